"""Residual attention downsampling between stages (paper, equations 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .windows import WindowGrid, nesting_ratio


class AttentionResidual(nn.Module):
    """Equations 6 and 7: ``LS(Conv1x1(DWConv(A_last)))``, placed in the next stage's windows.

    The last scores of a stage, seen as an image with heads as channels, are halved along each of
    their four spatial axes (query row and column, key row and column) by a depthwise convolution,
    mixed across heads by a 1x1 convolution, and scaled by a LayerScale (CaiT) that starts small.
    The convolutions have no bias: where nothing was attended, nothing is passed on.

    Args:
        prev_heads: Heads of the previous stage.
        num_heads: Heads of this stage.
        prev_window: Side of the previous stage's windows, in its tokens.
        window: Side of this stage's windows, in its tokens.
        layer_scale_init: Start of the LayerScale, one value per head.

    Raises:
        ValueError: If the windows do not nest.
    """

    def __init__(
        self,
        prev_heads: int,
        num_heads: int,
        prev_window: int,
        window: int,
        layer_scale_init: float = 1e-2,
    ) -> None:
        super().__init__()
        nesting_ratio(prev_window, window)
        # Kernel 4 over (query, key), with the four tokens of a 2 x 2 block one after the other, is
        # kernel 2 along each of the four spatial axes.
        self.dwconv = nn.Conv2d(prev_heads, prev_heads, 4, 4, groups=prev_heads, bias=False)
        self.pwconv = nn.Conv2d(prev_heads, num_heads, 1, bias=False)
        self.layer_scale = nn.Parameter(torch.full((num_heads,), layer_scale_init))

    def forward(self, scores: Tensor, prev: WindowGrid, grid: WindowGrid) -> Tensor:
        """Bring scores down one stage.

        Args:
            scores: The previous stage's last scores (windows, prev_heads, n', n'), 0 at padded
                pairs.
            prev: Grid of the previous stage.
            grid: Grid of this stage.

        Returns:
            Tensor (windows, num_heads, n, n): what to add to the first scores of this stage.
        """
        x = ops.halve_pairs(scores, self.dwconv, self.pwconv)
        return grid.nest(x * self.layer_scale[:, None, None], prev)
