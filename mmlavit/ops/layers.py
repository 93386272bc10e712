"""The layers of a stage, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.windows import WindowGrid
from . import inference


def layers(
    blocks: Sequence[nn.Module],
    x: Tensor,
    grid: WindowGrid,
    residual: Tensor | None,
    with_cp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the layers of a stage.

    Args:
        blocks: The layers: vanilla ones first, then less-attention ones.
        x: Map of tokens (B, H, W, C).
        grid: Grid of the windows over it.
        residual: What the first layer takes beside the tokens: scores from the previous stage, or
            None.
        with_cp: Whether to recompute each layer in the backward pass instead of storing it.

    Returns:
        The new map and the last layer's scores (windows, heads, n, n).
    """
    if inference.serves(blocks, x):
        return inference.layers(blocks, x, grid, residual)
    block: Any
    scores: Any = residual
    for i, block in enumerate(blocks):
        given = scores if i == 0 or block.attn.reuses_scores else None
        if with_cp and x.requires_grad:
            x, scores = checkpoint(block, x, grid, given, use_reentrant=False)
        else:
            x, scores = block(x, grid, given)
    return x, scores
