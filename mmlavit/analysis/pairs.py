"""Which tokens the windows of a layer hold, which pairs see each other, and what two layers share.

Everything here is geometry; nothing knows what the tokens mean.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.windows import WindowGrid


@dataclass(frozen=True)
class ShiftedWindowGrid(WindowGrid):
    """Windows as in Swin: moved by ``shift`` tokens to the bottom right, around the map's edges.

    Windows that hold both sides of an edge are cut there: tokens of different sides do not see each
    other (Liu et al., Swin Transformer, figure 4).

    Args:
        height: Rows of tokens.
        width: Columns of tokens.
        window: Side of a window, in tokens.
        shift: How far the windows are moved, in tokens, below ``window``.
    """

    shift: int = 0


@functools.lru_cache(maxsize=16)
def tokens_in(grid: WindowGrid) -> Tensor:
    """Which tokens the windows hold.

    Args:
        grid: Grid of the windows.

    Returns:
        Tensor (windows, n) of indices into the map, row by row; -1 at padded places. Do not write
        into it: it is kept for the next call.
    """
    index = torch.arange(1, grid.height * grid.width + 1).view(1, grid.height, grid.width, 1)
    return _in_windows(grid, grid.pad(index)) - 1


@functools.lru_cache(maxsize=16)
def visible_pairs(grid: WindowGrid) -> Tensor:
    """Which pairs of a query and a key see each other.

    Args:
        grid: Grid of the windows.

    Returns:
        Bool tensor (windows, n, n): both are real tokens, and on one side of the map's edges. Do
        not write into it: it is kept for the next call.
    """
    real, side = tokens_in(grid) >= 0, _sides(grid)
    together = side.unsqueeze(-1) == side.unsqueeze(-2)
    return together & real.unsqueeze(-1) & real.unsqueeze(-2)


def _in_windows(grid: WindowGrid, padded: Tensor) -> Tensor:
    """Values (1, H', W', 1) of a padded map in the windows (windows, n)."""
    if shift := getattr(grid, 'shift', 0):
        padded = padded.roll((-shift, -shift), dims=(1, 2))
    return grid.partition(padded, 1, 1)[0, :, 0, :, 0]


def _sides(grid: WindowGrid) -> Tensor:
    """On which sides of the map's edges the places of each window are, (windows, n)."""
    height, width = grid.rows * grid.window, grid.cols * grid.window
    shift = getattr(grid, 'shift', 0)
    # The first rows and columns come last when the map is rolled.
    y, x = torch.arange(height) < shift, torch.arange(width) < shift
    side = 2 * y[:, None].long() + x.long()
    return _in_windows(grid, side.view(1, height, width, 1))


@dataclass(frozen=True)
class Cells:
    """Groups of tokens that see each other in two layers, and where each layer has them.

    Args:
        tokens: (cells, c) indices into the map; -1 where a cell has fewer than c.
        windows: For each layer (cells,): the window that holds the cell.
        places: For each layer (cells, c): the places of the tokens in it; 0 where there is none.
    """

    tokens: Tensor
    windows: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]

    @property
    def visible(self) -> Tensor:
        """Bool tensor (cells, c, c) of the pairs that are there."""
        real = self.tokens >= 0
        return real.unsqueeze(-1) & real.unsqueeze(-2)

    def cut(self, attn: Tensor, layer: int) -> Tensor:
        """Cut the maps of a layer into the cells.

        Args:
            attn: Attention (B, windows, heads, n, n) of one of the two layers.
            layer: Which, 0 or 1.

        Returns:
            Tensor (B, cells, heads, c, c).
        """
        windows, places = self.windows[layer][:, None, None], self.places[layer]
        picked = attn[:, windows, :, places.unsqueeze(-1), places.unsqueeze(-2)]
        return picked.permute(3, 0, 4, 1, 2)


@functools.lru_cache(maxsize=16)
def shared_cells(a: WindowGrid, b: WindowGrid) -> Cells:
    """The largest groups of tokens that are together in a window of both layers.

    Args:
        a: Grid of a layer.
        b: Grid of another, over the same map.

    Returns:
        The cells. Every pair of tokens that see each other in both layers is in exactly one.

    Raises:
        ValueError: If the grids are not over maps of one size.
    """
    if (a.height, a.width) != (b.height, b.width):
        raise ValueError(
            f'a and b must be over maps of one size, got {a.height} x {a.width} and '
            f'{b.height} x {b.width}'
        )
    window_a, place_a, side_a = _homes(a)
    window_b, place_b, side_b = _homes(b)
    # Tokens of one cell agree in window and side, in both layers.
    key = torch.stack([window_a, side_a, window_b, side_b])
    _, cell, count = key.unique(dim=1, return_inverse=True, return_counts=True)
    order = cell.argsort(stable=True)
    start = count.cumsum(0) - count
    within = torch.arange(len(order)) - start[cell[order]]
    tokens = torch.full((len(count), int(count.max())), -1)
    tokens[cell[order], within] = order
    first, some, there = tokens[:, 0], tokens.clamp(min=0), tokens >= 0
    return Cells(
        tokens,
        windows=(window_a[first], window_b[first]),
        places=(place_a[some] * there, place_b[some] * there),
    )


@functools.lru_cache(maxsize=16)
def _homes(grid: WindowGrid) -> tuple[Tensor, Tensor, Tensor]:
    """For each token of the map: its window, its place there, and its side of the edges."""
    tokens = tokens_in(grid)
    real = tokens >= 0
    window, place = real.nonzero(as_tuple=True)
    side = _sides(grid)[real]
    order = tokens[real].argsort()
    return window[order], place[order], side[order]


def home_of(grid: WindowGrid, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Where tokens are.

    Args:
        grid: Grid of the windows.
        tokens: Indices into the map, row by row.

    Returns:
        Their windows and their places in these, of the same shape.
    """
    window, place, _ = _homes(grid)
    return window[tokens], place[tokens]
