"""Reading checkpoint files: weights alone where the format allows, and saying what is wrong."""

from __future__ import annotations

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

# By its first bytes: a file that is no checkpoint, and what to do about it.
_OTHER_FILES = {
    r'(?i)\s*<(!doctype|html|\?xml)': 'is a web page saved in its place; download it again',
    r'version https://git-lfs': "is a Git LFS pointer; run 'git lfs pull' where it comes from",
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
        path: The file.
        map_location: As in :func:`torch.load`.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is no checkpoint, is damaged, or holds anything but weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        # In MMEngine's words.
        raise FileNotFoundError(f'{path} can not be found.')
    _check_format(path)
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
    if head.startswith(b'PK'):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f'checkpoint {path} is damaged or incomplete: its end is missing; copy it again, '
                'or take an older one'
            )
        return
    # The older format is a bare pickle.
    if head.startswith(b'\x80'):
        return
    text = head.decode('latin-1')
    for pattern, words in _OTHER_FILES.items():
        if re.match(pattern, text):
            raise CheckpointError(f'checkpoint {path} {words}')
    raise CheckpointError(
        f'checkpoint {path} is no file of PyTorch: it starts with {head[:16]!r}; it must be what '
        'torch.save or MMEngine wrote'
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
    if '://' in path:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location)
    else:
        checkpoint = read_checkpoint(path, map_location)
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f'the state_dict of checkpoint {path} must be a dict, it is a {type(weights).__name__}'
        )
    return weights


def check_pretrained(path: str, prefix: str | None, map_location: Any = 'cpu') -> None:
    """See that MMEngine's ``Pretrained`` can load a checkpoint, before it does.

    Args:
        path: A file, or anything else that MMEngine loads from, such as an URL.
        prefix: What the names of the wanted weights start with; None for nothing.
        map_location: As in :func:`torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: See :func:`read_weights`; or no weight has that prefix.
    """
    weights = read_weights(path, map_location)
    if prefix is None:
        return
    wanted = prefix if prefix.endswith('.') else f'{prefix}.'
    if any(name.startswith(wanted) for name in weights):
        return
    found = sorted({match[1] for name in weights if (match := _KEY.match(name))})
    if found:
        remedy = f'a LaViT is there under {found[0]!r}: set init_cfg.prefix={found[0] or None!r}'
    else:
        remedy = f'its names start like {list(weights)[:3]}; it holds no LaViT'
    raise CheckpointError(f'checkpoint {path} has no weights under prefix={prefix!r}; {remedy}')


def load_from_file(filename: str, map_location: Any = None) -> dict:
    """:func:`read_checkpoint` as MMEngine calls its loaders; the name is for its log."""
    return read_checkpoint(filename, map_location)


def guard_checkpoints() -> None:
    """Make MMEngine load every local checkpoint of this process by :func:`read_checkpoint`.

    Its own loader tries to load weights alone, and where that fails loads the whole file. URLs stay
    with it.
    """
    CheckpointLoader.register_scheme('', loader=load_from_file, force=True)
