"""Modules that ONNX has no operators for at free sizes, recorded in operators that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def plain_operators(model: nn.Module) -> Iterator[None]:
    """Have a model compute in operators that ONNX has for sizes that are free; for recording.

    Replaced are adaptive average pooling (of PSPNet and UPerNet) and mmseg's ``Upsample`` by a
    whole factor (of Semantic FPN). They compute the same, but for rounding.

    Args:
        model: The model, whose modules are as they were afterwards.
    """
    replaced = []
    try:
        for module in model.modules():
            forward = _plain(module)
            # What somebody else has put in the place of a forward stays.
            if forward is not None and 'forward' not in vars(module):
                module.forward = forward
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _plain(module: Any) -> Callable[[Tensor], Tensor] | None:
    if isinstance(module, nn.AdaptiveAvgPool2d):
        size: Any = module.output_size
        rows, cols = size if isinstance(size, tuple) else (size, size)
        return partial(adaptive_average_pool, rows=rows, cols=cols)
    if type(module).__name__ == 'Upsample' and type(module).__module__.startswith('mmseg.'):
        factor = module.scale_factor
        if isinstance(factor, float) and factor.is_integer() and not module.size:
            return partial(
                _enlarge,
                factor=int(factor),
                mode=module.mode,
                align_corners=module.align_corners,
            )
    return None


def adaptive_average_pool(x: Tensor, rows: int | None, cols: int | None) -> Tensor:
    """Compute :func:`torch.nn.functional.adaptive_avg_pool2d` as products of matrices.

    Args:
        x: Maps (B, C, H, W).
        rows: Rows wanted; None for as many as there are.
        cols: Columns wanted, likewise.

    Returns:
        Maps (B, C, rows, cols).
    """
    if rows is not None:
        x = _averages(x.shape[2], rows, x) @ x
    if cols is not None:
        x = x @ _averages(x.shape[3], cols, x).T
    return x


def _averages(size: int, bins: int, like: Tensor) -> Tensor:
    """The matrix (bins, size) whose rows average; bin i is from floor(i s / b) to ceil of i + 1."""
    places = torch.arange(size, device=like.device)
    first = torch.arange(bins, device=like.device)[:, None] * size
    # Not -(-a // b), see WindowGrid.
    inside = (places >= first // bins) & (places < (first + size + bins - 1) // bins)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _enlarge(x: Tensor, factor: int, mode: str, align_corners: bool | None) -> Tensor:
    size = [factor * side for side in x.shape[2:]]
    return F.interpolate(x, size, mode=mode, align_corners=align_corners)
