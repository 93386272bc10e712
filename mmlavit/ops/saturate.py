"""Scores in float16, which ends at 65504."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max


def saturate(scores: Tensor) -> Tensor:
    """Scores fresh from a product, with the largest float16 in place of infinity, in place.

    ``Q K^T`` and ``Psi A Theta^T`` may leave the range of float16, under autocast or in a model
    that is float16 itself. An infinite score makes the softmax of its row NaN, and at the next
    product the whole window. A saturated one keeps its row's attention where it was: on the largest
    score. Subtracting something from each row would keep scores small without loss for this
    softmax, but not for the next layer: ``Psi A Theta^T`` depends on more than differences.

    As of any clamp, no gradient comes through a saturated score. Other types pass untouched:
    bfloat16 has the range of float32.

    Args:
        scores: What a product returned, in no other hands yet.

    Returns:
        ``scores`` itself.
    """
    if scores.dtype != torch.float16:
        return scores
    # Of the in-place functions, this one keeps its result for the backward pass, which whoever
    # takes the scores next keeps as well; clamp_ would keep a copy of what it was given.
    return F.hardtanh_(scores, -LARGEST, LARGEST)
