"""Tiny ImageNet (Stanford's CS231n), as a folder for each class, which mmpretrain reads.

Photographs of 64 x 64 pixels, of each class 500 to train on and 50 to validate with. What comes
out::

    {train,val}/WNID/NAME.JPEG
    classes.txt                  the classes' names, a line each, in the order of their numbers
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from .conversion import Conversion, ConversionError
from .reading import Download

LICENCE = "ImageNet's terms of access: research only (https://www.image-net.org/download.php)"
_SPLITS = ('train', 'val')
_SUFFIXES = ('.jpeg', '.jpg')
_NAMES = 'class_names.txt'  # of a copy: the wnid and the name of each class, in the set's order


def plan(source: str | Path, progress: bool = True, classes: int | None = None) -> Conversion:
    """Look at a download and check the images of the classes that are wanted.

    Args:
        source: ``tiny-imagenet-200``, a folder or a zip file; or a copy that has folders
            ``train/WNID`` and ``val/WNID``, and in it or beside it ``class_names.txt``: a folder, a
            zip file, or a folder with a zip file.
        progress: Whether to show a progress bar.
        classes: How many, the first in the set's own order; None for all that are there.

    Returns:
        What to write.

    Raises:
        ConversionError: If files are missing or damaged, or there are fewer classes.
        ValueError: If ``classes`` is less than 1.
    """
    if classes is not None and classes < 1:
        raise ValueError(f'classes must be at least 1, got {classes}')
    download, base, names = _open(source)
    wanted = list(names)[:classes]
    if len(wanted) < (classes or 1):
        raise ConversionError(f'{download.path} has {len(names)} classes, not {classes or 1}')
    images = _find_images(download, base, names)
    files: dict[str, Callable[[], bytes]] = {}
    counts = {split: {'images': 0, 'classes': len(wanted)} for split in _SPLITS}
    for split in _SPLITS:
        for wnid in tqdm(wanted, f'checking {split}', unit=' classes', disable=not progress):
            if not images[split].get(wnid):
                raise ConversionError(f'{download.path} has no image of {wnid} in {split}')
            for path in images[split][wnid]:
                download.image(path)
                name = PurePosixPath(path).name
                files[f'{split}/{wnid}/{name}'] = partial(download.read, path)
            counts[split]['images'] += len(images[split][wnid])
    # mmpretrain numbers the classes in the order of their folders' names.
    text = ''.join(f'{names[wnid]}\n' for wnid in sorted(wanted))
    files['classes.txt'] = text.encode
    return Conversion(
        name='tinyimagenet',
        version=1,
        licence=LICENCE,
        inputs={**download.used, 'classes': {wnid: names[wnid] for wnid in wanted}},
        files=files,
        counts=counts,
        options={'classes': len(wanted)},
    )


def _open(source: str | Path) -> tuple[Download, str, dict[str, str]]:
    """A download, the folder in it, and the names of its classes, by wnid, in the set's order."""
    download = Download(source)
    if (base := download.base('wnids.txt')) is not None:
        words = _read_names(download.text(f'{base}words.txt'), download.place(f'{base}words.txt'))
        names = {}
        for wnid in download.text(f'{base}wnids.txt').split():
            if wnid not in words:
                raise ConversionError(f'{download.place(f"{base}words.txt")} has no {wnid}')
            names[wnid] = words[wnid]
        return download, base, names
    beside = download.path.with_name(_NAMES)
    if (folder := download.base(_NAMES)) is not None:
        names = _read_names(download.text(folder + _NAMES), download.place(folder + _NAMES))
    elif beside.is_file():
        names = _read_names(beside.read_text(encoding='utf-8'), str(beside))
    else:
        raise ConversionError(
            f'{download.path} has no wnids.txt (the download), and there is no {_NAMES} in it or '
            'beside it (a copy)'
        )
    archives = [name for name in download.files if name.endswith('.zip')]
    if download.base('train/') is None and len(archives) == 1 and download.path.is_dir():
        download = Download(download.path / archives[0])
    if (base := download.base('train/')) is None:
        raise ConversionError(f'{download.path} has no folder train')
    # The list of a copy may be of all classes, of which it has some.
    there = {path[len(base) :].split('/')[1] for path in download.under(f'{base}train/')}
    for wnid in sorted(there - names.keys()):
        place = download.place(f'{base}train/{wnid}')
        raise ConversionError(f'{place} is the folder of an unknown class: not in {_NAMES}')
    return download, base, {wnid: name for wnid, name in names.items() if wnid in there}


def _read_names(text: str, place: str) -> dict[str, str]:
    """Names by wnid, of lines with a tab between the two."""
    names = {}
    for number, line in enumerate(text.splitlines(), 1):
        wnid, tab, name = line.partition('\t')
        if not line.strip():
            continue
        if not tab:
            raise ConversionError(f'{place}, line {number} must be a wnid, a tab and a name')
        names[wnid] = name.strip()
    return names


def _find_images(
    download: Download, base: str, names: dict[str, str]
) -> dict[str, dict[str, list[str]]]:
    """The paths of the images of each split and class."""
    images: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in _SPLITS}
    for path in sorted(download.files):
        split, _, rest = path.removeprefix(base).partition('/')
        if path.startswith(base) and split in _SPLITS and path.lower().endswith(_SUFFIXES):
            images[split][rest.split('/')[0]].append(path)
    # All images of the download's val are in one folder, and a list says what is on them.
    if images['val'].pop('images', None):
        listed = f'{base}val/val_annotations.txt'
        for number, line in enumerate(download.text(listed).splitlines(), 1):
            if not line.strip():
                continue
            file, wnid, *_ = [*line.split('\t'), '']
            if wnid not in names:
                raise ConversionError(
                    f'{download.place(listed)}, line {number} has the unknown class {wnid!r}'
                )
            images['val'][wnid].append(f'{base}val/images/{file}')
    return images
