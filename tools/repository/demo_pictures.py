"""What a demo's model predicts on held-out shapes, beside what is true."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from mmengine.fileio import load

from mmlavit.compat import repair_torchvision
from mmlavit.datasets.shapes import CLASSES

COLOURS = ((230, 60, 60), (60, 170, 60), (60, 90, 230))  # of the classes, RGB
COUNT, COLUMNS, SCALE = 12, 4, 4  # images on a sheet, images in a row, and their enlargement
TRUTH_LABELS = 'ade/annotations/validation'
VAL_IMAGES = 'ade/images/validation'


def draw_instances(predictions: Path, shapes: Path, out: Path) -> Path:
    """Draw boxes and masks: ground truth on the left, the prediction on the right of each image.

    Args:
        predictions: The file that mmdet's ``tools/test.py --out`` wrote.
        shapes: The shapes data.
        out: Picture to write.

    Returns:
        ``out``.
    """
    repair_torchvision()
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from pycocotools.coco import COCO

    truth = COCO(str(shapes / 'coco/annotations/instances_val2017.json'))
    visualizer = DetLocalVisualizer(line_width=2, alpha=0.5)
    visualizer.dataset_meta = dict(classes=CLASSES, palette=list(COLOURS))
    tiles = []
    for sample in load(predictions)[:COUNT]:
        image = _enlarged(sample['img_path'])
        drawn = DetDataSample(
            gt_instances=_true_instances(truth, sample['img_id'], image.shape[:2]),
            pred_instances=_predicted_instances(sample['pred_instances'], image.shape[:2]),
        )
        visualizer.add_datasample('demo', image, drawn, pred_score_thr=0.5)
        tiles.append(visualizer.get_image())
    return _sheet(tiles, out)


def draw_segmentation(predictions: Path, shapes: Path, out: Path) -> Path:
    """Tint the pixels by class: ground truth on the left, the prediction on the right of each.

    Args:
        predictions: The folder of label images that mmseg's ``tools/test.py --out`` wrote.
        shapes: The shapes data.
        out: Picture to write.

    Returns:
        ``out``.
    """
    tiles = []
    for path in sorted(predictions.glob('*.png'))[:COUNT]:
        image = _enlarged(shapes / VAL_IMAGES / f'{path.stem}.jpg')
        both = [
            cv2.imread(str(p), cv2.IMREAD_GRAYSCALE)
            for p in (shapes / TRUTH_LABELS / path.name, path)
        ]
        tiles.append(np.hstack([_tinted(image, labels) for labels in both]))
    return _sheet(tiles, out)


def draw_classes(predictions: Path, shapes: Path, out: Path) -> Path:
    """Write the predicted class over each image, and the true one where it is another.

    Args:
        predictions: The file that mmpretrain's ``tools/test.py --out`` wrote.
        shapes: The shapes data.
        out: Picture to write.

    Returns:
        ``out``.
    """
    repair_torchvision()
    import mmpretrain.structures  # noqa: F401  what the file holds

    samples = load(predictions)
    tiles = []
    # From every class some: the samples come class by class.
    for sample in samples[:: max(len(samples) // COUNT, 1)][:COUNT]:
        true, found = int(sample['gt_label']), int(sample['pred_label'])
        text = f'{CLASSES[found]} {float(sample["pred_score"].max()):.2f}'
        if found != true:
            text += f' (is {CLASSES[true]})'
        tile = cv2.copyMakeBorder(
            _enlarged(sample['img_path']), 32, 0, 0, 0, cv2.BORDER_CONSTANT, value=[255] * 3
        )
        colour = (0, 120, 0) if found == true else (200, 0, 0)
        cv2.putText(tile, text, (8, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.65, colour, 2, cv2.LINE_AA)
        tiles.append(tile)
    return _sheet(tiles, out)


def _enlarged(path: str | Path) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)


def _tinted(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The image with its shapes in the colours of ``labels`` (2.. are the classes)."""
    labels = cv2.resize(labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    out = image.copy()
    for i, colour in enumerate(COLOURS):
        here = labels == i + 2
        out[here] = (0.4 * image[here] + 0.6 * np.array(colour)).round()
    return out


def _sheet(tiles: list[np.ndarray], out: Path) -> Path:
    """Put RGB images of one size on a white sheet and write it."""
    framed = [cv2.copyMakeBorder(t, *[6] * 4, cv2.BORDER_CONSTANT, value=[255] * 3) for t in tiles]
    rows = [
        np.hstack(framed[i : i + COLUMNS]) for i in range(0, len(framed) - COLUMNS + 1, COLUMNS)
    ]
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
