"""Photographs: the first 20 classes of Tiny ImageNet, found through ``MMLAVIT_DATA``."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

ARCHIVE = Path('tinyimagenet20/tin20.zip')
VARIABLE = 'MMLAVIT_DATA'
_COUNTS = {'train': 10000, 'val': 1000}


def archive() -> Path | None:
    """The archive of photographs, or None where ``MMLAVIT_DATA`` is not set."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) / ARCHIVE if folder else None


def unpack_photographs(root: Path) -> None:
    """Unpack the photographs as an ImageNet folder tree, or nothing where they are.

    Args:
        root: Folder to write: ``{train,val}/CLASS/*.JPEG``.

    Raises:
        FileNotFoundError: If ``MMLAVIT_DATA`` is not set, or the archive is not there.
        ValueError: If the archive holds other images.
    """
    if root.is_dir():
        return
    path = archive()
    if path is None:
        raise FileNotFoundError(
            f'the photographs are found through {VARIABLE}, which is not set: the folder that '
            f'holds {ARCHIVE}'
        )
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there; {VARIABLE} is {os.environ[VARIABLE]!r}')
    scratch = root.with_name(f'{root.name}.{os.getpid()}')
    try:
        with zipfile.ZipFile(path) as files:
            names = [n for n in files.namelist() if n.endswith('.JPEG')]
            for split, count in _COUNTS.items():
                found = sum(name.startswith(f'{split}/') for name in names)
                if found != count:
                    raise ValueError(f'{path} must hold {count} images of {split}, it has {found}')
            files.extractall(scratch, names)
        scratch.rename(root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
