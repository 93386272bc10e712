"""The attention of a LaViT while it trains, in TensorBoard or wherever MMEngine logs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...models.arch import as_int
from ...models.lavit import LaViT
from ...ops.mode import in_evaluation
from ..lavits import lavits_of

if TYPE_CHECKING:
    from ...analysis.saturation import LayerNumbers

_SHORT = {'vanilla': 'VA', 'less': 'LA'}


@HOOKS.register_module()
class AttentionVisualizationHook(Hook):
    """Logs figures and measures of a LaViT's attention during training.

    ``custom_hooks = [dict(type='AttentionVisualizationHook')]`` (beside those that are there) logs,
    every ``interval`` iterations, the figures ``attention_curves`` and ``attention_heat_maps`` and
    the scalars ``attention_MEASURE/stageM_layerL_KIND`` to the visualizer's backends; see
    :mod:`mmlavit.analysis.measures` for the measures. Stages and layers count from 1.

    When an iteration is due, the hook notes the first images that the backbone gets in it, as the
    training has augmented them, and runs them through the backbone again after the step, in
    evaluation mode and without gradients. The training is the same with it as without, bit by bit;
    nothing is drawn from random generators. In distributed training the main process does it on
    its own images, without talking to the others. Of several LaViTs it takes the first.

    On two cores of a Xeon a log took 1.6 s, most of it drawing, beside 0.72 s for each iteration of
    configs/lavit_n_shapes.py (docs/benchmarks/attention_hook.py): 0.2 % of the time at the default
    interval, which stays under 2 % where an iteration takes more than 0.09 s. Needs matplotlib.

    Args:
        interval: Iterations between two logs. Defaults to 1000.
        images: How many images of the batch to run, at most. Defaults to 4.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is less than 1 or, when training starts, if the model has no
            LaViT or its weights are spread over processes, as by FSDP.
        ImportError: When training starts, without matplotlib.
    """

    # After the hooks that change the model, such as EMA.
    priority = 'VERY_LOW'

    def __init__(self, interval: int = 1000, images: int = 4) -> None:
        self.interval = as_int('interval', interval, 1)
        self.images = as_int('images', images, 1)
        self._backbone: LaViT | None = None
        self._handle: Any = None
        self._noted: Tensor | None = None

    def before_train(self, runner: Runner) -> None:
        """Find the LaViT."""
        _refuse_shards(runner.model)
        backbone = next(iter(lavits_of(runner, type(self).__name__).values()), None)
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'AttentionVisualizationHook draws with matplotlib, which is not installed; '
                'pip install matplotlib'
            ) from error
        self._backbone = backbone if is_main_process() else None

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Listen for images, if the iteration is due."""
        if self._backbone is not None and self.every_n_train_iters(runner, self.interval):
            self._handle = self._backbone.register_forward_pre_hook(self._note)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Measure and log, if the iteration was due."""
        if self._handle is None or self._backbone is None:
            return
        noted = self._stop()
        step = runner.iter + 1
        if noted is None:
            runner.logger.warning(
                f'AttentionVisualizationHook: the LaViT did not run in iteration {step}, so there '
                'is nothing to log.'
            )
            return
        layers = _measure(self._backbone, noted)
        runner.visualizer.add_scalars(_scalars(layers), step=step)
        from ...analysis.saturation_figures import draw_curves, draw_heat_maps, to_image

        for name, draw in (('curves', draw_curves), ('heat_maps', draw_heat_maps)):
            image = to_image(draw({f'after {step} iterations': layers}))
            runner.visualizer.add_image(f'attention_{name}', image, step=step)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        self._stop()
        self._backbone = None

    def _note(self, backbone: LaViT, args: tuple) -> None:
        self._noted = args[0][: self.images].detach()

    def _stop(self) -> Tensor | None:
        """Stop listening; what was heard."""
        if self._handle is not None:
            self._handle.remove()
        noted, self._handle, self._noted = self._noted, None, None
        return noted


def _refuse_shards(model: nn.Module) -> None:
    while is_model_wrapper(model):
        if not isinstance(model, (DataParallel, DistributedDataParallel)):
            raise ValueError(
                'AttentionVisualizationHook runs the backbone in the main process alone, which a '
                f'{type(model).__name__} cannot do, as its weights are spread over all processes; '
                'remove the hook'
            )
        model = model.module


@torch.no_grad()
def _measure(backbone: LaViT, images: Tensor) -> list[LayerNumbers]:
    """The numbers of each layer of a LaViT, which is left as it was.

    Args:
        backbone: The LaViT, in any mode.
        images: Normalized images (B, C, H, W).

    Returns:
        See :class:`~mmlavit.analysis.saturation.LayerNumbers`.
    """
    # The tools of analysis are imported when a log is due, not with mmlavit.
    from ...analysis.record import recording
    from ...analysis.saturation import SaturationMeter

    meter = SaturationMeter()
    with in_evaluation(backbone), recording(backbone, meter.see, device=None):
        backbone(images.to(next(backbone.parameters()).dtype))
    meter.end_batch()
    return meter.numbers()


def _scalars(layers: list[LayerNumbers]) -> dict[str, float]:
    """By name, what is defined."""
    from ...analysis.saturation import MEASURES, SIMILARITIES

    found = {}
    for layer in layers:
        place = f'stage{layer.stage + 1}_layer{layer.layer + 1}_{_SHORT[layer.kind]}'
        values = {name: getattr(layer, name) for name in MEASURES}
        values |= {name: layer.to_previous(name) for name in SIMILARITIES}
        for name, value in values.items():
            if value is not None:
                found[f'attention_{name}/{place}'] = value
    return found
