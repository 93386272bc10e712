"""LaViT with parts taken out, to see what they buy."""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..attention import LessAttention
from ..backbone import LaViT
from ..windows import WindowGrid


class ReusedAttention(LessAttention):
    """Less attention without ``Psi`` and ``Theta``: the scores of the layer before, as they are."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.psi, self.theta

    def forward(
        self, x: Tensor, grid: WindowGrid, scores: Tensor, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Attend with the scores given; as :meth:`~mmlavit.attention.LessAttention.forward`."""
        v = self.project(self.v, x, grid, norm)[0]
        return self.attend(scores, v, grid), scores


class NoPosition(nn.Module):
    """In place of the position convolution: its branch is 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like ``x``."""
        return torch.zeros_like(x)


@MODELS.register_module()
class AblatedLaViT(LaViT):
    """LaViT with parts taken out.

    Args:
        attention_residual: Whether scores are passed on from stage to stage (equations 6 and 7).
        position: Whether each layer begins with the position convolution.
        position_from_zero: Whether the position convolutions start with weights of 0; without, as
            LaViT's do, with weights that make random features of a token's neighbours.
        mixing: Whether less attention has ``Psi`` and ``Theta`` (equation 5); without, scores are
            used again as they are.
        kwargs: Arguments of :class:`~mmlavit.backbone.LaViT`.

    Raises:
        TypeError: If a switch is not a bool, or as LaViT.
        ValueError: As LaViT.
    """

    def __init__(
        self,
        attention_residual: bool = True,
        position: bool = True,
        position_from_zero: bool = False,
        mixing: bool = True,
        **kwargs: object,
    ) -> None:
        for name, value in (
            ('attention_residual', attention_residual),
            ('position', position),
            ('position_from_zero', position_from_zero),
            ('mixing', mixing),
        ):
            if not isinstance(value, bool):
                raise TypeError(f'{name} must be True or False, got {value!r}')
        super().__init__(**kwargs)
        for stage in self.stages:
            if not attention_residual:
                stage.attention_residual = None
            for block in stage.blocks:
                if position_from_zero:
                    nn.init.zeros_(block.pos_conv.weight)
                    nn.init.zeros_(block.pos_conv.bias)
                if not position:
                    block.pos_conv = NoPosition()
                if not mixing and isinstance(block.attn, LessAttention):
                    block.attn = _reused(block.attn, stage.window)
        self._freeze_stages()


def _reused(attn: LessAttention, window: int) -> ReusedAttention:
    """The same layer, with the same weights, without its two matrices."""
    reused = ReusedAttention(
        *(attn.proj.in_features, attn.num_heads, window, attn.v.bias is not None),
        *(attn.attn_drop.p, attn.proj_drop.p),
    )
    reused.load_state_dict(attn.state_dict(), strict=False)
    return reused
