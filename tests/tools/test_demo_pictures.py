"""What the demos draw, on predictions made up from the truth."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.structures import DataSample
from pycocotools import mask as rle
from pycocotools.coco import COCO

from mmlavit.datasets.shapes import CLASSES, ShapesRecipe, make_shapes
from repository import demo_pictures

SIDE = 96 * demo_pictures.SCALE


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    make_shapes(folder, ShapesRecipe(num_train=1, num_val=4), progress=False)
    return folder


def enlarged(path: Path | str) -> np.ndarray:
    image = cv2.imread(str(path))
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).astype(int)


def spans(filled: np.ndarray) -> list[slice]:
    """Where a row or column of flags is set without a gap."""
    edges = np.flatnonzero(np.diff(np.r_[0, filled.astype(int), 0]))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def pictures(sheet: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The pictures on a sheet, row by row, and the strips over them: BGR."""
    image = cv2.imread(str(sheet)).astype(int)
    ink = (image < 250).any(-1)
    rows = [s for s in spans(ink.mean(1) > 0.5) if s.stop - s.start == SIDE]
    columns = [s for s in spans(ink[rows[0]].any(0)) if s.stop - s.start == SIDE]
    found, over = [], []
    for row in rows:
        for column in columns:
            picture = image[row, column]
            if (picture < 250).any():
                found.append(picture)
                over.append(image[row.start - 30 : row.start, column])
    return found, over


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b).max(-1) > 30


def large(mask: np.ndarray) -> np.ndarray:
    return cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) > 0


def inside(mask: np.ndarray) -> np.ndarray:
    """A mask without its rim, where the outline is."""
    return cv2.erode(large(mask).astype(np.uint8), np.ones((13, 13))) > 0


def dark(strip: np.ndarray) -> bool:
    return (strip.max(-1) < 100).any()


def test_instances(shapes, tmp_path):
    """All right in the first images; in the third a wrong class, in the last nothing is found."""
    truth = COCO(str(shapes / 'coco/annotations/instances_val2017.json'))
    samples, true_masks = [], []
    for info in truth.loadImgs(truth.getImgIds()):
        found = truth.loadAnns(truth.getAnnIds(imgIds=[info['id']]))
        true_masks.append([truth.annToMask(a) for a in found])
        if info['id'] == 4:
            found = []
        boxes = torch.tensor([a['bbox'] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        wrong = info['id'] == 3
        labels = [(a['category_id'] - 1 + wrong) % 3 for a in found]
        samples.append(
            dict(
                img_id=info['id'],
                img_path=str(shapes / 'coco/val2017' / info['file_name']),
                pred_instances=dict(
                    bboxes=boxes,
                    labels=torch.tensor(labels, dtype=torch.long),
                    scores=torch.full((len(found),), 0.9),
                    masks=[rle.encode(np.asfortranarray(truth.annToMask(a))) for a in found],
                ),
            )
        )
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(samples))
    sheet = demo_pictures.draw_instances(tmp_path / 'p.pkl', shapes, tmp_path / 'p.png')
    found, over = pictures(sheet)
    assert len(found) == 2 * len(samples)
    assert all(dark(strip) for strip in over[:4]), 'headings'
    for index, (sample, masks) in enumerate(zip(samples, true_masks, strict=True)):
        left, right = found[2 * index : 2 * index + 2]
        image = enlarged(sample['img_path'])
        assert changed(left, image).any(), 'the truth is drawn on the left'
        number = sample['img_id']
        assert changed(right, image).any() == (number != 4), 'the prediction, if any, on the right'
        # Half of an object is free of labels, which are as large in both but for the score.
        same = [np.median(np.abs(left - right)[inside(m)]) < 12 for m in masks]
        assert all(same) if number < 3 else not any(same), 'one colour a class'


def test_segmentation(shapes, tmp_path):
    """Each class in its colour on both sides, right after the truth and the prediction."""
    truth = shapes / 'ade/annotations/validation'
    predictions = shutil.copytree(truth, tmp_path / 'predictions')
    names = sorted(path.name for path in predictions.iterdir())
    cv2.imwrite(str(predictions / names[-1]), np.ones((96, 96), np.uint8))  # nothing found
    sheet = demo_pictures.draw_segmentation(predictions, shapes, tmp_path / 'p.png')
    found, over = pictures(sheet)
    assert len(found) == 2 * len(names) and all(dark(strip) for strip in over[:4])
    colours = np.array(demo_pictures.COLOURS)[:, ::-1]
    for index, name in enumerate(names):
        left, right = found[2 * index : 2 * index + 2]
        image = enlarged(shapes / 'ade/images/validation' / name.replace('.png', '.jpg'))
        labels = cv2.imread(str(truth / name), 0)
        for label in set(np.unique(labels)) - {0, 1}:
            there = inside((labels == label).astype(np.uint8))
            colour = colours[label - 2]
            nearer = np.abs(left - colour).sum(-1) <= np.abs(image - colour).sum(-1)
            assert nearer[there].all(), 'in the colour of its class'
        assert (left == right).all() == (name != names[-1])
        if name == names[-1]:
            found_too = inside((labels > 1).astype(np.uint8))
            assert changed(left, right)[found_too].all()


def test_classes(shapes, tmp_path):
    """A line of text over the image; its colour says whether it is right."""
    samples = []
    for path in sorted((shapes / 'imagenet/val').glob('*/*.jpg')):
        true = CLASSES.index(path.parent.name)
        wrong = len(samples) == 3
        found = (true + wrong) % 3
        scores = torch.eye(3)[found] * 0.7 + 0.1
        sample = DataSample(metainfo=dict(img_path=str(path)))
        samples.append(
            sample.set_gt_label(true).set_pred_label(found).set_pred_score(scores).to_dict()
        )
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(samples))
    sheet = demo_pictures.draw_classes(tmp_path / 'p.pkl', shapes, tmp_path / 'p.png')
    found, over = pictures(sheet)
    assert len(found) == len(samples) == 4
    for index, (picture, strip) in enumerate(zip(found, over, strict=True)):
        assert (picture == enlarged(samples[index]['img_path'])).all()
        blue, green, red = strip[strip.max(-1) < 230].mean(0)
        assert (red > green) == (index == 3)
