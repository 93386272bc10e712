"""The diagonality preserving loss (equations 8 and 9) as a pure function."""

import math
from itertools import permutations
from statistics import pstdev

import pytest
import torch
from small import seeded
from torch import Tensor

from mmlavit import diagonality_preserving_loss

WINDOWS, HEADS, N = 3, 2, 6
# Real tokens: all; with a hole; a single pair.
VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1]], dtype=torch.bool)


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def naive_loss(scores: Tensor, valid: Tensor | None = None) -> float:
    """Straight from the equations, on Python numbers, pair by pair."""
    means = []
    for window, heads in enumerate(scores.tolist()):
        for a in heads:
            real = [i for i in range(len(a)) if valid is None or valid[window, i]]
            pairs = list(permutations(real, 2))
            asymmetry = sum(abs(a[i][j] - a[j][i]) for i, j in pairs)
            excess = sum(max(a[i][j] - a[i][i], 0) for i, j in pairs)
            spread = pstdev(a[i][j] for i in real for j in real) if pairs else 0
            means.append((asymmetry + excess) / len(pairs) / spread if spread else 0)
    return sum(means) / len(means)


def symmetric_dominant(*shape: int) -> Tensor:
    """Random maps whose diagonal is at least 1 over everything else."""
    scores = random_scores(*shape)
    scores = scores + scores.mT
    largest = scores.amax(dim=(-2, -1))[..., None, None]
    return scores.where(~torch.eye(shape[-1], dtype=torch.bool), largest + 1)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('valid', [None, VALID], ids=['whole', 'padded'])
def test_is_the_naive_loop(seed, valid):
    scores = random_scores(WINDOWS, HEADS, N, N, seed=seed)
    loss = diagonality_preserving_loss(scores, valid)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(naive_loss(scores, valid), abs=1e-12)


def test_all_real_tokens_are_no_mask():
    scores = random_scores(WINDOWS, HEADS, N, N)
    everywhere = torch.ones(WINDOWS, N, dtype=torch.bool)
    torch.testing.assert_close(
        diagonality_preserving_loss(scores, everywhere), diagonality_preserving_loss(scores)
    )


def test_a_transposed_view_counts_like_its_copy():
    """The layers hand out views whichever way their last product wrote them."""
    view = random_scores(WINDOWS, HEADS, N, N).mT
    for valid in (None, VALID):
        torch.testing.assert_close(
            diagonality_preserving_loss(view, valid),
            diagonality_preserving_loss(view.contiguous(), valid),
        )


# ---- What it measures ----------------------------------------------------------------------------


@pytest.mark.parametrize('valid', [None, VALID], ids=['whole', 'padded'])
def test_zero_on_symmetric_dominant_maps(valid):
    assert diagonality_preserving_loss(symmetric_dominant(WINDOWS, HEADS, N, N), valid) == 0


def test_zero_where_the_diagonal_is_only_as_large():
    assert diagonality_preserving_loss(torch.full((1, 1, N, N), 7.0)) == 0


@pytest.mark.parametrize(
    'a, violation, variance',
    [
        # Asymmetry alone: both ordered pairs differ by 1.
        ([[2, 1], [0, 2]], 1, 11 / 16),
        # Dominance alone: 1 over the diagonal in row 0, 3 in row 1.
        ([[1, 2], [2, -1]], (1 + 3) / 2, 3 / 2),
        # Both: |3 - 1| twice; 3 over 2 in row 0, 1 under 2 in row 1.
        ([[2, 3], [1, 2]], (2 + 2) / 2 + 1 / 2, 1 / 2),
        # One of six ordered pairs of each kind: A_01 is 1 more than A_10 and 1 over A_00.
        ([[0, 1, -5], [0, 9, -5], [-5, -5, 9]], (1 + 1) / 6 + 1 / 6, 263 / 9 - (1 / 9) ** 2),
        # Rows are compared with their own diagonal: A_10 = 1 is over A_00 = 0, which is no matter.
        ([[0, 1], [1, 9]], 1 / 2, 83 / 4 - (11 / 4) ** 2),
    ],
)
def test_by_hand(a, violation, variance):
    scores = torch.tensor(a, dtype=torch.float64)[None, None]
    expected = violation / math.sqrt(variance)
    assert diagonality_preserving_loss(scores).item() == pytest.approx(expected, abs=1e-12)


def test_each_violation_alone_is_seen():
    dominant = symmetric_dominant(1, 1, N, N)
    asymmetric = dominant.clone()
    asymmetric[0, 0, 1, 4] -= 0.5
    overtaken = dominant.clone()
    overtaken[0, 0, 2, 2] = overtaken[0, 0, 2].min() - 1
    assert torch.equal(overtaken, overtaken.mT)
    assert diagonality_preserving_loss(asymmetric) > 0
    assert diagonality_preserving_loss(overtaken) > 0


@pytest.mark.parametrize('valid', [None, VALID], ids=['whole', 'padded'])
@pytest.mark.parametrize('c', [1e-4, 1e-2, 3.0, 1e2, 1e4])
def test_looks_at_the_pattern_whatever_its_scale(c, valid):
    scores = random_scores(WINDOWS, HEADS, N, N).float()
    loss = diagonality_preserving_loss(scores, valid)
    scaled = diagonality_preserving_loss(c * scores, valid)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-4)
    # Each map has a scale of its own.
    factors = torch.tensor([[1.0, c], [c, 1.0], [c, c]])[..., None, None]
    apart = diagonality_preserving_loss(factors * scores, valid)
    assert apart.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_pattern_as_far_as_it_can(dtype):
    scores = random_scores(WINDOWS, HEADS, N, N)
    loss = diagonality_preserving_loss(scores)
    # Beyond these, float16 rounds more coarsely or ends.
    for c in (1e-2, 1.0, 1e4):
        rounded = diagonality_preserving_loss((c * scores).to(dtype))
        assert rounded.item() == pytest.approx(loss.item(), rel=4 * torch.finfo(dtype).eps)


def test_ignores_a_shift():
    scores = random_scores(WINDOWS, HEADS, N, N)
    loss = diagonality_preserving_loss(scores, VALID)
    torch.testing.assert_close(diagonality_preserving_loss(scores + 5, VALID), loss)


@pytest.mark.parametrize('valid', [None, VALID], ids=['whole', 'padded'])
@pytest.mark.parametrize('c', [1e-4, 1.0, 1e4])
def test_never_asks_for_larger_or_smaller_scores(c, valid):
    """Its gradient is orthogonal to each map, and to even maps."""
    scores = (c * random_scores(WINDOWS, HEADS, N, N)).requires_grad_()
    (gradient,) = torch.autograd.grad(diagonality_preserving_loss(scores, valid), scores)
    size = gradient.norm(dim=(-2, -1)) * scores.detach().norm(dim=(-2, -1))
    assert (size > 0).all()
    along = (gradient * scores.detach()).sum(dim=(-2, -1))
    assert (along.abs() <= 1e-12 * size).all()
    sums = gradient.abs().sum(dim=(-2, -1))
    assert (gradient.sum(dim=(-2, -1)).abs() <= 1e-12 * sums).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('value', [0.0, 1e-4, -7.0, 6e4])
@pytest.mark.parametrize('noise', [0.0, 3e-7])
def test_an_even_map_counts_as_zero_and_pulls_nowhere(value, noise, dtype):
    even = (value * (1 + noise * random_scores(WINDOWS, HEADS, N, N))).to(dtype)
    even = even.requires_grad_()
    for valid in (None, VALID):
        loss = diagonality_preserving_loss(even, valid)
        (gradient,) = torch.autograd.grad(loss, even)
        assert loss == 0 and gradient.isfinite().all() and not gradient.any()
    # Beside it, others count as ever.
    lively = random_scores(WINDOWS, HEADS, N, N).to(dtype)
    both = torch.cat([even.detach(), lively]).requires_grad_()
    loss = diagonality_preserving_loss(both)
    torch.testing.assert_close(loss, diagonality_preserving_loss(lively) / 2)
    (gradient,) = torch.autograd.grad(loss, both)
    assert not gradient[:WINDOWS].any() and gradient[WINDOWS:].isfinite().all()


def test_a_map_that_is_hardly_uneven_counts():
    scores = 1 + 1e-5 * random_scores(WINDOWS, HEADS, N, N)
    assert diagonality_preserving_loss(scores) > 0.1


def test_training_on_it_alone_makes_the_pattern_and_leaves_the_size():
    """Q and K of random tokens, 300 steps of Adam with a learning rate of 1e-3, falling to 0."""
    tokens, d, steps = 16, 32, 300
    generator = seeded(0)
    x = torch.randn(8, tokens, d, generator=generator)
    q, k = (torch.randn(d, d, generator=generator).div(math.sqrt(d)) for _ in range(2))
    q, k = q.requires_grad_(), k.requires_grad_()
    optimizer = torch.optim.Adam([q, k], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def scores() -> Tensor:
        return ((x @ q) @ (x @ k).mT / math.sqrt(d)).unsqueeze(1)

    start = scores().detach()
    assert start.std().item() == pytest.approx(1, abs=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        diagonality_preserving_loss(scores()).backward()
        optimizer.step()
        schedule.step()
    end = scores().detach()
    before, after = diagonality_preserving_loss(start), diagonality_preserving_loss(end)
    assert after <= before / 10
    assert 1 / 2 <= end.std() / start.std() <= 2


def test_descent_on_it_alone_restores_both_properties():
    scores = random_scores(1, 2, 5, 5).requires_grad_()
    off_diagonal = ~torch.eye(5, dtype=torch.bool)

    def violations() -> tuple[float, float]:
        a = scores.detach()
        excess = (a - a.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))[..., off_diagonal]
        return (a - a.mT).abs().max().item(), excess.max().item()

    assert min(violations()) > 0.5
    steps = 400
    for step in range(steps):
        (gradient,) = torch.autograd.grad(diagonality_preserving_loss(scores), scores)
        with torch.no_grad():
            # The loss is piecewise linear: steps must shrink to settle on its floor.
            scores -= 2 * (1 - step / steps) * gradient
    assert max(violations()) < 0.01


# ---- Windows, batch, padding ---------------------------------------------------------------------


def test_independent_of_the_number_of_windows():
    scores = random_scores(WINDOWS, HEADS, N, N)
    once = diagonality_preserving_loss(scores, VALID)
    tiled = diagonality_preserving_loss(scores.repeat(5, 1, 1, 1), VALID.repeat(5, 1))
    torch.testing.assert_close(tiled, once)
    torch.testing.assert_close(
        diagonality_preserving_loss(scores.repeat(5, 1, 1, 1)), diagonality_preserving_loss(scores)
    )


def test_windows_and_heads_count_alike():
    """However many real tokens they hold."""
    scores = random_scores(WINDOWS, HEADS, N, N)
    apart = [
        diagonality_preserving_loss(scores[w : w + 1, h : h + 1], VALID[w : w + 1])
        for w in range(WINDOWS)
        for h in range(HEADS)
    ]
    torch.testing.assert_close(
        diagonality_preserving_loss(scores, VALID), torch.stack(apart).mean()
    )


def test_a_padded_window_is_its_real_tokens():
    scores = random_scores(WINDOWS, HEADS, N, N)
    for window, valid in enumerate(VALID):
        cut_out = scores[window, :, valid][:, :, valid][None]
        torch.testing.assert_close(
            diagonality_preserving_loss(scores[window : window + 1], valid[None]),
            diagonality_preserving_loss(cut_out),
        )


@pytest.mark.parametrize('filling', [0.0, 1e4, -1e4, math.inf, -math.inf, math.nan])
def test_padding_leaves_no_trace(filling):
    padded = ~(VALID[:, None, :, None] & VALID[:, None, None, :]).expand(-1, HEADS, -1, -1)
    plain = random_scores(WINDOWS, HEADS, N, N).requires_grad_()
    filled = plain.detach().masked_fill(padded, filling).requires_grad_()
    losses = [diagonality_preserving_loss(scores, VALID) for scores in (plain, filled)]
    assert losses[0] == losses[1]
    gradients = [
        torch.autograd.grad(loss, scores)[0]
        for loss, scores in zip(losses, (plain, filled), strict=True)
    ]
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0][padded].count_nonzero() == 0
    assert gradients[0][~padded].count_nonzero() > 0


@pytest.mark.parametrize('real', [0, 1])
def test_a_window_without_pairs_counts_as_zero(real):
    scores = random_scores(2, HEADS, N, N).requires_grad_()
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[1, real:] = False
    loss = diagonality_preserving_loss(scores, valid)
    torch.testing.assert_close(loss, diagonality_preserving_loss(scores[:1]) / 2)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[1].count_nonzero() == 0 and gradient.isfinite().all()
    assert diagonality_preserving_loss(scores[1:], valid[1:]) == 0


def test_a_window_of_one_token_has_no_pairs():
    assert diagonality_preserving_loss(random_scores(2, HEADS, 1, 1)) == 0


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize('valid', [None, VALID], ids=['whole', 'padded'])
def test_gradcheck(valid):
    """All entries 0.1 apart, so that no step of the check crosses a kink."""
    count = WINDOWS * HEADS * N * N
    scores = 0.1 * torch.randperm(count, generator=seeded(0)).double()
    scores = scores.view(WINDOWS, HEADS, N, N).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: diagonality_preserving_loss(a, valid), scores)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    # Differences up to 1.2e5, sums of them and squares, which float16 cannot hold.
    scores = (6e4 * random_scores(64, HEADS, N, N).clamp(-1, 1)).to(dtype).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss = diagonality_preserving_loss(scores)
    assert loss.dtype == torch.float32
    assert loss == diagonality_preserving_loss(scores.detach().float())
    assert loss.item() == pytest.approx(naive_loss(scores.detach().double()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.count_nonzero()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_keeps_full_precision(dtype):
    assert diagonality_preserving_loss(torch.ones(1, 1, 3, 3, dtype=dtype)).dtype == dtype
