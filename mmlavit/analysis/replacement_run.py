"""What a trained model loses where something simple is in the place of what it has learnt."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from ..engine.checkpoint_file import read_weights
from ..engine.data_checks import check_data
from .loading import AnalysisError, build_model, load_weights, one_line
from .record import recording, stages_of
from .replacement import HOWS, MeanAttention, replaceable, replaced

#: The metrics of our configs, which count where nothing else is asked for.
MAIN_METRICS = ('accuracy/top1', 'coco/bbox_mAP', 'coco/segm_mAP', 'mIoU')

# What a model that loses nothing tells stands beside the head of its column.
_WORDS = {
    'even': ('even maps', 'what tokens attend to does nothing'),
    'identity': ('identity', 'attending to other tokens does nothing'),
    'mean': ('mean over images', 'that attention depends on the image does nothing'),
    'ar': ('AR off', 'the residual from the stage before (AR) does nothing'),
    'psi_theta': ('Psi, Theta = identity', 'Psi and Theta do nothing'),
}

#: Heads of columns, by what is replaced.
COLUMNS = {how: head for how, (head, _) in _WORDS.items()}


@dataclass(frozen=True)
class Change:
    """What happens to the metrics where something is replaced.

    Args:
        how: What it is replaced by, see :func:`mmlavit.analysis.replacement.replaced`.
        stage: Where, from 0; None for all stages together.
        points: By metric, how many points more than the model as it is.
        errors: By metric, the standard error of that, where it can be known.
    """

    how: str
    stage: int | None
    points: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Args:
        config: Its config.
        checkpoint: Its weights.
        images: On how many images.
        stages: How many stages its LaViT has.
        as_it_is: The metrics of the model as it is, in points (0 to 100).
        changes: What happens to them.
        left_out: What could not be replaced, and why, in sentences.
    """

    config: str
    checkpoint: str
    images: int
    stages: int
    as_it_is: dict[str, float]
    changes: list[Change]
    left_out: list[str]


def measure(
    config: str | Path,
    checkpoint: str,
    *,
    only: Sequence[str] = HOWS,
    images: int | None = None,
    metric: str | None = None,
    report: Callable[[str], Any] = print,
) -> Measured:
    """Run the validation of a config again and again, each time with something else replaced.

    It is MMEngine's own loop with the config's data and metrics (those of the test, in a config
    without a validation), on a GPU where there is one. Hooks of the config stay out of it.

    Args:
        config: A config of mmdet, mmseg or mmpretrain whose model has a LaViT inside.
        checkpoint: A checkpoint of the whole model.
        only: What to replace, see :func:`mmlavit.analysis.replacement.replaced`.
        images: How many images, spread evenly over the data set; None for all.
        metric: What counts; None for those of :data:`MAIN_METRICS` that the config has.
        report: Called with a line after each run.

    Returns:
        What was measured.

    Raises:
        AnalysisError: If the config has no LaViT, no validation or no such metric, the checkpoint
            does not fit, or the model as it is has no value to compare with.
        mmlavit.engine.launch.LaunchError: If the config is missing or unreadable.
        OSError: If the checkpoint or the data are not there.
        ValueError: If the checkpoint is damaged, the data are empty, ``images`` is less than 1 or
            ``only`` names something unknown.
    """
    if images is not None and images < 1:
        raise ValueError(f'images must be at least 1, got {images}')
    model, cfg = build_model(config)
    stages = 1 + max(m for _, m, _ in stages_of(model))
    plan = {how: replaceable(model, how) for how in only}
    load_weights(model, read_weights(checkpoint), checkpoint, config)
    mean = MeanAttention() if 'mean' in plan else None
    with tempfile.TemporaryDirectory() as folder:
        evaluation = _Evaluation(config, cfg, model, images, folder)
        watch = nullcontext() if mean is None else recording(model, mean.see, device=None)
        with watch:
            plain = evaluation.run()
        names = _names(plain.metrics, metric, config)
        found = {name: evaluation.points(plain, name) for name in names}
        for name, value in found.items():
            # An AP without ground truth is -1.
            if not 0 <= value < math.inf:
                raise AnalysisError(
                    f'{name} of {checkpoint} is {value} on these images, which nothing can be '
                    'compared with'
                )
        report(f'as it is: {_list(found)} on {evaluation.images} images')
        left_out = []
        if mean is not None and mean.refusal is not None:
            del plan['mean']
            left_out.append(f'The mean over images is left out: {mean.refusal}.')
        for how in [how for how, where in plan.items() if not where]:
            del plan[how]
            left_out.append(f'{_WORDS[how][0]} is left out: no stage has that.')
        runs = [(how, m) for how, where in plan.items() for m in (None, *where)]
        changes = []
        for i, (how, m) in enumerate(runs, 1):
            given = mean if how == 'mean' else None
            with replaced(model, how, stages=None if m is None else [m], mean=given):
                other = evaluation.run()
            values = {name: evaluation.points(other, name) for name in names}
            report(f'[{i}/{len(runs)}] {_place(m)}, {_WORDS[how][0]}: {_list(values)}')
            errors = {name: _standard_error(plain, other, name) for name in names}
            changes.append(
                Change(
                    how,
                    m,
                    {name: values[name] - found[name] for name in names},
                    {name: error for name, error in errors.items() if error is not None},
                )
            )
    return Measured(
        str(config), str(checkpoint), evaluation.images, stages, found, changes, left_out
    )


def draw_table(measured: Measured, metric: str) -> str:
    """The changes of a metric in Markdown: a row for each place, a column for each replacement."""
    hows = list(dict.fromkeys(change.how for change in measured.changes))
    cells = {(c.how, c.stage): _amount(c, metric) for c in measured.changes}
    head = f'{metric}: {measured.as_it_is[metric]:.1f} as it is'
    rows = [[head, *(_WORDS[how][0] for how in hows)], ['---', *('---:' for _ in hows)]]
    for stage in (None, *range(measured.stages)):
        rows.append([_place(stage), *(cells.get((how, stage), '–') for how in hows)])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def judge(measured: Measured, metric: str, threshold: float) -> list[str]:
    """Say which parts do nothing that a metric sees, and which do harm.

    Args:
        measured: What was measured.
        metric: One of its metrics.
        threshold: A change of less than so many points is nothing.

    Returns:
        Sentences.
    """
    if not measured.as_it_is[metric]:
        return [f'WARNING: {metric} is 0 as it is, so the model has nothing to lose.']
    better, nothing, unsure = (defaultdict(list) for _ in range(3))
    for change in measured.changes:
        points, error = change.points[metric], change.errors.get(metric)
        if abs(points) < threshold:
            nothing[change.how].append(change)
        elif error is not None and abs(points) < 2 * error:
            unsure[change.how].append(change)
        elif points > 0:
            better[change.how].append(change)

    def where(how: str, changes: list[Change]) -> str:
        places = [f'{_place(change.stage)} ({_amount(change, metric)})' for change in changes]
        return f'{_WORDS[how][0]} in {", ".join(places)}'

    sentences = [
        f'WARNING: {where(*item)}: {metric} is better without what the model has learnt.'
        for item in better.items()
    ]
    for how, changes in nothing.items():
        few = any(2 * change.errors.get(metric, 0) > threshold for change in changes)
        hedge = ', as far as so few images can tell' if few else ''
        sentences.append(
            f'{where(how, changes)}: {_WORDS[how][1]} there that {metric} sees{hedge}.'
        )
    sentences += [f'{where(*item)}: this may be chance.' for item in unsure.items()]
    return sentences or [f'Each of these costs at least {threshold:g} points of {metric}.']


def to_json(measured: Measured, threshold: float) -> str:
    """All numbers and what :func:`judge` says, with stages counted from 1, as in the table."""
    changes = [
        {**asdict(c), 'stage': None if c.stage is None else c.stage + 1} for c in measured.changes
    ]
    sentences = {metric: judge(measured, metric, threshold) for metric in measured.as_it_is}
    content = {'threshold': threshold, 'changes': changes, 'sentences': sentences}
    return json.dumps({**asdict(measured), **content}, indent=1)


@dataclass(frozen=True)
class _Run:
    """Metrics of one run, and which images were named right where that is what counts."""

    metrics: dict[str, Any]
    hits: Tensor


class _Evaluation:
    """The validation of a config, built once and run many times."""

    def __init__(
        self, config: str | Path, cfg: Config, model: nn.Module, images: int | None, folder: str
    ) -> None:
        split = next((s for s in ('val', 'test') if cfg.get(f'{s}_dataloader')), None)
        if split is None:
            raise AnalysisError(f'{config} has no val_dataloader and no test_dataloader')
        self.split = split
        self.is_fraction = cfg.default_scope == 'mmdet'
        self.hits = _Hits()
        check_data()
        settings = cfg[f'{self.split}_dataloader']
        # What the packages print is no part of the report.
        with redirect_stdout(io.StringIO()):
            try:
                loader = Runner.build_dataloader(settings)
                total = len(loader.dataset)
                self.images = min(images or total, total)
                chosen = [i * total // self.images for i in range(self.images)]
                if self.images < total:
                    settings = {**settings, 'dataset': loader.dataset, 'batch_sampler': None}
                    loader = Runner.build_dataloader({**settings, 'sampler': chosen})
                parts = {name: cfg[f'{self.split}_{name}'] for name in ('cfg', 'evaluator')}
                parts['dataloader'] = loader
                self.runner = Runner(
                    model,
                    folder,
                    **{f'{self.split}_{name}': part for name, part in parts.items()},
                    default_hooks=dict.fromkeys(_DEFAULT_HOOKS),
                    custom_hooks=[self.hits],
                    default_scope=cfg.default_scope,
                    log_level='ERROR',
                )
                loop = getattr(self.runner, f'{self.split}_loop')
            except (KeyError, TypeError) as error:
                raise AnalysisError(
                    f'cannot build the data or the metric of {config}: {one_line(error)}'
                ) from error
        if self.images < total:
            for metric in loop.evaluator.metrics:
                # COCO's metric has the ground truth of all images, and would miss the others.
                if hasattr(metric, 'img_ids'):
                    metric.img_ids = [loader.dataset.get_data_info(i)['img_id'] for i in chosen]

    def run(self) -> _Run:
        """Evaluate the model as it is now."""
        self.hits.found.clear()
        with redirect_stdout(io.StringIO()):
            metrics = getattr(self.runner, self.split)()
        return _Run(metrics, torch.tensor(self.hits.found, dtype=torch.float64))

    def points(self, run: _Run, name: str) -> float:
        """A metric in points, from 0 to 100."""
        # mmdet's metrics are fractions, but for those of panoptic segmentation. Where a detector
        # finds nothing in any image, it has no AP, not even 0.
        if not self.is_fraction or name.startswith('coco_panoptic/'):
            return float(run.metrics[name])
        return 100 * float(run.metrics.get(name, 0))


_DEFAULT_HOOKS = (
    'runtime_info',
    'timer',
    'sampler_seed',
    'logger',
    'param_scheduler',
    'checkpoint',
)


class _Hits(Hook):
    """Notes for each image whether a classifier was right."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Any, mode: str
    ) -> None:
        for sample in outputs:
            if 'pred_label' in sample and 'gt_label' in sample:
                self.found.append(sample.pred_label.tolist() == sample.gt_label.tolist())


def _names(metrics: dict[str, Any], metric: str | None, config: str | Path) -> list[str]:
    names = [name for name in MAIN_METRICS if name in metrics] if metric is None else [metric]
    if not names or names[0] not in metrics:
        wanted = f'none of {list(MAIN_METRICS)}' if metric is None else f'no {metric!r}'
        raise AnalysisError(
            f'the evaluation of {config} gives {wanted} for --metric, but {sorted(metrics)}'
        )
    return names


def _standard_error(plain: _Run, other: _Run, name: str) -> float | None:
    """Of a difference of accuracies on the same images, where it is known what was right."""
    runs = (plain, other)
    if name != 'accuracy/top1' or len(plain.hits) < 2:
        return None
    # A threshold on scores makes other accuracies than counting.
    if any(abs(100 * run.hits.mean() - run.metrics[name]) > 1e-3 for run in runs):
        return None
    difference = other.hits - plain.hits
    return 100 * float(difference.std()) / math.sqrt(len(difference))


def _place(stage: int | None) -> str:
    return 'all stages' if stage is None else f'stage {stage + 1}'


def _amount(change: Change, metric: str) -> str:
    # Adding 0 takes the sign from -0.0.
    return f'{round(change.points[metric], 1) + 0:+.1f}{_error(change.errors.get(metric))}'


def _error(error: float | None) -> str:
    return '' if error is None else f' ± {error:.1f}'


def _list(values: dict[str, float]) -> str:
    return ', '.join(f'{name} {value:.1f}' for name, value in values.items())
