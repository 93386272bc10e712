"""FSDP through MMEngine's strategy, with resuming."""

from __future__ import annotations

from copy import copy

from mmengine._strategy import FSDPStrategy
from torch.distributed.fsdp import FullOptimStateDictConfig
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP


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
