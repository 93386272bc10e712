"""What a training step of each variant's backbone takes, beside LaViT's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from mmengine.registry import MODELS

from ..benchmark.timing import interleave
from .tasks import SIZE
from .variants import VARIANTS, register_backbones


def step_ratios(rounds: int = 15, batch: int = 16) -> dict[str, float]:
    """Time forward and backward passes by turns, on one core.

    Args:
        rounds: How often each.
        batch: Images of the tasks' size.

    Returns:
        The median time by name in :data:`~.variants.VARIANTS`, LaViT's being 1.
    """
    register_backbones()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = {name: _step(dict(v.backbone), batch) for name, v in VARIANTS.items()}
        seconds = interleave(steps, rounds, description='steps')
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: median / medians['lavit'] for name, median in medians.items()}


def _step(backbone: dict, batch: int) -> Callable[[], None]:
    model = MODELS.build(backbone)
    model.train()  # Swin's returns nothing
    images = torch.randn(batch, 3, SIZE, SIZE)

    def step() -> None:
        sum(out.square().mean() for out in model(images)).backward()
        model.zero_grad(set_to_none=True)

    return step
