"""What functions share that keep little for the backward pass and compute the rest again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    if hasattr(torch.amp, 'is_autocast_available'):
        kind = x.device.type
        return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    # Before torch 2.4 there is a function for each kind of device.
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


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
