"""Linear layers by the fastest public route that PyTorch has on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch 2.1 has it under another name, and it does not tell there in every function; what is then
# compiled is the convolution, which computes the same.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, computed by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., in_features) to tokens (..., out_features)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, equal to :func:`torch.nn.functional.linear` but for rounding.

    PyTorch sends float32 products on a CPU to MKL, which keeps half of the vector width of an AMD
    processor idle, and 1 x 1 convolutions to oneDNN, which does not: 200 and 440 GFLOP/s on two
    Zen 5 cores. Where MKL is at its best the two are alike.

    Args:
        x: Tokens (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        Tokens (..., out_features).
    """
    if not prefers_convolution(x):
        return F.linear(x, weight, bias)
    out = F.conv2d(_as_pixels(x), weight[:, :, None, None], bias)
    return _as_tokens(out, x)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`linear`, by the same route.

    Args:
        grad: Gradient of its output (..., out_features).
        x: Its input (..., in_features).
        weight: Its weight (out_features, in_features).
        needed: Which are wanted: of the input, the weight, the bias.

    Returns:
        The gradients of input, weight and bias; None where not wanted.
    """
    if prefers_convolution(x):
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            _as_pixels(grad),
            _as_pixels(x),
            weight[:, :, None, None],
            [weight.shape[0]],
            *([1, 1], [0, 0], [1, 1], False, [0, 0], 1),  # stride, padding, dilation, ..., groups
            needed,
        )
        return (
            _as_tokens(grad_x, x) if needed[0] else None,
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


def _as_tokens(pixels: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_as_pixels` for tokens that lie as those of ``like``."""
    return pixels.permute(0, 2, 3, 1).reshape(*like.shape[:-1], -1)


def prefers_convolution(x: Tensor) -> bool:
    """Whether a 1 x 1 convolution is the faster linear layer for ``x``."""
    return (
        x.device.type == 'cpu'
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        # On one thread PyTorch itself takes a plain product for a 1 x 1 convolution, and copies.
        and torch.get_num_threads() > 1
        and not is_traced()
    )


def is_traced() -> bool:
    """Whether the code is being recorded rather than run, when sizes must not become constants."""
    return torch.jit.is_tracing() or _is_compiling()
