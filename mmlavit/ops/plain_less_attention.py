"""Less attention (paper, equation 5) in PyTorch's own operators, step by step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..models.windows import WindowGrid
from .attend import attend
from .scores import two_sided_linear, zero_padded_pairs


def plain_less_attention(
    v: Tensor,
    scores: Tensor,
    psi: Tensor,
    theta: Tensor,
    grid: WindowGrid,
    attn_drop: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``.

    Arguments and results are those of :func:`mmlavit.ops.less_attention.less_attention`.
    """
    scores = two_sided_linear(scores, psi, theta)
    if grid.padded:
        scores = zero_padded_pairs(scores, grid)
    values = grid.partition(v, 1, scores.shape[1])[0]
    return grid.merge(attend(scores, values, grid, attn_drop)), scores
