"""The diagonality preserving loss (paper, equations 8 and 9) and the hook that adds it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ...models.attention import LessAttention
from ...models.lavit import LaViT
from ...models.windows import WindowGrid

# What a checkpoint's meta has since the loss does not grow with the scores.
_MARK = 'scale_free_diagonality_loss'

# A map whose spread is less than this of its largest magnitude holds nothing but rounding.
_EVEN = 1e-6


def diagonality_preserving_loss(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """How far the pattern of scores is from symmetric and diagonally dominant, at any scale.

    Each map ``A`` is divided by its spread, the standard deviation over its pairs of real tokens.
    Then equation 8, symmetry, is the mean of ``|A_ij - A_ji|``, and equation 9, dominance of the
    diagonal, the mean of ``relu(A_ij - A_ii)``. Both are over the pairs ``j != i`` of real tokens
    of a window; their sum is averaged over windows and heads. It is at least 0, is 0 exactly on
    symmetric diagonally dominant maps, does not depend on the number of windows, and is the same
    for ``c A`` for every ``c > 0``.

    The paper does not divide. Then the loss is smallest at ``A = 0``, which makes attention a plain
    average, and that is where training goes; here the gradient is orthogonal to each map, so it
    asks for a pattern and never for smaller scores.

    Args:
        scores: ``A`` before the softmax (windows, heads, n, n). Half precision is computed in
            float32.
        valid: Bool mask (windows, n) of real tokens; None where all are. A window with fewer than
            two real tokens has no pairs and counts as 0, and so does, without a gradient, a map
            that is even: whose spread is less than 1e-6 of its largest magnitude.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``scores`` is not floating point or ``valid`` not bool.
        ValueError: If a shape is wrong.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f'scores must be a floating-point tensor, got {kind}')
    if scores.ndim != 4 or scores.shape[2] != scores.shape[3] or 0 in scores.shape:
        raise ValueError(f'scores must be (windows, heads, n, n), got {tuple(scores.shape)}')
    windows, _, n, _ = scores.shape
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if valid is None:
        padded, count = None, torch.full((windows, 1), n, device=scores.device)
    else:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            kind = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
            raise TypeError(f'valid must be a bool tensor, got {kind}')
        if valid.shape != (windows, n):
            raise ValueError(
                f'valid must be (windows, n) = {(windows, n)} like scores, got {tuple(valid.shape)}'
            )
        padded = ~(valid[:, None, :, None] & valid[:, None, None, :])
        # Also before the differences, so that not even infinite padding leaves a trace.
        scores = scores.masked_fill(padded, 0)
        count = valid.sum(dim=-1, keepdim=True)
    scores, is_even = _unit_spread(scores, padded, count)
    # The pairs j = i contribute 0 to both, so summing over all pairs leaves those with j != i.
    violation = (scores - scores.mT).abs()
    violation = violation + F.relu(scores - scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))
    if padded is not None:
        violation = violation.masked_fill(padded, 0)
    pairs = (count * (count - 1)).clamp(min=1)
    return (violation.sum(dim=(-2, -1)) / pairs).masked_fill(is_even, 0).mean()


def _unit_spread(scores: Tensor, padded: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """Maps divided by the standard deviation over their pairs of real tokens.

    Args:
        scores: (windows, heads, n, n), 0 at padded pairs.
        padded: Which pairs those are, broadcast over heads; None for none.
        count: Real tokens of each window (windows, 1).

    Returns:
        The maps, and which of them, (windows, heads), are even; those are not divided.
    """
    # First by their largest magnitude: squares of large scores would be infinite, of small ones 0.
    # It is no part of the gradient, as the second division takes it out again.
    largest = scores.detach().abs().amax(dim=(-2, -1), keepdim=True)
    scores = scores / largest.masked_fill(largest == 0, 1)
    total = count.square().clamp(min=1)[..., None, None]
    centred = scores - scores.sum(dim=(-2, -1), keepdim=True) / total
    if padded is not None:
        centred = centred.masked_fill(padded, 0)
    variance = centred.square().sum(dim=(-2, -1), keepdim=True) / total
    is_even = variance.detach() <= _EVEN**2
    # The root of 0 has no gradient.
    spread = variance.masked_fill(is_even, 1).sqrt()
    return scores / spread, is_even[..., 0, 0]


@HOOKS.register_module()
class DiagonalityLossHook(Hook):
    """Adds the diagonality preserving loss to any model whose backbone is a LaViT.

    While the model computes its losses in training, the hook notes the scores of each
    less-attention layer and adds ``loss_dp`` to the dict of losses that the model returns: the mean
    of :func:`diagonality_preserving_loss` over those layers, times ``loss_weight``. From there on
    it is a loss like any other: summed, scaled by AMP, accumulated, reduced by DDP, logged. Layers
    in frozen stages do not count. Nothing runs in validation and test.

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
        model = runner.model
        while is_model_wrapper(model):
            model = model.module
        layers = less_attention_layers(model)
        self.after_train(runner)
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


def less_attention_layers(model: nn.Module) -> list[LessAttention]:
    """The trainable less-attention layers of the LaViTs inside a model.

    Args:
        model: Any model.

    Returns:
        The layers.

    Raises:
        ValueError: If there is no LaViT, or none of its layers is a trainable less-attention layer.
    """
    backbones = [m for m in model.modules() if isinstance(m, LaViT)]
    if not backbones:
        raise ValueError(
            'DiagonalityLossHook needs a model with a LaViT backbone; '
            f'{type(model).__name__} has none'
        )
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
