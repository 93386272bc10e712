"""A depthwise convolution and the GELU after it."""

from __future__ import annotations

from typing import Any

import torch
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
