"""How FSDP is to cut a LaViT."""

from __future__ import annotations

from mmengine.registry import FUNCTIONS
from torch import nn

from ..models.block import Block


@FUNCTIONS.register_module()
def wrap_lavit_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Each layer of a LaViT by itself: an ``auto_wrap_policy`` of FSDP.

    In a config ``auto_wrap_policy='wrap_lavit_blocks'``, within
    ``strategy=dict(type='ResumableFSDPStrategy', model_wrapper=dict(...))``. Cut finer than that,
    ``with_cp=True`` would recompute across the cuts, which FSDP does not support.

    Args:
        module: A module of the model.
        recurse: Whether FSDP asks if to look inside the module, or if to wrap it.
        nonwrapped_numel: How many parameters in it are not wrapped yet.

    Returns:
        True to look inside any module and to wrap each :class:`mmlavit.models.block.Block`.
    """
    return recurse or isinstance(module, Block)
