"""What is compared: LaViT, its all-vanilla twin, and the peers that the installed packages ship."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from mmlavit.compat import repair_torchvision
from mmlavit.models.arch import Arch
from mmlavit.models.lavit import LaViT


def _all_vanilla() -> nn.Module:
    """LaViT-S whose every layer computes attention: what less attention is measured against."""
    arch = Arch.of('small')
    return LaViT(vars(replace(arch, vanilla_depths=arch.depths)))


def _swin_tiny() -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.swin import SwinTransformer

    return SwinTransformer(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1)


def _pvt_v2_b2() -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.pvt import PyramidVisionTransformerV2

    return PyramidVisionTransformerV2(embed_dims=64, num_layers=[3, 4, 6, 3])


def _resnet_50() -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.resnet import ResNet

    # Everything trains, as in the others.
    return ResNet(50, norm_eval=False)


def _convnext_tiny() -> nn.Module:
    repair_torchvision()
    from mmpretrain.models.backbones import ConvNeXt

    return ConvNeXt('tiny', out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


#: Name of a backbone and how to build it, with maps at strides 4 to 32. The first one asked for is
#: what the others are compared with.
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    'LaViT-S': lambda: LaViT('small'),
    'LaViT-S all-vanilla': _all_vanilla,
    'Swin-T': _swin_tiny,
    'PVTv2-B2': _pvt_v2_b2,
    'ResNet-50': _resnet_50,
    'ConvNeXt-T': _convnext_tiny,
    'LaViT-T': lambda: LaViT('tiny'),
    'LaViT-B': lambda: LaViT('base'),
    'LaViT-S conv-stem': lambda: LaViT('small', conv_stem=True),
    'LaViT-S overlap': lambda: LaViT('small', overlap_downsample=True),
    'LaViT-S conv-stem overlap': lambda: LaViT('small', conv_stem=True, overlap_downsample=True),
}
DEFAULT_BACKBONES = tuple(BACKBONES)[:6]


def build(name: str) -> nn.Module:
    """The backbone of a name in :data:`BACKBONES`."""
    return BACKBONES[name]()


#: Name of a detector and its config, ours by its name, the peers' as MMEngine finds them.
DETECTORS = {
    'Mask R-CNN LaViT-S': 'mmlavit::maskrcnn_lavit_s_coco.py',
    'Mask R-CNN Swin-T': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'Mask R-CNN R-50': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
}
