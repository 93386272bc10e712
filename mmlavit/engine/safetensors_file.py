"""Checkpoints as safetensors files, which hold tensors and a text and can run nothing.

https://huggingface.co/docs/safetensors. The text of ours, under the key ``checkpoint``, is all of a
checkpoint that is no tensor, in JSON: what MMEngine calls ``meta``, and the versions of modules
that PyTorch keeps with a state dict.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

SUFFIX = '.safetensors'
_KEY = 'checkpoint'
# JSON has lists alone, and names alone as keys; a colour of a palette must stay a tuple.
_TUPLE, _ITEMS = '__tuple__', '__items__'


def dump_safetensors(checkpoint: dict) -> bytes:
    """A checkpoint as the content of a safetensors file; the same one gives the same bytes.

    Args:
        checkpoint: ``state_dict``, of tensors alone, and ``meta``, of plain Python values.

    Returns:
        The content.

    Raises:
        ImportError: If safetensors is not installed.
    """
    weights = checkpoint['state_dict']
    rest = dict(meta=checkpoint['meta'], versions=dict(getattr(weights, '_metadata', {})))
    # One key, as several are written in an order that chance decides.
    text = {_KEY: json.dumps(_to_json(rest), ensure_ascii=False)}
    return _library('torch').save(dict(weights), metadata=text)


def load_safetensors(path: str | Path, map_location: Any = 'cpu') -> dict:
    """Load a safetensors file as a checkpoint.

    Args:
        path: The file, ours or any other.
        map_location: A device, or None for the CPU.

    Returns:
        ``state_dict``, and ``meta`` if the file is one of :func:`dump_safetensors`.

    Raises:
        ImportError: If safetensors is not installed.
        TypeError: If ``map_location`` is anything else.
        ValueError: If the file is damaged or none; the text does not name it.
    """
    if map_location is not None and not isinstance(map_location, str | torch.device):
        raise TypeError(f'map_location must be a device or None, got {map_location!r}')
    library = _library()
    try:
        with library.safe_open(path, framework='pt', device=str(map_location or 'cpu')) as file:
            weights = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            text = (file.metadata() or {}).get(_KEY)
        if text is None:
            return dict(state_dict=weights)
        rest = json.loads(text, object_hook=_from_json)
        weights._metadata = OrderedDict(rest['versions'])  # type: ignore[attr-defined]
        return dict(meta=rest['meta'], state_dict=weights)
    except (library.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'it is no whole safetensors file ({reason})') from error


def _library(module: str = '') -> Any:
    try:
        return importlib.import_module(f'safetensors.{module}'.rstrip('.'))
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{SUFFIX} files need the package safetensors, which is not installed: '
            'pip install safetensors',
            name='safetensors',
        ) from error


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(part) for key, part in value.items()}
        return {_ITEMS: [[_to_json(key), _to_json(part)] for key, part in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(part) for part in value]}
    return [_to_json(part) for part in value] if isinstance(value, list) else value


def _from_json(value: dict) -> Any:
    if value.keys() == {_TUPLE}:
        return tuple(value[_TUPLE])
    return dict(value[_ITEMS]) if value.keys() == {_ITEMS} else value
