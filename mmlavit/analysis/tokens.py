"""Where tokens and windows lie in an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.windows import WindowGrid
from .record import LayerAttention

Box = tuple[int, int, int, int]


def stride_of(stage: int) -> int:
    """Pixels from token to token in a stage, counted from 0."""
    return 4 << stage


@dataclass(frozen=True)
class Query:
    """The token of a stage that holds a pixel, in its window.

    Args:
        grid: Grid of the windows over the stage's map of tokens.
        stride: Pixels from token to token.
        row: Row of the token in the map.
        col: Its column.
    """

    grid: WindowGrid
    stride: int
    row: int
    col: int

    @classmethod
    def at(cls, layer: LayerAttention, x: int, y: int) -> Query:
        """The token that holds pixel ``x, y`` in the stage of a layer.

        Raises:
            ValueError: If the layer has no windows.
        """
        stride = stride_of(layer.stage)
        return cls(layer.window_grid, stride, y // stride, x // stride)

    @property
    def window(self) -> int:
        """Which window the token is in."""
        w = self.grid.window
        return self.row // w * self.grid.cols + self.col // w

    @property
    def place(self) -> int:
        """The place of the token in its window."""
        w = self.grid.window
        return self.row % w * w + self.col % w

    @property
    def box(self) -> Box:
        """Left, top, right and bottom of the token, in pixels."""
        s = self.stride
        return self.col * s, self.row * s, (self.col + 1) * s, (self.row + 1) * s

    @property
    def window_box(self) -> Box:
        """Left, top, right and bottom of the real tokens of its window, in pixels."""
        w, s = self.grid.window, self.stride
        left, top = self.col // w * w, self.row // w * w
        right, bottom = min(left + w, self.grid.width), min(top + w, self.grid.height)
        return left * s, top * s, right * s, bottom * s

    def keys(self, maps: np.ndarray) -> np.ndarray:
        """What a layer has for this query, over the real keys of its window.

        Args:
            maps: Maps of one image (windows, heads, n, n).

        Returns:
            Array (heads, rows, columns).
        """
        w, (left, top, right, bottom) = self.grid.window, self.window_box
        keys = maps[self.window, :, self.place].reshape(-1, w, w)
        return keys[:, : (bottom - top) // self.stride, : (right - left) // self.stride]
