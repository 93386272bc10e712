"""The diagonality preserving loss (paper, equations 8 and 9)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
