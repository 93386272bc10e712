"""The MLP of a layer."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Two linear layers with GELU between; ours, an option: a convolution before GELU.

    The convolution, 3 x 3 and depthwise, makes it the Mix-FFN of "SegFormer" (arXiv 2105.15203),
    which PVTv2 (arXiv 2106.13797) has too.

    Args:
        embed_dims: Channels of a token.
        hidden_dims: Channels between the layers.
        mix_ffn: Whether there is the convolution.
        drop_rate: Dropout after each layer.
    """

    def __init__(
        self, embed_dims: int, hidden_dims: int, mix_ffn: bool = False, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv: nn.Conv2d | None = None
        if mix_ffn:
            self.dwconv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """``fc2(GELU(fc1(x)))`` of a map of tokens (B, H, W, embed_dims)."""
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))
