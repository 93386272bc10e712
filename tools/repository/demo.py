"""The demo: train, test and draw a config on the shapes data, through the tools that users take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import find_latest_checkpoint

from mmlavit.datasets.shapes import ShapesRecipe, make_shapes

from .demo_pictures import draw_classes, draw_instances, draw_segmentation

SHAPES = Path('data/shapes')
# A panel of the curves for each, as lines of one panel may lie on each other: what its axis is
# called, and by their names in MMEngine's log what its lines are.
METRICS = {
    'box AP': {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP at IoU 0.5'},
    'mask AP': {'coco/segm_mAP': 'AP', 'coco/segm_mAP_50': 'AP at IoU 0.5'},
    'percent': {'mIoU': 'mean IoU', 'mAcc': 'mean accuracy of the classes'},
    'top-1 accuracy, percent': {'accuracy/top1': 'top-1 accuracy'},
}


@dataclass(frozen=True)
class Demo:
    """What to train, and how to tell that it worked.

    Args:
        config: Config to train on the shapes data.
        work_dir: Where checkpoints, logs and pictures go.
        targets: Test metrics by their names in MMEngine's log, with the least that counts as
            success.
        predictions: What ``tools/test.py --out`` of the config's toolbox is to write, by name.
        draw: Draws it: takes what was written, the data, and the picture to write.
    """

    config: Path
    work_dir: Path
    targets: dict[str, float]
    predictions: str
    draw: Callable[[Path, Path, Path], Path]


DEMOS = {
    'det': Demo(
        config=Path('configs/maskrcnn_lavit_n_shapes.py'),
        work_dir=Path('work_dirs/demo'),
        targets={'coco/bbox_mAP_50': 0.95, 'coco/segm_mAP_50': 0.95, 'coco/bbox_mAP': 0.78},
        predictions='predictions.pkl',
        draw=draw_instances,
    ),
    'seg': Demo(
        config=Path('configs/upernet_lavit_n_shapes.py'),
        work_dir=Path('work_dirs/demo-seg'),
        targets={'mIoU': 82.0},
        predictions='predictions',
        draw=draw_segmentation,
    ),
    'cls': Demo(
        config=Path('configs/lavit_n_shapes.py'),
        work_dir=Path('work_dirs/demo-cls'),
        targets={'accuracy/top1': 91.0},
        predictions='predictions.pkl',
        draw=draw_classes,
    ),
}


def run(demo: Demo) -> dict[str, float]:
    """Make the data, train (or go on where it stopped), test the best checkpoint, draw.

    Args:
        demo: What to run. Paths are relative to the current directory, the repository's top.

    Returns:
        The test metrics.

    Raises:
        subprocess.CalledProcessError: If training or testing fails; its output says why.
    """
    print(f'[1/4] data in {SHAPES}', flush=True)
    make_shapes(SHAPES, ShapesRecipe())

    print('[2/4] training', flush=True)
    best = train(demo.config, demo.work_dir)

    print(f'[3/4] testing {best}', flush=True)
    test_dir = demo.work_dir / 'test'
    predictions = test_dir / demo.predictions
    _tool('test.py', demo.config, best, '--work-dir', test_dir, '--out', predictions)
    metrics = load(max(test_dir.glob('*/*.json')))

    print('[4/4] drawing', flush=True)
    curves = draw_curves(demo.work_dir, demo.work_dir / 'curves.png')
    pictures = demo.draw(predictions, SHAPES, demo.work_dir / 'predictions.png')

    print(f'\ncheckpoint   {best}\ncurves       {curves}\npredictions  {pictures}')
    for name, least in demo.targets.items():
        verdict = 'reached' if metrics[name] >= least else 'MISSED'
        print(f'{name:<20} {metrics[name]:.3f}   (target {least:.2f}: {verdict})')
    return metrics


def train(config: Path, work_dir: Path) -> Path:
    """Train a config, go on where an earlier call stopped, or do nothing where it had finished.

    Args:
        config: Config to train.
        work_dir: Where checkpoints and logs go.

    Returns:
        The best checkpoint by the config's own measure.

    Raises:
        subprocess.CalledProcessError: If training fails.
    """
    last = last_checkpoint(Config.fromfile(config))
    latest = find_latest_checkpoint(str(work_dir)) if work_dir.is_dir() else None
    if latest and Path(latest).name == last and _validated(work_dir, last):
        print(f'{config.stem}: finished before ({latest})', flush=True)
    else:
        start = f'going on from {latest}' if latest else f'up to {last}'
        print(f'{config.stem}: {start}', flush=True)
        _tool('train.py', config, '--work-dir', work_dir, '--resume')
    return max(work_dir.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)


def last_checkpoint(cfg: Config) -> str:
    """Name of the checkpoint with which a training ends."""
    if 'max_iters' in cfg.train_cfg:
        return f'iter_{cfg.train_cfg.max_iters}.pth'
    return f'epoch_{cfg.train_cfg.max_epochs}.pth'


def _validated(work_dir: Path, checkpoint: str) -> bool:
    """Whether the model of a checkpoint was validated, which a kill may have prevented."""
    step = int(re.search(r'\d+', checkpoint)[0])
    return any('loss' not in record and record['step'] == step for record in read_scalars(work_dir))


def read_scalars(work_dir: Path) -> list[dict]:
    """What MMEngine logged, over all runs into a directory; a resumed run overrules an earlier one.

    Args:
        work_dir: Work directory of the training.

    Returns:
        Log records in the order of their steps; those with a ``loss`` come from training (their
        step is the iteration), the others from validation (their step is the epoch or iteration).
    """
    records = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            records['loss' in record, record['step']] = record
    return [records[key] for key in sorted(records)]


def draw_curves(work_dir: Path, out: Path) -> Path:
    """Plot the losses and the validation metrics of a training.

    Args:
        work_dir: Work directory of the training.
        out: Picture to write.

    Returns:
        ``out``.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    trained, validated = [], []
    for record in read_scalars(work_dir):
        (trained if 'loss' in record else validated).append(record)
    metrics = {
        title: found
        for title, names in METRICS.items()
        if (
            found := {key: name for key, name in names.items() if validated and key in validated[0]}
        )
    }
    count = 1 + len(metrics)
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 4), layout='constrained')
    panels = list(np.atleast_1d(panels))
    losses = re.compile(r'(.*\.)?loss.*')
    for name in filter(losses.fullmatch, trained[0] if trained else ()):
        style = dict(linewidth=2.5, color='black') if name == 'loss' else dict(linewidth=1.2)
        label = 'sum of losses' if name == 'loss' else name
        panels[0].plot(
            [r['step'] for r in trained], [r[name] for r in trained], label=label, **style
        )
    panels[0].set(title='training', xlabel='iteration', ylabel='loss', yscale='log')
    # MMEngine's loops of epochs say in which one an iteration was.
    unit = 'epoch' if trained and 'epoch' in trained[0] else 'iteration'
    for panel, (title, names) in zip(panels[1:], metrics.items(), strict=True):
        for key, name in names.items():
            values = [r[key] for r in validated]
            panel.plot([r['step'] for r in validated], values, '.-', label=name)
        # mmdet counts to 1, the other toolboxes to 100; a little more, so that no line is the edge.
        top = 1 if 'mAP' in next(iter(names)) else 100
        panel.set(title='held-out images', xlabel=unit, ylabel=title, ylim=(0, 1.03 * top))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for panel in panels:
        panel.grid(alpha=0.3)
        if len(panel.get_lines()) > 1:
            panel.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def _tool(name: str, *args: object) -> None:
    # Waiting threads that spin make training several times slower where cores are shared.
    env = {'OMP_WAIT_POLICY': 'PASSIVE', **os.environ}
    subprocess.run(
        [sys.executable, str(Path('tools') / name), *map(str, args)], check=True, env=env
    )
