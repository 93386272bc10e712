"""Attention of Swin and PVTv2, recorded through their own modules, beside LaViT's.

The models of mmdet, mmseg and mmpretrain are left as they are; hooks read what their modules
compute anyway, so outputs are the same, bit by bit.

What can be compared with LaViT, and what cannot:

- **Swin** has windows, too, shifted in every second layer. Each layer's diagonality, symmetry and
  entropy mean the same as in LaViT. Two layers with different windows are compared on the pairs of
  tokens that share a window in both, see :func:`mmlavit.analysis.pairs.shared_cells`. Swin lets
  real tokens attend to padded ones; measures leave that share out.
- **PVTv2** attends from all tokens of the map to few keys, each a merged patch of tokens. Such maps
  are not square: a query has no place of its own among the keys and nothing can be symmetric, so
  diagonality and symmetry are left out, but in the last stage, where nothing is merged. Its maps
  are of the whole image, not of a window; entropy is relative to the number of keys in both.
- Head h of a less-attention layer comes from head h of the layer before. In Swin and PVTv2 heads of
  different layers have nothing to do with each other: there the cosine, which compares them by
  their number, is a low estimate, as in the literature. CKA does not depend on heads' order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.lavit import LaViT
from .pairs import ShiftedWindowGrid
from .record import LayerAttention, recording

# Names of the modules in all three toolboxes, which need not be installed.
_SWIN, _PVT = 'ShiftWindowMSA', 'SpatialReductionAttention'
_STAGE = {_SWIN: r'(?:^|\.)stages\.(\d+)\.', _PVT: r'(?:^|\.)layers\.(\d+)\.'}


def recording_any(
    model: nn.Module,
    keep: Callable[[LayerAttention], Any] | None = None,
    device: torch.device | str | None = 'cpu',
) -> AbstractContextManager[list]:
    """Record the attention of a LaViT, a Swin or a PVTv2.

    Args:
        model: The model, or another around it.
        keep: As in :func:`mmlavit.analysis.record.recording`.
        device: As there.

    Returns:
        A context manager that gives a list, as there. The ``kind`` of Swin's layers is
        ``'window'`` or ``'shifted'``, that of PVTv2's is ``'reduced'``.

    Raises:
        ValueError: If the model holds none of them.
    """
    if any(isinstance(module, LaViT) for module in model.modules()):
        return recording(model, keep, device=device)
    found = list(_peer_layers(model))
    if not found:
        raise ValueError(
            f'model must hold a LaViT, or a Swin or PVT of mmdet, mmseg or mmpretrain; '
            f'{type(model).__name__} holds none'
        )
    return _recording_peers(found, keep, device)


def _peer_layers(model: nn.Module) -> Iterator[tuple[str, int, int, str, nn.Module]]:
    """Path, stage, place in the stage, kind and module of the attention of each layer."""
    counts: dict[int, int] = {}
    for name, module in model.named_modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _STAGE), None)
        if kind is None or not (found := re.search(_STAGE[kind], name)):
            continue
        stage = int(found[1])
        yield name, stage, counts.setdefault(stage, 0), kind, module
        counts[stage] += 1


@contextmanager
def _recording_peers(
    found: list[tuple[str, int, int, str, nn.Module]],
    keep: Callable[[LayerAttention], Any] | None,
    device: torch.device | str | None,
) -> Iterator[list]:
    layers: list = []
    handles: list = []

    def record(*values: Any) -> None:
        layer = LayerAttention(*values)
        layers.append(layer if keep is None else keep(layer))

    try:
        for name, stage, place, kind, module in found:
            listen = _listen_to_swin if kind == _SWIN else _listen_to_pvt
            handles += listen((name, stage, place), module, record, device)
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _listen_to_swin(
    place: tuple[str, int, int],
    module: Any,
    record: Callable[..., None],
    device: torch.device | str | None,
) -> list:
    """Hooks on a ShiftWindowMSA: its softmax has the attention, its mask tells of the shift."""
    heard: dict[str, Any] = {}

    def hear_mask(msa: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get('mask', args[1] if len(args) > 1 else None)
        heard['shifted'] = mask is not None

    def hear_attention(softmax: nn.Module, args: tuple, attn: Tensor) -> None:
        heard['attn'] = attn.detach()

    def finish(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        query = args[0] if args else kwargs['query']
        height, width = args[1] if len(args) > 1 else kwargs['hw_shape']
        shift = module.shift_size if heard['shifted'] else 0
        grid = ShiftedWindowGrid(height, width, module.window_size, shift)
        attn = heard.pop('attn').to(device, torch.float32).unflatten(0, (query.shape[0], -1))
        record(*place, 'shifted' if shift else 'window', attn, None, None, grid)

    return [
        module.w_msa.register_forward_pre_hook(hear_mask, with_kwargs=True),
        module.w_msa.softmax.register_forward_hook(hear_attention),
        module.register_forward_hook(finish, with_kwargs=True),
    ]


def _listen_to_pvt(
    place: tuple[str, int, int],
    module: Any,
    record: Callable[..., None],
    device: torch.device | str | None,
) -> list:
    """Hooks on the nn.MultiheadAttention of a SpatialReductionAttention."""

    def ask_for_heads(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # The module computes weights in any case, and by default their mean over the heads.
        return args, {**kwargs, 'need_weights': True, 'average_attn_weights': False}

    def finish(attention: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        attn = output[1].detach().to(device, torch.float32).unsqueeze(1)
        record(*place, 'reduced', attn)

    return [
        module.attn.register_forward_pre_hook(ask_for_heads, with_kwargs=True),
        module.attn.register_forward_hook(finish),
    ]
