"""Equation 5 on a map of values: plain, or in one Triton kernel (fused_attention.py)."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.windows import WindowGrid
from .attend import attend
from .fused_attention import can_fuse, fused_less_attention
from .scores import two_sided_linear, zero_padded_pairs


def less_attention(
    v: Tensor,
    scores: Tensor,
    psi: Tensor,
    theta: Tensor,
    grid: WindowGrid,
    attn_drop: nn.Module,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``.

    Args:
        v: Map of values (B, H, W, heads * d).
        scores: ``A_{l-1}`` (windows, heads, n, n), 0 at padded pairs.
        psi: (n, n).
        theta: (n, n).
        grid: Grid of the windows.
        attn_drop: Dropout on the attention.
        fused: Whether one kernel may compute it.

    Returns:
        ``Z``, a map like ``v``, and ``A_l`` (windows, heads, n, n), 0 at padded pairs.
    """
    given = scores, psi, theta, grid
    if fused and _does_nothing(attn_drop) and can_fuse(v, *given):
        return fused_less_attention(v, *given)
    scores = two_sided_linear(scores, psi, theta)
    if grid.padded:
        scores = zero_padded_pairs(scores, grid)
    values = grid.partition(v, 1, scores.shape[1])[0]
    return grid.merge(attend(scores, values, grid, attn_drop)), scores


def _does_nothing(drop: nn.Module) -> bool:
    """Whether a dropout leaves what it gets, and nobody listens."""
    hooks = drop._forward_pre_hooks, drop._forward_hooks
    idle = type(drop) is nn.Dropout and not (drop.p and drop.training)
    return idle and not any(hooks)
