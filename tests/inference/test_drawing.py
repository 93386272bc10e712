"""Drawings of boxes and masks: one colour a class, labels in the image that can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData

from mmlavit.inference.colours import class_colours
from mmlavit.inference.drawing import ClassColourVisualizer

PALETTE = [(250, 40, 40), (40, 200, 40), (40, 40, 250)]
CLASSES = ('one', 'two', 'three')
GREY = np.full((300, 400, 3), 128, np.uint8)


def instances(boxes: list, labels: list, masks: bool = True, **more) -> InstanceData:
    """Instances whose masks fill their boxes."""
    filled = np.zeros((len(boxes), 300, 400), bool)
    for mask, (left, top, right, bottom) in zip(filled, boxes, strict=True):
        mask[top:bottom, left:right] = True
    found = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        **more,
    )
    if masks:
        found.masks = torch.from_numpy(filled)
    return found


def draw(found: InstanceData, palette=PALETTE, classes=CLASSES, **options) -> np.ndarray:
    visualizer = ClassColourVisualizer(**options)
    visualizer.dataset_meta = dict(classes=classes, palette=palette)
    if 'scores' in found:
        visualizer.add_datasample('x', GREY, DetDataSample(pred_instances=found), draw_gt=False)
    else:
        visualizer.add_datasample('x', GREY, DetDataSample(gt_instances=found), draw_pred=False)
    return visualizer.get_image().astype(int)


def test_a_class_has_one_colour_whatever_the_draw():
    """Everywhere, in every picture; nearer its own colour than that of any other class."""
    boxes, labels = [[10, 60, 90, 140], [150, 60, 230, 140], [300, 200, 390, 290]], [1, 1, 2]
    pictures = []
    for seed in (0, 1):
        np.random.seed(seed)
        pictures.append(draw(instances(boxes, labels)))
    assert (pictures[0] == pictures[1]).all()
    middles = [pictures[0][(t + b) // 2, (x0 + x1) // 2] for x0, t, x1, b in boxes]
    assert (middles[0] == middles[1]).all()
    for middle, label in zip(middles, labels, strict=True):
        distances = [np.abs(middle - np.array(colour)).sum() for colour in PALETTE]
        assert np.argmin(distances) == label
    outside = pictures[0][250:, :100]
    assert (outside == 128).all()


def changed_around(picture: np.ndarray) -> tuple[int, int, int, int]:
    """The box around all that was drawn: left, top, right, bottom."""
    there = (picture != 128).any(-1)
    (rows,), (columns,) = np.nonzero(there.any(1)), np.nonzero(there.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# Capitals are wide, and none of these goes below the line.
@pytest.mark.parametrize(('name', 'height', 'width'), [('three', 9, 25), ('RBC', 8, 20)])
@pytest.mark.parametrize('corner', [(0, 0), (392, 0), (0, 292), (392, 292)])
def test_the_label_of_a_small_object_is_whole_and_large(corner, name, height, width):
    """As large as that of a large one, also where the object is in a corner."""
    x, y = corner
    classes = ('one', 'two', name)
    small = draw(instances([[x, y, x + 8, y + 8]], [2], masks=False), classes=classes)
    plain = draw(instances([[150, 100, 158, 108]], [2], masks=False), classes=classes)
    sizes = []
    for picture in (small, plain):
        ink = (np.abs(picture - PALETTE[2]).sum(-1) > 60) & (picture.min(-1) > 180)
        rows, columns = np.nonzero(ink)
        sizes.append((np.ptp(rows), np.ptp(columns)))
    assert sizes[0] == pytest.approx(sizes[1], abs=2)
    assert sizes[0][0] >= height and sizes[0][1] >= width, 'in pixels'


def test_labels_of_one_place_are_not_over_each_other():
    """Three guesses at one object: three times the letters of one."""
    boxes = [[150, 100, 250, 200]] * 3
    scores = torch.tensor([0.9, 0.8, 0.7])
    one = draw(instances(boxes[:1], [2], masks=False, scores=scores[:1]))
    three = draw(instances(boxes, [2, 2, 2], masks=False, scores=scores))
    # Letters are white.
    counts = [(picture.min(-1) > 230).sum() for picture in (one, three)]
    assert counts[1] > 2.5 * counts[0] > 0


def ink(picture: np.ndarray) -> int:
    """How much is written: letters are white, their edges between white and the colour."""
    return (picture.min(-1) - 128).clip(0).sum()


def test_labels_for_which_the_image_has_no_room_are_left_out():
    """Ten objects, six lines: those of the first are whole."""
    boxes = [[0, 30 * i, 400, 30 * i + 29] for i in range(10)]
    scores = torch.full((10,), 0.9)
    options = dict(classes=('one', 'two', 'a long name'), font_size=25)
    picture = draw(instances(boxes, [2] * 10, masks=False, scores=scores), **options)
    one = draw(instances(boxes[:1], [2], masks=False, scores=scores[:1]), **options)
    written = ink(picture) / ink(one)
    assert 3 <= round(written) < 10 and written == pytest.approx(round(written), abs=0.15)


def test_a_label_does_not_hide_another_small_object():
    """Also where that one is just above, where the label would be."""
    boxes = [[150, y, 162, y + 12] for y in (100, 84, 68, 52)]
    picture = draw(instances(boxes, [2] * len(boxes), masks=False))
    assert (picture.min(-1) > 230).any(), 'labels are written'
    for left, top, _, _ in boxes:
        assert tuple(picture[top + 6, left + 6]) == (128, 128, 128)


@pytest.mark.parametrize('top', [20, 150, 285])
def test_labels_of_objects_in_a_row_stay_near_and_in_the_image(top):
    """Each is narrower than its label: some go below or above others, none out of the image."""
    boxes = [[x, top, x + 8, top + 8] for x in range(20, 380, 36)]
    scores = torch.full((len(boxes),), 0.9)
    picture = draw(instances(boxes, [2] * len(boxes), masks=False, scores=scores))
    one = draw(instances([[150, 100, 158, 108]], [2], masks=False, scores=scores[:1]))
    assert ink(picture) / ink(one) == pytest.approx(len(boxes), rel=0.2)
    _, highest, _, lowest = changed_around(picture)
    _, label_top, _, bottom = changed_around(one)
    assert lowest - highest <= 4 * (bottom - label_top)


@pytest.mark.parametrize(
    ('columns', 'rows', 'written'),
    [
        pytest.param(range(5, 390, 15), range(5, 290, 15), False, id='all over the image'),
        pytest.param(range(5, 65, 15), range(5, 65, 15), False, id='in a corner'),
        pytest.param((5, 110, 384), range(20, 290, 30), True, id='far apart'),
    ],
)
def test_many_labels_do_not_hide_what_is_found(columns, rows, written):
    """As many as there are objects, or none; how much of the image they cover does not matter."""
    boxes = [[x, y, x + 8, y + 8] for x in columns for y in rows]
    scores = torch.full((len(boxes),), 0.9)
    picture = draw(instances(boxes, [2] * len(boxes), masks=False, scores=scores))
    one = draw(instances([[150, 100, 158, 108]], [2], masks=False, scores=scores[:1]))
    assert ink(picture) / ink(one) == pytest.approx(len(boxes) * written, rel=0.2)
    middles = [tuple(picture[top + 4, left + 4]) for left, top, _, _ in boxes]
    assert set(middles) == {(128, 128, 128)}, 'what is within a box can be seen'


def test_few_labels_are_written_in_any_image():
    """Here, in letters so large that they cover most of it."""
    boxes = [[150, y, 250, y + 40] for y in range(5, 290, 60)]
    scores = torch.full((len(boxes),), 0.9)
    found = instances(boxes, [2] * len(boxes), masks=False, scores=scores)
    assert (draw(found, font_size=30).min(-1) > 230).sum() > 5 * 200


@pytest.mark.parametrize('number', [1, 3, 10, 35, 80])
def test_colours_can_be_told_apart_and_stay_with_more_classes(number):
    colours = class_colours(number)
    assert len(set(colours)) == number and class_colours(number + 7)[:number] == colours
    pairs = itertools.combinations(np.array(colours[:10]), 2)
    assert min((np.abs(a - b).sum() for a, b in pairs), default=255) > 60
    assert class_colours(2, [[1, 2, 3], [4, 5, 6]]) == [(1, 2, 3), (4, 5, 6)]


def test_a_palette_of_other_classes_is_none():
    """Three classes of one's own in a CocoDataset inherit the colours of its eighty."""
    found = instances([[100, 100, 200, 200]], [0])
    inherited = draw(found, palette=CocoDataset.METAINFO['palette'])
    assert (inherited == draw(found, palette=None)).all()
    assert (inherited != draw(found)).any()
    # mmdet's word for no palette.
    assert (inherited == draw(found, palette='random')).all()
    # What else it takes for one.
    for palette in ('voc', (10, 20, 30)):
        assert changed_around(draw(found, palette=palette))[1] < 100


def test_all_that_mmdet_draws():
    """No object; masks without boxes, as SOLO has, or in mmdet's type; no names; no colours."""
    assert (draw(instances([], [])) == GREY).all()
    boxes = [[100, 100, 200, 200]]
    found = instances(boxes, [0])
    with_boxes = draw(found)
    without = InstanceData(bboxes=torch.zeros(1, 4), labels=found.labels, masks=found.masks)
    assert (draw(without)[120:180, 120:180] == with_boxes[120:180, 120:180]).all()
    assert changed_around(draw(without))[1] < 100, 'a label above'
    bitmaps = InstanceData(bboxes=found.bboxes, labels=found.labels)
    bitmaps.masks = BitmapMasks(found.masks.numpy().astype(np.uint8), 300, 400)
    visualizer = ClassColourVisualizer()
    visualizer.dataset_meta = dict(classes=CLASSES, palette=PALETTE)
    visualizer.add_datasample('x', GREY, DetDataSample(gt_instances=bitmaps), draw_pred=False)
    assert (visualizer.get_image() == with_boxes).all()
    empty = InstanceData(
        bboxes=torch.zeros(1, 4), labels=found.labels, masks=torch.zeros(1, 300, 400)
    )
    draw(empty)
    assert changed_around(draw(found, palette=None, classes=None))[1] < 100
