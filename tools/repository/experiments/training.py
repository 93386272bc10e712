"""One training of one variant: what an experiment is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmlavit.analysis.measures import entropy
from mmlavit.analysis.record import LayerAttention, recording
from mmlavit.engine.hooks.attention_health import AttentionHealthHook
from mmlavit.models.lavit import LaViT

from .tasks import TASKS, build_config
from .variants import VARIANTS, register_backbones

WORK_DIR = Path('work_dirs/experiments')
#: Task and variant of what a pretrained variant starts from.
CLASSIFIER = 'photo', 'lavit'


class _Record(Hook):
    """Notes what is measured."""

    def __init__(self, metric: str, scale: float) -> None:
        self.metric, self.scale = metric, scale
        self.curve: dict[int, float] = {}

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        # mmdet gives nothing at all for a detector that finds nothing.
        value = float(metrics[self.metric]) if metrics else 0.0
        self.curve[runner.iter] = self.scale * value


def work_dir_of(task: str, variant: str, seed: int, rate: float) -> Path:
    """Where a training leaves its logs and weights; arguments as of :func:`train_variant`."""
    return WORK_DIR / task / f'{variant}-{seed}-{rate:g}'


def weights_of(task: str, variant: str, seed: int) -> Path:
    """The weights that a training at the variant's own learning rate has left.

    Raises:
        FileNotFoundError: If it has not been run here.
    """
    weights = work_dir_of(task, variant, seed, VARIANTS[variant].rate(task)) / 'weights.pth'
    if not weights.is_file():
        raise FileNotFoundError(
            f'{weights} is not there: weights are not kept with the results. Without its line in '
            'results.jsonl, tools/experiments.py trains it again'
        )
    return weights


def train_variant(
    task: str, variant: str, seed: int, rate: float, work_dir: Path
) -> dict[str, Any]:
    """Train once and measure on held-out images.

    Args:
        task: Name in :data:`~repository.experiments.tasks.TASKS`, whose data must be there.
        variant: Name in :data:`~repository.experiments.variants.VARIANTS`.
        seed: Seed of weights, shuffling and augmentation.
        rate: The largest learning rate.
        work_dir: Where MMEngine writes its logs.

    Returns:
        ``task``, ``variant``, ``seed``, ``rate``, ``iterations``, the version of the ``data``,
        the ``curve`` of the task's metric in percent over iterations, its last value as ``metric``,
        ``parameters`` of the backbone, and the version of ``torch``; of a LaViT also the
        ``entropy`` of its attention and the standard deviation of its ``scores`` over the keys, for
        each stage. The model's weights are in ``weights.pth`` in ``work_dir``.

    Raises:
        KeyError: If a name is unknown.
        FileNotFoundError: If the classifier that the variant starts from is not there.
    """
    register_backbones()
    chosen = TASKS[task]
    cfg = build_config(chosen, VARIANTS[variant], seed, rate, work_dir)
    if VARIANTS[variant].pretrained:
        cfg.model.backbone.init_cfg = dict(checkpoint=str(weights_of(*CLASSIFIER, seed)))
    record = _Record(chosen.metric, chosen.scale)
    # Another training in this process may have left its toolbox's scope behind.
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(record)
        if isinstance(runner.model.backbone, LaViT):
            runner.register_hook(AttentionHealthHook())
        parameters = sum(p.numel() for p in runner.model.backbone.parameters())
        runner.train()
        seen = _look(runner)
        torch.save(runner.model.state_dict(), work_dir / 'weights.pth')
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
        **seen,
    }


def _look(runner: Runner) -> dict[str, list[float]]:
    """How even attention is over the validation set, and how far scores of a query are apart.

    Args:
        runner: After its training.

    Returns:
        ``entropy`` and ``scores`` (standard deviation over the keys), a mean for each stage;
        nothing for a backbone that is no LaViT.
    """
    if not isinstance(runner.model.backbone, LaViT):
        return {}
    sums: dict[int, list[float]] = {}

    def keep(layer: LayerAttention) -> None:
        of_stage = sums.setdefault(layer.stage, [0.0, 0.0, 0.0])
        # A batch of 50 images and the last, smaller one count by their images.
        count = layer.attn.shape[0]
        of_stage[0] += count * entropy(layer.attn.flatten(0, 1)).nanmean().item()
        of_stage[1] += count * layer.scores.std(dim=-1).mean().item()
        of_stage[2] += count

    with recording(runner.model, keep):
        runner.val_loop.run()
    return {
        'entropy': [of_stage[0] / of_stage[2] for of_stage in sums.values()],
        'scores': [of_stage[1] / of_stage[2] for of_stage in sums.values()],
    }
