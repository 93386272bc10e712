"""What is compared: LaViT, LaViT with parts changed or taken out, and peers of its size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mmlavit.compat import repair_torchvision


def register_backbones() -> None:
    """Make the types that :data:`VARIANTS` name known to MMEngine."""
    repair_torchvision()
    import mmdet.models  # noqa: F401

    from .. import peers  # noqa: F401
    from . import ablations  # noqa: F401


# Small enough for a training in a minute or two on one core; deep enough for layers that reuse.
ARCH = dict(
    embed_dims=(24, 48, 96, 192),
    num_heads=(1, 2, 4, 8),
    depths=(2, 2, 4, 2),
    vanilla_depths=(1, 1, 1, 1),
    mlp_ratios=(4, 4, 4, 4),
)


@dataclass(frozen=True)
class Variant:
    """A backbone to train.

    Args:
        title: What a reader calls it.
        backbone: Its config, without ``out_indices``.
        hooks: ``custom_hooks`` to train it with.
        rates: Learning rate by task, where it is not 1e-3: what the experiment ``rates`` found.
        pretrained: Whether it starts from the backbone of LaViT's classifier of photographs that
            was trained with the same seed.
    """

    title: str
    backbone: dict[str, Any] = field(hash=False)
    hooks: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    rates: dict[str, float] = field(default_factory=dict, hash=False)
    pretrained: bool = False

    def rate(self, task: str) -> float:
        """Learning rate for a task."""
        return self.rates.get(task, 1e-3)


#: Windows of 8, or the whole map where that is smaller, as in the demos' configs. Images of 64 x 64
#: have maps of 16, 8, 4 and 2 tokens a side.
WINDOWS = (8, 8, 4, 2)


def _lavit(**options: Any) -> dict[str, Any]:
    return dict(type='LaViT', arch=ARCH, window_sizes=WINDOWS, drop_path_rate=0.0) | options


def _ablated(**options: Any) -> dict[str, Any]:
    return _lavit(type='AblatedLaViT', **options)


def _pvt(**options: Any) -> dict[str, Any]:
    return (
        dict(
            type='TuplePVTv2',
            embed_dims=ARCH['embed_dims'][0],  # times num_heads are the channels of a stage
            num_layers=[2, 2, 2, 2],
            num_heads=ARCH['num_heads'],
            mlp_ratios=[8, 8, 4, 3],  # as PVTv2-B0's, but for the last, which is 4 there
            sr_ratios=[8, 4, 2, 1],
            drop_path_rate=0.0,
        )
        | options
    )


def _diagonality(weight: float) -> tuple[dict[str, Any], ...]:
    return (dict(type='DiagonalityLossHook', loss_weight=weight),)


#: By name, what is compared.
VARIANTS = {
    'lavit': Variant('LaViT (windows 8)', _lavit()),
    'as-it-was': Variant(
        'LaViT as it was',
        _ablated(position_std=math.sqrt(2 / 9), linear_std=0.02),
        hooks=(dict(type='GrowingDiagonalityLossHook'),),
    ),
    'vanilla': Variant(
        'all-vanilla twin',
        _lavit(arch={**ARCH, 'vanilla_depths': ARCH['depths']}),
        rates={'match': 3e-4},
    ),
    'stem': Variant('LaViT, convolutional stem', _lavit(conv_stem=True)),
    'overlap': Variant('LaViT, overlapping downsampling', _lavit(overlap_downsample=True)),
    'stem-mix': Variant('LaViT, stem and Mix-FFN', _lavit(conv_stem=True, mix_ffn=True)),
    'swin': Variant(
        'Swin (windows 4)',
        dict(
            type='TupleSwin',
            embed_dims=ARCH['embed_dims'][0],
            depths=ARCH['depths'],
            num_heads=ARCH['num_heads'],
            window_size=4,  # larger ones would hold more padding than tokens from stage 3 on
            drop_path_rate=0.0,
        ),
        rates={'cls': 3e-4, 'det': 3e-4},
    ),
    'pvt': Variant('PVTv2', _pvt()),
    'pvt-no-attention': Variant(
        'PVTv2 without its attention', _pvt(type='AblatedPVTv2', attention=False)
    ),
    'pvt-no-convolution': Variant(
        'PVTv2 without the convolutions in its MLPs', _pvt(type='AblatedPVTv2', convolution=False)
    ),
    'resnet': Variant(
        'ResNet-18, narrowed',
        dict(
            type='mmdet.ResNet',
            depth=18,
            base_channels=ARCH['embed_dims'][0],
            norm_eval=False,
            style='pytorch',
        ),
    ),
    'no-residual': Variant('no attention residual', _ablated(attention_residual=False)),
    'no-mixing': Variant('attention reused as it is', _ablated(mixing=False)),
    'position-0.2': Variant('kernels not centred', _ablated(position_std=0.2)),
    'position-scaled': Variant(
        'standard deviation 0.47 under a LayerScale of 0.3, not centred',
        _ablated(position_std=math.sqrt(2 / 9), position_scale=0.3),
    ),
    'diagonality-0.1': Variant('diagonality loss, weight 0.1', _lavit(), _diagonality(0.1)),
    'diagonality-0.01': Variant('diagonality loss, weight 0.01', _lavit(), _diagonality(0.01)),
    'query-key-0.02': Variant('Q and K from 0.02, as in Swin', _ablated(query_key_std=0.02)),
    'linear-0.02': Variant('all projections from 0.02, as in Swin', _ablated(linear_std=0.02)),
    'residual-1': Variant('attention residual from a scale of 1', _ablated(residual_scale=1.0)),
    'eps-1e-5': Variant('eps of the norms 1e-5', _ablated(norm_eps=1e-5)),
    'pretrained': Variant('LaViT, from photographs', _lavit(), pretrained=True),
}


@dataclass(frozen=True)
class Experiment:
    """A question, and the variants that answer it.

    Args:
        question: One sentence.
        variants: Names in :data:`VARIANTS`, the one that the others are held against first.
        rates: Learning rates to compare, with the first seed alone. By default each variant has
            its own.
        tasks: Names in :data:`~repository.experiments.tasks.TASKS`, if it is not asked of all.
    """

    question: str
    variants: tuple[str, ...]
    rates: tuple[float, ...] = ()
    tasks: tuple[str, ...] = ()

    def asks(self, task: str) -> bool:
        """Whether the question is asked of a task."""
        return not self.tasks or task in self.tasks

    @property
    def starts_from_photographs(self) -> bool:
        """Whether a variant starts from a classifier of photographs."""
        return any(VARIANTS[name].pretrained for name in self.variants)


#: By name, what is asked.
EXPERIMENTS = {
    'rates': Experiment(
        'Which learning rate suits which backbone?',
        ('lavit', 'vanilla', 'swin', 'pvt', 'resnet'),
        rates=(1e-3, 3e-4),
    ),
    'less': Experiment('Does less attention cost accuracy?', ('vanilla', 'lavit')),
    'peers': Experiment(
        'How does LaViT do beside a Swin, a PVTv2 and a ResNet of like size?',
        ('lavit', 'stem-mix', 'swin', 'pvt', 'resnet'),
    ),
    'pvt': Experiment(
        'What is it that PVTv2 has?',
        ('pvt', 'pvt-no-attention', 'pvt-no-convolution', 'lavit'),
        tasks=('cls', 'det', 'seg'),
    ),
    'options': Experiment(
        'What do a convolutional stem, overlapping downsampling and a Mix-FFN buy?',
        ('lavit', 'stem', 'overlap', 'stem-mix'),
    ),
    'start': Experiment(
        'How should LaViT start, and what did mending its start and its loss do?',
        ('lavit', 'position-0.2', 'position-scaled', 'as-it-was'),
    ),
    'diagonality': Experiment(
        'What does the diagonality preserving loss buy?',
        ('lavit', 'diagonality-0.1', 'diagonality-0.01'),
    ),
    'parts': Experiment(
        'What do the attention residual between stages, Psi and Theta buy?',
        ('lavit', 'no-residual', 'no-mixing'),
    ),
    'scores': Experiment(
        'How should projections, the attention residual and norms start?',
        ('lavit', 'query-key-0.02', 'linear-0.02', 'residual-1', 'eps-1e-5'),
        tasks=('cls', 'seg'),
    ),
    'pretraining': Experiment(
        'Does it help shapes to start from a classifier of photographs?',
        ('lavit', 'pretrained'),
        tasks=('cls', 'det', 'seg', 'match'),
    ),
}
