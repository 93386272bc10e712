"""What stands between a checkpoint and a model: the arch it was made for, and its windows."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import ARCHS

_BLOCK = re.compile(r'stages\.(\d+)\.blocks\.\d+\.attn\.(qkv|v)\.weight')


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


def observed_arch(weights: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Read the sizes of a LaViT off its weights.

    Args:
        weights: A LaViT's weights under their own names.

    Returns:
        The fields of :class:`mmlavit.arch.Arch`, with a value for each stage that the weights hold.
        ``num_heads`` is absent from a single stage, whose weights do not show it.
    """
    kinds = defaultdict(list)
    for name in weights:
        if match := _BLOCK.fullmatch(name):
            kinds[int(match[1])].append(match[2])
    stages = range(len(kinds))
    dims = [weights[f'stages.{m}.blocks.0.norm1.weight'].shape[0] for m in stages]
    hidden = [weights[f'stages.{m}.blocks.0.mlp.fc1.weight'].shape[0] for m in stages]
    heads = [weights[f'stages.{m}.attention_residual.pwconv.weight'].shape[:2] for m in stages[1:]]
    observed = dict(
        embed_dims=tuple(dims),
        depths=tuple(len(kinds[m]) for m in stages),
        vanilla_depths=tuple(kinds[m].count('qkv') for m in stages),
        mlp_ratios=tuple(h / d for h, d in zip(hidden, dims, strict=True)),
    )
    if heads:
        observed['num_heads'] = (heads[0][1], *(h[0] for h in heads))
    return observed


def check_arch(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse the weights of another arch.

    Stages that only the checkpoint has are what a smaller ``out_indices`` leaves out of the model,
    and are no error.

    Args:
        weights: The checkpoint's weights under LaViT's own names.
        own: The model's weights.

    Raises:
        ValueError: If the checkpoint is of another arch, takes other input channels or lacks stages
            that the model has. The message names both archs.
    """
    theirs, ours = observed_arch(weights), observed_arch(own)
    num_stages = len(ours['depths'])
    if len(theirs['depths']) < num_stages:
        raise ValueError(
            f'the checkpoint holds {len(theirs["depths"])} stage(s) of a LaViT '
            f'{_name(theirs)}, the model has {num_stages}: it was saved with smaller out_indices'
        )
    if any(theirs[k][:num_stages] != v for k, v in ours.items() if k in theirs):
        raise ValueError(
            f'the checkpoint is a LaViT {_name(theirs)}, the model is a LaViT {_name(ours)}; '
            'set arch to the one of the checkpoint, or load another checkpoint'
        )
    theirs_in, ours_in = (w['patch_embed.proj.weight'].shape[1] for w in (weights, own))
    if theirs_in != ours_in:
        raise ValueError(
            f'the checkpoint takes in_channels={theirs_in}, the model in_channels={ours_in}'
        )


def _name(observed: Mapping[str, tuple]) -> str:
    """``'small' (embed_dims=..., ...)``, the name being the family's where it is one of them."""
    num_stages = len(observed['depths'])
    name = next(
        (
            name
            for name, arch in ARCHS.items()
            if all(getattr(arch, k)[:num_stages] == v for k, v in observed.items())
        ),
        'custom',
    )
    sizes = ', '.join(f'{k}={v}' for k, v in observed.items())
    return f'{name!r} ({sizes})'


def resize_window_weight(weight: Tensor, window: int) -> Tensor:
    """Bring ``Psi`` or ``Theta`` to another window size, by interpolation over both window grids.

    What the matrix does beyond the identity is interpolated: ``I + U (W - I) D``, where ``D`` takes
    a map of the new window to the old one and ``U`` takes it back, both bilinear with
    antialiasing. So a layer that reuses its scores as they are still does so afterwards, and a
    smooth map is treated alike at both sizes.

    Args:
        weight: (m**2, m**2) for windows of side ``m``.
        window: Side of the new windows, in tokens.

    Returns:
        Tensor (window**2, window**2) of the same dtype and device.

    Raises:
        ValueError: If ``weight`` is not square over a square window.
    """
    n = weight.shape[0]
    side = math.isqrt(n)
    if weight.shape != (n, n) or side**2 != n:
        raise ValueError(
            'Psi and Theta must be (n, n) with n the number of tokens of a square window, got '
            f'{tuple(weight.shape)}'
        )
    residual = weight.double() - torch.eye(n, dtype=torch.float64, device=weight.device)
    to_old = _interpolation(window, side, weight.device)
    to_new = _interpolation(side, window, weight.device)
    eye = torch.eye(window**2, dtype=torch.float64, device=weight.device)
    return (eye + to_new @ residual @ to_old).to(weight.dtype)


def _interpolation(source: int, target: int, device: torch.device) -> Tensor:
    """Matrix (target**2, source**2) that resizes a flattened square map."""
    basis = torch.eye(source**2, dtype=torch.float64, device=device).view(1, -1, source, source)
    resized = F.interpolate(
        basis, size=(target, target), mode='bilinear', antialias=True, align_corners=False
    )
    return resized.flatten(2)[0].T


def fit_windows(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Resize every ``Psi`` and ``Theta`` whose window is not the model's, in place of the old one.

    Args:
        weights: The checkpoint's weights under LaViT's own names; changed in place.
        own: The model's weights.

    Returns:
        The names that were resized.
    """
    resized = []
    for name, weight in own.items():
        if not name.endswith(('.psi', '.theta')) or name not in weights:
            continue
        if weights[name].shape != weight.shape:
            weights[name] = resize_window_weight(weights[name], math.isqrt(weight.shape[0]))
            resized.append(name)
    return resized


def windows_of(weights: Mapping[str, Tensor]) -> tuple[int | None, ...]:
    """The window size of each stage, read off ``Psi``; None in a stage without less attention."""
    windows: dict[int, int | None] = {}
    for name, weight in weights.items():
        if name.startswith('stages.'):
            stage = int(name.split('.')[1])
            windows.setdefault(stage, None)
            if name.endswith('.psi'):
                windows[stage] = math.isqrt(weight.shape[0])
    return tuple(windows[stage] for stage in sorted(windows))
