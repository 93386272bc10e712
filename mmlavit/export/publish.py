"""Released weights: what others need of a training's checkpoint, and nothing else.

A checkpoint of MMEngine holds, beside the weights, the optimizer's state, the log, and a config
with the paths of the machine that trained. Released files hold the weights and what a user of them
needs to know: the config, the classes, how long and with which seed the training ran.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.checkpoint_file import CheckpointError, read_checkpoint, write_whole
from ..engine.hooks.safe_checkpoint import damage
from ..engine.safetensors_file import SUFFIX, dump_safetensors
from ..errors import MMLaViTError
from ..version import __version__
from .privacy import Change, Privacy

BACKBONE = 'backbone.'
_NAME = re.compile(r'[\w.+-]+')
# In MMEngine's name of an experiment, after the name of its config.
_STARTED = re.compile(r'_\d{8}_\d{6}$')


class PublishError(MMLaViTError, ValueError):
    """A model cannot be published as asked; the text is one line for the user."""


@dataclass(frozen=True)
class Release:
    """A model as it is published.

    Attributes:
        name: What it was asked to be called, or the name of its config, with ``-backbone`` or
            ``-half`` where it is.
        checkpoint: ``meta``, of plain Python values, and ``state_dict``.
        changes: What is different in the config.
    """

    name: str
    checkpoint: dict[str, Any]
    changes: Sequence[Change] = ()

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the training."""
        return self.checkpoint['meta']

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights by name."""
        return self.checkpoint['state_dict']

    def files(self) -> dict[str, bytes]:
        """The files that hold it, by name.

        Returns:
            A checkpoint of PyTorch and one of safetensors. Both are called
            ``NAME_DATE-HASH``, as OpenMMLab's: the day that the weights are from, and the first
            eight digits of the file's own SHA-256. The same checkpoint gives the same files.
        """
        buffer = io.BytesIO()
        torch.save(self.checkpoint, buffer)
        contents = {'.pth': buffer.getvalue(), SUFFIX: dump_safetensors(self.checkpoint)}
        day = self.meta['time'][:8]
        return {
            f'{self.name}_{day}-{sha256(content)[:8]}{suffix}': content
            for suffix, content in contents.items()
        }


def sha256(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def prepare(
    path: str | Path,
    *,
    backbone: bool = False,
    half: bool = False,
    ema: bool | None = None,
    name: str | None = None,
    privacy: Privacy | None = None,
) -> Release:
    """Take out of a training's checkpoint what is to be published.

    Args:
        path: The checkpoint, as a Runner writes it, or one that is published already.
        backbone: Whether to take the backbone alone. Its weights then have no prefix, and
            LaViT's ``init_cfg`` takes the file with and without one.
        half: Whether to store numbers in half precision. Models load them as what they
            themselves are, so float32 weights are rounded to 11 bits and otherwise as before.
        ema: Where ``EMAHook`` averaged weights: True takes the averages, False the weights of the
            last step. None where there is no choice.
        name: What the model is called; by default as its config, with ``-backbone`` or ``-half``
            where it is.
        privacy: What is private; by default this machine's user and name.

    Returns:
        What is to be published.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or no checkpoint.
        PublishError: If it is no checkpoint of a training, or an argument does not fit it.
        PrivacyError: If something private is in it that cannot be taken out.
    """
    path = Path(path).expanduser()
    privacy = privacy or Privacy.of_this_machine()
    checkpoint = read_checkpoint(path)
    # torch.load does not look at checksums.
    if path.suffix != SUFFIX and (reason := damage(path)):
        raise CheckpointError(f'checkpoint {path}: {reason}; copy it again, or take an older one')
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or not isinstance(meta.get('cfg'), str):
        raise PublishError(
            f'{path} is no checkpoint of a training: its meta has no config (cfg); publish what a '
            'Runner of MMEngine has written'
        )
    weights = _choose_weights(checkpoint, ema, path)
    if backbone:
        weights = _of_backbone(weights, path)
    weights = _finished(weights, half, path)
    config, changes = privacy.clean_config(meta['cfg'])
    called = privacy.clean_text(name or _name_of(meta, path), 'the name of the model')
    if not _NAME.fullmatch(called):
        raise PublishError(f'name must be of letters, digits and .+-_, got {called!r}')
    published = dict(
        cfg=config,
        name=called,
        part=meta.get('part') if not backbone else 'backbone',
        precision=meta.get('precision') if not half else 'float16',
        weights=meta.get('weights') if ema is None else ('ema' if ema else 'last step'),
        time=_time_of(meta),
        mmlavit_version=__version__,
    )
    for key in ('dataset_meta', 'epoch', 'iter', 'seed', 'mmengine_version'):
        if meta.get(key) is not None:
            published[key] = _plain(meta[key], key, privacy)
    kept = {key: value for key, value in published.items() if value is not None}
    if not name:
        called += '-backbone' * (kept.get('part') == 'backbone')
        called += '-half' * (kept.get('precision') == 'float16')
    return Release(called, dict(meta=kept, state_dict=weights), changes)


def write(folder: str | Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files that are not there yet; none is replaced.

    Args:
        folder: Where to; it is made if need be.
        files: Contents by name.

    Returns:
        The paths. A file that was there already with the same content is left alone.

    Raises:
        FileExistsError: If there is another file of one of the names. Then nothing is written.
        PublishError: If a file cannot be written. Each file is whole or not there.
    """
    folder = Path(folder).expanduser()
    paths = {folder / name: content for name, content in files.items()}
    try:
        for path, content in paths.items():
            if path.exists() and not (path.is_file() and path.read_bytes() == content):
                raise FileExistsError(f'{path} is there already, with other content; move it away')
        for path, content in paths.items():
            if not path.exists():
                write_whole(path, content)
    except FileExistsError as error:
        if error.errno is None:
            raise
        raise PublishError(f'{folder} is no folder; name another') from error
    except OSError as error:
        raise PublishError(f'cannot write {error.filename or folder}: {error.strerror}') from error
    return list(paths)


def _choose_weights(checkpoint: dict, ema: bool | None, path: Path) -> Mapping[str, Any]:
    weights, averaged = checkpoint.get('state_dict'), checkpoint.get('ema_state_dict')
    if not isinstance(weights, Mapping) or not weights:
        raise PublishError(f'{path} holds no weights: it has no state_dict')
    if averaged is None:
        if ema is not None:
            raise PublishError(
                f'{path} has one set of weights, no averages of EMAHook beside them; leave out '
                '--ema and --no-ema'
            )
        return weights
    if ema is None:
        raise PublishError(
            f'{path} has two sets of weights: the averages of EMAHook, which validation has '
            'measured, and those of the last step; choose with --ema or --no-ema'
        )
    if ema:
        # EMAHook has exchanged the two when it saved: a plain loader takes the averages.
        return weights
    last = {k.removeprefix('module.'): v for k, v in averaged.items() if k.startswith('module.')}
    if last.keys() != weights.keys():
        raise PublishError(
            f'{path} has averages of other weights than its state_dict, as {_differ(last, weights)}'
            ' shows; only --ema is possible'
        )
    chosen = OrderedDict((name, last[name]) for name in weights)
    chosen._metadata = getattr(weights, '_metadata', {})  # type: ignore[attr-defined]
    return chosen


def _differ(one: Mapping, other: Mapping) -> str:
    return min(one.keys() ^ other.keys())


def _of_backbone(weights: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    chosen = OrderedDict(
        (name.removeprefix(BACKBONE), value)
        for name, value in weights.items()
        if name.startswith(BACKBONE)
    )
    if not chosen:
        raise PublishError(
            f'{path} has no weights under {BACKBONE!r}; their names start like {list(weights)[:3]}'
        )
    versions = getattr(weights, '_metadata', {})
    chosen._metadata = OrderedDict(  # type: ignore[attr-defined]
        (name[len(BACKBONE) :], version)
        for name, version in versions.items()
        if f'{name}.'.startswith(BACKBONE)
    )
    return chosen


def _finished(weights: Mapping[str, Any], half: bool, path: Path) -> OrderedDict[str, Tensor]:
    """Weights of their own memory, on the CPU, checked, and rounded if asked for."""
    finished: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise PublishError(
                f'{path} has a {type(value).__name__} among the weights, {name!r}; every one must '
                'be a tensor'
            )
        if value.is_floating_point():
            if not value.isfinite().all():
                raise PublishError(
                    f'{path} has weights that are infinite or NaN, in {name!r}: the training has '
                    'diverged; take an older checkpoint'
                )
            if half and (largest := value.abs().amax().item() if value.numel() else 0) > 65504:
                raise PublishError(
                    f'{path} has weights of {largest:.3g} in {name!r}, and half precision ends at '
                    '65504; publish it without --half'
                )
            value = value.half() if half else value
        finished[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    versions = getattr(weights, '_metadata', {})
    finished._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return finished


def _name_of(meta: dict, path: Path) -> str:
    """What the training's config was called."""
    name = meta.get('name') or _STARTED.sub('', str(meta.get('experiment_name') or ''))
    # MMEngine's word for a config that was no file.
    if name in ('', 'default'):
        raise PublishError(f'{path} does not say what its config is called; give a --name')
    return name


def _time_of(meta: dict) -> str:
    """The time at which the weights were saved, as MMEngine writes it."""
    time = str(meta.get('time'))
    # Other programs have other clocks.
    return time if re.match(r'\d{8}_', time) else f'{datetime.date.today():%Y%m%d}_000000'


def _plain(value: Any, where: str, privacy: Privacy) -> Any:
    """A value of Python's own types, which every loader takes, with nothing private."""

    def part(item: Any, key: object) -> Any:
        return _plain(item, f'{where}.{key}', privacy)

    if isinstance(value, str):
        # Labels are no paths, and their names are everybody's.
        is_label = re.search(r'\.(classes|palette)\b', where, re.IGNORECASE)
        return str(value) if is_label else privacy.clean_text(value, where)
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    if value is None:
        return None
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {part(key, 'key'): part(item, key) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(part(item, i) for i, item in enumerate(value))
    if isinstance(value, set | frozenset):
        # In an order that does not depend on the process.
        value = sorted(value, key=repr)
    if isinstance(value, list):
        return [part(item, i) for i, item in enumerate(value)]
    raise PublishError(
        f'{where} is a {type(value).__name__}, which no reader of the file could load; it must be '
        'of numbers, texts, lists and dicts'
    )
