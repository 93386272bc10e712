"""Where scores come from: ``Q K^T / sqrt(d)`` (equation 4) and ``Psi A Theta^T`` (equation 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.windows import WindowGrid
from .saturate import saturate


def scaled_product(q: Tensor, k: Tensor, scale: float, residual: Tensor | None) -> Tensor:
    """``scale Q K^T + residual`` in one product, saturated in float16.

    Args:
        q: (windows, heads, n, d).
        k: (windows, heads, n, d).
        scale: A number.
        residual: (windows, heads, n, n), or None for 0.

    Returns:
        Tensor (windows, heads, n, n).
    """
    start, beta = (q.new_zeros(()), 0) if residual is None else (residual.flatten(0, 1), 1)
    product = torch.baddbmm(start, q.flatten(0, 1), k.flatten(0, 1).mT, beta=beta, alpha=scale)
    return saturate(product).unflatten(0, q.shape[:2])


def two_sided_linear(
    scores: Tensor, psi: Tensor, theta: Tensor, linear: Callable[..., Tensor] = F.linear
) -> Tensor:
    """``Psi A Theta^T`` for every map ``A``, saturated in float16.

    A linear layer acts on the last axis. So one product works on the maps as they lie in memory
    and the other on their transposes: two large plain products and one copy, which is faster than
    broadcasting ``psi`` over a batched product. The result is left in whichever order the second
    product wrote it, and the next call starts from there.

    Args:
        scores: ``A`` (windows, heads, n, n).
        psi: (n, n).
        theta: (n, n).
        linear: What applies a matrix to the last axis.

    Returns:
        Tensor (windows, heads, n, n), possibly a transposed view.
    """
    if scores.is_contiguous():
        x = saturate(linear(scores, theta)).mT.contiguous()
        return saturate(linear(x, psi)).mT
    x = saturate(linear(scores.mT, psi)).mT.contiguous()
    return saturate(linear(x, theta))


def zero_padded_pairs(scores: Tensor, grid: WindowGrid) -> Tensor:
    """Scores with 0 at every pair that involves a padded token.

    Args:
        scores: (B * windows, heads, n, n).
        grid: Grid of the windows.

    Returns:
        Tensor like ``scores``.
    """
    valid = grid.valid(scores.device)[:, None].to(scores.dtype)
    # The windows of an image apart from the batch, to meet the mask.
    windows = scores.unflatten(0, (-1, valid.shape[0]))
    return (windows * (valid.unsqueeze(-1) * valid.unsqueeze(-2))).view(scores.shape)
