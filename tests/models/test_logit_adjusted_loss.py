"""The loss that weighs classes in training alone (Menon et al., equation 11)."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import seeded

from mmlavit import LogitAdjustedLoss

WEIGHT = [0.5, 1.0, 6.0]
IGNORED = 255


def scores_and_labels(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    scores = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator)
    labels[0, 0] = IGNORED
    return scores, labels


def naive(scores, labels, factors=None):
    """Pixel by pixel, on Python numbers."""
    total, count = 0.0, 0
    for n, row, column in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        label = int(labels[n, row, column])
        if label == IGNORED:
            continue
        z = scores[n, :, row, column].tolist()
        chances = [weight * math.exp(score) for weight, score in zip(WEIGHT, z, strict=True)]
        loss = -WEIGHT[label] * math.log(chances[label] / sum(chances))
        total += loss * (1 if factors is None else float(factors[n, row, column]))
        count += 1
    return total / count


@pytest.mark.parametrize('factors', [None, torch.linspace(0, 2, 40).view(2, 4, 5)])
def test_it_is_equation_11(factors):
    scores, labels = scores_and_labels()
    loss = LogitAdjustedLoss(WEIGHT, loss_weight=0.4)(scores, labels, factors)
    assert float(loss) == pytest.approx(0.4 * naive(scores, labels, factors), rel=1e-9)


def test_equal_weights_are_the_cross_entropy():
    scores, labels = scores_and_labels()
    plain = F.cross_entropy(scores, labels, ignore_index=IGNORED)
    assert float(LogitAdjustedLoss([1, 1, 1])(scores, labels)) == pytest.approx(float(plain))
    assert float(LogitAdjustedLoss()(scores, labels)) == pytest.approx(float(plain))


def test_what_is_learned_are_the_frequencies():
    """Where nothing tells the classes apart; the weighted cross entropy learns others."""
    labels = torch.tensor([0] * 70 + [1] * 25 + [2] * 5).view(1, 100)
    weighted = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHT))
    learned = {}
    for name, loss in ('adjusted', LogitAdjustedLoss(WEIGHT)), ('weighted', weighted):
        scores = torch.zeros(1, 3, 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([scores], max_iter=100, line_search_fn='strong_wolfe')

        def step(loss=loss, scores=scores, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(scores.expand(1, 3, 100), labels)
            value.backward()
            return value

        optimizer.step(step)
        learned[name] = scores.detach().softmax(1).flatten().tolist()
    assert learned['adjusted'] == pytest.approx([0.70, 0.25, 0.05], abs=1e-3)
    shares = [0.5 * 0.70, 1.0 * 0.25, 6.0 * 0.05]
    assert learned['weighted'] == pytest.approx([s / sum(shares) for s in shares], abs=1e-3)


def test_pixels_without_a_label_and_half_precision():
    scores, labels = scores_and_labels()
    loss = LogitAdjustedLoss(WEIGHT)
    nothing = scores.clone().requires_grad_()
    empty = loss(nothing, torch.full_like(labels, IGNORED))
    empty.backward()
    assert empty.item() == 0 and not nothing.grad.any()
    half = loss(scores.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(naive(scores.bfloat16().double(), labels), rel=1e-5)


@pytest.mark.parametrize(
    ('wrong', 'error'),
    [
        ('weights.npy', TypeError),
        (2.0, TypeError),
        ([1.0, '2'], TypeError),
        ([1.0, True], TypeError),
        ([], ValueError),
        ([1.0, 0.0], ValueError),
        ([1.0, -1.0], ValueError),
        ([1.0, math.nan], ValueError),
        ([1.0, math.inf], ValueError),
    ],
)
def test_wrong_weights_are_refused(wrong, error):
    with pytest.raises(error, match='class_weight must be'):
        LogitAdjustedLoss(wrong)


def test_other_classes_are_refused():
    scores, labels = scores_and_labels()
    with pytest.raises(ValueError, match='class_weight has 2 weights.* 3 classes'):
        LogitAdjustedLoss([1.0, 2.0])(scores, labels)


def test_a_head_of_mmseg_trains_with_it():
    """Its loss is the naive one of what the head gives, and it has no weights in prediction."""
    pytest.importorskip('mmseg')
    from mmengine.registry import DefaultScope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    config = dict(
        type='FCNHead',
        in_channels=4,
        channels=4,
        num_classes=3,
        loss_decode=dict(type='LogitAdjustedLoss', class_weight=WEIGHT),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        head = MODELS.build(config).eval()
    _, labels = scores_and_labels()
    features = [torch.randn(2, 4, 4, 5, generator=seeded(1))]
    samples = [
        SegDataSample(
            gt_sem_seg=PixelData(data=label[None]),
            metainfo=dict(img_shape=(4, 5), pad_shape=(4, 5)),
        )
        for label in labels
    ]
    logits = head.forward(features)
    losses = head.loss(features, samples, {})
    assert float(losses['loss_ce'].detach()) == pytest.approx(naive(logits, labels), rel=1e-5)
    predicted = head.predict(features, [sample.metainfo for sample in samples], {})
    assert torch.equal(predicted, logits)
