"""The images that a model is run on: a file, the files of a folder, the frames of a video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import mmcv
import numpy as np

from ..errors import MMLaViTError

# What frames per second a video has that does not say.
_FPS = 25.0


class SourceError(MMLaViTError, ValueError):
    """There is nothing to run a model on; the text is one line that names the path."""


@dataclass(frozen=True)
class Image:
    """One image.

    Args:
        name: Its file name; that of a frame is made up.
        key: What its results are called.
        data: What inferencers of the toolboxes take: a path, or BGR (H, W, 3), uint8.
        frame: Which frame of the video it is, from 0; None where there is none.
    """

    name: str
    key: str
    data: str | np.ndarray
    frame: int | None = None

    @cached_property
    def pixels(self) -> np.ndarray:
        """RGB (H, W, 3), uint8.

        Raises:
            SourceError: If the file cannot be read.
        """
        pixels = mmcv.imread(self.data)
        if pixels is None:
            raise SourceError(f'cannot read {self.data}')
        return pixels[..., ::-1]


@dataclass(frozen=True)
class Source:
    """What a model is run on.

    Args:
        path: An image file, a folder or a video.
        files: The images; none for a video.
        left_out: How many files of the folder are no images.
        fps: Frames per second of the video; None where there is none.
    """

    path: Path
    files: tuple[Path, ...] = ()
    left_out: int = 0
    fps: float | None = None

    def __iter__(self) -> Iterator[Image]:
        if self.fps is None:
            stems = Counter(file.stem for file in self.files)
            for file in self.files:
                key = file.stem if stems[file.stem] == 1 else file.name
                yield Image(file.name, key, str(file))
            return
        for index, pixels in enumerate(mmcv.VideoReader(str(self.path))):
            key = f'{self.path.stem}_{index:06d}'
            yield Image(f'{key}.jpg', key, pixels, index)


def open_source(path: str | Path) -> Source:
    """Find out what there is to run a model on.

    Args:
        path: An image, a folder of images (not of folders), or a video. What a file is, OpenCV says
            by its content.

    Returns:
        It.

    Raises:
        SourceError: If there is no such path, or no image in it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        images = tuple(file for file in files if cv2.haveImageReader(str(file)))
        if not images:
            raise SourceError(f'folder {path} has no image in it ({len(files)} other files)')
        return Source(path, images, len(files) - len(images))
    if not path.is_file():
        raise SourceError(f'no image, folder or video: {path}')
    if cv2.haveImageReader(str(path)):
        return Source(path, (path,))
    video = mmcv.VideoReader(str(path))
    if not video.opened:
        raise SourceError(f'{path} is neither an image nor a video that OpenCV can read')
    return Source(path, fps=video.fps or _FPS)
