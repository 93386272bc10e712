"""What trained classifiers lose where something simple is in the place of their attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmlavit.analysis.replacement_run import measure as measure_model

from .tasks import TASKS, build_config
from .training import weights_of
from .variants import VARIANTS, register_backbones

#: Of which variants.
COMPARED = ('lavit', 'stem-mix', 'vanilla')
_TASK = 'photo'


def measure(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Validate the classifiers of photographs with parts of their attention replaced.

    Args:
        seeds: Whose trainings; their weights must be where the study left them.

    Returns:
        For each seed, variant of :data:`COMPARED`, replacement
        (:func:`mmlavit.analysis.replacement.replaced`) and stage (from 0; None for all together)
        ``seed``, ``variant``, ``how``, ``stage`` and ``points``, the change of the accuracy.

    Raises:
        FileNotFoundError: If the weights of a training are not there.
    """
    register_backbones()
    found = []
    for seed in seeds:
        for name in COMPARED:
            variant = VARIANTS[name]
            weights = weights_of(_TASK, name, seed)
            cfg = build_config(TASKS[_TASK], variant, seed, variant.rate(_TASK), weights.parent)
            config = weights.with_name('replacing.py')
            cfg.dump(config)
            measured = measure_model(config, str(weights), metric=TASKS[_TASK].metric)
            found += [
                dict(seed=seed, variant=name, how=change.how, stage=change.stage)
                | dict(points=change.points[TASKS[_TASK].metric])
                for change in measured.changes
            ]
    return found
