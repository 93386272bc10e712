"""What a conversion is, and how it is written: as a whole, and over nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import MMLaViTError

MANIFEST = 'dataset.json'


class ConversionError(MMLaViTError):
    """What keeps a download from being converted; the text is one line that names the file."""


@dataclass(frozen=True)
class Conversion:
    """A data set that is ready to be written.

    Args:
        name: The data set's, as in ``data/NAME``.
        version: Raise it whenever the same download would give other files.
        licence: Of the data set.
        options: What the user chose; by name.
        inputs: The files of the download that are used, by their paths in it, each with what tells
            it from another of that name, such as its size.
        files: What to write: paths in the output folder, with ``/``, each with what returns the
            bytes.
        counts: How much there is of what, by split.
    """

    name: str
    version: int
    licence: str
    inputs: Mapping[str, Any]
    files: Mapping[str, Callable[[], bytes]]
    counts: Mapping[str, Mapping[str, int]]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for two conversions to give the same files."""
        inputs = json.dumps(dict(sorted(self.inputs.items()))).encode()
        return {
            'converter': f'mmlavit.{self.name}',
            'version': self.version,
            'options': dict(self.options),
            'download': hashlib.sha256(inputs).hexdigest(),
        }


def write(conversion: Conversion, out: str | Path, progress: bool = True) -> bool:
    """Write a data set, or what is missing of it.

    Files are written into a hidden folder beside ``out``, each as a whole, and that folder becomes
    ``out`` when all are there. After an interruption the same call goes on where it stopped.

    Args:
        conversion: What to write.
        out: Output folder; made if it does not exist.
        progress: Whether to show a progress bar.

    Returns:
        True when something was written, False when this very data set was complete.

    Raises:
        FileExistsError: If ``out`` is a file, or a folder that holds anything else than this very
            data set.
        ConversionError: If an input turns out to be broken.
    """
    identity = conversion.identity
    # A link to a folder on another disk stays one.
    out = Path(out).resolve()
    if _is_written(out, identity):
        return _write_files(conversion, out, progress)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    # What such a folder holds depends on its name alone, so it may be anyone's who does the same.
    scratch = out.with_name(f'.{out.name}.{digest}.partial')
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        _write_files(conversion, scratch, progress)
        manifest = {**identity, 'licence': conversion.licence, 'counts': conversion.counts}
        _write_file(scratch, MANIFEST, (json.dumps(manifest, indent=2) + '\n').encode())
        for left in scratch.glob('.*.tmp'):  # by runs that were killed
            left.unlink()
        if out.is_dir():
            out.rmdir()
        scratch.rename(out)
    except OSError:
        # Another process that did the same may have been done first.
        if not _is_written(out, identity):
            raise
        return False
    for folder in out.parent.iterdir():
        if re.fullmatch(rf'\.{re.escape(out.name)}\.[0-9a-f]{{12}}\.partial', folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    return True


def _is_written(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds this very data set; an error if it holds anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f'{out} is not a directory; choose another one (--out)')
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return False
    try:
        found = json.loads((out / MANIFEST).read_text(encoding='utf-8'))
        there = {key: found[key] for key in identity}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f'{out} holds {names[0]!r} and no {MANIFEST} of a converter, so something else wrote '
            'it: choose another directory (--out) or remove it by hand'
        ) from None
    differences = [
        'it was made of other files'
        if key == 'download'
        else f'{key} is {there[key]!r} there and {identity[key]!r} here'
        for key in identity
        if there[key] != identity[key]
    ]
    if differences:
        raise FileExistsError(
            f'{out} holds another data set ({", ".join(differences)}): choose another directory '
            '(--out) or remove it by hand'
        )
    return True


def _write_files(conversion: Conversion, root: Path, progress: bool) -> bool:
    """Write the files that are not there; whether there were any."""
    missing = {p: make for p, make in conversion.files.items() if not (root / p).exists()}
    bar = tqdm(missing.items(), conversion.name, unit='file', disable=not (progress and missing))
    for path, make in bar:
        _write_file(root, path, make())
    return bool(missing)


def _write_file(root: Path, path: str, data: bytes) -> None:
    """Write a file whole or not at all, so that a file that exists is a file that is right."""
    scratch = root / f'.{os.getpid()}.tmp'
    scratch.write_bytes(data)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    os.replace(scratch, root / path)
