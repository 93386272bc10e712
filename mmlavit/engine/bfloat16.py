"""Training under autocast to bfloat16, on a CPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward passes under autocast to bfloat16, on the device where the model is.

    In the place of MMEngine's AmpOptimWrapper, which refuses CPUs::

        optim_wrapper = dict(
            type='BFloat16OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05)
        )

    Weights, their gradients and the optimizer stay in float32. bfloat16 has the range of float32,
    so losses are not scaled, and checkpoints hold what those of MMEngine's OptimWrapper do: a
    training may go on under the one or the other. Validation and tests are in float32.

    What autocast leaves to a model holds here too: an operator that takes no bfloat16 raises. On a
    CPU that is mmcv's RoIAlign, and so two-stage detectors. It was tried on CPUs alone: there was
    no GPU.

    Args:
        kwargs: As of :class:`mmengine.optim.OptimWrapper`: ``optimizer``, ``accumulative_counts``,
            ``clip_grad``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and what accumulating gradients needs; around each forward pass.

        Args:
            model: What is trained.
        """
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
