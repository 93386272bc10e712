"""The hook that adds the diagonality preserving loss to any model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ...models.attention import LessAttention
from ...models.diagonality import diagonality_preserving_loss
from ...models.lavit import LaViT
from ...models.windows import WindowGrid
from ..lavits import lavits_of, unwrapped

# What a checkpoint's meta has since the loss does not grow with the scores.
_MARK = 'scale_free_diagonality_loss'


@HOOKS.register_module()
class DiagonalityLossHook(Hook):
    """Adds the diagonality preserving loss to any model whose backbone is a LaViT.

    While the model computes its losses in training, the hook notes the scores of each
    less-attention layer and adds ``loss_dp`` to the dict of losses that the model returns: the mean
    of :func:`~mmlavit.models.diagonality.diagonality_preserving_loss` over those layers, times
    ``loss_weight``. From there on it is a loss like any other: summed, scaled by AMP, accumulated,
    reduced by DDP, logged. Layers in frozen stages do not count. Nothing runs in validation and
    test.

    MMEngine logs the sum of all losses as ``loss``. A model whose own loss has that name, as
    mmpretrain's classifiers, would hide the sum, so it is logged as ``loss_task``.

    Args:
        loss_weight: Factor of the loss; the paper adds it as it is. 0 switches it off: the
            model is not watched. Defaults to 1.

    Raises:
        TypeError: If ``loss_weight`` is not a number.
        ValueError: If it is negative or not finite, or, when training starts, if the model holds no
            LaViT with a trainable less-attention layer.
        RuntimeError: In training, if such layers run without gradients, as under MMEngine's
            reentrant ``activation_checkpointing``, or not at all; or if the losses hold a
            ``loss_dp`` already, as from a second hook.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        if not isinstance(loss_weight, (int, float)) or isinstance(loss_weight, bool):
            raise TypeError(f'loss_weight must be a number, got {loss_weight!r}')
        if not 0 <= loss_weight < math.inf:
            raise ValueError(f'loss_weight must be finite and at least 0, got {loss_weight}')
        self.loss_weight = loss_weight
        self._handles: list = []
        self._seen: list[tuple[LessAttention, Tensor, WindowGrid]] | None = None
        self._hidden: set[LessAttention] = set()

    #: The loss of the scores of one layer, for a subclass to replace.
    loss = staticmethod(diagonality_preserving_loss)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note in the checkpoint which loss this is, also where it is off."""
        checkpoint.setdefault('meta', {})[_MARK] = True

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Say so where a training goes on that began under the loss of before."""
        meta = checkpoint.get('meta', {})
        resumes = self.loss_weight and getattr(runner, '_resume', False)
        if resumes and _MARK not in meta and type(self).__name__ in str(meta.get('cfg', '')):
            runner.logger.warning(
                'DiagonalityLossHook: this training began when the loss still grew with the '
                'scores; now it looks at their pattern alone, so loss_dp is another figure from '
                'here on and attention may become less even.'
            )

    def before_train(self, runner: Runner) -> None:
        """Start watching the model that the runner trains, unless the weight is 0."""
        if not self.loss_weight:
            return
        self.after_train(runner)
        backbones = lavits_of(runner, type(self).__name__)
        if not backbones:
            return
        layers = less_attention_layers(backbones.values())
        model = unwrapped(runner.model)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            *(layer.register_forward_hook(self._after_attention) for layer in layers),
        ]

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get('mode') == 'loss':
            self._seen = [] if model.training else None
            self._hidden = set()

    def _after_attention(self, layer: LessAttention, args: tuple, output: tuple) -> None:
        # Under with_cp a layer runs again in the backward pass, when nobody is listening.
        if self._seen is None or not layer.training:
            return
        if torch.is_grad_enabled():
            self._seen.append((layer, output[1], args[1]))
        else:
            self._hidden.add(layer)

    def _after_forward(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: object
    ) -> dict | None:
        if self._seen is None or kwargs.get('mode') != 'loss':
            return None
        seen, self._seen = self._seen, None
        hidden, self._hidden = self._hidden - {layer for layer, _, _ in seen}, set()
        if hidden:
            raise RuntimeError(
                f'DiagonalityLossHook: {len(hidden)} less-attention layers ran without gradients, '
                "as under MMEngine's activation_checkpointing; use LaViT's with_cp=True instead"
            )
        if not isinstance(losses, dict):
            raise TypeError(
                'DiagonalityLossHook needs a model that returns a dict of losses in mode "loss", '
                f'{type(model).__name__} returned {type(losses).__name__}'
            )
        if not seen:
            raise RuntimeError(
                f'DiagonalityLossHook: {type(model).__name__} computed its losses without running '
                'a less-attention layer'
            )
        if 'loss_dp' in losses:
            raise RuntimeError(
                f"DiagonalityLossHook: {type(model).__name__}'s losses have a loss_dp already; is "
                'the hook listed twice in custom_hooks? remove one'
            )
        losses = {'loss_task' if name == 'loss' else name: loss for name, loss in losses.items()}
        total = sum(self.loss(*_with_mask(scores, grid)) for _, scores, grid in seen)
        return {**losses, 'loss_dp': self.loss_weight * total / len(seen)}


def less_attention_layers(backbones: Iterable[LaViT]) -> list[LessAttention]:
    """The trainable less-attention layers of some LaViTs.

    Args:
        backbones: The LaViTs.

    Returns:
        The layers.

    Raises:
        ValueError: If none of their layers is a trainable less-attention layer.
    """
    layers = [m for b in backbones for m in b.modules() if isinstance(m, LessAttention)]
    if not layers:
        raise ValueError(
            'DiagonalityLossHook: the LaViT has no less-attention layer (vanilla_depths equals '
            'depths in every stage), so there is no loss to add; remove the hook'
        )
    trainable = [a for a in layers if any(p.requires_grad for p in a.parameters())]
    if not trainable:
        raise ValueError(
            'DiagonalityLossHook: every less-attention layer of the LaViT is frozen '
            '(frozen_stages), so the loss could change nothing; remove the hook'
        )
    return trainable


def _with_mask(scores: Tensor, grid: WindowGrid) -> tuple[Tensor, Tensor | None]:
    if not grid.padded:
        return scores, None
    valid = grid.valid(scores.device)
    return scores, valid.repeat(scores.shape[0] // valid.shape[0], 1)
