"""Reading downloads: folders and zip files alike, with errors that name the file."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .conversion import ConversionError


class Download:
    """The files of a folder or of a zip file, by their paths in it, with ``/``.

    Hidden files, and what macOS adds to zip files, are left out.

    Args:
        path: The folder or the zip file.

    Raises:
        ConversionError: If it is neither, or the zip file is not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        #: Size of each file, and in a zip file its checksum; they tell it from another so called.
        self.files: dict[str, Any] = {}
        #: The same, of those that have been read.
        self.used: dict[str, Any] = {}
        if self.path.is_dir():
            for file in sorted(_walk(self.path)):
                self._add(file.relative_to(self.path).as_posix(), file.stat().st_size)
        elif self.path.is_file():
            try:
                self._zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise ConversionError(
                    f'{self.path} is no zip file, or not all of it: {error}'
                ) from error
            for info in self._zip.infolist():
                if not info.is_dir():
                    self._add(info.filename, [info.file_size, info.CRC])
        else:
            raise ConversionError(f'{self.path} is not there')

    def _add(self, name: str, mark: Any) -> None:
        if not any(part.startswith('.') or part == '__MACOSX' for part in name.split('/')):
            self.files[name] = mark

    def place(self, name: str) -> str:
        """What an error calls a file."""
        return f'{self.path}: {name}' if self._zip else str(self.path / name)

    def base(self, mark: str) -> str | None:
        """The folder, of those least deep, that holds a file or a folder.

        Args:
            mark: Path in that folder; that of a folder ends with ``/``.

        Returns:
            ``''``, or a path that ends with ``/``; None where there is no such folder.
        """
        found = set()
        for name in self.files:
            before, there, after = f'/{name}'.partition(f'/{mark}')
            if there and (mark.endswith('/') or not after):
                found.add(before[1:] + '/' if before else '')
        return min(found, key=lambda base: (base.count('/'), base), default=None)

    def under(self, folder: str) -> Iterator[str]:
        """The paths of all files below a folder, whose path ends with ``/``, sorted."""
        return (name for name in sorted(self.files) if name.startswith(folder))

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ConversionError: If it is not there, or damaged.
        """
        if name not in self.files:
            raise ConversionError(f'{self.place(name)} is missing')
        self.used[name] = self.files[name]
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        # RuntimeError is of zip files that are encrypted or packed in an unusual way.
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ConversionError(f'{self.place(name)} cannot be read: {error}') from error

    def text(self, name: str) -> str:
        """The text of a file, in UTF-8.

        Raises:
            ConversionError: If it is not there, damaged, or no text.
        """
        try:
            return self.read(name).decode('utf-8-sig')
        except UnicodeDecodeError as error:
            raise ConversionError(f'{self.place(name)} is no text: {error}') from error

    def json(self, name: str) -> Any:
        """What a JSON file says.

        Raises:
            ConversionError: If it is not there, damaged, or no JSON.
        """
        try:
            return json.loads(self.text(name))
        except ValueError as error:
            raise ConversionError(f'{self.place(name)} is no JSON: {error}') from error

    def image(self, name: str) -> Image.Image:
        """An image, decoded to its end.

        Raises:
            ConversionError: If it is not there, damaged, or no image.
        """
        data = self.read(name)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        # PIL's plugins raise SyntaxError, too, of what is not in their format.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConversionError(f'{self.place(name)} is no whole image: {error}') from error
        return image


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder, also through links to folders, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for name in names if (path := Path(folder, name)).is_file())


def check_size(what: str, size: Sequence[float], wanted: Sequence[float]) -> None:
    """Hold a size against that of the image it belongs to.

    Args:
        what: What it is the size of, for the error.
        size: Width and height.
        wanted: Width and height of the image.

    Raises:
        ConversionError: If they differ.
    """
    if tuple(size) != tuple(wanted):
        raise ConversionError(
            f'{what} has another size (width, height) than its image: {tuple(size)}, not '
            f'{tuple(wanted)}'
        )
