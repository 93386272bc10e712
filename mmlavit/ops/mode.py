"""In what mode the code runs: recorded, transformed, or with a backward pass to come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# torch 2.1 has it under another name, and it does not tell there in every function; what is then
# compiled is the convolution, which computes the same.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling
_is_exporting = getattr(torch.compiler, 'is_exporting', _is_compiling)


def is_traced() -> bool:
    """Whether the code is being recorded rather than run, when sizes must not become constants."""
    return torch.jit.is_tracing() or _is_compiling()


def is_exported() -> bool:
    """Whether the code is being recorded for elsewhere, in plain operators; not to be compiled."""
    # Before torch 2.7 nothing tells the two apart.
    return is_traced() and (torch.jit.is_tracing() or _is_exporting())


def may_differ(size: int, other: int) -> bool:
    """Whether two sizes differ, or may: code that is being recorded is for all sizes."""
    return is_traced() or size != other


def is_dispatched() -> bool:
    """Whether somebody sees every operator: a recorder (make_fx), a counter of FLOPs, fakes."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether ``torch.func`` transforms the code (vmap, grad, jvp), which it does op by op."""
    # What PyTorch itself asks before it applies a torch.autograd.Function.
    return torch._C._are_functorch_transforms_active()


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and each module back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
