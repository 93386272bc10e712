"""Swin and PVTv2 as they ship in mmdet, for all three toolboxes, and PVTv2 with parts taken out."""

from __future__ import annotations

from typing import Any

from mmengine.model import Sequential
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmlavit.compat import repair_torchvision

repair_torchvision()

from mmdet.models.backbones.pvt import (  # noqa: E402
    MixFFN,
    PyramidVisionTransformerV2,
    SpatialReductionAttention,
)
from mmdet.models.backbones.swin import SwinTransformer  # noqa: E402


@MODELS.register_module()
class TupleSwin(SwinTransformer):
    """mmdet's Swin, whose maps come as a tuple: a list is refused by mmpretrain's necks."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps; as mmdet's, but in a tuple."""
        return tuple(super().forward(x))


@MODELS.register_module()
class TuplePVTv2(PyramidVisionTransformerV2):
    """mmdet's PVTv2, whose maps come as a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps; as mmdet's, but in a tuple."""
        return tuple(super().forward(x))


@MODELS.register_module()
class AblatedPVTv2(TuplePVTv2):
    """PVTv2 without its attention, or without the convolutions in its MLPs.

    Args:
        attention: Whether layers attend; else tokens go past the attention, whose weights stay.
        convolution: Whether the MLPs have their 3 x 3 depthwise convolutions.
        **options: Those of mmdet's PVTv2.
    """

    def __init__(self, attention: bool = True, convolution: bool = True, **options: Any) -> None:
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, SpatialReductionAttention) and not attention:
                module.forward = _go_past
            if isinstance(module, MixFFN) and not convolution:
                module.layers = Sequential(*filter(_is_not_depthwise, module.layers))


def _go_past(x: Tensor, hw_shape: tuple[int, int], identity: Tensor) -> Tensor:
    return identity


def _is_not_depthwise(module: nn.Module) -> bool:
    return not (isinstance(module, nn.Conv2d) and module.groups > 1)
