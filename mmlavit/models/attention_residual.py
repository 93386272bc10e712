"""Residual attention downsampling between stages (paper, equations 6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.linear import linear
from ..ops.saturate import saturate
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
        # Kernel 4 over (query, key), with the four tokens of a block one after the other, is kernel
        # 2 along each of the four spatial axes. See `kernel` for how the two are applied.
        self.dwconv = nn.Conv2d(prev_heads, prev_heads, 4, 4, groups=prev_heads, bias=False)
        self.pwconv = nn.Conv2d(prev_heads, num_heads, 1, bias=False)
        self.layer_scale = nn.Parameter(torch.full((num_heads,), layer_scale_init))

    def forward(self, scores: Sequence[Tensor], prev: WindowGrid, grid: WindowGrid) -> Tensor:
        """Bring scores down one stage.

        Args:
            scores: The previous stage's last scores, 0 at padded pairs: tensors (windows,
                prev_heads, n', n') that hold all its windows in order.
            prev: Grid of the previous stage.
            grid: Grid of this stage.

        Returns:
            Tensor (windows, num_heads, n, n): what to add to the first scores of this stage.
        """
        kernel = self.kernel()
        # Scores may come as transposed views. Queries and keys then change places, as copying along
        # an axis that is not contiguous takes several times longer.
        swapped = kernel.permute(0, 1, 4, 5, 2, 3)
        halves = [
            halve_pairs(part, kernel) if part.is_contiguous() else halve_pairs(part.mT, swapped).mT
            for part in scores
        ]
        return grid.nest(torch.cat(halves), prev)

    def kernel(self) -> Tensor:
        """Depthwise convolution, 1x1 convolution and LayerScale as one kernel.

        Returns:
            Tensor (num_heads, prev_heads, 2, 2, 2, 2): row and column of the query in its 2 x 2
            block, then of the key.
        """
        scaled = self.pwconv.weight * self.layer_scale[:, None, None, None]
        kernel = scaled * self.dwconv.weight.squeeze(1)
        return kernel.unflatten(3, (2, 2)).unflatten(2, (2, 2))


def halve_pairs(scores: Tensor, kernel: Tensor) -> Tensor:
    """Convolve maps of pairs with stride 2 along all of their four spatial axes.

    A convolution of so few channels is slow, and so is bringing 2 x 2 blocks of tokens together.
    Two rows of keys, though, lie together in memory, and all the blocks that they hold come out of
    one linear layer, whose matrix has the kernel on its diagonal. It multiplies with many zeros and
    is five times as fast.

    Args:
        scores: Maps (windows, prev_heads, n, n) of windows of an even side, contiguous.
        kernel: (num_heads, prev_heads, 2, 2, 2, 2), see :meth:`AttentionResidual.kernel`.

    Returns:
        Tensor (windows, num_heads, n / 4, n / 4).
    """
    num_heads, prev_heads = kernel.shape[:2]
    s = math.isqrt(scores.shape[-1]) // 2
    diagonal = torch.eye(s, dtype=kernel.dtype, device=kernel.device)
    # From (previous head, query row, query column, key row, block, key column) to (head, block).
    matrix = torch.einsum('oiabcd,rt->oriabctd', kernel, diagonal).reshape(num_heads * s, -1)
    x = scores.reshape(-1, prev_heads, s, 2, s, 2, s, 4 * s).permute(0, 2, 4, 6, 1, 3, 5, 7)
    x = saturate(linear(x.reshape(-1, s * s, s, prev_heads * 16 * s), matrix))
    x = x.unflatten(-1, (num_heads, s)).permute(0, 3, 1, 2, 4)
    return x.reshape(-1, num_heads, s * s, s * s)
