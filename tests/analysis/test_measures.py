"""Measures of attention against naive loops, and what must hold of them."""

import math

import pytest
import torch
from small import seeded
from torch import Tensor

from mmlavit.analysis.measures import (
    cka,
    cosine_similarity,
    diagonality,
    entropy,
    hsic,
    symmetry,
)
from mmlavit.analysis.pairs import ShiftedWindowGrid, shared_cells, tokens_in, visible_pairs
from mmlavit.models.windows import WindowGrid

ONE_MAP = [diagonality, symmetry, entropy]


def attention(maps: int = 5, heads: int = 3, n: int = 6, m: int = 6, seed: int = 0) -> Tensor:
    scores = torch.randn(maps, heads, n, m, generator=seeded(seed), dtype=torch.float64)
    return (2 * scores).softmax(dim=-1)


def some_visible(maps: int = 5, n: int = 6, seed: int = 1) -> Tensor:
    """Tokens of the first map see nobody but themselves; those of the others are in two groups."""
    generator = seeded(seed)
    real = torch.rand(maps, n, generator=generator) < 0.8
    side = torch.rand(maps, n, generator=generator) < 0.6
    real[0] = torch.arange(n) == 2
    together = side[:, :, None] == side[:, None]
    return together & real[:, :, None] & real[:, None]


def naive(name: str, a: Tensor, seen: Tensor) -> float:
    """A measure of one map (n, n) and the pairs that count, by loops over numbers."""
    n = len(a)
    rows = {}
    for i in range(n):
        keys = [j for j in range(n) if seen[i, j]]
        total = sum(float(a[i, j]) for j in keys)
        if keys:
            rows[i] = {j: float(a[i, j]) / total for j in keys}
    if name == 'diagonality':
        own = [
            (row[i] - 1 / len(row)) / (1 - 1 / len(row)) for i, row in rows.items() if len(row) > 1
        ]
        return sum(own) / len(own) if own else math.nan
    if name == 'symmetry':
        pairs = [(i, j) for i in rows for j in rows[i] if i != j]
        if not pairs:
            return math.nan
        differs = sum(abs(rows[i][j] - rows[j][i]) for i, j in pairs)
        return 1 - differs / sum(rows[i][j] + rows[j][i] for i, j in pairs)
    spread = [
        -sum(p * math.log(p) for p in row.values()) / math.log(len(row))
        for row in rows.values()
        if len(row) > 1
    ]
    return sum(spread) / len(spread) if spread else math.nan


# ---- Measures of one layer -----------------------------------------------------------------------


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('measure', ONE_MAP)
def test_a_measure_is_that_of_loops_over_numbers(measure, masked):
    a = attention()
    visible = some_visible() if masked else None
    seen = torch.ones(5, 6, 6, dtype=torch.bool) if visible is None else visible
    expected = [[naive(measure.__name__, head, seen[i]) for head in a[i]] for i in range(len(a))]
    found = measure(a, visible)
    torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True)
    # The cases that are not defined are there, or nothing was tried.
    assert bool(found.isnan().any()) == masked


@pytest.mark.parametrize('measure', ONE_MAP)
def test_pairs_that_do_not_count_never_matter(measure):
    a, visible = attention(), some_visible()
    other = torch.where(visible[:, None], a, torch.tensor(float('nan')).double())
    assert torch.equal(measure(a, visible).isnan(), measure(other, visible).isnan())
    torch.testing.assert_close(
        measure(other, visible), measure(a, visible), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ('matrix', 'expected'),
    [
        ('identity', (1, 1, 0)),
        ('uniform', (0, 1, 1)),
        ('next', (-1 / 7, 0, 0)),
        ('mutual', (-1 / 7, 1, 0)),
    ],
)
def test_measures_of_maps_that_one_knows(matrix, expected):
    eye = torch.eye(8).double()
    maps = {
        'identity': eye,
        'uniform': torch.full((8, 8), 1 / 8).double(),
        'next': eye.roll(1, 0),  # round the ring, one way
        'mutual': eye.flip(0),  # the first and the last, the second and the last but one, ...
    }
    a = maps[matrix].expand(2, 3, 8, 8)
    for measure, value in zip(ONE_MAP, expected, strict=True):
        torch.testing.assert_close(measure(a), torch.full((2, 3), float(value)).double())


def test_entropy_and_diagonality_are_relative_to_the_keys_that_are_seen():
    visible = some_visible()
    even = visible.double().unsqueeze(1) + 1e-300
    for measure, expected in ((entropy, 1.0), (diagonality, 0.0)):
        found = measure(even, visible)
        assert found.isnan()[0].all()
        torch.testing.assert_close(found[1:], torch.full((4, 1), expected).double())


def test_maps_that_are_not_square_have_an_entropy_alone():
    a = attention(m=4)
    torch.testing.assert_close(entropy(a.new_ones(1, 1, 6, 4)), torch.ones(1, 1).double())
    assert entropy(a).shape == (5, 3)
    for measure in (diagonality, symmetry):
        with pytest.raises(ValueError, match=r'as many queries as keys.*\(5, 3, 6, 4\)'):
            measure(a)


def test_half_precision_is_measured_in_float32():
    a = attention()
    for measure in ONE_MAP:
        half = measure(a.half())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), measure(a), rtol=0, atol=2e-3)


# ---- Similarity of two layers --------------------------------------------------------------------


def test_cosine_is_that_of_loops_and_leaves_out_what_does_not_count():
    a, b, visible = attention(seed=2), attention(seed=3), some_visible()
    scaled = [
        (x * visible[:, None]) / (x * visible[:, None]).sum(-1, keepdim=True).clamp(min=1e-300)
        for x in (a, b)
    ]
    expected = torch.zeros(5, 3).double()
    for i in range(5):
        for head in range(3):
            x, y = (s[i, head].flatten().tolist() for s in scaled)
            product = sum(p * q for p, q in zip(x, y, strict=True))
            size = math.sqrt(sum(p * p for p in x)) * math.sqrt(sum(q * q for q in y))
            expected[i, head] = product / size
    torch.testing.assert_close(cosine_similarity(a, b, visible), expected)
    junk = torch.where(visible[:, None], a, torch.tensor(float('nan')).double())
    torch.testing.assert_close(cosine_similarity(junk, b, visible), expected)


def test_cosine_of_the_same_of_even_and_of_disjoint_attention():
    a = attention()
    torch.testing.assert_close(cosine_similarity(a, a), torch.ones(5, 3).double())
    eye = torch.eye(6).double().expand(5, 3, 6, 6)
    assert not cosine_similarity(eye, eye.roll(1, -1)).any()
    # The cosine of one of n ones with n ones.
    even = torch.full_like(a, 1 / 6)
    torch.testing.assert_close(cosine_similarity(eye, even), torch.full((5, 3), 6**-0.5).double())


def naive_hsic(k: Tensor, g: Tensor) -> float:
    """The mean over all quadruples of different examples (Song et al. 2012, equation 4)."""
    n = len(k)
    pair, triple, quadruple = [], [], []
    for i in range(n):
        for j in set(range(n)) - {i}:
            pair.append(k[i, j] * g[i, j])
            for q in set(range(n)) - {i, j}:
                triple.append(k[i, j] * g[i, q])
                quadruple += [k[i, j] * g[q, r] for r in set(range(n)) - {i, j, q}]
    pair, triple, quadruple = (float(sum(x) / len(x)) for x in (pair, triple, quadruple))
    return pair + quadruple - 2 * triple


def features(examples: int, count: int, seed: int) -> Tensor:
    return torch.randn(examples, count, generator=seeded(seed), dtype=torch.float64)


def test_hsic_is_the_mean_over_quadruples():
    x, y = features(7, 3, seed=4), features(7, 5, seed=5)
    k, g = x @ x.mT, y @ y.mT + k_shift(7)
    found = hsic(k, g)
    torch.testing.assert_close(float(found), naive_hsic(k, g))


def k_shift(n: int) -> Tensor:
    """What the diagonal holds is of no account."""
    return torch.arange(n).double().diag()


def kornblith(x: Tensor, y: Tensor) -> float:
    """Linear CKA as in the paper (equation 5): ``||Y^T X||^2 / (||X^T X|| ||Y^T Y||)``, centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.mT @ x).norm() ** 2 / ((x.mT @ x).norm() * (y.mT @ y).norm()))


def test_cka_is_that_of_kornblith_when_examples_are_many():
    x = features(3000, 6, seed=6)
    y = x @ features(6, 4, seed=7) + 2 * features(3000, 4, seed=8)
    expected = kornblith(x, y)
    assert 0.1 < expected < 0.9
    assert abs(float(cka(x, y)) - expected) < 3e-3


def test_cka_of_unrelated_features_is_about_0_although_they_outnumber_the_examples():
    found = [float(cka(features(40, 400, seed=s), features(40, 400, seed=s + 1))) for s in (10, 20)]
    assert max(map(abs, found)) < 0.05
    # For which the usual estimate says that they are nearly the same.
    assert kornblith(features(40, 400, seed=10), features(40, 400, seed=11)) > 0.8


def test_cka_does_not_change_when_features_are_scaled_moved_rotated_or_ordered_otherwise():
    x, y = features(30, 8, seed=12), features(30, 8, seed=13) + features(30, 8, seed=12)
    expected = cka(x, y)
    assert 0.1 < expected < 0.9
    rotation = torch.linalg.qr(features(8, 8, seed=14)).Q
    for other in (-7 * x, x + 3, x @ rotation, x[:, torch.arange(8).flip(0)]):
        torch.testing.assert_close(cka(other, y), expected)
        torch.testing.assert_close(cka(y, other), expected)
        torch.testing.assert_close(cka(other, x), torch.ones(()).double())
    stretched = x * torch.tensor([5.0] + 7 * [1.0])
    assert abs(cka(stretched, y) - expected) > 1e-3


def test_cka_of_features_that_do_not_vary_is_not_defined():
    x = features(10, 3, seed=15)
    assert cka(torch.full((10, 64), 1 / 64), x).isnan()
    # Rounding of float32 is no variation.
    rows = attention(n=1, m=64)[0, 0, 0].float().expand(10, 64)
    rows = rows * (1 + 1e-7 * features(10, 1, seed=16).float())
    assert cka(rows, x).isnan()


# ---- Which pairs ---------------------------------------------------------------------------------


def naive_windows(grid: WindowGrid) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Window -> its tokens (y, x); windows that a shift wraps round an edge are cut there."""
    shift = getattr(grid, 'shift', 0)
    w = grid.window
    found: dict = {}
    for y in range(grid.height):
        for x in range(grid.width):
            # Where the token lies after the roll; what comes round gets a window of its own.
            found.setdefault(((y - shift) // w, (x - shift) // w), []).append((y, x))
    return found


GRIDS = [
    WindowGrid(6, 9, 3),
    WindowGrid(5, 7, 4),
    ShiftedWindowGrid(6, 9, 3, 1),
    ShiftedWindowGrid(5, 9, 4, 2),
    ShiftedWindowGrid(4, 4, 4, 2),
    ShiftedWindowGrid(3, 9, 7, 3),
]


def pairs_of(grid: WindowGrid) -> set[tuple]:
    groups = naive_windows(grid).values()
    return {(a, b) for group in groups for a in group for b in group}


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_tokens_see_those_of_their_window_on_their_side_of_the_edges(grid):
    tokens, visible = tokens_in(grid), visible_pairs(grid)
    place = {y * grid.width + x: (y, x) for y in range(grid.height) for x in range(grid.width)}
    assert sorted(tokens[tokens >= 0].tolist()) == sorted(place)
    found = [(place[int(tokens[w, i])], place[int(tokens[w, j])]) for w, i, j in visible.nonzero()]
    assert len(found) == len(set(found))
    assert set(found) == pairs_of(grid)


@pytest.mark.parametrize(
    'pair', [(GRIDS[0], GRIDS[2]), (GRIDS[3], WindowGrid(5, 9, 4)), (GRIDS[4], WindowGrid(4, 4, 4))]
)
def test_cells_hold_the_pairs_that_two_layers_share(pair):
    """Each pair of tokens is written into its place of a map, and found again in the cell."""
    cells = shared_cells(*pair)
    wanted = pairs_of(pair[0]) & pairs_of(pair[1])
    width = pair[0].width
    tokens = cells.tokens
    found = {
        tuple(divmod(int(tokens[c, i]), width) for i in ij)
        for c, *ij in cells.visible.nonzero().tolist()
    }
    assert found == wanted
    assert len(found) == int(cells.visible.sum())
    for layer, grid in enumerate(pair):
        own = tokens_in(grid)
        codes = 1000.0 * own[:, :, None] + own[:, None]  # of query and key
        cut = cells.cut(codes[None, :, None], layer)[0, :, 0]
        expected = 1000.0 * tokens[:, :, None] + tokens[:, None]
        assert torch.equal(cut[cells.visible], expected[cells.visible])


def test_maps_of_two_sizes_share_nothing():
    with pytest.raises(ValueError, match='one size, got 6 x 9 and 5 x 7'):
        shared_cells(GRIDS[0], GRIDS[1])


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('call', 'error', 'match'),
    [
        (lambda a: entropy(a.long()), TypeError, 'attn must be a floating-point.*int64'),
        (lambda a: entropy([1]), TypeError, 'attn .* list'),
        (lambda a: entropy(a[0]), ValueError, r'attn must be \(maps.*\(3, 6, 6\)'),
        (lambda a: symmetry(a, some_visible().long()), TypeError, 'visible must be a bool'),
        (lambda a: symmetry(a, some_visible()[1:]), ValueError, r'visible must be .*\(4, 6, 6\)'),
        (lambda a: cosine_similarity(a, a[1:]), ValueError, r'one shape.*\(4, 3, 6, 6\)'),
        (lambda a: cka(a, a), ValueError, r'x must be \(examples, features\)'),
        (lambda a: cka(a[0, 0], a[0, 0, :5]), ValueError, r'\(6, 6\) and \(5, 5\)'),
        (lambda a: cka(a[0, 0, :3], a[0, 0, :3]), ValueError, 'at least 4 examples, got 3'),
    ],
)
def test_refuses_what_it_cannot_measure(call, error, match):
    with pytest.raises(error, match=match):
        call(attention())
