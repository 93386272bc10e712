"""The contest's score against its definition, pixel by pixel and in fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from mmlavit import DSB2018Metric

SHAPE = (14, 18)
Pixels = set[tuple[int, int]]


def pixels(mask: np.ndarray) -> Pixels:
    return {(int(y), int(x)) for y, x in zip(*mask.nonzero(), strict=True)}


def reference(truth: list[Pixels], predicted: list[tuple[float, Pixels]], least: float) -> Fraction:
    """The score of one image as the contest defines it."""
    taken: Pixels = set()
    apart = []
    for score, mask in sorted(predicted, key=lambda pair: -pair[0]):
        if score >= least:
            apart.append(mask - taken)
            taken |= mask
    apart = [mask for mask in apart if mask]
    if not truth and not apart:
        return Fraction(1)
    total = Fraction(0)
    for percent in range(50, 100, 5):
        left = list(truth)
        hits = 0
        for mask in apart:
            for other in left:
                if Fraction(len(mask & other), len(mask | other)) > Fraction(percent, 100):
                    hits += 1
                    left.remove(other)
                    break
        total += Fraction(hits, hits + (len(apart) - hits) + len(left))
    return total / 10


def blots(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Rectangles, which may lie over each other."""
    masks = []
    for _ in range(count):
        mask = np.zeros(SHAPE, bool)
        y, x = rng.integers(0, SHAPE[0] - 2), rng.integers(0, SHAPE[1] - 2)
        mask[y : y + rng.integers(2, 8), x : x + rng.integers(2, 8)] = True
        masks.append(mask)
    return masks


def annotate(path: Path, truth: list[list[np.ndarray]]) -> Path:
    """The true masks of images 1, 2 and so on, in COCO's format."""
    annotations = []
    for image_id, masks in enumerate(truth, 1):
        for mask in masks:
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            segmentation = dict(size=rle['size'], counts=rle['counts'].decode())
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=1,
                    segmentation=segmentation,
                    bbox=coco_mask.toBbox(rle).tolist(),
                    area=int(mask.sum()),
                    iscrowd=0,
                )
            )
    height, width = SHAPE
    images = [
        dict(id=i, file_name=f'{i}.png', height=height, width=width)
        for i in range(1, len(truth) + 1)
    ]
    categories = [dict(id=1, name='nucleus')]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def sample(
    image_id: int,
    masks: list[np.ndarray],
    scores: list[float],
    form: str = 'tensor',
    **more: object,
) -> dict:
    """What mmdet's evaluator hands to a metric."""
    encoded = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    stacked = torch.from_numpy(np.array(masks, bool).reshape(-1, *SHAPE))
    instances = InstanceData(
        masks=stacked if form == 'tensor' else encoded,
        scores=torch.tensor(scores),
        labels=torch.zeros(len(scores), dtype=torch.long),
        **more,
    )
    return dict(img_id=image_id, pred_instances=instances.to_dict())


def evaluate(metric: DSB2018Metric, samples: list[dict]) -> float:
    metric.process({}, samples)
    (value,) = metric.evaluate(len(samples)).values()
    return value


@pytest.mark.parametrize('form', ['tensor', 'rle'])
@pytest.mark.parametrize('least', [0.0, 0.5, 0.9])
def test_the_definition(tmp_path, form, least):
    """Predictions near the truth, and some that are not, in any number, the empty ones too."""
    for seed in range(12):
        print('seed', seed)
        rng = np.random.default_rng(seed)
        truths, samples, expected = [], [], []
        for image_id in range(1, 6):
            # The contest's true masks are apart from each other.
            free = np.ones(SHAPE, bool)
            truth = []
            for mask in blots(rng, int(rng.integers(0, 7))):
                if (mask & free).any():
                    truth.append(mask & free)
                free &= ~mask
            shifts = [np.roll(mask, rng.integers(-1, 2, 2), (0, 1)) for mask in truth]
            masks = shifts[: int(rng.integers(0, 7))] + blots(rng, int(rng.integers(0, 3)))
            scores = rng.permutation(len(masks)) / max(len(masks), 1)
            scores = [float(np.float32(s)) for s in scores]
            truths.append(truth)
            samples.append(sample(image_id, masks, scores, form))
            drawn = [(s, pixels(m)) for s, m in zip(scores, masks, strict=True)]
            expected.append(reference([pixels(mask) for mask in truth], drawn, least))
        metric = DSB2018Metric(str(annotate(tmp_path / 'truth.json', truths)), score_thr=least)
        assert evaluate(metric, samples) == pytest.approx(float(sum(expected) / 5), abs=1e-12)


def strip(length: int, row: int = 0) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[row].flat[:length] = True
    return mask


@pytest.mark.parametrize(
    'length, score',
    [
        (18, 1.0),
        (17, 0.9),  # 17 / 18 = 0.944: all thresholds but 0.95
        (9, 0.0),  # exactly half does not exceed a half
        (10, 0.2),  # 0.556: 0.50 and 0.55
    ],
)
def test_how_much_of_a_mask_has_to_be_found(tmp_path, length, score):
    metric = DSB2018Metric(str(annotate(tmp_path / 'truth.json', [[strip(18)]])))
    assert evaluate(metric, [sample(1, [strip(length)], [0.9])]) == pytest.approx(score)


@pytest.mark.parametrize('percent', range(50, 100, 5))
def test_an_overlap_of_exactly_a_threshold_does_not_exceed_it(tmp_path, percent):
    truth, found = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    truth[:5, :4] = True  # 20 pixels, 5 % each
    found[:5, :4] = (np.arange(20) < percent // 5).reshape(5, 4)
    metric = DSB2018Metric(str(annotate(tmp_path / 'truth.json', [[truth]])))
    below = (percent - 50) // 5
    assert evaluate(metric, [sample(1, [found], [0.9])]) == pytest.approx(below / 10)


def test_misses_and_inventions_count_alike_and_images_too(tmp_path):
    """1 of 2 found; 1 found and 1 invented; an empty image, right and wrong."""
    truths = [[strip(9), strip(9, 3)], [strip(9)], [], []]
    samples = [
        sample(1, [strip(9)], [0.9]),
        sample(2, [strip(9), strip(5, 7)], [0.9, 0.6]),
        sample(3, [], []),
        sample(4, [strip(9)], [0.9]),
    ]
    metric = DSB2018Metric(str(annotate(tmp_path / 'truth.json', truths)))
    assert evaluate(metric, samples) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)


def test_overlaps_belong_to_the_higher_score(tmp_path):
    """A second mask over the first is left with nothing, and is no prediction then."""
    path = str(annotate(tmp_path / 'truth.json', [[strip(9)]]))
    assert evaluate(DSB2018Metric(path), [sample(1, [strip(9), strip(8)], [0.8, 0.7])]) == 1
    half = pytest.approx(1 / 2 * 8 / 10)  # 8 of 9 pixels: below 0.90, beside a mask of one pixel
    assert evaluate(DSB2018Metric(path), [sample(1, [strip(9), strip(8)], [0.7, 0.8])]) == half


def test_scores_of_masks_decide_where_there_are_some(tmp_path):
    path = str(annotate(tmp_path / 'truth.json', [[strip(9)]]))
    doubtful = sample(1, [strip(9)], [0.9], mask_scores=torch.tensor([0.3]))
    assert evaluate(DSB2018Metric(path), [doubtful]) == 0


def test_mmdets_evaluator_finds_it(tmp_path):
    from mmdet.registry import METRICS

    path = str(annotate(tmp_path / 'truth.json', [[strip(9)]]))
    with DefaultScope.overwrite_default_scope('mmdet'):
        metric = METRICS.build(dict(type='DSB2018Metric', ann_file=path))
    metric.process({}, [sample(1, [strip(9)], [0.9])])
    assert metric.evaluate(1) == {'dsb2018/score': 1.0}


@pytest.mark.parametrize('least', [-0.1, 1.5])
def test_refuses_a_score_that_none_has(tmp_path, least):
    with pytest.raises(ValueError, match=f'score_thr must be between 0 and 1, got {least}'):
        DSB2018Metric(str(annotate(tmp_path / 'truth.json', [])), score_thr=least)


def test_refuses_an_image_without_truth(tmp_path):
    path = annotate(tmp_path / 'truth.json', [[]])
    with pytest.raises(ValueError, match=r'truth\.json has no image with the id 2'):
        DSB2018Metric(str(path)).process({}, [sample(2, [], [])])
