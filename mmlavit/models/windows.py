"""The grid of windows: sizes, partition, merge, padding, nesting.

Everything here is geometry of a map of tokens; nothing knows what the tokens mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.block_diagonal import block_diagonal
from ..ops.mode import may_differ


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, for non-negative ``a`` and positive ``b``."""
    # Not -(-a // b), which is another number in ONNX: its division of integers rounds towards 0.
    return (a + b - 1) // b


def pad_map(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map at the bottom and right to whole multiples.

    Args:
        x: Map (B, H, W, C).
        multiple: What the sides become multiples of.

    Returns:
        Map (B, H', W', C); ``x`` itself where nothing is missing.
    """
    bottom, right = (ceil_div(side, multiple) * multiple - side for side in x.shape[1:3])
    missing = may_differ(bottom, 0) or may_differ(right, 0)
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if missing else x


def nesting_ratio(prev_window: int, window: int) -> int:
    """How many windows of the previous stage lie in one window of the next, per axis.

    A stage halves its token grid, so a window of ``prev_window`` tokens covers ``prev_window / 2``
    tokens of the next stage. A window there must hold a whole number of them.

    Args:
        prev_window: Side of the previous stage's windows, in its tokens.
        window: Side of this stage's windows, in its tokens.

    Returns:
        ``2 * window / prev_window``, an integer >= 1.

    Raises:
        ValueError: If the windows do not nest.
    """
    if prev_window % 2:
        raise ValueError(
            f'window_sizes: {prev_window} is odd, so halving the grid would split a window; '
            'every window size but the last must be even'
        )
    if 2 * window % prev_window:
        raise ValueError(
            f'window_sizes: a window of {prev_window} tokens becomes {prev_window // 2} tokens in '
            f'the next stage, and its window of {window} tokens is not a whole number of those; '
            f'choose a multiple of {prev_window // 2}'
        )
    return 2 * window // prev_window


@dataclass(frozen=True)
class WindowGrid:
    """Non-overlapping ``window x window`` tiles over a ``height x width`` map of tokens.

    Windows are counted row by row, and so are the ``n = window ** 2`` tokens in each. A map that
    the window does not divide is padded at the bottom and right; :meth:`valid` tells real tokens
    from padded ones.

    Args:
        height: Rows of tokens.
        width: Columns of tokens.
        window: Side of a window, in tokens.
    """

    height: int
    width: int
    window: int

    @property
    def rows(self) -> int:
        """Windows from top to bottom."""
        return ceil_div(self.height, self.window)

    @property
    def cols(self) -> int:
        """Windows from left to right."""
        return ceil_div(self.width, self.window)

    @property
    def padded(self) -> bool:
        """Whether any window may hold padded tokens."""
        below = may_differ(self.rows * self.window, self.height)
        return below or may_differ(self.cols * self.window, self.width)

    def pad(self, x: Tensor) -> Tensor:
        """Fill the last windows up with zeros.

        Args:
            x: Map of tokens (B, height, width, C).

        Returns:
            Map (B, rows * window, cols * window, C); ``x`` itself where nothing is missing.
        """
        return pad_map(x, self.window) if self.padded else x

    def crop(self, x: Tensor) -> Tensor:
        """Undo :meth:`pad`.

        Args:
            x: Map (B, rows * window, cols * window, C).

        Returns:
            Map of tokens (B, height, width, C).
        """
        # Not a slice: a copy lies in memory alike whether there was something to cut or not.
        missing = (0, 0, 0, self.width - x.shape[2], 0, self.height - x.shape[1])
        return F.pad(x, missing) if self.padded else x

    def partition(self, x: Tensor, num_parts: int, num_heads: int) -> Tensor:
        """Cut a map into windows, the last ones filled up with zeros, and its channels into heads.

        Args:
            x: Map of tokens (B, height, width, num_parts * num_heads * d).
            num_parts: Equal runs of channels that come apart first (3 for Q, K, V; 1 for V).
            num_heads: Heads in each part.

        Returns:
            Tensor (num_parts, B * rows * cols, num_heads, n, d).
        """
        w, d = self.window, x.shape[-1] // (num_parts * num_heads)
        x = self.pad(x).reshape(-1, self.rows, w, self.cols, w, num_parts, num_heads, d)
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)
        return x.reshape(num_parts, -1, num_heads, w * w, d)

    def merge(self, x: Tensor) -> Tensor:
        """Put windows and heads back into a map; the inverse of :meth:`partition`.

        Args:
            x: Tensor (B * rows * cols, num_heads, n, d).

        Returns:
            Map of tokens (B, height, width, num_heads * d).
        """
        num_heads, d, w = x.shape[1], x.shape[3], self.window
        x = x.reshape(-1, self.rows, self.cols, num_heads, w, w, d).permute(0, 1, 4, 2, 5, 3, 6)
        return self.crop(x.reshape(-1, self.rows * w, self.cols * w, num_heads * d))

    def valid(self, device: torch.device | str | None = None) -> Tensor:
        """Which tokens are real.

        Args:
            device: Where to put the mask.

        Returns:
            Bool tensor (rows * cols, n), the same for every image of a batch.
        """
        w = self.window
        y = torch.arange(self.rows * w, device=device) < self.height
        x = torch.arange(self.cols * w, device=device) < self.width
        mask = y[:, None] & x
        return mask.view(self.rows, w, self.cols, w).transpose(1, 2).reshape(-1, w * w)

    def nest(self, blocks: Tensor, prev: WindowGrid) -> Tensor:
        """Place maps of the previous stage's windows into this stage's windows.

        A previous window, halved, is a ``s x s`` part of a new window; its map of pairs is a
        diagonal block of the new window's map. Pairs that no previous window saw get 0.

        Args:
            blocks: Maps (B * prev.rows * prev.cols, num_heads, s * s, s * s) with
                ``s = prev.window / 2``.
            prev: Grid of the previous stage, of which this grid is the halved one.

        Returns:
            Tensor (B * rows * cols, num_heads, n, n).
        """
        r = nesting_ratio(prev.window, self.window)
        s = prev.window // 2
        num_heads = blocks.shape[1]
        blocks = blocks.reshape(-1, prev.rows, prev.cols, num_heads, s, s, s, s)
        extra_rows, extra_cols = self.rows * r - prev.rows, self.cols * r - prev.cols
        if may_differ(extra_rows, 0) or may_differ(extra_cols, 0):
            blocks = F.pad(blocks, (0,) * 10 + (0, extra_cols, 0, extra_rows))
        if r == 1:
            return blocks.reshape(-1, num_heads, s * s, s * s)
        blocks = blocks.reshape(-1, self.rows, r, self.cols, r, num_heads, s, s, s, s)
        return block_diagonal(blocks.transpose(2, 3)).reshape(
            -1, num_heads, self.window**2, self.window**2
        )
