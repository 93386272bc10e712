"""The geometry of inference in pieces, against that of the models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmlavit.models.windows import WindowGrid
from mmlavit.ops.pieces import cut_into_slabs, fill_padded, merge_and_crop, pad_and_partition

GRIDS = [(8, 8, 8), (5, 7, 4), (1, 1, 8), (9, 16, 8), (14, 3, 7)]


@given(*[st.integers(1, 20)] * 2, st.integers(1, 6), st.integers(1, 4), st.integers(1, 500))
def test_slabs_are_all_windows_in_order(height, width, window, batch, tokens):
    grid = WindowGrid(height, width, window)
    x = torch.arange(batch * height * width).view(batch, height, width, 1)
    expected = grid.partition(x, 1, 1)[0]
    slabs = cut_into_slabs(grid, batch, tokens)
    parts = [slab.grid.partition(slab.of(x), 1, 1)[0] for slab in slabs]
    assert torch.equal(torch.cat(parts), expected)
    assert [slab.count for slab in slabs] == [len(part) for part in parts]
    # No more tokens than asked for, but for a single row of windows.
    least = width * min(window, height)
    assert all(slab.of(x).numel() <= max(tokens, least) for slab in slabs)


@given(*[st.integers(1, 20)] * 2, st.integers(1, 6), st.integers(1, 3))
def test_one_copy_does_what_two_do(height, width, window, batch):
    grid = WindowGrid(height, width, window)
    x = torch.arange(batch * height * width * 12).view(batch, height, width, 12)
    windows = pad_and_partition(grid, x, 3, 2)
    assert torch.equal(windows, grid.partition(x, 3, 2))
    values = windows[1]
    assert torch.equal(merge_and_crop(grid, values), grid.merge(values))


@pytest.mark.parametrize('queries, keys', [(0.0, None), (None, 7.0), (0.0, 7.0), (None, None)])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('height, width, window', GRIDS)
def test_fill_padded(height, width, window, transposed, queries, keys):
    grid = WindowGrid(height, width, window)
    valid = grid.valid()
    pairs = torch.randn(2 * len(valid), 3, window**2, window**2)
    if transposed:
        pairs = pairs.mT
    expected = pairs.clone().unflatten(0, (2, -1))
    if queries is not None:
        expected.masked_fill_(~valid[:, None, :, None], queries)
    if keys is not None:
        expected.masked_fill_(~valid[:, None, None, :], keys)
    fill_padded(grid, pairs, queries=queries, keys=keys)
    assert torch.equal(pairs, expected.flatten(0, 1))
