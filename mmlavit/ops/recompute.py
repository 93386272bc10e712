"""What functions share that keep little for the backward pass and compute the rest again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .mode import is_traced, is_transformed


def recomputes(x: Tensor) -> bool:
    """Whether a backward pass may come for ``x`` for which cheap things are computed again.

    Not under autocast, whose casts a second computation would have to repeat, and not when
    recorded or transformed.
    """
    if is_traced() or is_transformed():
        return False
    return torch.is_grad_enabled() and not autocasts(x)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    if hasattr(torch.amp, 'is_autocast_available'):
        kind = x.device.type
        return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    # Before torch 2.4 there is a function for each kind of device.
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of the kind it was made as, and nobody watches it.

    Somebody may have put a layer of their own in its place (LoRA, say), or hooks on it (Grad-CAM);
    then it has to be called as a module.
    """
    hooks = module._forward_pre_hooks, module._forward_hooks
    hooks += module._backward_pre_hooks, module._backward_hooks
    return type(module) is kind and not any(hooks)


def gradients(
    out: Tensor,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor | None,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of ``out`` with respect to the tensors that need one, None for the others."""
    wanted = [t for t, is_needed in zip(tensors, needed, strict=True) if is_needed]
    found = torch.autograd.grad(out, wanted, grad, create_graph=create_graph) if wanted else ()
    grads = iter(found)
    return [next(grads) if is_needed else None for is_needed in needed]
