"""Swin and PVTv2 as they ship in mmdet, for all three toolboxes."""

from __future__ import annotations

from mmengine.registry import MODELS
from torch import Tensor

from mmlavit.compat import repair_torchvision

repair_torchvision()

from mmdet.models.backbones.pvt import PyramidVisionTransformerV2  # noqa: E402
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
