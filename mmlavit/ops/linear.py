"""Linear layers by the fastest route on the device."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mode import is_dispatched, is_traced, is_transformed
from .recompute import autocast_dtype, autocasts, gradients

# Inductor's own, and so not documented, but there since torch 2.0. It knows no gradients.
_onednn_linear: Any = None
if torch.backends.mkldnn.is_available():
    _onednn_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, equal to :func:`torch.nn.functional.linear` but for rounding.

    PyTorch sends float32 products on a CPU to MKL, which keeps half of the vector width of an AMD
    processor idle. oneDNN does not: 200 and 440 GFLOP/s on two Zen 5 cores. Where MKL is at its
    best, oneDNN is on a par for many tokens, and ahead for few. bfloat16 goes to oneDNN anyway, but
    there PyTorch first writes the bias to each row of the output, and then adds to it.

    Args:
        x: Tokens (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        Tokens (..., out_features).
    """
    # PyTorch says which types do not go together, oneDNN only that it cannot.
    if not prefers_onednn(x) or (weight.dtype != x.dtype and not autocasts(x)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        # What is kept for the backward pass is then as narrow as the product.
        return _Linear.apply(*onednn_operands(x), weight, bias)
    return _onednn_linear(*onednn_operands(x, weight, bias), 'none', [], None)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``GELU(x W^T + b)``; gradients do not come through it. Arguments as of :func:`linear`."""
    if prefers_onednn(x):
        return _onednn_linear(*onednn_operands(x, weight, bias), 'gelu', [], 'none')
    # In place: a second tensor of this size would come fresh from the system.
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def prefers_onednn(x: Tensor) -> bool:
    """Whether oneDNN has the faster linear layer for ``x``, and is on (torch.backends.mkldnn)."""
    # Whether it is traced comes first: torch.compile cannot look into the rest.
    return (
        not is_traced()
        and not is_dispatched()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == 'cpu'
        and _onednn_linear is not None
        and bool(torch.backends.mkldnn.enabled)
        and not is_transformed()
        and _has_products(_narrowed_dtype(x))
    )


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in a type on this processor, and is the fastest."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _narrowed_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer of ``x`` is computed."""
    # Autocast leaves float64 as it is.
    return autocast_dtype(x) if autocasts(x) and x.dtype != torch.float64 else x.dtype


def onednn_operands(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``x`` and what it meets, as autocast would hand them to a linear layer."""
    if not autocasts(x):
        return x, *tensors
    dtype = _narrowed_dtype(x)
    return x.to(dtype), *(t if t is None else t.to(dtype) for t in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            tensors = (x, weight, bias)
            return tuple(gradients(out, tensors, ctx.needs_input_grad, grad, create_graph=True))
        return linear_backward(grad, x, weight, ctx.needs_input_grad)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`linear`.

    Args:
        grad: Gradient of its output (..., out_features).
        x: Its input (..., in_features), of the same type.
        weight: Its weight (out_features, in_features); autocast may have narrowed it.
        needed: Which are wanted: of the input, the weight, the bias.

    Returns:
        The gradients of input, weight and bias, in the type of ``grad`` (autograd brings them to
        that of each); None where not wanted.
    """
    weight = weight.to(grad.dtype)
    is_single = x.dtype == torch.float32
    if is_single and prefers_onednn(x) and _mkl_is_slow() and torch.get_num_threads() > 1:
        # As those of a 1 x 1 convolution, which PyTorch sends to oneDNN, unless on one thread.
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            _as_pixels(grad),
            _as_pixels(x),
            weight[:, :, None, None],
            [weight.shape[0]],
            *([1, 1], [0, 0], [1, 1], False, [0, 0], 1),  # stride, padding, dilation, ..., groups
            needed,
        )
        return (
            grad_x.permute(0, 2, 3, 1).reshape(x.shape) if needed[0] else None,
            grad_weight.flatten(1) if needed[1] else None,
            grad_bias,
        )
    rows = grad.reshape(-1, weight.shape[0])
    return (
        grad @ weight if needed[0] else None,
        rows.mT @ x.reshape(-1, weight.shape[1]) if needed[1] else None,
        rows.sum(0) if needed[2] else None,
    )


def _as_pixels(x: Tensor) -> Tensor:
    """Tokens (..., C) as an image (1, C, tokens, 1) in channels_last."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether this is an AMD processor. Elsewhere MKL's gradients take half to 0.9 of the time."""
    cpuinfo = Path('/proc/cpuinfo')
    return 'AuthenticAMD' in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())
