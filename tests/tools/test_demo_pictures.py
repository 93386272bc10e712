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
FRAME = 6


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    make_shapes(folder, ShapesRecipe(num_train=1, num_val=4), progress=False)
    return folder


def enlarged(path: Path | str) -> np.ndarray:
    image = cv2.imread(str(path))
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).astype(int)


def tiles(sheet: Path, width: int, height: int = SIDE) -> list[np.ndarray]:
    """The pictures on a sheet of one row of four."""
    image = cv2.imread(str(sheet)).astype(int)
    assert image.shape == (height + 2 * FRAME, 4 * (width + 2 * FRAME), 3)
    parts = np.split(image, 4, axis=1)
    return [part[FRAME:-FRAME, FRAME:-FRAME] for part in parts]


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b).max(-1) > 30


def test_instances(shapes, tmp_path):
    truth = COCO(str(shapes / 'coco/annotations/instances_val2017.json'))
    samples = []
    for info in truth.loadImgs(truth.getImgIds()):
        found = truth.loadAnns(truth.getAnnIds(imgIds=[info['id']]))
        if info['id'] == 4:
            found = []
        masks = [np.asfortranarray(truth.annToMask(a)) for a in found]
        boxes = torch.tensor([a['bbox'] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        samples.append(
            dict(
                img_id=info['id'],
                img_path=str(shapes / 'coco/val2017' / info['file_name']),
                pred_instances=dict(
                    bboxes=boxes,
                    labels=torch.tensor([a['category_id'] - 1 for a in found], dtype=torch.long),
                    scores=torch.full((len(found),), 0.9),
                    masks=[rle.encode(m) for m in masks],
                ),
            )
        )
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(samples))
    sheet = demo_pictures.draw_instances(tmp_path / 'p.pkl', shapes, tmp_path / 'p.png')
    for tile, sample in zip(tiles(sheet, 2 * SIDE), samples, strict=True):
        left, right = tile[:, :SIDE], tile[:, SIDE:]
        image = enlarged(sample['img_path'])
        assert changed(left, image).any(), 'the truth is drawn on the left'
        drawn = changed(right, image).any()
        assert drawn == (sample['img_id'] != 4), 'and the prediction, if any, on the right'


def test_segmentation(shapes, tmp_path):
    """Tinted where there is a shape and nowhere else, right after the prediction."""
    predictions = shutil.copytree(shapes / 'ade/annotations/validation', tmp_path / 'predictions')
    names = sorted(path.name for path in predictions.iterdir())
    cv2.imwrite(str(predictions / names[-1]), np.ones((96, 96), np.uint8))  # nothing found
    sheet = demo_pictures.draw_segmentation(predictions, shapes, tmp_path / 'p.png')
    for tile, name in zip(tiles(sheet, 2 * SIDE), names, strict=True):
        image = enlarged(shapes / 'ade/images/validation' / name.replace('.png', '.jpg'))
        labels = cv2.imread(str(shapes / 'ade/annotations/validation' / name), 0)
        shape = cv2.resize(labels, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) > 1
        left, right = tile[:, :SIDE], tile[:, SIDE:]
        assert (left != image).any(-1)[shape].mean() > 0.9
        assert not changed(left, image)[~shape].any()
        assert (left == right).all() == (name != names[-1])
        if name == names[-1]:
            assert not changed(right, image).any()


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
    text_height = 32
    for i, tile in enumerate(tiles(sheet, SIDE, SIDE + text_height)):
        assert not changed(tile[text_height:], enlarged(samples[i]['img_path'])).any()
        text = tile[:text_height].reshape(-1, 3)
        blue, green, red = text[text.max(1) < 230].mean(0)
        assert (red > green) == (i == 3)
