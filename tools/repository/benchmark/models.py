"""What is compared: LaViT, its all-vanilla twin, and the peers that installed packages ship."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch import Tensor, nn

from mmlavit.compat import repair_torchvision
from mmlavit.models.arch import Arch
from mmlavit.models.lavit import LaViT

from .workload import Task


def _lavit(arch: str, **options: bool) -> Callable[[Task], nn.Module]:
    return lambda task: LaViT(arch, **options)


def _options() -> Iterator[tuple[str, dict[str, bool]]]:
    """What the options of LaViT are called in a name, in each combination."""
    names = {'conv_stem': ' conv-stem', 'overlap_downsample': ' overlap', 'mix_ffn': ' mix-ffn'}
    for chosen in itertools.product([False, True], repeat=len(names)):
        options = {option: True for option, on in zip(names, chosen, strict=True) if on}
        yield ''.join(names[option] for option in options), options


def _all_vanilla(task: Task) -> nn.Module:
    """LaViT-S whose every layer computes attention: what less attention is measured against."""
    arch = Arch.of('small')
    return LaViT(vars(replace(arch, vanilla_depths=arch.depths)))


def _swin_tiny(task: Task) -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.swin import SwinTransformer

    return SwinTransformer(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1)


def _pvt_v2_b2(task: Task) -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.pvt import PyramidVisionTransformerV2

    return PyramidVisionTransformerV2(embed_dims=64, num_layers=[3, 4, 6, 3])


def _resnet_50(task: Task) -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.resnet import ResNet

    # Everything trains, as in the others.
    return ResNet(50, norm_eval=False)


def _convnext_tiny(task: Task) -> nn.Module:
    repair_torchvision()
    from mmpretrain.models.backbones import ConvNeXt

    return ConvNeXt('tiny', out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def _timm(name: str) -> nn.Module:
    repair_torchvision()
    import timm

    return timm.create_model(name, features_only=True)


def _hiera_tiny(task: Task) -> nn.Module:
    """Hiera-T as in SAM 2, with windows; the classifier's takes one size of images alone."""
    return _timm('sam2_hiera_tiny')


def _fastvit_sa24(task: Task) -> nn.Module:
    """FastViT-SA24, for inference as its authors deploy it."""
    model = _timm('fastvit_sa24')
    return model if task.name == 'training' else merge_branches(model.eval())


def merge_branches(model: nn.Module) -> nn.Module:
    """A copy of a backbone of timm whose parallel convolutions are merged into one."""
    from timm.utils import reparameterize_model

    return reparameterize_model(model)


class _ChannelsFirst(nn.Module):
    """A backbone whose maps (B, H, W, C) are handed on as (B, C, H, W), as necks take them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return [y.permute(0, 3, 1, 2) for y in self.backbone(x)]


def _mambaout_tiny(task: Task) -> nn.Module:
    return _ChannelsFirst(_timm('mambaout_tiny'))


#: Name of a backbone and how to build it for a task, with maps at strides 4 to 32. The first one
#: asked for is what the others are compared with.
BACKBONES: dict[str, Callable[[Task], nn.Module]] = {
    'LaViT-S': _lavit('small'),
    'LaViT-S all-vanilla': _all_vanilla,
    'Swin-T': _swin_tiny,
    'PVTv2-B2': _pvt_v2_b2,
    'ResNet-50': _resnet_50,
    'ConvNeXt-T': _convnext_tiny,
    'Hiera-T': _hiera_tiny,
    'FastViT-SA24': _fastvit_sa24,
    'MambaOut-T': _mambaout_tiny,
    'LaViT-T': _lavit('tiny'),
    'LaViT-B': _lavit('base'),
    **{f'LaViT-S{names}': _lavit('small', **options) for names, options in _options() if options},
}
DEFAULT_BACKBONES = tuple(BACKBONES)[:9]
#: Those that timm ships.
OF_TIMM = ('Hiera-T', 'FastViT-SA24', 'MambaOut-T')
#: Those that are trained in NCHW alone on a CPU: in NHWC FastViT, in torch 2.13, writes where it
#: must not and takes the process with it, in float32 as in bfloat16, with no other model beside it.
TRAINED_IN_NCHW = ('FastViT-SA24',)


def require_packages(names: Iterable[str]) -> None:
    """Make sure that the packages of backbones are there.

    Args:
        names: Of :data:`BACKBONES`.

    Raises:
        ModuleNotFoundError: If timm is needed and not installed; its text is one line for the user.
    """
    asked = [name for name in names if name in OF_TIMM]
    if asked and importlib.util.find_spec('timm') is None:
        raise ModuleNotFoundError(
            f'{", ".join(asked)} need timm, which is not installed: pip install timm, or name '
            'others with --models'
        )


def build(name: str, task: Task) -> nn.Module:
    """The backbone of a name in :data:`BACKBONES`; another process can be handed this function."""
    return BACKBONES[name](task)


#: Name of a detector and its config, ours by its name, the peers' as MMEngine finds them.
DETECTORS = {
    'Mask R-CNN LaViT-S': 'mmlavit::maskrcnn_lavit_s_coco.py',
    'Mask R-CNN Swin-T': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'Mask R-CNN R-50': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
}
