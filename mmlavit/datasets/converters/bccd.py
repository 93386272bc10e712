"""BCCD, blood cells under the microscope, as COCO detection.

364 images of 640 x 480 with red cells, white cells and platelets. Many red cells have no box, so
precision is to be read class by class. What comes out::

    images/NAME.jpg
    annotations/{train,val,test,trainval}.json
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from .coco import CocoFile, plan_coco, read_copy
from .conversion import Conversion, ConversionError
from .reading import Download, check_size

CLASSES = ('RBC', 'WBC', 'Platelets')

LICENCE = 'MIT (https://github.com/Shenggan/BCCD_Dataset/blob/master/LICENSE)'
_SPLITS = ('train', 'val', 'test', 'trainval')


def plan(source: str | Path, progress: bool = True) -> Conversion:
    """Look at a download and read all boxes.

    Args:
        source: The folder or zip file: the repository, or its folder ``BCCD`` (``Annotations``,
            ``ImageSets/Main``, ``JPEGImages``), or a copy that has ``images`` and
            ``annotations/{train,val,test,trainval}.json``.
        progress: Whether to show a progress bar.

    Returns:
        What to write.

    Raises:
        ConversionError: If files are missing or damaged, an image has another size than its
            annotations say, or a class is unknown.
    """
    download = Download(source)
    if (base := download.base('ImageSets/Main/train.txt')) is not None:
        readers = {split: partial(_read_voc, download, base, split) for split in _SPLITS}
    elif (base := download.base('annotations/train.json')) is not None:
        readers = {
            split: partial(read_copy, download, f'{base}annotations/{split}.json', f'{base}images/')
            for split in _SPLITS
        }
    else:
        raise ConversionError(
            f'{download.path} has neither ImageSets/Main/train.txt (the download) nor '
            'annotations/train.json (a copy)'
        )
    return plan_coco(
        download,
        readers,
        progress,
        name='bccd',
        version=1,
        licence=LICENCE,
        classes=CLASSES,
        images='images/',
    )


def _read_voc(
    download: Download, base: str, split: str, coco: CocoFile
) -> Iterator[tuple[str, str]]:
    """Read Pascal VOC's files, one for each image."""
    for name in download.text(f'{base}ImageSets/Main/{split}.txt').split():
        path, xml = f'{base}JPEGImages/{name}.jpg', f'{base}Annotations/{name}.xml'
        size = download.image(path).size
        place = download.place(xml)
        coco.add_image(f'{name}.jpg', size)
        try:
            root = ElementTree.fromstring(download.text(xml))
            check_size(place, (_number(root, 'size/width'), _number(root, 'size/height')), size)
            for thing in root.iter('object'):
                label = (thing.findtext('name') or '').strip()
                if label not in CLASSES:
                    raise ConversionError(
                        f'{place} has the unknown class {label!r}; there are {list(CLASSES)}'
                    )
                # Nothing says whether they count pixels from 0 or, as Pascal VOC, from 1. From 0.
                left, top, right, bottom = (
                    min(max(_number(thing, f'bndbox/{key}'), 0), limit)
                    for key, limit in zip(('xmin', 'ymin', 'xmax', 'ymax'), size * 2, strict=True)
                )
                coco.add_box(label, [left, top, right - left, bottom - top])
        except (ElementTree.ParseError, ValueError) as error:
            raise ConversionError(f'{place} is no annotation of Pascal VOC: {error}') from error
        yield f'{name}.jpg', path


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f'it has no {path}')
    if not math.isfinite(number := float(text)):
        raise ValueError(f'its {path} is {text}')
    return number
