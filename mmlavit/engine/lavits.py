"""The LaViTs inside a model."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..models.lavit import LaViT


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without what wraps it (DDP, FSDP)."""
    inner: Any = model
    while is_model_wrapper(inner):
        inner = inner.module
    return inner


def lavits(model: nn.Module) -> dict[str, LaViT]:
    """The LaViTs inside a model.

    Args:
        model: Any model, wrapped (DDP, FSDP) or not.

    Returns:
        By their paths in the unwrapped model; ``''`` is the path of the model itself.
    """
    modules = unwrapped(model).named_modules()
    return {path: module for path, module in modules if isinstance(module, LaViT)}


def lavits_of(runner: Runner, hook: str) -> dict[str, LaViT]:
    """The LaViTs that a hook works on.

    Args:
        runner: Whose model.
        hook: Name of the hook, for messages.

    Returns:
        As :func:`required_lavits`.

    Raises:
        ValueError: As there.
    """
    return required_lavits(runner.model, hook, 'remove the hook')


def required_lavits(model: nn.Module, who: str, remedy: str) -> dict[str, LaViT]:
    """The LaViTs of a model that is to have some.

    Args:
        model: As for :func:`lavits`.
        who: What needs them, for messages.
        remedy: What to do where there are none, for messages.

    Returns:
        As :func:`lavits`. None, with a warning, for a model without any backbone: tools that draw
        schedules train such a stand-in by the rest of a config.

    Raises:
        ValueError: If the model has another backbone.
    """
    found = lavits(model)
    if found:
        return found
    model = unwrapped(model)
    text = f'{who} needs a model with a LaViT backbone; {type(model).__name__} has none'
    if any(path.rpartition('.')[2] == 'backbone' for path, _ in model.named_modules()):
        raise ValueError(f'{text}; {remedy}')
    print_log(f'{text}, so there is nothing to do.', logger='current', level=logging.WARNING)
    return {}
