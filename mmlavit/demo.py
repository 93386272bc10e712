"""The demo: train, test and draw a config on the shapes data, through the tools that users take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import find_latest_checkpoint

from .compat import repair_torchvision
from .shapes import CLASSES, ShapesRecipe, make_shapes

SHAPES = Path('data/shapes')


@dataclass(frozen=True)
class Demo:
    """What to train, and how to tell that it worked.

    Args:
        config: Config to train on the shapes data.
        work_dir: Where checkpoints, logs and pictures go.
        targets: Test metrics by their names in MMEngine's log, with the least that counts as
            success.
    """

    config: Path
    work_dir: Path
    targets: dict[str, float]


MASK_RCNN = Demo(
    config=Path('configs/maskrcnn_lavit_n_shapes.py'),
    work_dir=Path('work_dirs/demo'),
    targets={'coco/bbox_mAP_50': 0.85, 'coco/segm_mAP_50': 0.85, 'coco/bbox_mAP': 0.60},
)


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

    max_epochs = Config.fromfile(demo.config).train_cfg.max_epochs
    latest = find_latest_checkpoint(str(demo.work_dir)) if demo.work_dir.is_dir() else None
    if latest and Path(latest).name == f'epoch_{max_epochs}.pth':
        print(f'[2/4] training: finished before ({latest})', flush=True)
    else:
        start = f'going on from {latest}' if latest else f'{max_epochs} epochs'
        print(f'[2/4] training: {start}', flush=True)
        _tool('train.py', demo.config, '--work-dir', demo.work_dir, '--resume')

    best = max(demo.work_dir.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    print(f'[3/4] testing {best}', flush=True)
    test_dir = demo.work_dir / 'test'
    predictions = test_dir / 'predictions.pkl'
    _tool('test.py', demo.config, best, '--work-dir', test_dir, '--out', predictions)
    metrics = load(max(test_dir.glob('*/*.json')))

    print('[4/4] drawing', flush=True)
    curves = draw_curves(demo.work_dir, demo.work_dir / 'curves.png')
    pictures = draw_predictions(predictions, demo.work_dir / 'predictions.png')

    print(f'\ncheckpoint   {best}\ncurves       {curves}\npredictions  {pictures}')
    for name, least in demo.targets.items():
        verdict = 'reached' if metrics[name] >= least else 'MISSED'
        print(f'{name:<20} {metrics[name]:.3f}   (target {least:.2f}: {verdict})')
    return metrics


def read_scalars(work_dir: Path) -> list[dict]:
    """What MMEngine logged, over all runs into a directory; a resumed run overrules an earlier one.

    Args:
        work_dir: Work directory of the training.

    Returns:
        Log records in the order of their steps; those with a ``loss`` come from training (their
        step is the iteration), the others from validation (their step is the epoch).
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

    records = read_scalars(work_dir)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for panel, title, x_label, shown, training in (
        (panels[0], 'training loss', 'iteration', r'loss.*', True),
        (panels[1], 'validation', 'epoch', r'.*_mAP(_50)?', False),
    ):
        rows = [r for r in records if ('loss' in r) is training]
        for name in filter(re.compile(shown).fullmatch, rows[0] if rows else ()):
            panel.plot([r['step'] for r in rows], [r[name] for r in rows], '.-', label=name)
        panel.set(title=title, xlabel=x_label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_yscale('log')
    panels[1].set_ylim(0, 1)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def draw_predictions(predictions: Path, out: Path, count: int = 12, scale: int = 4) -> Path:
    """Draw held-out images: ground truth on the left, the prediction on the right of each.

    Args:
        predictions: What mmdet's ``tools/test.py --out`` wrote for the shapes data.
        out: Picture to write.
        count: How many images, four to a row.
        scale: Enlargement; boxes and labels are drawn at the larger size.

    Returns:
        ``out``.
    """
    repair_torchvision()
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from pycocotools.coco import COCO

    truth = COCO(str(SHAPES / 'coco/annotations/instances_val2017.json'))
    visualizer = DetLocalVisualizer(line_width=2, alpha=0.5)
    colours = [(230, 60, 60), (60, 170, 60), (60, 90, 230)]
    visualizer.dataset_meta = dict(classes=CLASSES, palette=colours)
    tiles = []
    for sample in load(predictions)[:count]:
        image = cv2.cvtColor(cv2.imread(sample['img_path']), cv2.COLOR_BGR2RGB)
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        drawn = DetDataSample(
            gt_instances=_true_instances(truth, sample['img_id'], image.shape[:2]),
            pred_instances=_predicted_instances(sample['pred_instances'], image.shape[:2]),
        )
        visualizer.add_datasample('demo', image, drawn, pred_score_thr=0.5)
        tiles.append(
            cv2.copyMakeBorder(
                visualizer.get_image(), *[6] * 4, cv2.BORDER_CONSTANT, value=[255] * 3
            )
        )
    rows = [np.hstack(tiles[i : i + 4]) for i in range(0, len(tiles) // 4 * 4, 4)]
    cv2.imwrite(str(out), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    return out


def _true_instances(truth, image_id: int, size: tuple[int, int]):
    annotations = truth.loadAnns(truth.getAnnIds(imgIds=[image_id]))
    boxes = np.array([a['bbox'] for a in annotations])
    boxes[:, 2:] += boxes[:, :2]
    masks = [truth.annToMask(a) for a in annotations]
    labels = [truth.getCatIds().index(a['category_id']) for a in annotations]
    return _instances(boxes, labels, masks, size)


def _predicted_instances(predicted: dict, size: tuple[int, int]):
    from pycocotools import mask as rle

    masks = [rle.decode(m) for m in predicted['masks']]
    instances = _instances(predicted['bboxes'].numpy(), predicted['labels'], masks, size)
    instances.scores = predicted['scores']
    return instances


def _instances(boxes: np.ndarray, labels, masks: list[np.ndarray], size: tuple[int, int]):
    """Instances in an image enlarged to ``size`` (height, width)."""
    import torch
    from mmengine.structures import InstanceData

    boxes = np.array(boxes, dtype=np.float32)
    large = np.zeros((len(masks), *size), dtype=bool)
    for i, mask in enumerate(masks):
        large[i] = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_LINEAR)
        boxes[i] *= size[0] / mask.shape[0]
    return InstanceData(
        bboxes=torch.as_tensor(boxes), labels=torch.as_tensor(labels), masks=torch.as_tensor(large)
    )


def _tool(name: str, *args: object) -> None:
    # Waiting threads that spin make training several times slower where cores are shared.
    env = {'OMP_WAIT_POLICY': 'PASSIVE', **os.environ}
    subprocess.run(
        [sys.executable, str(Path('tools') / name), *map(str, args)], check=True, env=env
    )
