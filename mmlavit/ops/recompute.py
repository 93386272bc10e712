"""What functions share that keep little for the backward pass and compute the rest again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Before torch 2.4 there is a function for each kind of device.
_ASKS_BY_DEVICE = hasattr(torch.amp, 'is_autocast_available')


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    kind = x.device.type
    if _ASKS_BY_DEVICE:
        return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.is_autocast_cpu_enabled() if kind == 'cpu' else torch.is_autocast_enabled()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast, which has to be on for the device of ``x``, computes in."""
    kind = x.device.type
    if _ASKS_BY_DEVICE:
        return torch.get_autocast_dtype(kind)
    return torch.get_autocast_cpu_dtype() if kind == 'cpu' else torch.get_autocast_gpu_dtype()


def gradients(
    out: Tensor,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor | None,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of ``out`` with respect to the tensors that need one, None for the others."""
    pairs = zip(tensors, needed, strict=True)
    wanted = [t for t, is_needed in pairs if is_needed and t is not None]
    found = torch.autograd.grad(out, wanted, grad, create_graph=create_graph) if wanted else ()
    grads = iter(found)
    return [next(grads) if is_needed else None for is_needed in needed]
