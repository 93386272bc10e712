"""What trained classifiers come to at other window sizes, their matrices interpolated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from .tasks import TASKS, build_config
from .training import weights_of
from .variants import VARIANTS, WINDOWS, register_backbones

#: What the windows are changed to, from :data:`~repository.experiments.variants.WINDOWS`.
SIZES = (WINDOWS, (4, 4, 4, 2), (16, 8, 4, 2), (8, 8, 8, 4), (14, 14, 14, 7))
_TASK, _VARIANT = 'photo', 'lavit'


def measure(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Validate the classifiers of photographs with other windows.

    Args:
        seeds: Whose trainings; their weights must be where the study left them.

    Returns:
        For each seed and size ``seed``, ``windows`` and ``metric``, in percent.

    Raises:
        FileNotFoundError: If the weights of a seed are not there.
    """
    register_backbones()
    task, variant = TASKS[_TASK], VARIANTS[_VARIANT]
    found = []
    for seed in seeds:
        weights = weights_of(_TASK, _VARIANT, seed)
        for windows in SIZES:
            cfg = build_config(
                task, variant, seed, variant.rate(_TASK), weights.with_name('resized')
            )
            cfg.model.backbone.window_sizes = windows
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                runner = Runner.from_cfg(cfg)
                runner.model.load_state_dict(torch.load(weights, weights_only=True))
                metric = task.scale * runner.val()[task.metric]
            found.append(dict(seed=seed, windows=windows, metric=metric))
    return found
