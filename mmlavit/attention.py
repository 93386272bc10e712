"""Vanilla and less attention inside windows (paper, equations 4 and 5).

Scores (before the softmax) travel from layer to layer as tensors (windows, heads, n, n), where
``n`` is the number of tokens in a window. Pairs that involve a padded token always hold 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .fused_attention import can_fuse, fused_less_attention
from .linear import Linear, linear
from .windows import WindowGrid


class WindowAttention(nn.Module):
    """What both attentions share: ``Z = softmax(A) V`` in every window, and the projection.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads; must divide ``embed_dims``.
        attn_drop_rate: Dropout on the attention after the softmax.
        drop_rate: Dropout on the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = Linear(embed_dims, embed_dims)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj_drop = nn.Dropout(drop_rate)

    def attend(self, scores: Tensor, v: Tensor, grid: WindowGrid) -> Tensor:
        """``softmax(A) V`` over the real keys of each window, back on the map and projected.

        Args:
            scores: ``A`` (windows, heads, n, n).
            v: Values (windows, heads, n, d).
            grid: Grid of the windows.

        Returns:
            Map of tokens (B, H, W, heads * d).
        """
        if grid.padded:
            scores = mask_keys(scores, grid)
        attn = self.attn_drop(scores.softmax(dim=-1))
        return self.proj_drop(self.proj(grid.merge(attn @ v)))


class VanillaAttention(WindowAttention):
    """Equation 4: ``A = Q K^T / sqrt(d)``, ``Z = softmax(A) V``; keeps ``A``.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads; must divide ``embed_dims``.
        qkv_bias: Whether the projections to Q, K and V have a bias.
        attn_drop_rate: Dropout on the attention after the softmax.
        drop_rate: Dropout on the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, num_heads, attn_drop_rate, drop_rate)
        self.scale = 1 / math.sqrt(embed_dims // num_heads)
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)

    def forward(
        self, x: Tensor, grid: WindowGrid, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend, computing scores from the tokens.

        Args:
            x: Map (B, H, W, embed_dims), padded to whole windows.
            grid: Grid of the windows over that map.
            residual: Scores from the previous stage (windows, heads, n, n), to be added to
                this layer's own (equation 6).

        Returns:
            The new map (B, H, W, embed_dims) and the scores (windows, heads, n, n).
        """
        q, k, v = grid.partition(self.qkv(x), 3, self.num_heads).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if residual is not None:
            scores = scores + residual
        if grid.padded:
            scores = zero_padded_pairs(scores, grid)
        return self.attend(scores, v, grid), scores


class LessAttention(WindowAttention):
    """Equation 5: ``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``; no Q, no K.

    ``Psi`` and ``Theta`` mix the query places and the key places of a window. They are shared by
    all heads and windows, and start as the identity: a new layer reuses the attention it is given.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads; must divide ``embed_dims``.
        window: Side of a window, in tokens; ``Psi`` and ``Theta`` are (window**2, window**2).
        qkv_bias: Whether the projection to V has a bias.
        attn_drop_rate: Dropout on the attention after the softmax.
        drop_rate: Dropout on the output.
        fused: Whether to compute it in one kernel where that can be, see :func:`can_fuse`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window: int,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__(embed_dims, num_heads, attn_drop_rate, drop_rate)
        self.fused = fused
        self.v = Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.psi = nn.Parameter(torch.eye(window**2))
        self.theta = nn.Parameter(torch.eye(window**2))

    def forward(self, x: Tensor, grid: WindowGrid, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with transformed scores.

        Args:
            x: Map (B, H, W, embed_dims), padded to whole windows.
            grid: Grid of the windows over that map.
            scores: ``A_{l-1}`` (windows, heads, n, n), 0 at padded pairs.

        Returns:
            The new map (B, H, W, embed_dims) and ``A_l`` (windows, heads, n, n).
        """
        v = self.v(x)
        given = v, scores, self.psi, self.theta, grid, self.num_heads
        drop = self.attn_drop
        # Active dropout, or somebody's own layer in its place.
        drops = not isinstance(drop, nn.Dropout) or drop.training and drop.p > 0
        if self.fused and not drops and can_fuse(*given):
            z, scores = fused_less_attention(*given)
            return self.proj_drop(self.proj(z)), scores
        v = grid.partition(v, 1, self.num_heads)[0]
        scores = two_sided_linear(scores, self.psi, self.theta)
        if grid.padded:
            scores = zero_padded_pairs(scores, grid)
        return self.attend(scores, v, grid), scores


def two_sided_linear(scores: Tensor, psi: Tensor, theta: Tensor) -> Tensor:
    """``Psi A Theta^T`` for every map ``A``.

    A linear layer acts on the last axis. So one product works on the maps as they lie in memory
    and the other on their transposes: two large plain products and one copy, which is faster than
    broadcasting ``psi`` over a batched product. The result is left in whichever order the second
    product wrote it, and the next call starts from there.

    Args:
        scores: ``A`` (windows, heads, n, n).
        psi: (n, n).
        theta: (n, n).

    Returns:
        Tensor (windows, heads, n, n), possibly a transposed view.
    """
    if scores.is_contiguous():
        return linear(linear(scores, theta).mT.contiguous(), psi).mT
    return linear(linear(scores.mT, psi).mT.contiguous(), theta)


def mask_keys(scores: Tensor, grid: WindowGrid) -> Tensor:
    """Scores with ``-inf`` at padded keys, so that the softmax gives them nothing.

    Args:
        scores: (B * windows, heads, n, n).
        grid: Grid of the windows.

    Returns:
        Tensor like ``scores``.
    """
    padded = ~grid.valid(scores.device)[:, None, None, :]
    mask = scores.new_zeros(padded.shape).masked_fill(padded, -math.inf)
    return (per_image(scores, grid) + mask).view(scores.shape)


def zero_padded_pairs(scores: Tensor, grid: WindowGrid) -> Tensor:
    """Scores with 0 at every pair that involves a padded token.

    Args:
        scores: (B * windows, heads, n, n).
        grid: Grid of the windows.

    Returns:
        Tensor like ``scores``.
    """
    valid = grid.valid(scores.device)[:, None].to(scores.dtype)
    return (per_image(scores, grid) * (valid.unsqueeze(-1) * valid.unsqueeze(-2))).view(
        scores.shape
    )


def per_image(scores: Tensor, grid: WindowGrid) -> Tensor:
    """Scores with the windows of an image apart from the batch, to meet a mask (windows, ...)."""
    return scores.unflatten(0, (-1, grid.rows * grid.cols))
