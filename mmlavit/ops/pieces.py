"""Geometry of inference in pieces: slabs of a map, windows in one copy, padding overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..models.windows import WindowGrid, ceil_div


@dataclass(frozen=True)
class Slab:
    """Some windows of a batch of maps of tokens.

    Args:
        image: The first of its maps.
        images: How many maps.
        row: The first of its rows of tokens in each.
        grid: Grid of the windows over its rows.
    """

    image: int
    images: int
    row: int
    grid: WindowGrid

    @property
    def count(self) -> int:
        """Windows, over all maps."""
        return self.images * self.grid.rows * self.grid.cols

    def of(self, x: Tensor) -> Tensor:
        """The slab's tokens of a batch of maps (B, H, W, C), a view."""
        return x[self.image : self.image + self.images, self.row : self.row + self.grid.height]

    def is_whole(self, x: Tensor) -> bool:
        """Whether it has all rows of the maps ``x`` (B, H, W, C)."""
        return self.grid.height == x.shape[1]

    def with_neighbours(self, x: Tensor) -> Tensor:
        """Its tokens of ``x`` (B, H, W, C), and the row above and below where there is one."""
        rows = slice(max(self.row - 1, 0), self.row + self.grid.height + 1)
        return x[self.image : self.image + self.images, rows]

    def without_neighbours(self, x: Tensor) -> Tensor:
        """The slab's tokens of what :meth:`with_neighbours` has, a view."""
        first = min(self.row, 1)
        return x[:, first : first + self.grid.height]


def cut_into_slabs(grid: WindowGrid, batch: int, tokens: int) -> list[Slab]:
    """Cut a batch of maps into pieces that share no window.

    Args:
        grid: Grid of the windows.
        batch: Maps in the batch.
        tokens: How many tokens a piece may hold, unless a single row of windows has more.

    Returns:
        Groups of whole maps or, where a map has more tokens than that, rows of windows of one
        map, in the order in which the windows are counted. Pieces are about equal.
    """
    most = tokens // (grid.height * grid.width)
    if most:
        group = ceil_div(batch, ceil_div(batch, most))
        return [Slab(i, min(group, batch - i), 0, grid) for i in range(0, batch, group)]
    most = max(1, tokens // (grid.window * grid.width))
    step = ceil_div(grid.rows, ceil_div(grid.rows, most)) * grid.window
    cuts = [
        (y, WindowGrid(min(step, grid.height - y), grid.width, grid.window))
        for y in range(0, grid.height, step)
    ]
    return [Slab(i, 1, y, part) for i in range(batch) for y, part in cuts]


def pad_and_partition(grid: WindowGrid, x: Tensor, num_parts: int, num_heads: int) -> Tensor:
    """``grid.partition(x)`` in one copy; gradients do not come through it.

    Args:
        grid: Grid of the windows.
        x: Map (B, height, width, num_parts * num_heads * d).
        num_parts: As there.
        num_heads: As there.

    Returns:
        Tensor (num_parts, B * rows * cols, num_heads, n, d).
    """
    if not grid.padded:
        return grid.partition(x, num_parts, num_heads)
    w, d = grid.window, x.shape[-1] // (num_parts * num_heads)
    out = x.new_zeros(num_parts, x.shape[0], grid.rows, grid.cols, num_heads, w, w, d)
    windows = out.permute(1, 2, 3, 5, 6, 0, 4, 7)
    for in_windows, in_map in _regions(grid, windows, x.unflatten(-1, (num_parts, -1, d))):
        in_windows.copy_(in_map)
    return out.view(num_parts, -1, num_heads, w * w, d)


def merge_and_crop(grid: WindowGrid, x: Tensor) -> Tensor:
    """``grid.merge(x)`` in one copy; gradients do not come through it.

    Args:
        grid: Grid of the windows.
        x: Tensor (B * rows * cols, num_heads, n, d).

    Returns:
        Map (B, height, width, num_heads * d).
    """
    if not grid.padded:
        return grid.merge(x)
    num_heads, d, w = x.shape[1], x.shape[3], grid.window
    windows = x.reshape(-1, grid.rows, grid.cols, num_heads, w, w, d)
    out = x.new_empty(windows.shape[0], grid.height, grid.width, num_heads, d)
    for in_windows, in_map in _regions(grid, windows.permute(0, 1, 2, 4, 5, 3, 6), out):
        in_map.copy_(in_windows)
    return out.flatten(-2)


def _regions(grid: WindowGrid, windows: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole windows, those cut at the right, at the bottom, and at both.

    Args:
        grid: Grid of the windows.
        windows: (B, rows, cols, window, window, ...).
        x: The map (B, height, width, ...) that they hold.

    Yields:
        A part of each, views of equal shape (B, rows, cols, height, width, ...).
    """
    for rows, ys, height in _runs(grid, grid.height):
        for cols, xs, width in _runs(grid, grid.width):
            part = x[:, ys, xs].unflatten(2, (-1, width)).unflatten(1, (-1, height))
            yield windows[:, rows, cols, :height, :width], part.transpose(2, 3)


def _runs(grid: WindowGrid, size: int) -> list[tuple[slice, slice, int]]:
    """Windows of equal extent along an axis: which, over which tokens, how many in each."""
    whole, rest = divmod(size, grid.window)
    end = whole * grid.window
    runs = [(slice(0, whole), slice(0, end), grid.window)] if whole else []
    return [*runs, (slice(whole, whole + 1), slice(end, size), rest)] if rest else runs


def fill_padded(
    grid: WindowGrid, pairs: Tensor, *, queries: float | None = None, keys: float | None = None
) -> None:
    """Overwrite the pairs that involve a padded token, in place.

    Args:
        grid: Grid of the windows.
        pairs: Maps of pairs (B * rows * cols, num_heads, n, n).
        queries: Value for pairs with a padded query; None leaves them.
        keys: Value for pairs with a padded key, then; None leaves them.
    """
    w = grid.window
    pairs = pairs.view(-1, grid.rows, grid.cols, pairs.shape[1], w, w, w, w)
    bottom, right = pairs[:, -1], pairs[:, :, -1]
    rows, cols = grid.height - (grid.rows - 1) * w, grid.width - (grid.cols - 1) * w
    for value, first in ((queries, 3), (keys, 5)):
        if value is not None and rows < w:
            bottom.narrow(first, rows, w - rows).fill_(value)
        if value is not None and cols < w:
            right.narrow(first + 1, cols, w - cols).fill_(value)
