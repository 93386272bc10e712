"""FSDP through MMEngine's strategy: how to cut a LaViT, and resuming."""

from __future__ import annotations

from copy import copy

from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

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


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDPStrategy, which also resumes; arguments are the same.

    MMEngine 0.10 hands the arguments of ``optim_state_dict_to_load`` over in the order of torch
    2.0, so that ``resume`` ends in ``TypeError: unhashable type: 'dict'``.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimizer, as a checkpoint holds it.

        Args:
            state_dict: What MMEngine's ``optim_state_dict`` returned when it was saved.
        """
        config = copy(self.optim_state_dict_config)
        if isinstance(config, FullOptimStateDictConfig):
            # Every process has read the file, none waits for the first to send it.
            config.rank0_only = False
        with FSDP.state_dict_type(self.model, self.state_dict_type, self.state_dict_config, config):
            state = FSDP.optim_state_dict_to_load(
                model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
            )
        self.optim_wrapper.load_state_dict(state)
