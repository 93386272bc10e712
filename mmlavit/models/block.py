"""Patch embedding, stem, downsampling and the block (position convolution, attention, MLP)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .attention import LessAttention, VanillaAttention
from .mlp import MLP
from .windows import WindowGrid, pad_map


class PatchEmbed(nn.Module):
    """A convolution of stride ``patch``, then LayerNorm.

    Serves both as the patch embedding of the image (patch 4) and as the downsampling between
    stages (patch 2). Maps that ``patch`` does not divide are zero-padded at the bottom and right.
    The paper's patches do not overlap: the kernel is ``patch x patch``.

    Args:
        in_channels: Channels of the input.
        embed_dims: Channels of a token.
        patch: Side of a patch.
        overlap: Ours: a kernel of side ``patch + 1``, which also sees the row above its patch and
            the column to its left.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, patch: int, overlap: bool = False
    ) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, embed_dims, patch + overlap, patch, int(overlap))
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Embed.

        Args:
            x: Map (B, H, W, in_channels).

        Returns:
            Map of tokens (B, ceil(H / patch), ceil(W / patch), embed_dims).
        """
        # A convolution that overlaps could do without. But of a map one pixel wide oneDNN, in torch
        # 2.13, leaves unset what should be zeros of the weights' gradient in bfloat16.
        x = pad_map(x, self.patch)
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Ours, in place of the 4 x 4 patches: two 3 x 3 convolutions of stride 2.

    Each is followed by LayerNorm, with GELU between them. "Early Convolutions Help Transformers See
    Better" (arXiv 2106.14881) found such stems to train faster and to a better end.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of a token, and between the convolutions.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__()
        self.conv1 = PatchEmbed(in_channels, embed_dims, 2, overlap=True)
        self.conv2 = PatchEmbed(embed_dims, embed_dims, 2, overlap=True)

    def forward(self, x: Tensor) -> Tensor:
        """Embed.

        Args:
            x: Image (B, H, W, in_channels).

        Returns:
            Map of tokens (B, ceil(H / 4), ceil(W / 4), embed_dims).
        """
        return self.conv2(F.gelu(self.conv1(x)))


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images (arXiv 1603.09382).

    Args:
        drop_prob: Probability of dropping; the kept branches are scaled to keep the mean.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop or keep the branch ``x`` (B, ...) of each image."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * (x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        """The probability, for ``print(model)``."""
        return f'drop_prob={self.drop_prob:.3f}'


class Block(nn.Module):
    """One layer: position convolution, attention, MLP, each with a shortcut.

    Args:
        embed_dims: Channels of a token.
        attn: :class:`~mmlavit.models.attention.VanillaAttention` or
            :class:`~mmlavit.models.attention.LessAttention`.
        mlp_ratio: Hidden channels of the MLP over ``embed_dims``.
        mix_ffn: Ours: whether the MLP holds a convolution.
        drop_rate: Dropout in the MLP.
        drop_path_rate: Probability of dropping a branch.
    """

    def __init__(
        self,
        embed_dims: int,
        attn: VanillaAttention | LessAttention,
        mlp_ratio: float,
        mix_ffn: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.pos_conv = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = MLP(embed_dims, int(embed_dims * mlp_ratio), mix_ffn, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    @ops.lean
    def forward(self, x: Tensor, grid: WindowGrid, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: Map of tokens (B, H, W, embed_dims).
            grid: Grid of the windows over that map.
            scores: What the attention takes beside the tokens (windows, heads, n, n): the residual
                from the previous stage or None (vanilla), the scores of the layer before (less).

        Returns:
            The new map and this layer's scores (windows, heads, n, n).
        """
        x = x + self.pos_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z, scores = self.attn(self.norm1(x), grid, scores)
        x = x + self.drop_path(z)
        return x + self.drop_path(self.mlp(self.norm2(x))), scores
