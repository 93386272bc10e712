"""What the models take from MMEngine, and what stands in for it where there is none."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from torch import nn

M = TypeVar('M', bound=nn.Module)

# Type checkers always see the stand-in, since MMEngine shows them no annotations.
if not TYPE_CHECKING and find_spec('mmengine') is not None:
    from ..compat import require_mmengine

    require_mmengine()  # what MMEngine needs around it comes before MMEngine
    from mmengine.logging import print_log
    from mmengine.model import BaseModule
    from mmengine.registry import MODELS

    register = MODELS.register_module()

    def say(text: str) -> None:
        """Write a line into the log of the run, or to stderr where there is no run."""
        print_log(text, logger='current')

else:

    class BaseModule(nn.Module):
        """A plain module, which takes ``init_cfg=None`` alone."""

        def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
            super().__init__()
            if init_cfg is not None:
                raise ImportError('init_cfg needs MMEngine; load weights by load_state_dict')
            self.init_cfg = init_cfg
            self.is_init = False

        def init_weights(self) -> None:
            """Leave the weights as they are: a LaViT starts initialized."""

    def register(cls: type[M]) -> type[M]:
        """Leave a class as it is."""
        return cls

    def say(text: str) -> None:
        """Write a line into Python's log."""
        logging.getLogger('mmlavit').info(text)
