"""One training of one variant: what an experiment is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from .tasks import TASKS, build_config
from .variants import VARIANTS, register_backbones


class _Record(Hook):
    """Notes what is measured."""

    def __init__(self, metric: str, scale: float) -> None:
        self.metric, self.scale = metric, scale
        self.curve: dict[int, float] = {}

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        # mmdet gives nothing at all for a detector that finds nothing.
        value = float(metrics[self.metric]) if metrics else 0.0
        self.curve[runner.iter] = self.scale * value


def train_variant(
    task: str, variant: str, seed: int, rate: float, work_dir: Path
) -> dict[str, Any]:
    """Train once and measure on held-out images.

    Args:
        task: Name in :data:`~mmlavit.experiments.tasks.TASKS`, whose data must be there.
        variant: Name in :data:`~mmlavit.experiments.variants.VARIANTS`.
        seed: Seed of weights, shuffling and augmentation.
        rate: The largest learning rate.
        work_dir: Where MMEngine writes its logs.

    Returns:
        ``task``, ``variant``, ``seed``, ``rate``, ``iterations``, the version of the ``data``,
        the ``curve`` of the task's metric in percent over iterations, its last value as ``metric``,
        ``parameters`` of the backbone, and the version of ``torch``.

    Raises:
        KeyError: If a name is unknown.
    """
    register_backbones()
    chosen = TASKS[task]
    cfg = build_config(chosen, VARIANTS[variant], seed, rate, work_dir)
    record = _Record(chosen.metric, chosen.scale)
    # Another training in this process may have left its toolbox's scope behind.
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(record)
        parameters = sum(p.numel() for p in runner.model.backbone.parameters())
        runner.train()
    return {
        'task': task,
        'variant': variant,
        'seed': seed,
        'rate': rate,
        'iterations': max(record.curve),
        'data': chosen.data,
        'metric': record.curve[max(record.curve)],
        'curve': record.curve,
        'parameters': parameters,
        'torch': torch.__version__,
    }
