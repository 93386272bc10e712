"""Reading checkpoint files: weights alone where the format allows, and saying what is wrong."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from ..errors import MMLaViTError
from .safetensors_file import SUFFIX, load_safetensors

# By its first bytes: a file that is no checkpoint, and what to do about it.
_OTHER_FILES = {
    r'(?i)\s*<(!doctype|html|\?xml)': 'is a web page saved in its place; download it again',
    r'version https://git-lfs': "is a Git LFS pointer; run 'git lfs pull' where it comes from",
    r'(?s).{8}\{\s*"': f'is a safetensors file; its name must end in {SUFFIX}',
}
_KEY = re.compile(r'(.*?)(patch_embed\.(?:proj|conv1)|stages\.\d+\.blocks)\.')


class CheckpointError(MMLaViTError, ValueError):
    """A checkpoint cannot be read, resumed from or written; the text is one line that names it."""


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> dict:
    """Load a checkpoint file without running code that it may bring.

    A checkpoint is a pickle, and a pickle can run any program. From torch 2.6 on, torch loads
    weights alone unless it is told otherwise; what MMEngine adds to them in training (numbers of
    the log) is allowed too. Earlier versions of torch cannot do that for what MMEngine saves: there
    a file is loaded whole, and has to come from a source that you trust.

    Args:
        path: The file. One that ends in ``.safetensors`` is read as such, and can run nothing.
        map_location: As in :func:`torch.load`; of safetensors a device or None.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is one of safetensors, which is not installed.
        CheckpointError: If the file is no checkpoint, is damaged, or holds anything but weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        # In MMEngine's words.
        raise FileNotFoundError(f'{path} can not be found.')
    _check_format(path)
    if path.suffix == SUFFIX:
        try:
            return load_safetensors(path, map_location)
        except ValueError as error:
            raise CheckpointError(f'checkpoint {path}: {error}; copy it again') from error
    try:
        with _types_of_mmengine():
            # By not saying weights_only, torch's own environment variables keep their meaning.
            checkpoint = torch.load(path, map_location=map_location)
    except pickle.UnpicklingError as error:
        if not (refused := re.search(r'GLOBAL (\S+)', str(error))):
            raise CheckpointError(f'checkpoint {path} is damaged: {_one_line(error)}') from error
        raise CheckpointError(
            f'checkpoint {path} was not loaded: it holds {refused[1]}, which is no weight, and '
            'loading it whole could run any program; if you trust where it comes from, set '
            'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1'
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # What is missing from a file shows as almost any error.
        raise CheckpointError(
            f'checkpoint {path} cannot be read ({_one_line(error)}); it is probably damaged or '
            'incomplete: copy it again, or take an older one'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'checkpoint {path} must hold a dict of weights, it holds a {type(checkpoint).__name__}'
        )
    return checkpoint


def _check_format(path: Path) -> None:
    with path.open('rb') as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f'checkpoint {path} is empty; copy it again, or take an older one')
    if path.suffix == SUFFIX:
        # The length of what describes the tensors, which is JSON.
        if head[8:9] == b'{':
            return
    elif head.startswith(b'PK'):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f'checkpoint {path} is damaged or incomplete: its end is missing; copy it again, '
                'or take an older one'
            )
        return
    # The older format is a bare pickle.
    elif head.startswith(b'\x80'):
        return
    text = head.decode('latin-1')
    for pattern, words in _OTHER_FILES.items():
        if re.match(pattern, text):
            raise CheckpointError(f'checkpoint {path} {words}')
    kind, writers = 'PyTorch', 'torch.save or MMEngine'
    if path.suffix == SUFFIX:
        kind, writers = 'safetensors', 'tools/publish_model.py or safetensors'
    raise CheckpointError(
        f'checkpoint {path} is no file of {kind}: it starts with {head[:16]!r}; it must be what '
        f'{writers} wrote'
    )


def _types_of_mmengine() -> AbstractContextManager:
    """Lets torch load what MMEngine saves beside weights, where both can."""
    safe_globals = getattr(torch.serialization, 'safe_globals', None)
    allowed = getattr(mmengine_checkpoint, 'get_torch_safe_globals', None)
    if safe_globals is None or allowed is None:
        return nullcontext()
    # Its list has float64 and two integers alone; a metric may be of another kind of number. And
    # a data set's metainfo may hold a dict of the config.
    numbers = np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?'
    return safe_globals([*allowed(), *{type(np.dtype(code)) for code in numbers}, ConfigDict])


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_weights(path: str, map_location: Any = 'cpu') -> Mapping[str, Any]:
    """The state dict of a checkpoint.

    Args:
        path: A file, or anything else that MMEngine loads from, such as an URL.
        map_location: As in :func:`torch.load`.

    Returns:
        Names and weights.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: See :func:`read_checkpoint`; or it holds no state dict.
    """
    return weights_of(read_anywhere(path, map_location), path)


def dataset_meta_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a training's checkpoint says of its data: ``classes``, ``palette``.

    Args:
        checkpoint: What :func:`read_anywhere` returns.

    Returns:
        Names, in lower case, and values; empty if it says nothing.
    """
    said = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    return {name.lower(): value for name, value in said.items()}


def read_anywhere(path: str, map_location: Any = 'cpu') -> dict:
    """A checkpoint from a file, or from whatever else MMEngine loads from, such as an URL.

    Args:
        path: The file or URL.
        map_location: As in :func:`torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: See :func:`read_checkpoint`.
    """
    if '://' in path:
        return CheckpointLoader.load_checkpoint(path, map_location)
    return read_checkpoint(path, map_location)


def weights_of(checkpoint: dict, path: str) -> Mapping[str, Any]:
    """The state dict of a checkpoint that has been read.

    Args:
        checkpoint: What :func:`read_anywhere` returns.
        path: Where it is from, for the error.

    Raises:
        CheckpointError: If it holds none.
    """
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f'the state_dict of checkpoint {path} must be a dict, it is a {type(weights).__name__}'
        )
    return weights


def check_pretrained(path: str, prefix: str | None, map_location: Any = 'cpu') -> str | None:
    """See that MMEngine's ``Pretrained`` can load a checkpoint, before it does.

    Args:
        path: A file, or anything else that MMEngine loads from, such as an URL.
        prefix: What the names of the wanted weights start with; None for nothing.
        map_location: As in :func:`torch.load`.

    Returns:
        The prefix that they do start with: as wanted, but None if the file says of itself that it
        is a published backbone and nothing else.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: See :func:`read_weights`; or no weight has that prefix.
    """
    checkpoint = read_anywhere(path, map_location)
    weights = weights_of(checkpoint, path)
    if prefix is None:
        return None
    wanted = prefix if prefix.endswith('.') else f'{prefix}.'
    if any(name.startswith(wanted) for name in weights):
        return prefix
    meta = checkpoint.get('meta')
    if isinstance(meta, Mapping) and meta.get('part') == wanted.rstrip('.'):
        return None
    found = sorted({match[1] for name in weights if (match := _KEY.match(name))})
    if found:
        remedy = f'a LaViT is there under {found[0]!r}: set init_cfg.prefix={found[0] or None!r}'
    else:
        remedy = f'its names start like {list(weights)[:3]}; it holds no LaViT'
    raise CheckpointError(f'checkpoint {path} has no weights under prefix={prefix!r}; {remedy}')


def load_from_file(filename: str, map_location: Any = None) -> dict:
    """:func:`read_checkpoint` as MMEngine calls its loaders; the name is for its log."""
    return read_checkpoint(filename, map_location)


def load_from_safetensors(filename: str, map_location: Any = None) -> dict:
    """The same, for files that end in ``.safetensors``."""
    return read_checkpoint(filename, map_location)


def register_safetensors() -> None:
    """Let MMEngine, and with it the toolboxes, load local safetensors files as checkpoints."""
    # MMEngine takes what it calls a prefix for a pattern.
    local = rf'(?!\w+://).*{re.escape(SUFFIX)}$'
    CheckpointLoader.register_scheme(local, load_from_safetensors, force=True)


def guard_checkpoints() -> None:
    """Make MMEngine load every local checkpoint of this process by :func:`read_checkpoint`.

    Its own loader tries to load weights alone, and where that fails loads the whole file. URLs stay
    with it.
    """
    CheckpointLoader.register_scheme('', loader=load_from_file, force=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that bears its name only when all of it is on the disk.

    Args:
        path: Where to; folders that are missing are made. Until it is whole the content is in a
            file beside it, with ``.tmp`` added to the name, and what was there stays.
        content: What is in it.

    Raises:
        OSError: If it cannot be written, as when the disk is full.
    """
    temporary = path.with_name(f'{path.name}.tmp')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, 'wb') as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk, where the system can."""
    if hasattr(os, 'O_DIRECTORY'):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
