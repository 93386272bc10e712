"""How far what another runtime computes may be from PyTorch, by what the numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How two tensors of one meaning are compared.

    Args:
        unit: What follows the number, for the user.
        tolerance: The largest difference that is rounding.
        measure: Takes what was found and what was expected; returns their difference.
    """

    unit: str
    tolerance: float
    measure: Callable[[Tensor, Tensor], float]


def _of_largest(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _most(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def _share(found: Tensor, expected: Tensor) -> float:
    return (found != expected).double().mean().item()


#: Feature maps, logits, scores; the largest value counts as 1 if it is less.
VALUES = Agreement('of the largest value', 1e-4, _of_largest)
#: Corners of boxes.
BOXES = Agreement('pixels', 0.01, _most)
#: The best class of each pixel, where a tie may fall either way.
LABELS = Agreement('of all pixels', 1e-3, _share)
