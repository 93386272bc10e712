"""A config of somebody's own data in folders: masks of pixels (mmseg), or a class a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .own_config import OwnDataError, as_text, below, check, top, with_classes

# What the folders of a split are called, in the order in which they are tried.
_SPLITS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation', 'test')}
_IMAGES = ('img_dir', 'images', 'imgs')
_MASKS = ('ann_dir', 'annotations', 'masks', 'labels')
# As mmpretrain has them.
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
CLASSES_FILE = 'classes.txt'


@dataclass(frozen=True)
class Masks:
    """Images of a split and their masks, PNG files whose grey values are classes.

    Args:
        images: Folder of the images.
        masks: Folder of the masks, with the names of the images but for the suffix.
    """

    images: Path
    masks: Path

    def suffix(self) -> str:
        """The suffix of the images.

        Raises:
            OwnDataError: If they have several, or none has a mask, or one has not.
        """
        files = _images_in(self.images)
        suffixes = sorted({file.suffix for file in files})
        if len(suffixes) != 1:
            raise OwnDataError(
                f'images in {self.images} must have one suffix, as mmseg takes one, got '
                f'{", ".join(suffixes) or "no image"}'
            )
        missing = [
            file
            for file in files
            if not (self.masks / file.relative_to(self.images)).with_suffix('.png').is_file()
        ]
        if missing:
            raise OwnDataError(
                f'{len(missing)} of {len(files)} images in {self.images} have no mask in '
                f'{self.masks}, such as {missing[0].name}, whose mask is '
                f'{missing[0].with_suffix(".png").name}'
            )
        return suffixes[0]

    def __len__(self) -> int:
        return len(_images_in(self.images))


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob('*') if f.suffix.lower() in _SUFFIXES and f.is_file())


def find_masks(data: Path, split: str) -> Masks:
    """Find the images and masks of a split in a folder.

    Args:
        data: The folder. Below it are ``img_dir`` (or images, imgs) and ``ann_dir`` (or
            annotations, masks, labels), each with a folder for each split, or the other way round.
        split: ``'train'`` or ``'val'``.

    Raises:
        OwnDataError: If they are not there.
    """
    if not data.is_dir():
        raise OwnDataError(f'no folder {data}')
    for word, images, masks in product(_SPLITS[split], _IMAGES, _MASKS):
        for found in (
            Masks(data / images / word, data / masks / word),
            Masks(data / word / images, data / word / masks),
        ):
            if found.images.is_dir() and found.masks.is_dir():
                return found
    raise OwnDataError(
        f'{data} has no img_dir/{split} with ann_dir/{split}; name the folders with '
        f'--{split}-images DIR and --{split} DIR'
    )


def read_classes(file: Path) -> list[str]:
    """Read the names of classes, one a line, in the order of their numbers from 0.

    Args:
        file: A text file.

    Raises:
        OwnDataError: If it cannot be read or is empty.
    """
    try:
        lines = file.read_text(encoding='utf-8').splitlines()
    except (OSError, ValueError) as error:
        raise OwnDataError(
            f'cannot read {file}, which names the classes of the masks, one a line; or give them '
            f'with --classes: {error}'
        ) from error
    if not (names := [line.strip() for line in lines if line.strip()]):
        raise OwnDataError(f'{file} names no class')
    return names


def make_masks_config(
    base: Path, base_name: str, data: Path, classes: Sequence[str], train: Masks, val: Masks
) -> str:
    """Write a config for masks of one's own.

    Args:
        base: The config to start from: a segmentor of mmseg.
        base_name: How the new config is to name it.
        data: Folder of the data.
        classes: Names of the classes, by the grey values of the masks, from 0. Pixels of 255 are
            not looked at.
        train: What to train on.
        val: What to validate and test on.

    Returns:
        The text of the config. It has been read back, and its model and data built: some masks
        were held against the number of classes.

    Raises:
        OwnDataError: If the data do not fit together.
        mmlavit.engine.data_checks.DataError: If masks have more classes.
        mmlavit.engine.launch.LaunchError: If the config is missing or unreadable.
    """
    _refuse_twice(classes)
    cfg = Config.fromfile(base)
    lines = [
        *top(base_name, classes, len(train), len(val)),
        f'model = {as_text(with_classes(cfg.model.to_dict(), len(classes)))}',
    ]
    for name, split in (('train', train), ('val', val)):
        dataset = _innermost(cfg, name, base)
        lines += [
            '',
            f'{name}_pipeline = [',
            *(f'    {as_text(_as_they_are(step))},' for step in dataset.pipeline),
            ']',
            f'{name}_dataloader = dict(',
            # Whole images may be of many sizes.
            *(['    batch_size=1,'] if name == 'val' else []),
            '    dataset=dict(',
            '        _delete_=True,',
            "        type='BaseSegDataset',",
            f'        data_root={str(data)!r},',
            '        data_prefix=dict(',
            f'            img_path={below(split.images, data)!r},',
            f'            seg_map_path={below(split.masks, data)!r},',
            '        ),',
            f'        img_suffix={split.suffix()!r},',
            '        metainfo=metainfo,',
            f'        pipeline={name}_pipeline,',
            '    ),',
            ')',
        ]
    text = '\n'.join([*lines, 'test_dataloader = val_dataloader']) + '\n'
    check(text, 'mmseg')
    return text


def _innermost(cfg: Config, name: str, base: Path) -> Any:
    dataset = cfg[f'{name}_dataloader'].dataset
    while isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        raise OwnDataError(f'{base} has no {name}_dataloader.dataset.pipeline to go on with')
    return dataset


def _as_they_are(step: Mapping) -> dict:
    """A step of a pipeline that takes labels as the masks have them."""
    return {key: value for key, value in step.items() if key != 'reduce_zero_label'}


def find_tree(data: Path, split: str) -> Path:
    """Find the folder of a split that has a folder for each class.

    Args:
        data: The folder of the data.
        split: ``'train'`` or ``'val'``.

    Raises:
        OwnDataError: If it is not there.
    """
    if not data.is_dir():
        raise OwnDataError(f'no folder {data}')
    for word in _SPLITS[split]:
        if (data / word).is_dir():
            return data / word
    raise OwnDataError(f'{data} has no folder {split}; name it with --{split} DIR')


def count_images(tree: Path) -> dict[str, int]:
    """How many images each class has, by the names of its folders, in their order.

    Args:
        tree: A folder with a folder for each class.

    Raises:
        OwnDataError: If it has no folder, or one of them no image.
    """
    counts = Counter({f.name: len(_images_in(f)) for f in sorted(tree.iterdir()) if f.is_dir()})
    if not counts:
        raise OwnDataError(f'{tree} has no folder; it should have one for each class')
    if empty := [name for name, number in counts.items() if not number]:
        raise OwnDataError(f'{tree / empty[0]} has no image ({", ".join(_SUFFIXES)})')
    return counts


def make_tree_config(base: Path, base_name: str, data: Path, train: Path, val: Path) -> str:
    """Write a config for images of one's own in a folder for each class.

    Args:
        base: The config to start from: a classifier of mmpretrain.
        base_name: How the new config is to name it.
        data: Folder of the data.
        train: Folder of the classes to train on.
        val: Folder of those to validate and test on.

    Returns:
        The text of the config. It has been read back, and its model and data built.

    Raises:
        OwnDataError: If the data do not fit together.
        mmlavit.engine.launch.LaunchError: If the config is missing or unreadable.
    """
    cfg = Config.fromfile(base)
    counts = [count_images(tree) for tree in (train, val)]
    classes = list(counts[0])
    if list(counts[1]) != classes:
        raise OwnDataError(
            f'{val} has the classes {list(counts[1])}, and {train} has {classes}; they must be the '
            'same'
        )
    number = len(classes)
    lines = [
        *top(base_name, classes, *(sum(c.values()) for c in counts)),
        f'model = {as_text(with_classes(cfg.model.to_dict(), number))}',
    ]
    if 'data_preprocessor' in cfg:
        lines.append(f'data_preprocessor = dict(num_classes={number})')
    for name, tree in (('train', train), ('val', val)):
        _innermost(cfg, name, base)
        lines += [
            f'{name}_dataloader = dict(',
            '    dataset=dict(',
            '        _delete_=True,',
            "        type='CustomDataset',",
            f'        data_root={str(data)!r},',
            f'        data_prefix={below(tree, data)!r},',
            '        metainfo=metainfo,',
            f'        pipeline={{{{_base_.{name}_dataloader.dataset.pipeline}}}},',
            '    ),',
            ')',
        ]
    lines.append('test_dataloader = val_dataloader')
    if fewer := with_classes(cfg.val_evaluator.to_dict(), number):
        lines += [f'val_evaluator = {as_text(fewer)}', 'test_evaluator = val_evaluator']
    text = '\n'.join(lines) + '\n'
    check(text, 'mmpretrain')
    return text


def _refuse_twice(classes: Sequence[str]) -> None:
    if twice := [name for name, number in Counter(classes).items() if number > 1]:
        raise OwnDataError(f'several classes are called {twice[0]!r}')
