"""Running a model over a source, and writing what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np

from ..analysis.loading import one_line
from .models import InferenceError, Predictor
from .sources import Image, Source, SourceError


def infer(
    predictor: Predictor,
    source: Source,
    out: Path,
    *,
    batch_size: int = 1,
    pictures: bool = True,
    report: Callable[[str], Any] = print,
) -> tuple[list[Path], list[str]]:
    """Run a model over a source.

    Args:
        predictor: The model.
        source: The images.
        out: Folder to write to: ``predictions.json``, pictures in ``pictures/``, labels of pixels
            in ``labels/``. It is made where it is missing.
        batch_size: How many images go through the model together.
        pictures: Whether to draw.
        report: Called with a line on each image.

    Returns:
        What was written (files and folders), and the names of files that are no readable images.

    Raises:
        InferenceError: If the model cannot take the images, or finds nothing that can be written.
        OSError: If a file cannot be written.
    """
    labels, drawings = out / 'labels', out / 'pictures'
    for folder in (out, labels, drawings):
        folder.mkdir(parents=True, exist_ok=True)
    video = source.fps is not None
    unreadable: list[str] = []
    number = 0
    with _Film(drawings / f'{source.path.stem}.mp4', source.fps or 0) as film:
        for batch in _batches(source, batch_size, unreadable):
            for image, sample in zip(batch, _predict(predictor, batch), strict=True):
                number += 1
                height, width = image.pixels.shape[:2]
                about = dict(id=number, file_name=image.name, height=height, width=width)
                if video:
                    about.update(video=source.path.name, frame=image.frame)
                words = predictor.keep(about, sample, labels / f'{image.key}.png')
                report(f'{image.name}: {words}')
                if not pictures:
                    continue
                picture = predictor.draw(image.pixels, sample)[..., ::-1]
                if video:
                    film.add(picture)
                else:
                    mmcv.imwrite(np.ascontiguousarray(picture), str(drawings / f'{image.key}.jpg'))
    if not number:
        raise InferenceError(f'{source.path} has no image that can be read')
    file = out / 'predictions.json'
    part = out / 'predictions.json.part'
    part.write_text(json.dumps(predictor.content()), encoding='utf-8')
    part.replace(file)
    for folder in (labels, drawings):
        if not any(folder.iterdir()):
            folder.rmdir()
    return [file, *filter(Path.exists, (labels, drawings))], unreadable


def _batches(source: Source, size: int, unreadable: list[str]) -> Iterator[list[Image]]:
    """The readable images in batches; the names of others are added to ``unreadable``."""

    def readable() -> Iterator[Image]:
        for image in source:
            try:
                image.pixels  # noqa: B018
            except SourceError:
                unreadable.append(image.name)
            else:
                yield image

    images = readable()
    while batch := list(islice(images, size)):
        yield batch


def _predict(predictor: Predictor, batch: list[Image]) -> list[Any]:
    try:
        return predictor.predict(batch)
    except (AssertionError, RuntimeError) as error:
        # Images of many sizes do not always go together, nor do many images into the memory.
        names = ', '.join(image.name for image in batch[:3]) + (', ...' if len(batch) > 3 else '')
        remedy = '; try --batch-size 1' if len(batch) > 1 else ''
        raise InferenceError(f'the model fails on {names}: {one_line(error)}{remedy}') from error


class _Film(AbstractContextManager):
    """A video file that is made with its first picture."""

    def __init__(self, file: Path, fps: float) -> None:
        self.file, self.fps = file, fps
        self.writer: cv2.VideoWriter | None = None
        self.size = (0, 0)

    def add(self, picture: np.ndarray) -> None:
        """Add a picture: BGR (H, W, 3), uint8."""
        if self.writer is None:
            self.size = picture.shape[1::-1]
            code = cv2.VideoWriter.fourcc(*'mp4v')
            self.writer = cv2.VideoWriter(str(self.file), code, self.fps, self.size)
            if not self.writer.isOpened():
                raise InferenceError(f'OpenCV cannot write the video {self.file}')
        self.writer.write(np.ascontiguousarray(picture))

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.release()
