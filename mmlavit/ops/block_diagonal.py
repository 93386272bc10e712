"""Maps of small windows as diagonal blocks of the map of a large one (equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .mode import is_traced


def block_diagonal(blocks: Tensor) -> Tensor:
    """Put the maps of ``r x r`` windows into the map of the window that they make up.

    Args:
        blocks: Maps of pairs (B, rows, cols, r, r, num_heads, s, s, s, s): the row and the column
            of a small window in its large one, then of the query and of the key in the small one.

    Returns:
        Tensor (B, rows, cols, num_heads, r, s, r, s, r, s, r, s): small window and token down,
        small window and token across, of the query, then of the key. Pairs of two small windows
        are 0.
    """
    # Ten times as fast; but copying into slices, recorded, would tell apart maps of one window and
    # of more.
    return _everywhere(blocks) if is_traced() else _copied(blocks)


def _everywhere(blocks: Tensor) -> Tensor:
    r = blocks.shape[3]
    same = torch.eye(r, dtype=torch.bool, device=blocks.device)
    same = same.view(r, 1, 1, 1, r, 1, 1, 1) & same.view(r, 1, 1, 1, r, 1)
    blocks = blocks.permute(0, 1, 2, 5, 3, 6, 4, 7, 8, 9).unsqueeze(8).unsqueeze(10)
    return torch.where(same, blocks, blocks.new_zeros(()))


def _copied(blocks: Tensor) -> Tensor:
    batch, rows, cols, r, _, num_heads, s = blocks.shape[:7]
    out = blocks.new_zeros(batch, rows, cols, num_heads, r, s, r, s, r, s, r, s)
    for i in range(r):
        for j in range(r):
            out[:, :, :, :, i, :, j, :, i, :, j, :] = blocks[:, :, :, i, j]
    return out
