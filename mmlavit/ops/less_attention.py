"""Equation 5 on a map of values: plain, or in one Triton kernel. The one place that chooses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..models.windows import WindowGrid
from .fused_attention import fused_less_attention, obstacle
from .fused_check import has_agreed
from .plain_less_attention import plain_less_attention


def less_attention(
    v: Tensor,
    scores: Tensor,
    psi: Tensor,
    theta: Tensor,
    grid: WindowGrid,
    attn_drop: nn.Module,
    fused: bool | Literal['auto'] = 'auto',
) -> tuple[Tensor, Tensor]:
    """``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``.

    Args:
        v: Map of values (B, H, W, heads * d).
        scores: ``A_{l-1}`` (windows, heads, n, n), 0 at padded pairs.
        psi: (n, n).
        theta: (n, n).
        grid: Grid of the windows.
        attn_drop: Dropout on the attention.
        fused: Whether one kernel computes it: True and False say so, ``'auto'`` has it where it can
            run (:func:`~mmlavit.ops.fused_attention.obstacle`) and has agreed with PyTorch
            (:func:`~mmlavit.ops.fused_check.has_agreed`).

    Returns:
        ``Z``, a map like ``v``, and ``A_l`` (windows, heads, n, n), 0 at padded pairs.

    Raises:
        RuntimeError: If ``fused`` is True and the kernel cannot run.
    """
    given = v, scores, psi, theta, grid
    if fused:
        why_not = None if _does_nothing(attn_drop) else 'attention dropout is active or watched'
        why_not = why_not or obstacle(*given)
        if fused is True and why_not:
            raise RuntimeError(
                f"fused_attention=True, but the kernel cannot run: {why_not}; with 'auto', PyTorch "
                'computes what the kernel cannot'
            )
        if not why_not and (fused is True or has_agreed(v, scores, grid)):
            return fused_less_attention(*given)
    return plain_less_attention(*given, attn_drop)


def _does_nothing(drop: nn.Module) -> bool:
    """Whether a dropout leaves what it gets, and nobody listens."""
    hooks = drop._forward_pre_hooks, drop._forward_hooks
    idle = type(drop) is nn.Dropout and not (drop.p and drop.training)
    return idle and not any(hooks)
