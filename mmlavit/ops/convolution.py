"""Depthwise convolutions on a CPU: with the GELU after it, and of maps of one or two rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import onednn_operands, prefers_onednn

# As with the linear layers': Inductor's own, there since torch 2.0, and without gradients.
_onednn_convolution: Any = None
if torch.backends.mkldnn.is_available():
    _onednn_convolution = getattr(torch.ops.mkldnn, '_convolution_pointwise', None)


def sees_neighbours_alone(conv: nn.Conv2d) -> bool:
    """Whether a pixel comes of the 3 x 3 around it, with zeros around the map."""
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode
    return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 'zeros')


def convolution_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``GELU(conv(x))``, in one pass over the map where oneDNN has it; without gradients.

    Args:
        x: Map (B, H, W, C).
        conv: C channels in and out, of which :func:`sees_neighbours_alone` holds.

    Returns:
        Map (B, H, W, C).
    """
    x = x.permute(0, 3, 1, 2)
    if _onednn_convolution is not None and prefers_onednn(x):
        settings = conv.padding, conv.stride, conv.dilation, conv.groups
        tensors = onednn_operands(x, conv.weight, conv.bias)
        return _onednn_convolution(*tensors, *settings, 'gelu', [], 'none').permute(0, 2, 3, 1)
    # In place: a second tensor of this size would come fresh from the system.
    return torch.ops.aten.gelu_(conv(x)).permute(0, 2, 3, 1)


def is_low(
    x: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a depthwise convolution of stride 1 has a kernel of more rows than its map."""
    is_depthwise = groups > 1 and weight.shape[1] == 1
    return is_depthwise and stride in (1, (1, 1)) and x.shape[-2] < weight.shape[-2]


def on_more_rows(
    func: Callable[..., Tensor], x: Tensor, weight: Tensor, *settings: Any, **named: Any
) -> Tensor:
    """``func(x, weight, ...)``, a convolution of which :func:`is_low`, on rows of zeros beside.

    oneDNN, in torch 2.13, takes a detour for the weights' gradient where a kernel is higher than
    its map: both passes of 64 maps of 1280 x 2 x 2 in bfloat16 take 25 ms, and 1.7 ms so. A single
    row of 16 tokens in float32 is a case that loses, and all that were tried do in torch 2.1.
    """
    rows = weight.shape[-2] - x.shape[-2]
    out = func(F.pad(x, (0, 0, 0, rows)), weight, *settings, **named)
    return out[..., : out.shape[-2] - rows, :]
