"""Linear layers: by the fastest route on the device, and keeping little in training."""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import flop_counter

from .mode import is_traced, is_transformed
from .recompute import autocasts, gradients, is_plain, recomputes

# Inductor's own, and so not documented, but there since torch 2.0. It knows no gradients.
_onednn_linear = None
if torch.backends.mkldnn.is_available():
    _onednn_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
# torch 2.1 has no such function.
if _onednn_linear is not None and hasattr(flop_counter, 'register_flop_formula'):

    @flop_counter.register_flop_formula(_onednn_linear)
    def _count(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, equal to :func:`torch.nn.functional.linear` but for rounding.

    PyTorch sends float32 products on a CPU to MKL, which keeps half of the vector width of an AMD
    processor idle. oneDNN does not: 200 and 440 GFLOP/s on two Zen 5 cores. Where MKL is at its
    best, oneDNN is on a par for many tokens, and ahead for few.

    Args:
        x: Tokens (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        Tokens (..., out_features).
    """
    if not prefers_onednn(x):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _onednn_linear(x, weight, bias, 'none', [], None)
    return _Linear.apply(x, weight, bias)


def prefers_onednn(x: Tensor) -> bool:
    """Whether oneDNN has the faster linear layer for ``x``, and is on (torch.backends.mkldnn)."""
    # Whether it is traced comes first: torch.compile cannot look into the rest.
    return (
        not is_traced()
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and _onednn_linear is not None
        and torch.backends.mkldnn.enabled
        and not is_transformed()
        and not autocasts(x)
    )


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
            out = F.linear(x, weight, bias)
            tensors = (x, weight, bias)
            return tuple(gradients(out, tensors, ctx.needs_input_grad, grad, create_graph=True))
        return linear_backward(grad, x, weight, ctx.needs_input_grad)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`linear`.

    Args:
        grad: Gradient of its output (..., out_features).
        x: Its input (..., in_features).
        weight: Its weight (out_features, in_features).
        needed: Which are wanted: of the input, the weight, the bias.

    Returns:
        The gradients of input, weight and bias; None where not wanted.
    """
    if prefers_onednn(x) and _mkl_is_slow() and torch.get_num_threads() > 1:
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


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, computed by :func:`linear`, with what comes right before it."""

    def forward(
        self, x: Tensor, function: Callable[..., Tensor] | None = None, *parameters: Tensor
    ) -> Tensor:
        """Map tokens (..., in_features) to tokens (..., out_features).

        Args:
            x: Tokens.
            function: What to apply to ``x`` first, see :func:`linear_after`; None for nothing.
            parameters: What else ``function`` takes.

        Returns:
            Tokens.
        """
        if function is None:
            return linear(x, self.weight, self.bias)
        return linear_after(function, x, self.weight, self.bias, *parameters)


def linear_after_norm(
    layer: nn.Module,
    norm: nn.Module,
    x: Tensor,
    pad: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``layer(pad(norm(x)))``, by :func:`linear_after` where both are what they were made as.

    Args:
        layer: A :class:`Linear`, or what somebody put in its place (LoRA, say).
        norm: A LayerNorm, or what somebody put in its place.
        x: Tokens (..., in_features).
        pad: What is done to the tokens in between; None for nothing.

    Returns:
        Tokens (..., out_features).
    """
    if not (is_plain(norm, nn.LayerNorm) and isinstance(layer, Linear) and recomputes(x)):
        x = norm(x)
        return layer(x if pad is None else pad(x))

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        x = F.layer_norm(x, norm.normalized_shape, *parameters, norm.eps)
        return x if pad is None else pad(x)

    return layer(x, function, norm.weight, norm.bias)


def linear_after(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *parameters: Tensor,
) -> Tensor:
    """``function(x, *parameters) W^T + b``, computing ``function`` again in the backward pass.

    A linear layer keeps its input for the backward pass. After GELU that is a tensor which can be
    had again, for little, from the input of GELU, which is kept anyway. The numbers stay the same.
    Under autocast and when recorded, nothing is computed again.

    Args:
        function: To tokens (..., in_features); cheap, and without chance.
        x: What it takes: tokens (..., in_features), usually.
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        parameters: What else ``function`` takes.

    Returns:
        Tokens (..., out_features).
    """
    if not recomputes(x):
        return linear(function(x, *parameters), weight, bias)
    return _LinearAfter.apply(function, x, weight, bias, *parameters)


class _LinearAfter(torch.autograd.Function):
    @staticmethod
    def forward(
        function: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        return linear(function(x, *parameters), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *parameters = ctx.saved_tensors
        _, of_x, of_weight, of_bias, *of_parameters = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            tensors, needed = (x, weight, bias, *parameters), ctx.needs_input_grad[1:]
            out = F.linear(ctx.function(x, *parameters), weight, bias)
            return None, *gradients(out, tensors, needed, grad, create_graph=True)
        tensors, needed = (x, *parameters), (of_x, *of_parameters)
        tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            y = ctx.function(*tensors)
        wanted = any(needed), of_weight, of_bias
        grad_y, grad_weight, grad_bias = linear_backward(grad, y.detach(), weight, wanted)
        grad_x, *rest = gradients(y, tensors, needed, grad_y)
        return None, grad_x, grad_weight, grad_bias, *rest
