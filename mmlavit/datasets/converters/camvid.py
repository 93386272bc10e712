"""CamVid (Brostow et al., 2009), in the piece that SegNet's tutorial made of it, for mmseg.

701 frames of drives through Cambridge at 480 x 360, with 11 classes. What comes out::

    img_dir/{train,val,test}/NAME.png
    ann_dir/{train,val,test}/NAME.png     0 to 10 the classes, 255 unlabelled, which mmseg ignores
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from .conversion import Conversion, ConversionError
from .reading import Download, check_size

CLASSES = (
    'sky',
    'building',
    'pole',
    'road',
    'pavement',
    'tree',
    'sign symbol',
    'fence',
    'car',
    'pedestrian',
    'bicyclist',
)
UNLABELLED = 11  # in the download
IGNORED = 255  # what mmseg's losses and metrics leave out

LICENCE = 'CC BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/)'
_SPLITS = ('train', 'val', 'test')


def plan(source: str | Path, progress: bool = True) -> Conversion:
    """Look at a download and check all of it.

    Args:
        source: The folder or zip file: SegNet's tutorial, or its folder ``CamVid`` (``train``,
            ``trainannot``, ``train.txt`` and so on), or a copy that has ``img_dir/train``,
            ``ann_dir/train`` and so on.
        progress: Whether to show a progress bar.

    Returns:
        What to write.

    Raises:
        ConversionError: If files are missing or damaged, a label map has another size than its
            image, or labels are unknown.
    """
    download = Download(source)
    if (base := download.base('trainannot/')) is not None:
        pairs = {split: _listed(download, base, split) for split in _SPLITS}
    elif (base := download.base('ann_dir/train/')) is not None:
        pairs = {split: _foldered(download, base, split) for split in _SPLITS}
    else:
        raise ConversionError(
            f'{download.path} has neither trainannot/ (the download) nor ann_dir/train/ (a copy); '
            "give the folder CamVid of SegNet's tutorial"
        )
    files = {}
    total = sum(map(len, pairs.values()))
    with tqdm(total=total, desc='checking', unit='image', disable=not progress) as bar:
        for split, of_split in pairs.items():
            for image, labels in of_split:
                _check(download, image, labels)
                name = PurePosixPath(image).stem
                files[f'img_dir/{split}/{name}.png'] = partial(_png, download, image)
                files[f'ann_dir/{split}/{name}.png'] = partial(_label_png, download, labels)
                bar.update()
    if len(files) != 2 * total:
        raise ConversionError(f'{download.path} has two images of one name in a split')
    return Conversion(
        name='camvid',
        version=1,
        licence=LICENCE,
        inputs=download.used,
        files=files,
        counts={split: {'images': len(of_split)} for split, of_split in pairs.items()},
    )


def _listed(download: Download, base: str, split: str) -> list[tuple[str, str]]:
    """Images and label maps of a split by the tutorial's list of them.

    The list has paths on its author's disk, of which the last folder and the name are right.
    """
    words = download.text(f'{base}{split}.txt').split()
    if not words or len(words) % 2:
        raise ConversionError(
            f'{download.place(f"{base}{split}.txt")} must list pairs of an image and a label map, '
            f'it has {len(words)} paths'
        )
    paths = [base + '/'.join(PurePosixPath(word).parts[-2:]) for word in words]
    return list(zip(paths[::2], paths[1::2], strict=True))


def _foldered(download: Download, base: str, split: str) -> list[tuple[str, str]]:
    """Images and label maps of a split by their common names."""
    images = {PurePosixPath(n).stem: n for n in download.under(f'{base}img_dir/{split}/')}
    labels = {PurePosixPath(n).stem: n for n in download.under(f'{base}ann_dir/{split}/')}
    for name in sorted({*images, *labels}):
        if name not in labels:
            raise ConversionError(f'{download.place(images[name])} has no label map')
        if name not in images:
            raise ConversionError(f'{download.place(labels[name])} has no image')
    if not images:
        raise ConversionError(f'{download.place(f"{base}img_dir/{split}")} has no image')
    return [(images[name], labels[name]) for name in sorted(images)]


def _check(download: Download, image: str, labels: str) -> None:
    size = download.image(image).size
    label_map = np.asarray(download.image(labels))
    if label_map.ndim != 2:
        raise ConversionError(
            f'{download.place(labels)} must have one channel, of class numbers; it has colours'
        )
    check_size(download.place(labels), label_map.shape[::-1], size)
    unknown = sorted({*np.unique(label_map).tolist()} - {*range(UNLABELLED + 1), IGNORED})
    if unknown:
        raise ConversionError(
            f'{download.place(labels)} has the unknown label {unknown[0]}; there are 0 to '
            f'{UNLABELLED - 1}, and {UNLABELLED} for unlabelled pixels'
        )


def _png(download: Download, name: str) -> bytes:
    """The image as PNG, unchanged where it is one."""
    return download.read(name) if name.endswith('.png') else _encode(download.image(name))


def _label_png(download: Download, name: str) -> bytes:
    label_map = np.array(download.image(name)).astype(np.uint8)
    label_map[label_map == UNLABELLED] = IGNORED
    return _encode(Image.fromarray(label_map))


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG', compress_level=1)
    return buffer.getvalue()
