"""LaViT with parts taken out, to see what they buy."""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from mmlavit import ops
from mmlavit.engine.hooks.diagonality import DiagonalityLossHook
from mmlavit.models.attention import LessAttention, VanillaAttention
from mmlavit.models.lavit import LaViT
from mmlavit.models.windows import WindowGrid


class ReusedAttention(LessAttention):
    """Less attention without ``Psi`` and ``Theta``: the scores of the layer before, as they are."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.psi, self.theta

    def forward(self, x: Tensor, grid: WindowGrid, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with the scores given; as :meth:`.LessAttention.forward`."""
        (v,) = grid.partition(self.v(x), 1, self.num_heads)
        z = ops.attend(scores, v, grid, self.attn_drop)
        return self.proj_drop(self.proj(grid.merge(z))), scores


class ScaledPosition(nn.Module):
    """A position convolution with a LayerScale (CaiT), one factor for each channel.

    Args:
        conv: The convolution.
        start: The factors at the start.
    """

    def __init__(self, conv: nn.Conv2d, start: float) -> None:
        super().__init__()
        self.conv = conv
        self.layer_scale = nn.Parameter(torch.full((conv.out_channels, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve tokens (B, C, H, W) and scale them."""
        return self.layer_scale * self.conv(x)


@MODELS.register_module()
class AblatedLaViT(LaViT):
    """LaViT with parts taken out, or with another start.

    Args:
        attention_residual: Whether scores are passed on from stage to stage (equations 6 and 7).
        position_std: Standard deviation of the position convolutions' weights at the start; None
            for LaViT's own.
        position_scale: Start of a LayerScale on each position convolution; None for none.
        linear_std: Standard deviation of all linear layers at the start; None for LaViT's own.
        query_key_std: Standard deviation of the projections to Q and K at the start; None for
            LaViT's own.
        residual_scale: Start of the attention residual's LayerScale; None for LaViT's own.
        norm_eps: What all LayerNorms add to the variance; None for LaViT's own.
        mixing: Whether less attention has ``Psi`` and ``Theta`` (equation 5); without, scores are
            used again as they are.
        kwargs: Arguments of :class:`~mmlavit.models.lavit.LaViT`.

    Raises:
        TypeError: If a switch is not a bool, a start no number, or as LaViT.
        ValueError: As LaViT.
    """

    def __init__(
        self,
        attention_residual: bool = True,
        position_std: float | None = None,
        position_scale: float | None = None,
        linear_std: float | None = None,
        query_key_std: float | None = None,
        residual_scale: float | None = None,
        norm_eps: float | None = None,
        mixing: bool = True,
        **kwargs: object,
    ) -> None:
        for name, value in (
            ('attention_residual', attention_residual),
            ('mixing', mixing),
        ):
            if not isinstance(value, bool):
                raise TypeError(f'{name} must be True or False, got {value!r}')
        for name, value in (
            ('position_std', position_std),
            ('position_scale', position_scale),
            ('linear_std', linear_std),
            ('query_key_std', query_key_std),
            ('residual_scale', residual_scale),
            ('norm_eps', norm_eps),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise TypeError(f'{name} must be a number or None, got {value!r}')
        super().__init__(**kwargs)
        self._options = {
            **kwargs,
            **dict(attention_residual=attention_residual, mixing=mixing),
            **dict(position_std=position_std, position_scale=position_scale),
            **dict(linear_std=linear_std, query_key_std=query_key_std),
            **dict(residual_scale=residual_scale, norm_eps=norm_eps),
        }
        for stage in self.stages:
            if residual_scale is not None and stage.attention_residual is not None:
                nn.init.constant_(stage.attention_residual.layer_scale, residual_scale)
            if not attention_residual:
                stage.attention_residual = None
            for block in stage.blocks:
                if position_std is not None:
                    nn.init.normal_(block.pos_conv.weight, std=position_std)
                if position_scale is not None:
                    block.pos_conv = ScaledPosition(block.pos_conv, position_scale)
                if linear_std is not None:
                    for module in block.modules():
                        if isinstance(module, nn.Linear):
                            nn.init.normal_(module.weight, std=linear_std)
                if query_key_std is not None and isinstance(block.attn, VanillaAttention):
                    query_and_key = block.attn.qkv.weight[: 2 * block.attn.qkv.in_features]
                    nn.init.normal_(query_and_key.detach(), std=query_key_std)
                if not mixing and isinstance(block.attn, LessAttention):
                    block.attn = _reused(block.attn, stage.window)
        if norm_eps is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps
        self._made = self._writes()
        self._freeze_stages()

    def init_weights(self) -> None:
        """As LaViT's, which draws anew what the model around has drawn, with the other start."""
        if not self.is_init and self._drawn_by_others():
            self.load_state_dict(type(self)(**self._options).state_dict())
        BaseModule.init_weights(self)


def _reused(attn: LessAttention, window: int) -> ReusedAttention:
    """The same layer, with the same weights, without its two matrices."""
    reused = ReusedAttention(
        *(attn.proj.in_features, attn.num_heads, window, attn.v.bias is not None),
        *(attn.attn_drop.p, attn.proj_drop.p),
    )
    reused.load_state_dict(attn.state_dict(), strict=False)
    return reused


@HOOKS.register_module()
class GrowingDiagonalityLossHook(DiagonalityLossHook):
    """Adds the diagonality preserving loss as the paper writes it, which grows with the scores."""

    @staticmethod
    def loss(scores: Tensor, valid: Tensor | None = None) -> Tensor:
        """The mean of ``|A_ij - A_ji| + relu(A_ij - A_ii)`` over pairs j != i of whole windows.

        Args:
            scores: ``A`` (windows, heads, n, n).
            valid: Must be None: maps of the tasks here fill their windows.

        Returns:
            A scalar.
        """
        if valid is not None:
            raise ValueError('GrowingDiagonalityLossHook is for maps that fill their windows')
        n = scores.shape[-1]
        above = scores - scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        violation = (scores - scores.mT).abs() + above.relu()
        return violation.sum(dim=(-2, -1)).mean() / max(n * (n - 1), 1)
