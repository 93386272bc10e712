"""Nuclei of the 2018 Data Science Bowl (Caicedo et al., 2019; BBBC038v1), as COCO instances.

The contest's first stage: microscope images of several kinds and sizes, up to 375 nuclei in one.
What comes out::

    images/{train,test}/ID.png
    annotations/{train,test}.json     one class, run-length encoded masks
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .coco import CocoFile, plan_coco, read_copy
from .conversion import Conversion, ConversionError
from .reading import Download, check_size

CLASSES = ('nucleus',)

LICENCE = 'CC0 1.0 (https://creativecommons.org/publicdomain/zero/1.0/)'
_SOLUTION = 'stage1_solution.csv'


def plan(source: str | Path, progress: bool = True) -> Conversion:
    """Look at a download and read all masks.

    Args:
        source: The folder or zip file that has ``stage1_train/ID/{images,masks}/*.png`` and
            ``stage1_test/ID/images/*.png``, the masks of the test images likewise or, as the
            contest published them, in ``stage1_solution.csv``; or a copy that has
            ``images/{train,test}`` and ``annotations/{train,test}.json``.
        progress: Whether to show a progress bar.

    Returns:
        What to write.

    Raises:
        ConversionError: If files are missing or damaged, or a mask has another size than its image.
    """
    download = Download(source)
    if (base := download.base('stage1_train/')) is not None:
        readers = {
            split: partial(_read_stage, download, base, f'stage1_{split}')
            for split in ('train', 'test')
        }
    elif (base := download.base('annotations/train.json')) is not None:
        readers = {
            split: partial(
                read_copy, download, f'{base}annotations/{split}.json', f'{base}images/{split}/'
            )
            for split in ('train', 'test')
        }
    else:
        raise ConversionError(
            f'{download.path} has neither stage1_train/ (the download) nor annotations/train.json '
            '(a copy)'
        )
    return plan_coco(
        download,
        readers,
        progress,
        name='dsb2018',
        version=1,
        licence=LICENCE,
        classes=CLASSES,
        images='images/{split}/',
    )


def _read_stage(
    download: Download, base: str, folder: str, coco: CocoFile
) -> Iterator[tuple[str, str]]:
    """Read the contest's folders, one for each image."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in download.under(f'{base}{folder}/'):
        parts = path[len(f'{base}{folder}/') :].split('/')
        if len(parts) == 3 and parts[1] in ('images', 'masks') and path.endswith('.png'):
            found.setdefault(parts[0], {'images': [], 'masks': []})[parts[1]].append(path)
    solution = None
    if folder == 'stage1_test' and not any(files['masks'] for files in found.values()):
        if f'{base}{_SOLUTION}' not in download.files:
            raise ConversionError(
                f'{download.place(f"{base}{folder}")} has no masks, and there is no {_SOLUTION} '
                'beside it, which the contest published them in'
            )
        solution = _read_solution(download, f'{base}{_SOLUTION}')
        for image_id in sorted(solution.keys() - found.keys()):
            place = download.place(f'{base}{folder}/{image_id}')
            raise ConversionError(f'{place} is missing, and {_SOLUTION} has its masks')
    for image_id, files in found.items():
        place = download.place(f'{base}{folder}/{image_id}')
        if len(files['images']) != 1:
            raise ConversionError(
                f'{place} must have one image in images/, it has {len(files["images"])}'
            )
        (path,) = files['images']
        size = download.image(path).size
        coco.add_image(f'{image_id}.png', size)
        if solution is not None:
            if image_id not in solution:
                raise ConversionError(
                    f'{download.place(f"{base}{_SOLUTION}")} has no masks of {image_id}'
                )
            for line, row in solution[image_id]:
                coco.add_mask('nucleus', _decode(row, size, line))
        elif not files['masks']:
            raise ConversionError(f'{place} has no mask in masks/')
        for mask_path in files['masks']:
            mask = np.asarray(download.image(mask_path).convert('L'))
            check_size(download.place(mask_path), mask.shape[::-1], size)
            coco.add_mask('nucleus', coco_mask.encode(np.asfortranarray(mask > 0).view(np.uint8)))
        yield f'{image_id}.png', path


def _read_solution(download: Download, path: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The rows of the contest's solution by image, each with what an error calls it."""
    reader = csv.DictReader(download.text(path).splitlines())
    wanted = ['ImageId', 'EncodedPixels', 'Height', 'Width']
    if not set(wanted) <= set(reader.fieldnames or ()):
        raise ConversionError(
            f'{download.place(path)} must have the columns {wanted}, it has {reader.fieldnames}'
        )
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    try:
        for row in reader:
            line = f'{download.place(path)}, line {reader.line_num}'
            rows.setdefault(row['ImageId'], []).append((line, row))
    except csv.Error as error:
        raise ConversionError(f'{download.place(path)} is no CSV file: {error}') from error
    return rows


def _decode(row: dict[str, Any], size: tuple[int, int], line: str) -> dict[str, Any]:
    """The mask of a row: pairs of a start and a length, down the columns, counted from 1."""
    width, height = size
    try:
        check_size(line, (int(row['Width']), int(row['Height'])), size)
        numbers = [int(number) for number in row['EncodedPixels'].split()]
        runs = list(zip(numbers[::2], numbers[1::2], strict=True))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f'{line} is no mask: {error}') from error
    mask = np.zeros(width * height, np.uint8)
    for first, length in runs:
        last = first + length - 1
        if not 1 <= first <= last <= mask.size:
            raise ConversionError(f'{line} has pixels {first} to {last} of {mask.size}')
        mask[first - 1 : last] = 1
    return coco_mask.encode(mask.reshape(height, width, order='F'))
