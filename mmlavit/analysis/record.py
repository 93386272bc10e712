"""Recording the attention of every layer while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.lavits import lavits
from ..models.attention import VanillaAttention
from ..models.block import Block
from ..models.lavit import Stage
from ..models.windows import WindowGrid


@dataclass(frozen=True)
class LayerAttention:
    """What one layer attended to in one forward pass.

    In LaViT every pair that involves a padded token is 0 in ``attn``, ``scores`` and ``residual``;
    ``grid.valid()`` tells which tokens are real.

    Args:
        name: Path of the attention module in the model.
        stage: Its stage, from 0.
        layer: Its place in the stage, from 0.
        kind: ``'vanilla'`` (equation 4) or ``'less'`` (equation 5).
        attn: Attention after the softmax (B, windows, heads, n, m), each row of a real query
            summing to 1; float32.
        scores: ``A`` before the softmax, of the same shape; None where a layer has none.
        residual: What :class:`mmlavit.models.attention_residual.AttentionResidual` brought in,
            scaled by its LayerScale, of the same shape: part of ``scores``. In the first layer of
            every stage but the first; else None.
        grid: Grid of the windows over the stage's map of tokens; None where there is none.
    """

    name: str
    stage: int
    layer: int
    kind: str
    attn: Tensor
    scores: Tensor | None = None
    residual: Tensor | None = None
    grid: WindowGrid | None = None

    @property
    def window_grid(self) -> WindowGrid:
        """``grid``, for what wants windows.

        Raises:
            ValueError: If there are none.
        """
        if self.grid is None:
            raise ValueError(f'layer must attend in windows, {self.name} does not')
        return self.grid


@contextmanager
def recording(
    model: nn.Module,
    keep: Callable[[LayerAttention], Any] | None = None,
    *,
    stages: Sequence[int] | None = None,
    device: torch.device | str | None = 'cpu',
) -> Iterator[list]:
    """Record the attention of every LaViT layer that runs inside the ``with``.

    What the model computes does not change. A layer is recorded as soon as it has run, so ``keep``
    can reduce it before the next one comes: one layer takes ``4 n`` bytes for each token and head,
    twice (``attn`` and ``scores``). All of LaViT-S on an 800 x 1280 image, with windows of 8, are
    0.2 GB; with the paper's windows of 56 tokens a layer of the first stage alone is 1.6 GB.

    ::

        with recording(model) as layers, torch.no_grad():
            model(images)
        for layer in layers:
            print(layer.name, layer.kind, layer.attn.shape)

    Args:
        model: Any model with a LaViT inside, or a LaViT.
        keep: What to keep of a layer: called with each :class:`LayerAttention`, it returns what
            goes into the list in its place. None keeps all of it.
        stages: The stages to record, from 0; None for all.
        device: Where the recorded tensors go before ``keep`` is called; None leaves them where
            they were computed.

    Yields:
        A list that fills up in the order in which layers run; a second forward pass appends.

    Raises:
        TypeError: If ``stages`` is no sequence of integers.
        ValueError: If the model holds no LaViT, or its LaViT has no such stage.
    """
    layers: list = []
    handles: list = []
    try:
        for path, m, stage in stages_of(model, stages):
            for i, block in enumerate(stage.blocks):

                def hook(
                    block: Block,
                    args: tuple,
                    output: tuple,
                    place: tuple = (attention_name(path, i), m, i),
                ) -> None:
                    found = _layer_attention(place, block, args, output[1], device)
                    layers.append(found if keep is None else keep(found))

                handles.append(block.register_forward_hook(hook))
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def stages_of(
    model: nn.Module, stages: Sequence[int] | None = None
) -> Iterator[tuple[str, int, Stage]]:
    """The stages of every LaViT in a model.

    Args:
        model: Any model with a LaViT inside, or a LaViT.
        stages: Which stages, from 0; None for all.

    Yields:
        Path in the model, number and module of each.

    Raises:
        TypeError: If ``stages`` is no sequence of integers.
        ValueError: If the model holds no LaViT, or its LaViT has no such stage.
    """
    backbones = lavits(model)
    if not backbones:
        raise ValueError(f'model must hold a LaViT, {type(model).__name__} holds none')
    for path, backbone in backbones.items():
        for m in check_stages(stages, len(backbone.stages)):
            yield f'{path}.stages.{m}' if path else f'stages.{m}', m, backbone.stages[m]


def attention_name(path: str, layer: int) -> str:
    """Path of a layer's attention in a model, from the path of its stage."""
    return f'{path}.blocks.{layer}.attn'


def check_stages(stages: Sequence[int] | None, count: int) -> list[int]:
    """The stages to look at.

    Args:
        stages: Stages, from 0; None for all.
        count: How many there are.

    Returns:
        The stages, ascending, each once.

    Raises:
        TypeError: If they are no sequence of integers.
        ValueError: If there is no such stage, or none is named.
    """
    if stages is None:
        return list(range(count))
    if not isinstance(stages, Sequence) or not all(
        isinstance(m, int) and not isinstance(m, bool) for m in stages
    ):
        raise TypeError(f'stages must be a sequence of integers, got {stages!r}')
    if not stages or not all(0 <= m < count for m in stages):
        raise ValueError(f'stages must be some of 0..{count - 1}, got {list(stages)}')
    return sorted(set(stages))


@torch.no_grad()
def _layer_attention(
    place: tuple[str, int, int],
    block: Block,
    args: tuple[Tensor, WindowGrid, Tensor | None],
    scores: Tensor,
    device: torch.device | str | None,
) -> LayerAttention:
    """What a block that ran with ``args`` and came to ``scores`` attended to."""
    x, grid, given = args
    is_vanilla = isinstance(block.attn, VanillaAttention)
    # A vanilla layer is given what the previous stage left, or nothing.
    residual = given if is_vanilla else None
    whole = _whole(scores, x.shape[0], device)
    return LayerAttention(
        *place,
        kind='vanilla' if is_vanilla else 'less',
        attn=_softmax(whole, grid),
        scores=whole,
        residual=None if residual is None else _whole(residual, x.shape[0], device),
        grid=grid,
    )


def _whole(scores: Tensor, batch: int, device: torch.device | str | None) -> Tensor:
    """Maps of all windows as a copy (B, windows, heads, n, n) in float32."""
    return scores.to(device, torch.float32, copy=True).unflatten(0, (batch, -1))


def _softmax(scores: Tensor, grid: WindowGrid) -> Tensor:
    """Softmax of (B, windows, heads, n, n) over the real keys, and 0 for padded queries."""
    if not grid.padded:
        return scores.softmax(dim=-1)
    padded = ~grid.valid(scores.device)[:, None]
    attn = scores.masked_fill(padded.unsqueeze(-2), -math.inf).softmax(dim=-1)
    return attn.masked_fill(padded.unsqueeze(-1), 0)
