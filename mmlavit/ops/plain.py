"""Whether modules are what they were made as, so that their weights may be used without them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from .mode import is_dispatched, is_traced, is_transformed

_KINDS = (nn.Conv2d, nn.Dropout, nn.GELU, nn.LayerNorm, nn.Linear)
_HOOKS = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')
_GLOBAL = (
    *('_global_forward_pre_hooks', '_global_forward_hooks'),
    *('_global_backward_pre_hooks', '_global_backward_hooks'),
)


def are_plain(modules: Iterable[nn.Module]) -> bool:
    """Whether each module and all inside it compute what their weights say, unwatched.

    Somebody may have put a layer of their own in a place (LoRA, say), weights of another kind
    (quantized, pruned), or a hook on it or on all modules (Grad-CAM, counters); then modules have
    to be called.
    """
    if any(getattr(hooks_of_all, name, None) for name in _GLOBAL):
        return False
    return all(_is_plain(part) for module in modules for part in module.modules())


def _is_plain(module: nn.Module) -> bool:
    kind, own = type(module), vars(module)
    known = kind in _KINDS or kind.__module__.startswith('mmlavit.models.')
    return (
        known
        and 'forward' not in own
        and not any(own[name] for name in _HOOKS)
        # A GELU by tanh is another function.
        and own.get('approximate', 'none') == 'none'
        and all(type(p) in (nn.Parameter, type(None)) for p in own['_parameters'].values())
    )


def is_unwatched_inference(x: Tensor) -> bool:
    """Whether nothing needs to be kept of a computation with ``x``."""
    watched = torch.is_grad_enabled() or is_traced() or is_transformed() or is_dispatched()
    return not watched
