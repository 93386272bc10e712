"""Vanilla and less attention inside windows (paper, equations 4 and 5).

Scores (before the softmax) travel from layer to layer as tensors (windows, heads, n, n), where
``n`` is the number of tokens in a window. Pairs that involve a padded token always hold 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from .state_dict import resize_window_weight
from .windows import WindowGrid


class WindowAttention(nn.Module):
    """What both attentions share.

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
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj_drop = nn.Dropout(drop_rate)


class VanillaAttention(WindowAttention):
    """Equation 4: ``A = Q K^T / sqrt(d)``, ``Z = softmax(A) V``; keeps ``A``.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads; must divide ``embed_dims``.
        qkv_bias: Whether the projections to Q, K and V have a bias.
        attn_drop_rate: Dropout on the attention after the softmax.
        drop_rate: Dropout on the output.
    """

    #: Whether it takes the scores of the layer before, or what the previous stage left.
    reuses_scores: Literal[False] = False

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
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)

    def forward(
        self, x: Tensor, grid: WindowGrid, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend, computing scores from the tokens.

        Args:
            x: Map of normalized tokens (B, H, W, embed_dims).
            grid: Grid of the windows over that map.
            residual: Scores from the previous stage (windows, heads, n, n), to be added to
                this layer's own (equation 6); None for none.

        Returns:
            A map (B, H, W, embed_dims) and the scores (windows, heads, n, n).
        """
        q, k, v = grid.partition(self.qkv(x), 3, self.num_heads).unbind()
        scores = ops.scaled_product(q, k, self.scale, residual)
        z = ops.attend(scores, v, grid, self.attn_drop)
        return self.proj_drop(self.proj(grid.merge(z))), scores


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
        fused: Whether one Triton kernel computes it: True, False or ``'auto'``, as in
            :func:`mmlavit.ops.less_attention.less_attention`.
    """

    reuses_scores: Literal[True] = True

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window: int,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        fused: bool | Literal['auto'] = 'auto',
    ) -> None:
        super().__init__(embed_dims, num_heads, attn_drop_rate, drop_rate)
        self.window = window
        self.fused = fused
        self.v = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.psi = nn.Parameter(torch.eye(window**2))
        self.theta = nn.Parameter(torch.eye(window**2))

    def forward(self, x: Tensor, grid: WindowGrid, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with transformed scores.

        Args:
            x: Map of normalized tokens (B, H, W, embed_dims).
            grid: Grid of the windows over that map.
            scores: ``A_{l-1}`` (windows, heads, n, n), 0 at padded pairs.

        Returns:
            A map (B, H, W, embed_dims) and ``A_l`` (windows, heads, n, n).
        """
        z, scores = ops.less_attention(
            self.v(x), scores, self.psi, self.theta, grid, self.attn_drop, fused=self.fused
        )
        return self.proj_drop(self.proj(z)), scores

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Bring ``Psi`` and ``Theta`` of other windows to this layer's."""
        for name in (f'{prefix}psi', f'{prefix}theta'):
            weight = state_dict.get(name)
            if weight is not None and weight.ndim == 2 and len(weight) != self.window**2:
                state_dict[name] = resize_window_weight(weight, self.window)
        super()._load_from_state_dict(state_dict, prefix, *args)
