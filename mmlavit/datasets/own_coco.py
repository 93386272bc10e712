"""A config of somebody's own data in COCO's format, from one of the configs that are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import is_list_of

from .own_config import OwnDataError, as_text, below, check, top, with_classes

# How deep annotation files and folders of images may lie in the folder of the data.
_DEPTH = 3
# What the files of the two splits have in their paths; of two words, the first that is found.
_SPLITS = {'train': ('train',), 'val': ('val', 'test')}


@dataclass(frozen=True)
class Annotations:
    """An annotation file in COCO's format.

    Args:
        file: Its path.
        content: What is in it.
    """

    file: Path
    content: dict

    @cached_property
    def classes(self) -> list[str]:
        """The names of the categories, in the order of the file, as mmdet counts them."""
        return [category['name'] for category in self.content['categories']]

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many annotations each class has."""
        names = {category['id']: category['name'] for category in self.content['categories']}
        counts = Counter(names.get(a['category_id']) for a in self.content['annotations'])
        return {name: counts[name] for name in self.classes}

    @property
    def has_masks(self) -> bool:
        """Whether each object that is no crowd has an outline."""
        return all(a.get('segmentation') for a in self.content['annotations'])

    @property
    def images(self) -> list[str]:
        """The file names of the images."""
        return [image['file_name'] for image in self.content['images']]


def read_annotations(file: Path) -> Annotations:
    """Read an annotation file.

    Args:
        file: A JSON file in COCO's format.

    Returns:
        What it holds.

    Raises:
        OwnDataError: If it is not there, or not in that format.
    """
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise OwnDataError(f'cannot read annotations {file}: {error}') from error
    if not _is_coco(content):
        raise OwnDataError(
            f"{file} is not in COCO's format: a JSON object with lists of images, annotations and "
            'categories'
        )
    annotations = Annotations(file, content)
    for what, listed in (('image', content['images']), ('category', content['categories'])):
        if not listed:
            raise OwnDataError(f'annotations {file} have no {what}')
    twice = [name for name, n in Counter(annotations.classes).items() if n > 1]
    if twice:
        raise OwnDataError(f'annotations {file} have several categories called {twice[0]!r}')
    return annotations


def _is_coco(content: Any) -> bool:
    keys = ('images', 'annotations', 'categories')
    return isinstance(content, dict) and all(is_list_of(content.get(k), dict) for k in keys)


def find_annotations(data: Path, split: str) -> Annotations:
    """Find the annotation file of a split in a folder.

    Args:
        data: The folder.
        split: ``'train'`` or ``'val'``; validation annotations may also be called test.

    Returns:
        What is in the file.

    Raises:
        OwnDataError: If there is none, or more than one.
    """
    if not data.is_dir():
        raise OwnDataError(f'no folder {data}')
    files = [f for depth in range(_DEPTH) for f in sorted(data.glob('*/' * depth + '*.json'))]
    for word in _SPLITS[split]:
        named = [f for f in files if word in f.relative_to(data).as_posix().lower()]
        # Captions and keypoints may lie beside them, and are large.
        named = [f for f in named if f.name.startswith('instances_')] or named
        found = [f for f in named if _looks_like_coco(f)]
        if len(found) == 1:
            return read_annotations(found[0])
        if found:
            raise OwnDataError(
                f'{data} has several annotation files for {split}: '
                f'{", ".join(map(str, found[:4]))}; choose one with --{split} FILE'
            )
    raise OwnDataError(
        f"{data} has no annotation file in COCO's format whose path says "
        f'{" or ".join(map(repr, _SPLITS[split]))}; name it with --{split} FILE'
    )


def _looks_like_coco(file: Path) -> bool:
    try:
        return _is_coco(json.loads(file.read_text(encoding='utf-8')))
    except (OSError, ValueError):
        return False


def find_images(data: Path, annotations: Annotations, split: str) -> Path:
    """Find the folder that the file names of annotations are in.

    Args:
        data: The folder of the data.
        annotations: The annotations.
        split: ``'train'`` or ``'val'``: folders with this in their path are tried first.

    Returns:
        A folder that has all images.

    Raises:
        OwnDataError: If no folder has all of them.
    """
    folders = [f for depth in range(_DEPTH) for f in sorted(data.glob('*/' * (depth + 1)))]
    words = _SPLITS[split]
    folders.sort(key=lambda f: not any(w in f.relative_to(data).as_posix().lower() for w in words))
    folders = [annotations.file.parent, *folders, data]
    fewest: list[str] | None = None
    nearest = data
    for folder in dict.fromkeys(folders):
        if (folder / annotations.images[0]).is_file():
            missing = [name for name in annotations.images if not (folder / name).is_file()]
            if not missing:
                return folder
            if fewest is None or len(missing) < len(fewest):
                fewest, nearest = missing, folder
    if fewest is not None:
        raise OwnDataError(
            f'{len(fewest)} of {len(annotations.images)} images of {annotations.file} are not in '
            f'{nearest}, such as {fewest[0]}'
        )
    raise OwnDataError(
        f'no folder in {data} has {annotations.images[0]}, the first image of {annotations.file}; '
        f'name theirs with --{split}-images DIR'
    )


@dataclass(frozen=True)
class Split:
    """Annotations and the folder of their images."""

    annotations: Annotations
    images: Path


def make_config(base: Path, base_name: str, data: Path, train: Split, val: Split) -> str:
    """Write a config for data of one's own.

    Args:
        base: The config to start from: a detector of mmdet on data in COCO's format.
        base_name: How the new config is to name it.
        data: Folder of the data.
        train: What to train on.
        val: What to validate and test on.

    Returns:
        The text of the config. It has been read back, and its model built: heads and data agree on
        the classes.

    Raises:
        OwnDataError: If the data do not fit together, or not the config.
        mmlavit.engine.data_checks.DataError: If a head of the model has another number of classes
            that the config does not name.
        mmlavit.engine.launch.LaunchError: If the config is missing or unreadable.
    """
    cfg = Config.fromfile(base)
    classes = train.annotations.classes
    if val.annotations.classes != classes:
        raise OwnDataError(
            f'{val.annotations.file} has the categories {val.annotations.classes}, and '
            f'{train.annotations.file} has {classes}; they must be the same, in the same order'
        )
    lines = [
        *top(base_name, classes, len(train.annotations.images), len(val.annotations.images)),
        f'model = {as_text(with_classes(cfg.model.to_dict(), len(classes)))}',
        '',
    ]
    for name, split in (('train', train), ('val', val)):
        file = split.annotations.file
        dataset, wrapped = cfg[f'{name}_dataloader'].dataset, f'{name}_data'
        while 'ann_file' not in dataset and isinstance(dataset.get('dataset'), Mapping):
            dataset, wrapped = dataset.dataset, f'dict(dataset={wrapped})'
        if 'ann_file' not in dataset:
            raise OwnDataError(f'{base} has no {name}_dataloader.dataset.ann_file to replace')
        steps = dataset.get('pipeline', ())
        if not split.annotations.has_masks and any(step.get('with_mask') for step in steps):
            raise OwnDataError(
                f'{file} has objects without a segmentation, and {base} is about masks; start from '
                'a detector of boxes, such as retinanet_lavit_s_coco'
            )
        lines += [
            f'{name}_data = dict(',
            f'    data_root={f"{data}/"!r},',
            f'    ann_file={below(file, data)!r},',
            f'    data_prefix=dict(img={below(split.images, data)!r}),',
            '    metainfo=metainfo,',
            ')',
            f'{name}_dataloader = dict(dataset={wrapped})',
        ]
    if not isinstance(cfg.val_evaluator, Mapping) or 'ann_file' not in cfg.val_evaluator:
        raise OwnDataError(f'{base} has no val_evaluator.ann_file to replace')
    lines += [
        'test_dataloader = val_dataloader',
        f'val_evaluator = dict(ann_file={str(val.annotations.file)!r})',
        'test_evaluator = val_evaluator',
    ]
    text = '\n'.join(lines) + '\n'
    check(text, 'mmdet')
    return text
