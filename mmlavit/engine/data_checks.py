"""Saying before the first step what is wrong with a data set."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import Evaluator
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn
from torch.utils.data import DataLoader

from ..errors import MMLaViTError

# What a data set without a single item raises while it is built: MMEngine's, packing its list of
# none; mmpretrain's, finding no image.
_NO_ITEM = r'need at least one array to concatenate|Found 0 files in subfolders of'
# What mmpretrain says of folders that are not the classes.
_FOLDERS = r'number of subfolders'
# What mmdet and pycocotools read of each annotation.
_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd')
#: What a module is called in a model of the three toolboxes that tells the data's classes apart;
#: not rpn_head, which tells things from the rest.
HEADS = (
    *('bbox_head', 'mask_head', 'panoptic_head', 'panoptic_fusion_head'),
    *('decode_head', 'auxiliary_head', 'head', 'seg_head'),
)
# How many images are looked at for their labels, and how many labels of pixels.
_IMAGES, _MAPS = 10_000, 16
# The label of pixels that mmseg ignores.
_IGNORED = 255
_REMEDY = 'check its ann_file, data_prefix, filter_cfg and the classes of its metainfo'


class DataError(MMLaViTError, ValueError):
    """A data set does not serve; the text is one line that names it."""


def check_data() -> None:
    """Make MMEngine's runners look at their data before the first step.

    Without an image they fail in words that say nothing of data, or look for the next image for
    ever. Without a box that is inside its image and no crowd's, a detector trains, on background
    alone; and one whose head has fewer classes than its data takes the others for background.
    Annotations in COCO's format may lack what only the evaluation asks for, after an epoch.
    """
    for runner in (Runner, FlexibleRunner):
        if not hasattr(runner.build_dataloader, '__wrapped__'):
            runner.build_dataloader = staticmethod(_with_items(runner.build_dataloader))
            runner.build_train_loop = _with_boxes(_with_classes(runner.build_train_loop))
            runner.build_val_loop = _with_classes(runner.build_val_loop)
            runner.build_test_loop = _with_classes(runner.build_test_loop)
            runner.build_evaluator = _with_annotations(runner.build_evaluator)


def _with_items(build: Callable[..., DataLoader]) -> Callable[..., DataLoader]:
    @functools.wraps(build)
    def build_dataloader(dataloader: DataLoader | dict, *args: Any, **kwargs: Any) -> DataLoader:
        message = f'{_name(dataloader)} has no image to use; {_REMEDY}'
        try:
            built = build(dataloader, *args, **kwargs)
        except KeyError as error:
            if error.args[0] in _KEYS and isinstance(dataloader, Mapping):
                _check_file(dataloader)
            raise
        except AssertionError as error:
            if not re.search(_FOLDERS, str(error)):
                raise
            raise DataError(
                f"{_name(dataloader)}: {error} For data of your own, type='CustomDataset' takes "
                'the names of the folders, and num_classes of the head is their number'
            ) from error
        except (ValueError, RuntimeError) as error:
            if not re.search(_NO_ITEM, str(error)):
                raise
            raise DataError(message) from error
        if hasattr(built.dataset, '__len__') and len(built.dataset) == 0:
            raise DataError(message)
        return built

    return build_dataloader


def _with_boxes(build: Callable[..., BaseLoop]) -> Callable[..., BaseLoop]:
    @functools.wraps(build)
    def build_train_loop(self: Runner, loop: BaseLoop | dict) -> BaseLoop:
        name = _name(self._train_dataloader)
        built = build(self, loop)
        dataset = built.dataloader.dataset
        if not has_targets(dataset):
            raise DataError(
                f'{name} has {len(dataset)} images and no box to train on: none is inside its '
                f'image, of one of the classes and no crowd; {_REMEDY}'
            )
        return built

    return build_train_loop


def _with_classes(build: Callable[..., BaseLoop]) -> Callable[..., BaseLoop]:
    @functools.wraps(build)
    def build_loop(self: Runner, loop: BaseLoop | dict) -> BaseLoop:
        built = build(self, loop)
        if isinstance(self.model, nn.Module):
            check_classes(self.model, built.dataloader.dataset)
            check_labels(self.model, built.dataloader.dataset)
        return built

    return build_loop


def _with_annotations(build: Callable[..., Evaluator]) -> Callable[..., Evaluator]:
    @functools.wraps(build)
    def build_evaluator(self: Runner, evaluator: Any) -> Evaluator:
        built = build(self, evaluator)
        cfgs = evaluator if isinstance(evaluator, Sequence) else [evaluator]
        for cfg, metric in zip(cfgs, built.metrics, strict=False):
            # mmdet's metric has read the file and does not say which.
            coco = getattr(metric, '_coco_api', None)
            if coco is not None and isinstance(cfg, Mapping):
                _check_annotations(coco.dataset.get('annotations', ()), str(cfg.get('ann_file')))
        return built

    return build_evaluator


def check_classes(model: nn.Module, dataset: Any) -> None:
    """Hold the classes of every head against those of the data.

    What does not tell the classes of the data apart may have another number: heads that are the
    same for all classes, edges beside a segmentation, words that a text may have, the detector in a
    tracker. A head may also count the things of a panoptic data set alone, or leave out a first
    class called background.

    Args:
        model: A detector, segmentor or classifier, wrapped or not.
        dataset: A data set of MMEngine, or a wrapper of such.

    Raises:
        DataError: If a head has another ``num_classes``, or the classes are no list of names.
    """
    metainfo = getattr(dataset, 'metainfo', None)
    if not isinstance(metainfo, Mapping) or (classes := metainfo.get('classes')) is None:
        return
    name = type(dataset).__name__
    if isinstance(classes, str):
        raise DataError(
            f'{name}: classes of metainfo must be a tuple or list of names, got the text '
            f'{classes!r}; write ({classes!r},)'
        )
    allowed = {len(classes), len(metainfo.get('thing_classes') or classes)}
    if len(classes) and str(classes[0]).lower() == 'background':
        allowed.add(len(classes) - 1)
    for path, module in _heads(model):
        # Of two classes, a head may have the output of the second alone.
        binary = getattr(module, 'out_channels', None) == 1 and len(classes) == 2
        if module.num_classes not in allowed and not (binary and module.num_classes == 1):
            raise DataError(
                f'{path} has num_classes={module.num_classes}, and the data set {name} '
                f'has {len(classes)} classes ({_some(classes)}); set num_classes of the model, or '
                'metainfo=dict(classes=...) of the data'
            )


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of all that tells the classes of the data apart."""
    inner: Any = getattr(model, 'module', model)  # out of a wrapper of DDP
    if hasattr(inner, 'language_model'):
        # Its heads count words.
        return
    for path, module in inner.named_modules():
        if path.startswith(('detector.', 'reid.')):
            continue
        # Heads in a list (cascades) have numbers after their names.
        kind = re.sub(r'(\.\d+)+$', '', path).rpartition('.')[2]
        # It mixes images and their classes, if at all.
        mixes = kind == 'data_preprocessor' and getattr(module, 'batch_augments', None)
        counts = isinstance(getattr(module, 'num_classes', None), int)
        edges = hasattr(module, 'boundary_threshold')
        # An RPN tells things from the rest, whatever the things are.
        proposes = any(base.__name__.endswith('RPNHead') for base in type(module).__mro__)
        agnostic = proposes or getattr(module, 'class_agnostic', False)
        if (kind in HEADS or mixes) and counts and not edges and not agnostic:
            yield path, module


def _some(names: Sequence) -> str:
    return ', '.join(map(str, names[:5])) + (', ...' if len(names) > 5 else '')


def check_labels(model: nn.Module, dataset: Any) -> None:
    """Hold the labels of the data against its names of classes, and against the heads.

    Args:
        model: A detector, segmentor or classifier, wrapped or not.
        dataset: A data set of MMEngine, or a wrapper of such. Of images of labels, and of lists of
            labels, it looks at some.

    Raises:
        DataError: If an annotation file lacks classes that the data set names, or a label is larger
            than a head can tell.
    """
    heads = [(path, head) for path, head in _heads(model) if path != 'data_preprocessor']
    ignored = {_IGNORED, *(getattr(head, 'ignore_index', _IGNORED) for _, head in heads)}
    for leaf in _leaves(dataset):
        name = type(leaf).__name__
        classes = leaf.metainfo.get('classes')
        categories = getattr(leaf, 'cat_ids', None)
        if isinstance(categories, list) and classes and len(categories) != len(classes):
            names = [c['name'] for c in json.loads(Path(leaf.ann_file).read_text())['categories']]
            raise DataError(
                f'annotations {leaf.ann_file} have {len(names)} categories ({_some(names)}), and '
                f'the data set {name} has {len(classes)} classes ({_some(classes)}), of which '
                f'{len(categories)} are among them; set metainfo=dict(classes=...) of the data to '
                'names of the file, in its order, and num_classes of the model to their number'
            )
        largest, where = _largest_label(leaf, ignored)
        for path, head in heads:
            # A head with one output tells two labels apart.
            number = max(head.num_classes, 2 * (getattr(head, 'out_channels', None) == 1))
            if largest >= number:
                raise DataError(
                    f'{where} has the label {largest}, and {path} has num_classes='
                    f'{head.num_classes}, which is for labels from 0 to {number - 1}; set '
                    'num_classes of the model, or check the labels of the data'
                )


def _leaves(dataset: Any) -> Iterator[Any]:
    """The data sets within whatever wraps them."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for part in inner:
        if part is not None:
            yield from _leaves(part)
        elif isinstance(getattr(dataset, 'metainfo', None), Mapping):
            yield dataset


def _largest_label(dataset: Any, ignored: Collection[int]) -> tuple[int, str]:
    """The largest label of some images, or -1, and the file where it is.

    Args:
        dataset: A data set of MMEngine. Without labels of images or pixels there are none.
        ignored: Labels of pixels that are none.
    """
    nothing = -1, ''
    if not hasattr(dataset, 'get_data_info') or not len(dataset):
        return nothing
    first = dataset.get_data_info(0)
    steps = getattr(dataset.pipeline, 'transforms', ())
    load = next((step for step in steps if type(step).__name__ == 'LoadAnnotations'), None)
    if 'gt_label' in first:
        find, most = _labels_of_image, _IMAGES
    elif load is not None and 'reduce_zero_label' in first:
        find, most = partial(_labels_of_pixels, load, ignored), _MAPS
    else:
        return nothing
    indices = range(0, len(dataset), -(-len(dataset) // most))
    return max(map(find, map(dataset.get_data_info, indices)), default=nothing)


def _labels_of_image(found: dict) -> tuple[int, str]:
    labels = found['gt_label'] if isinstance(found['gt_label'], list) else [found['gt_label']]
    return max((x for x in labels if isinstance(x, int)), default=-1), found.get('img_path', '')


def _labels_of_pixels(load: Callable, ignored: Collection[int], found: dict) -> tuple[int, str]:
    labels = np.unique(load(found)['gt_seg_map'])
    return int(max(set(labels) - set(ignored), default=-1)), found['seg_map_path']


def _check_file(dataloader: Mapping) -> None:
    """Look into the annotation file of a data set that did not load."""
    cfg = innermost(dataloader)
    if isinstance(cfg, Mapping) and cfg.get('ann_file'):
        path = Path(cfg.get('data_root') or '', cfg['ann_file'])
        if path.suffix == '.json' and path.is_file():
            content = json.loads(path.read_text(encoding='utf-8'))
            if isinstance(content, dict):
                _check_annotations(content.get('annotations', ()), str(path))


def _check_annotations(annotations: Sequence[Mapping], file: str) -> None:
    for annotation in annotations:
        for key in _KEYS:
            if key not in annotation:
                rest = {k: v for k, v in annotation.items() if k != 'segmentation'}
                raise DataError(
                    f"annotations {file} lack {key!r}, first in {rest}; in COCO's format each has "
                    f'{", ".join(_KEYS)} (iscrowd is 0 but for crowds, area is width times height '
                    'of a box without a mask)'
                )


def has_targets(dataset: Any) -> bool:
    """Whether an image of a data set has a box to learn, or the data set is not one of boxes.

    Args:
        dataset: A data set of MMEngine, or a wrapper of such.
    """
    if not hasattr(dataset, 'get_data_info') or not len(dataset):
        return True
    for index in range(len(dataset)):
        instances = dataset.get_data_info(index).get('instances')
        if instances is None or any(not i.get('ignore_flag') for i in instances):
            return True
    return False


def innermost(dataloader: Mapping) -> Any:
    """The config of a data set, within whatever wraps it.

    Args:
        dataloader: The config of its loader.
    """
    cfg = dataloader['dataset']
    while isinstance(cfg, Mapping) and isinstance(cfg.get('dataset'), Mapping):
        cfg = cfg['dataset']
    return cfg


def _name(dataloader: DataLoader | Mapping) -> str:
    """The type and place of a data set."""
    if not isinstance(dataloader, Mapping):
        return f'the data set {type(dataloader.dataset).__name__}'
    cfg = innermost(dataloader)
    if not isinstance(cfg, Mapping):
        return f'the data set {type(cfg).__name__}'
    places = [f'{k}={cfg[k]!r}' for k in ('data_root', 'ann_file', 'data_prefix') if cfg.get(k)]
    return f'the data set {cfg.get("type")} ({", ".join(places)})'
