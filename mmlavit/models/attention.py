"""Vanilla and less attention inside windows (paper, equations 4 and 5).

Scores (before the softmax) travel from layer to layer as tensors (windows, heads, n, n), where
``n`` is the number of tokens in a window. Pairs that involve a padded token always hold 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.fused_attention import can_fuse, fused_less_attention
from ..ops.linear import Linear, linear, linear_after_norm
from ..ops.mode import keeps_activations
from ..ops.saturate import saturate
from ..ops.softmax import masked_softmax, softmax_product
from .state_dict import resize_window_weight
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

    def project(self, layer: nn.Module, x: Tensor, grid: WindowGrid, norm: nn.Module) -> Tensor:
        """A projection of the normalized tokens, in windows.

        Args:
            layer: The projection, to some parts (Q, K, V or V alone) of ``embed_dims`` channels.
            x: Map of tokens (B, H, W, embed_dims).
            grid: Grid of the windows over that map.
            norm: The LayerNorm.

        Returns:
            Tensor (parts, windows, heads, n, d).
        """
        if keeps_activations(self):
            x = linear_after_norm(layer, norm, x, grid.pad)
            return grid.partition(x, x.shape[-1] // self.proj.in_features, self.num_heads)
        # Padded tokens end as zeros here instead of as the bias. That makes no difference to the
        # real ones, and there are fewer to project.
        x = layer(norm(x))
        return grid.pad_and_partition(x, x.shape[-1] // self.proj.in_features, self.num_heads)

    def attend(self, scores: Tensor, v: Tensor, grid: WindowGrid) -> Tensor:
        """``softmax(A) V`` over the real keys of each window, back on the map and projected.

        Args:
            scores: ``A`` (windows, heads, n, n), 0 at padded pairs.
            v: Values (windows, heads, n, d).
            grid: Grid of the windows.

        Returns:
            Map of tokens (B, H, W, heads * d).
        """
        if keeps_activations(self):
            mask = key_mask(grid, scores) if grid.padded else None
            if self.attn_drop.p and self.training:
                z = self.attn_drop(masked_softmax(scores, mask)) @ v
            else:
                z = softmax_product(scores, v, mask)
            return self.proj_drop(grid.crop(self.proj(grid.merge(z))))
        if grid.padded:
            grid.fill_padded(scores, keys=-math.inf)
        z = scores.softmax(dim=-1) @ v
        if grid.padded:
            grid.fill_padded(scores, keys=0.0)
        return self.proj(grid.merge_and_crop(z))


class VanillaAttention(WindowAttention):
    """Equation 4: ``A = Q K^T / sqrt(d)``, ``Z = softmax(A) V``; keeps ``A``.

    In float16 scores end at 65504 instead of becoming infinite, see
    :func:`~mmlavit.ops.saturate.saturate`.

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
        self, x: Tensor, grid: WindowGrid, residual: Tensor | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Attend, computing scores from the tokens.

        Args:
            x: Map of tokens (B, H, W, embed_dims).
            grid: Grid of the windows over that map.
            residual: Scores from the previous stage (windows, heads, n, n), to be added to
                this layer's own (equation 6); None for none.
            norm: LayerNorm of the tokens.

        Returns:
            The new map (B, H, W, embed_dims) and the scores (windows, heads, n, n).
        """
        q, k, v = self.project(self.qkv, x, grid, norm).unbind(0)
        scores = scaled_product(q, k, self.scale, residual)
        if grid.padded and keeps_activations(self):
            scores = zero_padded_pairs(scores, grid)
        return self.attend(scores, v, grid), scores


class LessAttention(WindowAttention):
    """Equation 5: ``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``; no Q, no K.

    ``Psi`` and ``Theta`` mix the query places and the key places of a window. They are shared by
    all heads and windows, and start as the identity: a new layer reuses the attention it is given.
    In float16 scores end at 65504 instead of becoming infinite, see
    :func:`~mmlavit.ops.saturate.saturate`.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads; must divide ``embed_dims``.
        window: Side of a window, in tokens; ``Psi`` and ``Theta`` are (window**2, window**2).
        qkv_bias: Whether the projection to V has a bias.
        attn_drop_rate: Dropout on the attention after the softmax.
        drop_rate: Dropout on the output.
        fused: Whether to compute it in one kernel where that can be, see
            :func:`~mmlavit.ops.fused_attention.can_fuse`.
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
        self.window = window
        self.psi = nn.Parameter(torch.eye(window**2))
        self.theta = nn.Parameter(torch.eye(window**2))

    def forward(
        self, x: Tensor, grid: WindowGrid, scores: Tensor, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Attend with transformed scores.

        Args:
            x: Map of tokens (B, H, W, embed_dims).
            grid: Grid of the windows over that map.
            scores: ``A_{l-1}`` (windows, heads, n, n), 0 at padded pairs.
            norm: LayerNorm of the tokens.

        Returns:
            The new map (B, H, W, embed_dims) and ``A_l`` (windows, heads, n, n).
        """
        given = scores, self.psi, self.theta, grid, self.num_heads
        drops = self.attn_drop.p and self.training
        if self.fused and not drops and can_fuse(x, *given):
            z, scores = fused_less_attention(linear_after_norm(self.v, norm, x), *given)
            return self.proj_drop(self.proj(z)), scores
        v = self.project(self.v, x, grid, norm)[0]
        scores = two_sided_linear(scores, self.psi, self.theta)
        if grid.padded and keeps_activations(self):
            scores = zero_padded_pairs(scores, grid)
        elif grid.padded:
            grid.fill_padded(scores, queries=0.0, keys=0.0)
        return self.attend(scores, v, grid), scores

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Bring ``Psi`` and ``Theta`` of other windows to this layer's."""
        for name in (f'{prefix}psi', f'{prefix}theta'):
            weight = state_dict.get(name)
            if weight is not None and weight.ndim == 2 and len(weight) != self.window**2:
                state_dict[name] = resize_window_weight(weight, self.window)
        super()._load_from_state_dict(state_dict, prefix, *args)


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


def two_sided_linear(scores: Tensor, psi: Tensor, theta: Tensor) -> Tensor:
    """``Psi A Theta^T`` for every map ``A``, saturated in float16.

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
        return _product(_product(scores, theta).mT.contiguous(), psi).mT
    return _product(_product(scores.mT, psi).mT.contiguous(), theta)


def _product(scores: Tensor, weight: Tensor) -> Tensor:
    return saturate(linear(scores, weight))


def key_mask(grid: WindowGrid, like: Tensor) -> Tensor:
    """What to add to scores so that the softmax gives padded keys nothing.

    Args:
        grid: Grid of the windows.
        like: A tensor of the type and on the device of the scores.

    Returns:
        Tensor (windows of an image, 1, 1, n): ``-inf`` at padded keys, else 0.
    """
    padded = ~grid.valid(like.device)[:, None, None, :]
    return like.new_zeros(padded.shape).masked_fill(padded, -math.inf)


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
