"""The geometry: partition, merge, masks, nesting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmlavit.models.windows import WindowGrid, ceil_div, nesting_ratio, pad_map

GRIDS = [(8, 8, 8), (5, 7, 4), (1, 1, 8), (9, 16, 8), (14, 3, 7)]


@pytest.mark.parametrize('height, width, window', GRIDS)
def test_partition_puts_every_token_where_the_coordinates_say(height, width, window):
    grid = WindowGrid(height, width, window)
    parts, heads, d = 3, 2, 5
    x = torch.randn(2, height, width, parts * heads * d)
    out = grid.partition(x, parts, heads)
    assert out.shape == (parts, 2 * grid.rows * grid.cols, heads, window**2, d)
    seen = torch.zeros_like(out, dtype=torch.bool)
    for b in range(2):
        for row in range(height):
            for col in range(width):
                index = (b * grid.rows + row // window) * grid.cols + col // window
                place = row % window * window + col % window
                expected = x[b, row, col].view(parts, heads, d)
                assert torch.equal(out[:, index, :, place], expected)
                seen[:, index, :, place] = True
    assert not out[~seen].any(), 'padded tokens must be 0'


@pytest.mark.parametrize('height, width, window', GRIDS)
def test_merge_and_crop_undo_partition_and_pad(height, width, window):
    grid = WindowGrid(height, width, window)
    x = torch.randn(3, height, width, 12)
    assert torch.equal(grid.merge(grid.partition(x, 1, 4)[0]), x)


@pytest.mark.parametrize('height, width, window', GRIDS)
def test_valid_is_one_partitioned(height, width, window):
    grid = WindowGrid(height, width, window)
    ones = grid.partition(torch.ones(1, height, width, 1), 1, 1)[0, :, 0, :, 0]
    assert torch.equal(grid.valid(), ones.bool())
    assert grid.valid().sum() == height * width
    assert grid.padded == (not grid.valid().all())
    assert grid.valid().any(dim=1).all(), 'every window holds a real token'


@given(st.integers(0, 50), st.integers(1, 9))
def test_ceil_div(a, b):
    assert (ceil_div(a, b) - 1) * b < a <= ceil_div(a, b) * b


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6))
def test_pad_map_reaches_the_next_multiple_with_zeros(height, width, multiple):
    x = torch.ones(1, height, width, 2)
    padded = pad_map(x, multiple)
    assert all(
        s % multiple == 0 and 0 <= s - t < multiple
        for s, t in zip(padded.shape[1:3], x.shape[1:3], strict=True)
    )
    assert torch.equal(padded[:, :height, :width], x)
    assert padded.sum() == x.sum()
    assert height % multiple or width % multiple or padded is x


@pytest.mark.parametrize(
    'prev, window, ratio', [(8, 8, 2), (8, 4, 1), (4, 8, 4), (14, 14, 2), (14, 7, 1), (2, 3, 3)]
)
def test_nesting_ratio(prev, window, ratio):
    assert nesting_ratio(prev, window) == ratio


@pytest.mark.parametrize(
    'height, width, prev_window, window',
    [(16, 16, 8, 8), (16, 16, 8, 4), (11, 21, 8, 8), (9, 9, 4, 8), (3, 40, 4, 6)],
)
def test_nest_places_each_window_on_the_diagonal(height, width, prev_window, window):
    """Against token coordinates: a pair keeps its value if one previous window held both."""
    prev = WindowGrid(height, width, prev_window)
    grid = WindowGrid(ceil_div(height, 2), ceil_div(width, 2), window)
    s, heads, batch = prev_window // 2, 3, 2
    blocks = torch.randn(batch * prev.rows * prev.cols, heads, s * s, s * s)
    out = grid.nest(blocks, prev)
    n = window**2
    assert out.shape == (batch * grid.rows * grid.cols, heads, n, n)
    for index in range(out.shape[0]):
        b, tile = divmod(index, grid.rows * grid.cols)
        tile_row, tile_col = divmod(tile, grid.cols)
        for i in range(n):
            for j in range(n):
                (y, x), (v, u) = (
                    (tile_row * window + k // window, tile_col * window + k % window)
                    for k in (i, j)
                )
                home = (y // s, x // s)
                expected = torch.zeros(heads)
                if home == (v // s, u // s) and home[0] < prev.rows and home[1] < prev.cols:
                    block = blocks[(b * prev.rows + home[0]) * prev.cols + home[1]]
                    expected = block[:, y % s * s + x % s, v % s * s + u % s]
                assert torch.equal(out[index, :, i, j], expected)
