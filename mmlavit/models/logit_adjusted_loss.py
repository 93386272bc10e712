"""Cross entropy that learns rare classes without seeing them everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import register


@register
class LogitAdjustedLoss(nn.Module):
    """Cross entropy weighted by class in training, of which predictions keep nothing.

    Weights let rare classes be learned, but a model that is trained with them predicts a class as
    if it were that many times as frequent. Here the weighted cross entropy is of
    ``cls_score + log(class_weight)``, so the model learns the ``cls_score`` that it would have
    without weights: what it predicts is the most probable class. In a decode head of mmseg::

        loss_decode = dict(type='LogitAdjustedLoss', class_weight=[0.5, 1.0, 4.0])

    Source: Menon et al., Long-Tail Learning via Logit Adjustment (arXiv 2007.07314), equation 11,
    with ``class_weight`` as alpha and its logarithm as Delta.

    Args:
        class_weight: A positive weight for each class; a common factor scales the loss alone. None
            weighs all alike.
        loss_weight: Factor of the loss.
        loss_name: Its name in the log; what begins with ``loss_`` is trained on.

    Raises:
        TypeError: If ``class_weight`` is neither None nor a list of numbers.
        ValueError: If one of them is not positive and finite, or there is none.
    """

    def __init__(
        self,
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ce',
    ) -> None:
        super().__init__()
        if class_weight is not None:
            _check(class_weight)
        self.class_weight = None if class_weight is None else [float(w) for w in class_weight]
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """Mean over the pixels whose label is not ``ignore_index``; 0 where there are none.

        Args:
            cls_score: Logits (N, classes, ...). Half precision is computed in float32.
            label: Classes (N, ...), integers.
            weight: Factor of each pixel (N, ...).
            ignore_index: Label of pixels that do not count.

        Returns:
            A scalar.

        Raises:
            ValueError: If ``cls_score`` has another number of classes than ``class_weight``.
        """
        if self.class_weight is not None and cls_score.shape[1] != len(self.class_weight):
            raise ValueError(
                f'class_weight has {len(self.class_weight)} weights, but cls_score is of '
                f'{cls_score.shape[1]} classes: give a weight for each'
            )
        if cls_score.dtype in (torch.float16, torch.bfloat16):
            cls_score = cls_score.float()
        weights = None
        if self.class_weight is not None:
            weights = cls_score.new_tensor(self.class_weight)
            cls_score = cls_score + weights.log().view(-1, *[1] * (cls_score.ndim - 2))
        loss = F.cross_entropy(
            cls_score, label, weights, ignore_index=ignore_index, reduction='none'
        )
        if weight is not None:
            loss = loss * weight
        return self.loss_weight * loss.sum() / (label != ignore_index).sum().clamp(min=1)


def _check(class_weight: object) -> None:
    """Raise unless these are weights."""
    if not isinstance(class_weight, Sequence) or any(
        isinstance(weight, bool) or not isinstance(weight, (int, float)) for weight in class_weight
    ):
        raise TypeError(
            f'class_weight must be a list of numbers, a class each, or None; got {class_weight!r}'
        )
    if not class_weight or not all(0 < weight < math.inf for weight in class_weight):
        raise ValueError(
            f'class_weight must be positive numbers, a class each, got {class_weight!r}'
        )
