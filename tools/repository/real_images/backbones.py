"""What is compared: LaViT-nano, its all-vanilla twin, and peers of its size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmlavit.models.arch import Arch

NANO = Arch.of('nano')
DROP_PATH = 0.05


@dataclass(frozen=True)
class Backbone:
    """A backbone in the place of the committed config's LaViT-nano.

    Args:
        title: What a reader calls it.
        dims: Channels of its four maps.
        changes: Of the config's LaViT, where it still is one.
        instead: The config of another backbone, without ``out_indices``; None for a LaViT.
        imports: Modules that register it.
        windows: Its option for the side of its windows, where it has one.
        no_decay: Parts of names of parameters without weight decay, beside norms and biases.
        health: Whether the config's hooks, which look at less attention, are for it.
        pretrained: Whether it starts from the classifier of Tiny ImageNet.
    """

    title: str
    dims: tuple[int, int, int, int] = NANO.embed_dims
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    instead: dict[str, Any] | None = field(default=None, hash=False)
    imports: tuple[str, ...] = ()
    windows: str | None = None
    no_decay: tuple[str, ...] = ()
    health: bool = True
    pretrained: bool = False


#: By name. The first is what the others are held against.
BACKBONES = {
    'lavit': Backbone('LaViT-nano'),
    'pretrained': Backbone('LaViT-nano, from Tiny ImageNet', pretrained=True),
    'vanilla': Backbone(
        'all-vanilla twin',
        changes=dict(arch=dict(_delete_=True, **{**vars(NANO), 'vanilla_depths': NANO.depths})),
        health=False,
    ),
    'swin': Backbone(
        'Swin',
        dims=(32, 64, 128, 256),
        instead=dict(
            type='TupleSwin',
            embed_dims=32,
            depths=(2, 2, 6, 2),
            num_heads=(1, 2, 4, 8),
            drop_path_rate=DROP_PATH,
        ),
        imports=('repository.peers',),
        windows='window_size',
        no_decay=('relative_position_bias_table',),
        health=False,
    ),
    'pvt': Backbone(
        'PVTv2-B0',
        dims=(32, 64, 160, 256),
        instead=dict(
            type='TuplePVTv2',
            embed_dims=32,  # times num_heads are the channels of a stage
            num_layers=[2, 2, 2, 2],
            num_heads=[1, 2, 5, 8],
            mlp_ratios=[8, 8, 4, 4],
            drop_path_rate=DROP_PATH,
        ),
        imports=('repository.peers',),
        health=False,
    ),
    'convnext': Backbone(
        'ConvNeXt',
        dims=(40, 80, 160, 320),
        instead=dict(
            type='mmpretrain.ConvNeXt',
            arch=dict(depths=[2, 2, 6, 2], channels=[40, 80, 160, 320]),
            drop_path_rate=DROP_PATH,
            gap_before_final_norm=False,  # necks and heads want maps
        ),
        imports=('mmpretrain.models',),
        health=False,
    ),
    'resnet': Backbone(
        'ResNet-18, narrowed',
        dims=(34, 68, 136, 272),
        instead=dict(
            type='mmdet.ResNet', depth=18, base_channels=34, norm_eval=False, style='pytorch'
        ),
        imports=('mmdet.models',),
        health=False,
    ),
}
