"""What configs of somebody's own data have in common, whatever the toolbox."""

from __future__ import annotations

import importlib
import pprint
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import is_seq_of

from ..engine.data_checks import HEADS, check_classes, check_labels, innermost
from ..errors import MMLaViTError


class OwnDataError(MMLaViTError, ValueError):
    """Data do not make a config; the text is one line that says why."""


def below(path: Path, data: Path) -> str:
    """A path as seen from the folder of the data; absolute if it is elsewhere."""
    if path.is_relative_to(data):
        return path.relative_to(data).as_posix()
    return path.resolve().as_posix()


def with_classes(model: Any, number: int, name: str = '', old: int | None = None) -> Any:
    """What has to change in the config of a model, or of its metric, for so many classes.

    Args:
        model: The config, or a part of one.
        number: How many classes there are.
        name: What the part is called in the whole.
        old: How many classes the head has that it is a part of.

    Returns:
        The changes, nested as the config is; None for nothing.
    """
    if isinstance(model, list | tuple):
        changes = [with_classes(part, number, name, old) for part in model]
        # MMEngine replaces lists as a whole.
        merged = [_merged(part, change) for part, change in zip(model, changes, strict=True)]
        return merged if any(changes) else None
    if not isinstance(model, dict):
        return None
    own: dict[str, Any] = {}
    if name in HEADS and 'num_classes' in model:
        old, own['num_classes'] = model['num_classes'], number
    # Mask2Former's, without stuff.
    if name in HEADS and model.get('num_stuff_classes') == 0:
        old, own['num_things_classes'] = model['num_things_classes'], number
    weights: Any = model.get('class_weight')
    if old is not None and is_seq_of(weights, float | int):
        own['class_weight'] = None
        if len(weights) == old + 1 and len(set(weights[:-1])) == 1:
            # The last is that of no object.
            own['class_weight'] = [*weights[:1] * number, weights[-1]]
    if max(_numbers(model.get('topk')), default=1) > number:
        own['topk'] = (1,)
    found = {key: with_classes(part, number, key, old) for key, part in model.items()}
    return {**{key: change for key, change in found.items() if change}, **own} or None


def _numbers(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [number for number in value or () if isinstance(number, int)]


def _merged(old: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return old if change is None else change
    return {
        **old,
        **{k: part if part is None else _merged(old.get(k), part) for k, part in change.items()},
    }


def as_text(value: Any) -> str:
    """A value as configs are written."""
    if isinstance(value, dict):
        return f'dict({", ".join(f"{key}={as_text(part)}" for key, part in value.items())})'
    if isinstance(value, list):
        return f'[{", ".join(map(as_text, value))}]'
    return repr(value)


def top(base_name: str, classes: Sequence[str], train: int, val: int) -> list[str]:
    """The first lines of a config.

    Args:
        base_name: How it is to name what it inherits from.
        classes: Names of the classes.
        train: How many images there are to train on.
        val: How many to validate on.
    """
    names = pprint.pformat(tuple(classes), width=76)
    return [
        f'# {len(classes)} classes, {train} images to train on and {val} to validate on. Written',
        "# by 'mmlavit configs new'; learning rate, batch size and schedule are those of the base.",
        f'_base_ = {base_name!r}',
        '',
        f'metainfo = dict(classes={names})',
    ]


def check(text: str, scope: str) -> None:
    """See that the heads of the model that a config builds and its data have as many classes.

    Args:
        text: The config.
        scope: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``. But for detectors, whose annotations
            have been read, labels are looked at, too.

    Raises:
        mmlavit.engine.data_checks.DataError: If they have not.
    """
    cfg = Config.fromstring(text, '.py')
    registry = importlib.import_module(f'{scope}.registry')
    with DefaultScope.overwrite_default_scope(scope), warnings.catch_warnings():
        # Of the toolbox, on what the base says; a training will say it again.
        warnings.simplefilter('ignore')
        about = dict(cfg.model)
        if 'data_preprocessor' in cfg:
            about.setdefault('data_preprocessor', cfg.data_preprocessor)
        model = registry.MODELS.build(about)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            dataset = {**innermost(loader), 'lazy_init': scope == 'mmdet'}
            built = registry.DATASETS.build(dataset)
            check_classes(model, built)
            if scope != 'mmdet':
                check_labels(model, built)
