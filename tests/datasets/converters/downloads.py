"""What the tests of the converters share: noise for images, folders as they were, real copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlavit.datasets.converters.conversion import Conversion, ConversionError


def noise(rng: np.random.Generator, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """``(height, width, channels)`` of random bytes, for a size of ``(width, height)``."""
    return rng.integers(0, 256, (*size[::-1], channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    """Write an image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write(path: Path, text: str) -> Path:
    """Write a text, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def tree(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file()
    }


def zipped(folder: Path, name: str = 'download') -> Path:
    """A zip file of a folder, which is in it as a folder, as downloads are."""
    return Path(shutil.make_archive(str(folder.parent / name), 'zip', folder.parent, folder.name))


def cut(path: Path, share: float = 0.6) -> None:
    """Lose the end of a file, as an interrupted download does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def the_refusal(plan: Callable[..., Conversion], source: Path, **options: object) -> str:
    """The one line with which a download is refused."""
    with pytest.raises(ConversionError) as caught:
        plan(source, progress=False, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def real(name: str) -> Path:
    """A copy of a real data set, found through MMLAVIT_DATA."""
    if 'MMLAVIT_DATA' not in os.environ:
        pytest.skip('MMLAVIT_DATA, the folder of real images, is not set')
    folder = Path(os.environ['MMLAVIT_DATA'], name)
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there')
    return folder
