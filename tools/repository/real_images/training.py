"""One training: the config that is written for it, and what the toolboxes' own tools make of it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import MODELS

from mmlavit.compat import repair_config_bases, repair_torchvision

from ..demo import last_checkpoint, read_scalars
from .backbones import BACKBONES
from .tasks import TASKS

repair_torchvision()
repair_config_bases()

WORK_DIR = Path('work_dirs/real_images')
#: What a learning rate is tried with, of a whole training.
TRIAL = 0.25
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


class Training(NamedTuple):
    """What is trained, and how; the names, but for the last, are those of results.

    Args:
        task: Name in :data:`~repository.real_images.tasks.TASKS`.
        backbone: Name in :data:`~repository.real_images.backbones.BACKBONES`.
        seed: Seed of weights, shuffling and augmentation.
        rate: The largest learning rate.
        share: 1, or :data:`TRIAL` where a learning rate is tried.
        budget: What the config's schedule is shortened to beside that, for a quick look.
    """

    task: str
    backbone: str
    seed: int
    rate: float
    share: float = 1.0
    budget: float = 1.0

    def __str__(self) -> str:
        trial = ' (trial)' if self.share < 1 else ''
        return f'{self.task} {self.backbone} seed {self.seed} learning rate {self.rate:g}{trial}'


@functools.lru_cache
def committed(path: Path) -> Config:
    """A config as it is committed."""
    return Config.fromfile(path)


def changes(training: Training, start: str | None = None) -> dict[str, Any]:
    """What a training changes in the committed config.

    Args:
        training: Which.
        start: The classifier to start from, for a backbone that is pretrained.

    Returns:
        What the written config has beside its ``_base_``: the backbone and the widths that go with
        it, the learning rate, autocast to bfloat16, the seed, the schedule's length, one process
        for the data, and one checkpoint to keep beside the best.
    """
    task, backbone = TASKS[training.task], BACKBONES[training.backbone]
    model: dict[str, Any] = {}
    optimizer: dict[str, Any] = dict(type='BFloat16OptimWrapper', optimizer=dict(lr=training.rate))
    found: dict[str, Any] = dict(model=model, optim_wrapper=optimizer)
    if backbone.instead is not None:
        own = dict(backbone.instead, out_indices=task.out_indices)
        if backbone.windows:
            own[backbone.windows] = task.swin_window
        model.update(backbone=dict(_delete_=True, **own), **task.widths(backbone.dims))
        imports = committed(task.config).custom_imports.imports
        found['custom_imports'] = dict(imports=[*imports, *backbone.imports])
    elif backbone.pretrained:
        model['backbone'] = dict(init_cfg=dict(checkpoint=start))
    elif backbone.changes:
        model['backbone'] = dict(backbone.changes)
    if backbone.no_decay:
        keys = {name: dict(decay_mult=0.0) for name in backbone.no_decay}
        optimizer['paramwise_cfg'] = dict(custom_keys=keys)
    if not backbone.health:
        found['custom_hooks'] = []
    found['randomness'] = dict(seed=training.seed)
    # More processes than the one would fight for its core.
    found.update({name: dict(num_workers=0, persistent_workers=False) for name in LOADERS})
    found['default_hooks'] = dict(checkpoint=dict(max_keep_ckpts=1))
    if (share := training.share * training.budget) != 1:
        _shorten(committed(task.config), share, found)
    if not model:
        del found['model']
    return found


def _shorten(cfg: Config, share: float, found: dict[str, Any]) -> None:
    """Add to the changes what makes a schedule shorter."""

    def shorter(value: int, least: int = 1) -> int:
        return max(round(value * share), least) if value else 0

    unit = unit_of(cfg)
    length = shorter(cfg.train_cfg[unit])
    if length < 2:
        raise ValueError(
            f'a share of {share:g} leaves {length} of {cfg.train_cfg[unit]} {unit[4:]} of '
            f'{cfg.filename}; it must leave at least 2'
        )
    found['train_cfg'] = {unit: length, 'val_interval': shorter(cfg.train_cfg.val_interval)}
    found['param_scheduler'] = [
        {k: shorter(v) if k in ('begin', 'end', 'T_max') else v for k, v in scheduler.items()}
        for scheduler in cfg.param_scheduler
    ]
    if unit == 'max_iters':
        interval = shorter(cfg.default_hooks.checkpoint.interval)
        found['default_hooks']['checkpoint']['interval'] = interval


def unit_of(cfg: Config) -> str:
    """What a schedule's length is counted in: ``'max_iters'`` or ``'max_epochs'``."""
    return 'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs'


def config_text(training: Training, start: str | None, base: str) -> str:
    """The config of a training, as it is written.

    Args:
        training: Which.
        start: As for :func:`changes`.
        base: The committed config, as the written one is to find it.
    """
    return f'_base_ = {base!r}\n{Config(changes(training, start)).pretty_text}'


@functools.cache
def resolved(training: Training, start: str | None = None) -> Config:
    """The config of a training with all that it inherits; arguments as of :func:`changes`."""
    text = config_text(training, start, str(TASKS[training.task].config.resolve()))
    return Config.fromstring(text, '.py')


@functools.cache
def fingerprint(training: Training, start: str | None = None) -> str:
    """SHA-256 of all settings of a training; arguments as of :func:`changes`."""
    settings = json.dumps(resolved(training, start).to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()


def folder_of(training: Training, start: str | None = None) -> Path:
    """Where a training leaves config, logs and checkpoints; settings of its own, a folder."""
    name = f'{training.backbone}-{training.seed}-{training.rate:g}'
    return WORK_DIR / training.task / f'{name}-{fingerprint(training, start)[:8]}'


def write_config(training: Training, start: str | None = None) -> Path:
    """Write the config of a training into its folder; arguments as of :func:`changes`."""
    path = folder_of(training, start) / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(TASKS[training.task].config, path.parent)
    path.write_text(config_text(training, start, base), encoding='utf-8')
    return path


def run(training: Training, start: str | None = None) -> dict[str, Any]:
    """Train, or go on where an earlier call was stopped, and test.

    Args:
        training: What.
        start: As for :func:`changes`.

    Returns:
        The names of :class:`Training` but for the budget; ``length`` of the schedule and its
        ``unit``; ``curve`` of the task's first measure in validation over that unit; ``metrics``,
        all that the test says (for a trial, which is not tested, the validation that counts);
        ``checkpoint``, the file that was tested; ``parameters`` of the backbone; ``seconds`` of the
        training steps; ``torch``; ``config``, the :func:`fingerprint`.

    Raises:
        RuntimeError: If a tool fails; the message names its output.
    """
    task = TASKS[training.task]
    config = write_config(training, start)
    folder = config.parent
    _tool(folder, 'train.py', config, '--work-dir', folder, '--resume')
    cfg = resolved(training, start)
    records = read_scalars(folder)
    validations = [r for r in records if 'loss' not in r]
    # mmdet gives nothing at all for a detector that finds nothing.
    first = task.measures[0].name
    curve = {r['step']: r.get(first, 0.0) for r in validations}
    checkpoint = folder / last_checkpoint(cfg)
    if task.best:
        checkpoint = max(folder.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    if training.share < 1:
        step = max(curve, key=curve.get) if task.best else max(curve)
        metrics = next(r for r in validations if r['step'] == step)
    else:
        _tool(folder, 'test.py', config, checkpoint, '--work-dir', folder / 'test')
        metrics = load(max(folder.glob('test/*/*.json')))
    unit = unit_of(cfg)
    return {
        **{name: getattr(training, name) for name in Training._fields[:-1]},
        'unit': unit.removeprefix('max_'),
        'length': cfg.train_cfg[unit],
        'curve': curve,
        'metrics': {k: v for k, v in metrics.items() if k not in ('time', 'data_time', 'step')},
        'checkpoint': checkpoint.name,
        'parameters': parameters_of(training.task, training.backbone),
        'seconds': round(_step_seconds([r for r in records if 'loss' in r])),
        'torch': torch.__version__,
        'config': fingerprint(training, start),
    }


def _step_seconds(records: list[dict[str, Any]]) -> float:
    """Of all training steps, by the median record: a training may have been held for a while."""
    return records[-1]['step'] * statistics.median(record['time'] for record in records)


def build_backbone(task: str, backbone: str) -> torch.nn.Module:
    """The backbone of a task's config, with fresh weights.

    Args:
        task: Name in :data:`~repository.real_images.tasks.TASKS`.
        backbone: Name in :data:`~repository.real_images.backbones.BACKBONES`.
    """
    # Where it starts from makes no difference to what it is.
    name = 'lavit' if BACKBONES[backbone].pretrained else backbone
    cfg = resolved(Training(task, name, 0, TASKS[task].rates[0]))
    return MODELS.build(cfg.model.backbone)


@functools.cache
def parameters_of(task: str, backbone: str) -> int:
    """Parameters of a backbone; arguments as of :func:`build_backbone`."""
    return sum(p.numel() for p in build_backbone(task, backbone).parameters())


_running: set[subprocess.Popen] = set()


def _tool(folder: Path, name: str, *args: object) -> None:
    """Run a tool of this repository on one core, its output at the end of a file."""
    # Waiting threads that spin make training several times slower where cores are shared. And glibc
    # gives large tensors back to the system, which takes a tenth of the time to hand them out anew.
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
    env |= {'MALLOC_MMAP_THRESHOLD_': str(4 << 30), 'MALLOC_TRIM_THRESHOLD_': str(16 << 30)}
    command = [sys.executable, str(Path('tools') / name), *map(str, args)]
    log = folder / 'output.log'
    with (
        log.open('ab') as output,
        subprocess.Popen(command, env=env, stdout=output, stderr=output) as process,
    ):
        _running.add(process)
        try:
            status = process.wait()
        finally:
            _running.discard(process)
    if status:
        raise RuntimeError(f'tools/{name} ended with status {status}; its output is in {log}')


def stop() -> None:
    """End the trainings that run; called again, they go on from their last checkpoint."""
    for process in list(_running):
        process.terminate()
