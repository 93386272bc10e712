"""What is compared: LaViT, LaViT with parts changed or taken out, and peers of its size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..compat import repair_torchvision


def register_backbones() -> None:
    """Make the types that :data:`VARIANTS` name known to MMEngine."""
    repair_torchvision()
    import mmdet.models  # noqa: F401

    from . import ablations, peers  # noqa: F401


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
        diagonality: Whether the diagonality preserving loss is added.
        rates: Learning rate by task, where it is not 1e-3: what the experiment ``rates`` found.
    """

    title: str
    backbone: dict[str, Any] = field(hash=False)
    diagonality: bool = True
    rates: dict[str, float] = field(default_factory=dict, hash=False)

    def rate(self, task: str) -> float:
        """Learning rate for a task."""
        return self.rates.get(task, 1e-3)


# Windows of 8, or the whole map where that is smaller, as in the demos' configs: for images of
# 64 x 64 the maps are 16, 8, 4 and 2 wide.
WINDOWS = (8, 8, 4, 2)


def _lavit(**options: Any) -> dict[str, Any]:
    return dict(type='LaViT', arch=ARCH, window_sizes=WINDOWS, drop_path_rate=0.0) | options


def _without(part: str) -> dict[str, Any]:
    return {**_lavit(), 'type': 'AblatedLaViT', part: False}


#: By name, what is compared.
VARIANTS = {
    'lavit': Variant('LaViT (windows 8)', _lavit()),
    'vanilla': Variant(
        'all-vanilla twin',
        {**_lavit(), 'arch': {**ARCH, 'vanilla_depths': ARCH['depths']}},
        diagonality=False,  # it is a loss on less-attention layers
    ),
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
        diagonality=False,
        rates={'cls': 3e-4, 'det': 3e-4},
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
        diagonality=False,
    ),
    'no-residual': Variant('no attention residual', _without('attention_residual')),
    'no-diagonality': Variant('no diagonality loss', _lavit(), diagonality=False),
    'no-position': Variant('no position convolution', _without('position')),
    'position-from-zero': Variant(
        'position convolution from 0',
        {**_lavit(), 'type': 'AblatedLaViT', 'position_from_zero': True},
    ),
    'no-mixing': Variant('attention reused as it is', _without('mixing')),
    'windows-4': Variant('windows 4', _lavit(window_sizes=(4, 4, 4, 2))),
    'windows-14': Variant('windows 14, 14, 14, 7', _lavit(window_sizes=(14, 14, 14, 7))),
    'windows-16': Variant('windows 16: the whole map', _lavit(window_sizes=(16, 8, 4, 2))),
}


@dataclass(frozen=True)
class Experiment:
    """A question, and the variants that answer it.

    Args:
        question: One sentence.
        variants: Names in :data:`VARIANTS`, the one that the others are held against first.
        rates: Learning rates to compare, with the first seed alone. By default each variant has
            its own.
    """

    question: str
    variants: tuple[str, ...]
    rates: tuple[float, ...] = ()


#: By name, what is asked.
EXPERIMENTS = {
    'rates': Experiment(
        'Which learning rate suits which backbone?',
        ('lavit', 'vanilla', 'swin', 'resnet'),
        rates=(1e-3, 3e-4),
    ),
    'less': Experiment(
        # The twin has no layers for the diagonality loss, so LaViT is also there without it.
        'Does less attention cost accuracy?',
        ('vanilla', 'lavit', 'no-diagonality'),
    ),
    'peers': Experiment(
        'How does LaViT do beside a Swin and a ResNet of like size?', ('lavit', 'swin', 'resnet')
    ),
    'residual': Experiment(
        'What does passing scores on from stage to stage buy?', ('lavit', 'no-residual')
    ),
    'diagonality': Experiment(
        'What does the diagonality preserving loss buy?', ('lavit', 'no-diagonality')
    ),
    'position': Experiment(
        'What does the position convolution buy, and how should it start?',
        ('lavit', 'no-position', 'position-from-zero'),
    ),
    'mixing': Experiment('What do Psi and Theta buy?', ('lavit', 'no-mixing')),
    'windows': Experiment(
        'How large should windows be?', ('lavit', 'windows-4', 'windows-14', 'windows-16')
    ),
}
