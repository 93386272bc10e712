"""What trains a model: hooks, learning rates, checkpoints, checks, and the launcher."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def register_all() -> bool:
    """Make known to MMEngine what configs name, without importing what few of them need.

    And let its runners look at how a LaViT is trained.

    Returns:
        Whether there is FSDP, which MMEngine leaves out where importing it fails.
    """
    import mmengine._strategy
    from mmengine.registry import STRATEGIES

    import_module('.hooks', __name__)
    import_module('.optim', __name__)
    import_module('.bfloat16', __name__)
    import_module('.checkpoint_file', __name__).register_safetensors()
    import_module('.training_checks', __name__).check_training()
    import_module('..evaluation.dsb2018', __name__)
    if not hasattr(mmengine._strategy, 'FSDPStrategy'):
        return False
    import_module('.fsdp_policy', __name__)
    STRATEGIES.register_module(name='ResumableFSDPStrategy', force=True, module=_fsdp_strategy)
    return True


def _fsdp_strategy(**kwargs: Any) -> Any:
    """What MMEngine calls to build a ``ResumableFSDPStrategy``."""
    return import_module('.fsdp', __name__).ResumableFSDPStrategy(**kwargs)
