"""The depthwise and the 1x1 convolution of the attention residual (equation 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .linear import linear
from .mode import is_dispatched, is_traced
from .plain import are_plain
from .saturate import saturate


def halve_pairs(scores: Tensor, dwconv: nn.Conv2d, pwconv: nn.Conv2d) -> Tensor:
    """``Conv1x1(DWConv(A))``: maps of pairs, halved along all of their four spatial axes.

    Args:
        scores: Maps (windows, prev_heads, n, n) of windows of an even side.
        dwconv: Depthwise convolution of 4 x 4, stride 4: 2 along each spatial axis, where the four
            tokens of a 2 x 2 block come one after the other.
        pwconv: 1 x 1 convolution over heads.

    Returns:
        Tensor (windows, num_heads, n / 4, n / 4), saturated in float16.
    """
    unseen = not is_traced() and not is_dispatched()
    if unseen and scores.device.type == 'cpu' and are_plain((dwconv, pwconv)):
        return _as_linear(scores, dwconv.weight, pwconv.weight)
    return saturate(pwconv(saturate(dwconv(by_block(scores)))))


def by_block(pairs: Tensor) -> Tensor:
    """Maps of pairs with the four tokens of each 2 x 2 block one after the other, on both axes.

    Args:
        pairs: (windows, heads, n, n), with tokens row by row.

    Returns:
        Tensor like ``pairs``.
    """
    s = math.isqrt(pairs.shape[-1]) // 2
    x = pairs.reshape(*pairs.shape[:2], s, 2, s, 2, s, 2, s, 2)
    return x.permute(0, 1, 2, 4, 3, 5, 6, 8, 7, 9).reshape(pairs.shape)


def _as_linear(scores: Tensor, dwconv: Tensor, pwconv: Tensor) -> Tensor:
    """The same as one linear layer, five times as fast on a CPU.

    A convolution of so few channels is slow, and so is bringing 2 x 2 blocks of tokens together.
    Two rows of keys, though, lie together in memory, and all the blocks that they hold come out of
    one linear layer, whose matrix has the kernel on its diagonal. It multiplies with many zeros.
    """
    # (num_heads, prev_heads, 2, 2, 2, 2): row and column of the query in its block, then the key's.
    kernel = (pwconv * dwconv.squeeze(1)).unflatten(3, (2, 2)).unflatten(2, (2, 2))
    if scores.is_contiguous():
        return _rows_of_keys(scores, kernel)
    # Transposed views: queries and keys change places, as copying along an axis that is not
    # contiguous takes several times longer.
    return _rows_of_keys(scores.mT, kernel.permute(0, 1, 4, 5, 2, 3)).mT


def _rows_of_keys(scores: Tensor, kernel: Tensor) -> Tensor:
    num_heads, prev_heads = kernel.shape[:2]
    s = math.isqrt(scores.shape[-1]) // 2
    # Made in float32: torch 2.1 has none in bfloat16.
    diagonal = torch.eye(s, device=kernel.device).to(kernel.dtype)
    # From (previous head, query row, query column, key row, block, key column) to (head, block).
    matrix = torch.einsum('oiabcd,rt->oriabctd', kernel, diagonal).reshape(num_heads * s, -1)
    x = scores.reshape(-1, prev_heads, s, 2, s, 2, s, 4 * s).permute(0, 2, 4, 6, 1, 3, 5, 7)
    x = saturate(linear(x.reshape(-1, s * s, s, prev_heads * 16 * s), matrix))
    x = x.unflatten(-1, (num_heads, s)).permute(0, 3, 1, 2, 4)
    return x.reshape(-1, num_heads, s * s, s * s)
