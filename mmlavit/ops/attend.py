"""``softmax(A) V`` over the real keys of a window."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..models.windows import WindowGrid


def attend(
    scores: Tensor, v: Tensor, grid: WindowGrid, attn_drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """``dropout(softmax(A)) V``, with padded keys left out.

    Args:
        scores: ``A`` (windows, heads, n, n).
        v: Values (windows, heads, n, d).
        grid: Grid of the windows.
        attn_drop: The dropout.

    Returns:
        ``Z`` (windows, heads, n, d).
    """
    mask = key_mask(grid, scores) if grid.padded else None
    return attn_drop(masked_softmax(scores, mask)) @ v


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(A + mask)`` over the keys.

    Args:
        scores: ``A`` (windows, heads, n, n).
        mask: What is added to the scores, broadcast over images and heads: (windows of an image,
            1, 1, n); None for nothing.

    Returns:
        Tensor like ``scores``.
    """
    if has_torch_function_unary(scores):
        return handle_torch_function(masked_softmax, (scores,), scores, mask)
    if mask is not None:
        # The windows of an image apart from the batch, to meet the mask.
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask).view(scores.shape)
    return scores.softmax(dim=-1)


def key_mask(grid: WindowGrid, like: Tensor) -> Tensor:
    """What to add to scores so that the softmax gives padded keys nothing.

    Args:
        grid: Grid of the windows.
        like: A tensor of the type and on the device of the scores.

    Returns:
        Tensor (windows of an image, 1, 1, n): ``-inf`` at padded keys, else 0.
    """
    padded = ~grid.valid(like.device)[:, None, None, :]
    return torch.zeros_like(padded, dtype=like.dtype).masked_fill(padded, -math.inf)
