"""Training under autocast to bfloat16, on a CPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn


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

    Heads of detectors and segmentors give float32, and extractors of regions get it: mmcv's NMS and
    RoIAlign take no bfloat16 on a CPU, and the corners of a box of 500 pixels are off by up to 1 in
    it. Other operators that take none raise, as under any autocast. It was tried on CPUs alone:
    there was no GPU.

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
        narrow = torch.autocast(device, torch.bfloat16)
        with super().optim_context(model), _wide_boxes(model), narrow:
            yield


@contextmanager
def _wide_boxes(model: nn.Module) -> Iterator[None]:
    """What makes or reads boxes in the detectors inside ``model`` meets float32."""
    handles = []
    for module in model.modules():
        # mmdet's names for what all its heads and all its extractors have.
        if hasattr(module, 'predict_by_feat'):
            handles.append(module.register_forward_hook(lambda module, args, out: _wide(out)))
        elif hasattr(module, 'roi_layers'):
            handles.append(module.register_forward_pre_hook(lambda module, args: _wide(args)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wide(value: Any) -> Any:
    return apply_to(
        value, lambda t: isinstance(t, Tensor) and t.dtype == torch.bfloat16, Tensor.float
    )
