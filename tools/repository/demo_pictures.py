"""What a demo's model predicts on held-out shapes, beside what is true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from mmengine.fileio import load

from mmlavit.compat import repair_torchvision
from mmlavit.datasets.shapes import CLASSES

BACKGROUND = (120, 120, 120)
COLOURS = ((230, 60, 60), (60, 170, 60), (60, 90, 230))  # of the classes, RGB
COUNT, COLUMNS, SCALE = 6, 2, 4  # images on a sheet, pairs in a row, and enlargement of an image
# Pixels between pictures, over them for headings, and below them for the colours of the classes.
GAP, HEADING, LEGEND = 12, 36, 44
DPI = 100
# Points; the sheet is shown at half its size where it stands in a page.
FONT = 16
HEADINGS = ('ground truth', 'prediction')
TRUTH_LABELS = 'ade/annotations/validation'
VAL_IMAGES = 'ade/images/validation'


def draw_instances(predictions: Path, shapes: Path, out: Path) -> Path:
    """Draw boxes and masks: ground truth on the left, the prediction on the right of each pair.

    Args:
        predictions: The file that mmdet's ``tools/test.py --out`` wrote.
        shapes: The shapes data.
        out: Picture to write.

    Returns:
        ``out``.
    """
    repair_torchvision()
    from mmdet.structures import DetDataSample
    from pycocotools.coco import COCO

    from mmlavit.inference.drawing import ClassColourVisualizer

    truth = COCO(str(shapes / 'coco/annotations/instances_val2017.json'))
    visualizer = ClassColourVisualizer(font_size=FONT, line_width=3, alpha=0.75)
    visualizer.dataset_meta = dict(classes=CLASSES, palette=list(COLOURS))
    pictures = []
    for sample in load(predictions)[:COUNT]:
        image = _enlarged(sample['img_path'])
        drawn = DetDataSample(
            gt_instances=_true_instances(truth, sample['img_id'], image.shape[:2]),
            pred_instances=_predicted_instances(sample['pred_instances'], image.shape[:2]),
        )
        visualizer.add_datasample('demo', image, drawn, pred_score_thr=0.5)
        pictures += np.hsplit(visualizer.get_image(), 2)
    return _sheet(pictures, out, HEADINGS)


def draw_segmentation(predictions: Path, shapes: Path, out: Path) -> Path:
    """Tint the pixels by class: ground truth on the left, the prediction on the right of each pair.

    Args:
        predictions: The folder of label images that mmseg's ``tools/test.py --out`` wrote.
        shapes: The shapes data.
        out: Picture to write.

    Returns:
        ``out``.
    """
    repair_torchvision()
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer(alpha=0.75)
    visualizer.dataset_meta = dict(classes=['background', *CLASSES], palette=[BACKGROUND, *COLOURS])
    pictures = []
    for path in sorted(predictions.glob('*.png'))[:COUNT]:
        image = _enlarged(shapes / VAL_IMAGES / f'{path.stem}.jpg')
        for file in (shapes / TRUTH_LABELS / path.name, path):
            labels = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
            labels = cv2.resize(labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            # In the files 0 is for what has no class.
            drawn = SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(labels - 1)[None]))
            visualizer.add_datasample('demo', image, drawn, with_labels=False)
            pictures.append(visualizer.get_image())
    return _sheet(pictures, out, HEADINGS, legend=True)


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
    pictures, headings, colours = [], [], []
    count = 2 * COUNT
    # From every class some: the samples come class by class.
    for sample in samples[:: max(len(samples) // count, 1)][:count]:
        true, found = int(sample['gt_label']), int(sample['pred_label'])
        text = f'{CLASSES[found]} {float(sample["pred_score"].max()):.2f}'
        pictures.append(_enlarged(sample['img_path']))
        headings.append(text if found == true else f'{text} (is {CLASSES[true]})')
        colours.append('darkgreen' if found == true else 'crimson')
    return _sheet(pictures, out, headings, colours)


def _enlarged(path: str | Path) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)


def _sheet(
    pictures: Sequence[np.ndarray],
    out: Path,
    headings: Sequence[str],
    colours: Sequence[str] = ('black',),
    legend: bool = False,
) -> Path:
    """Put RGB pictures of one size on a white sheet, four in a row, and write it.

    Args:
        pictures: The pictures, as they stand: pixels are kept.
        out: Picture to write.
        headings: What stands over them, one for each picture; or two, over each pair of the first
            row.
        colours: Of the headings; one for all, or one for each.
        legend: Whether to say below which colour is which class.

    Returns:
        ``out``.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    across = 2 * COLUMNS
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // across)
    each = len(headings) == len(pictures)
    # From the left and the top; a pair stands closer than two pairs.
    lefts = [GAP + i * (width + GAP // 2) + i // 2 * GAP for i in range(across)]
    over = HEADING if each else 0
    tops = [HEADING - over + i * (height + over + GAP) + over for i in range(rows)]
    sheet = lefts[-1] + width + GAP, tops[-1] + height + GAP + LEGEND * legend
    figure = plt.figure(figsize=(sheet[0] / DPI, sheet[1] / DPI), dpi=DPI, facecolor='white')
    for i, picture in enumerate(pictures):
        left, top = lefts[i % across], tops[i // across]
        figure.figimage(picture, left, sheet[1] - top - height)
        if each or i < across:
            figure.text(
                (left + width / 2) / sheet[0],
                1 - (top - HEADING / 2) / sheet[1],
                headings[i if each else i % 2],
                color=colours[i % len(colours)],
                fontsize=FONT,
                ha='center',
                va='center',
            )
    if legend:
        patches = [
            Patch(color=tuple(value / 255 for value in colour), label=name)
            for name, colour in zip(CLASSES, COLOURS, strict=True)
        ]
        figure.legend(
            handles=patches, loc='lower center', ncols=len(patches), fontsize=FONT, frameon=False
        )
    figure.savefig(out, dpi=DPI)
    plt.close(figure)
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
    from mmengine.structures import InstanceData

    boxes = np.array(boxes, dtype=np.float32)
    large = np.zeros((len(masks), *size), dtype=bool)
    for i, mask in enumerate(masks):
        large[i] = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_LINEAR)
        boxes[i] *= size[0] / mask.shape[0]
    return InstanceData(
        bboxes=torch.as_tensor(boxes), labels=torch.as_tensor(labels), masks=torch.as_tensor(large)
    )
