"""Saying before the first step that a data set has nothing to use in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from ..errors import MMLaViTError

# What a data set without a single item raises while it is built: MMEngine's, packing its list of
# none; mmpretrain's, finding no image.
_NO_ITEM = r'need at least one array to concatenate|Found 0 files in subfolders of'
_REMEDY = 'check its ann_file, data_prefix, filter_cfg and the classes of its metainfo'


class EmptyDataError(MMLaViTError, ValueError):
    """A data set has nothing to use; the text is one line that names the data set."""


def refuse_empty_data() -> None:
    """Make MMEngine's runners refuse data with nothing in it.

    Without an image they fail in words that say nothing of data, or look for the next image for
    ever. Without a box that is inside its image and no crowd's, a detector trains, on background
    alone.
    """
    for runner in (Runner, FlexibleRunner):
        if not hasattr(runner.build_dataloader, '__wrapped__'):
            runner.build_dataloader = staticmethod(_with_items(runner.build_dataloader))
            runner.build_train_loop = _with_boxes(runner.build_train_loop)


def _with_items(build: Callable[..., DataLoader]) -> Callable[..., DataLoader]:
    @functools.wraps(build)
    def build_dataloader(dataloader: DataLoader | dict, *args: Any, **kwargs: Any) -> DataLoader:
        message = f'{_name(dataloader)} has no image to use; {_REMEDY}'
        try:
            built = build(dataloader, *args, **kwargs)
        except (ValueError, RuntimeError) as error:
            if not re.search(_NO_ITEM, str(error)):
                raise
            raise EmptyDataError(message) from error
        if hasattr(built.dataset, '__len__') and len(built.dataset) == 0:
            raise EmptyDataError(message)
        return built

    return build_dataloader


def _with_boxes(build: Callable[..., BaseLoop]) -> Callable[..., BaseLoop]:
    @functools.wraps(build)
    def build_train_loop(self: Runner, loop: BaseLoop | dict) -> BaseLoop:
        name = _name(self._train_dataloader)
        built = build(self, loop)
        dataset = built.dataloader.dataset
        if not has_targets(dataset):
            raise EmptyDataError(
                f'{name} has {len(dataset)} images and no box to train on: none is inside its '
                f'image, of one of the classes and no crowd; {_REMEDY}'
            )
        return built

    return build_train_loop


def has_targets(dataset: Any) -> bool:
    """Whether an image of a data set has a box to learn, or the data set is not one of boxes.

    Args:
        dataset: A data set of MMEngine, or a wrapper of such.
    """
    if not hasattr(dataset, 'get_data_info'):
        return True
    for index in range(len(dataset)):
        instances = dataset.get_data_info(index).get('instances')
        if instances is None or any(not i.get('ignore_flag') for i in instances):
            return True
    return False


def _name(dataloader: DataLoader | Mapping) -> str:
    """The type and place of a data set, within whatever wraps it."""
    if not isinstance(dataloader, Mapping):
        return f'the data set {type(dataloader.dataset).__name__}'
    cfg = dataloader['dataset']
    while isinstance(cfg, Mapping) and isinstance(cfg.get('dataset'), Mapping):
        cfg = cfg['dataset']
    if not isinstance(cfg, Mapping):
        return f'the data set {type(cfg).__name__}'
    places = [f'{k}={cfg[k]!r}' for k in ('data_root', 'ann_file', 'data_prefix') if cfg.get(k)]
    return f'the data set {cfg.get("type")} ({", ".join(places)})'
