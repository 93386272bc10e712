"""What stands between a checkpoint and a model: the arch it was made for, and its windows."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import ARCHS, Arch

_STAGE = re.compile(r'stages\.(\d+)\.')
_PROJECTION = re.compile(r'stages\.(\d+)\.blocks\.\d+\.attn\.(qkv|v)\.weight')
_DOWNSAMPLE = re.compile(r'stages\.\d+\.downsample\.proj\.weight')
_PATCHES = 'patch_embed.proj.weight'
_WINDOW_WEIGHT = re.compile(r'stages\.(\d+)\.blocks\.\d+\.attn\.(psi|theta)')


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


def are_flattened(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are FSDP's flat shares of weights, whose shapes tell nothing.

    So they are in a local state dict (MMEngine's ``state_dict_cfg='local'``): in one tensor for
    each unit or, with ``use_orig_params``, one for each weight.
    """
    return any(
        name.endswith('._flat_param') or (name.endswith('.proj.weight') and weight.ndim == 1)
        for name, weight in weights.items()
    )


def observed_arch(weights: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Read the sizes of a LaViT off its weights.

    Args:
        weights: A LaViT's weights under their own names; some may be missing.

    Returns:
        The fields of :class:`mmlavit.models.arch.Arch`, with a value for each stage that the
        weights hold: None where the weights that show it are missing, as the heads of a single
        stage are.
    """
    num_stages = len({match[1] for name in weights if (match := _STAGE.match(name))})
    projections = [match.groups() for name in weights if (match := _PROJECTION.fullmatch(name))]

    def size(name: str, axis: int = 0) -> int | None:
        return weights[name].shape[axis] if name in weights else None

    observed = defaultdict(tuple)
    for m in range(num_stages):
        dims = size(f'stages.{m}.blocks.0.norm1.weight')
        hidden = size(f'stages.{m}.blocks.0.mlp.fc1.weight')
        if m == 0:
            heads = size('stages.1.attention_residual.pwconv.weight', axis=1)
        else:
            heads = size(f'stages.{m}.attention_residual.pwconv.weight')
        vanilla = projections.count((str(m), 'qkv'))
        observed['embed_dims'] += (dims,)
        observed['num_heads'] += (heads,)
        observed['depths'] += (vanilla + projections.count((str(m), 'v')),)
        observed['vanilla_depths'] += (vanilla,)
        observed['mlp_ratios'] += (hidden / dims if hidden and dims else None,)
    return dict(observed)


def check_arch(
    weights: Mapping[str, Tensor], arch: Arch, num_stages: int, in_channels: int
) -> None:
    """Refuse the weights of another arch.

    Stages that only the checkpoint has are what a smaller ``out_indices`` leaves out of the model,
    and are no error.

    Args:
        weights: The checkpoint's weights under LaViT's own names.
        arch: Arch of the model.
        num_stages: How many stages the model built.
        in_channels: Input channels of the model.

    Raises:
        ValueError: If the weights are no LaViT's, or of another arch, or take other input channels
            or lack stages that the model has. The message names both archs.
    """
    theirs = observed_arch(weights)
    if not theirs:
        raise ValueError(
            f'the state dict holds no LaViT weights (it starts with {list(weights)[:3]}); to load '
            "the backbone of a larger model, give init_cfg a prefix such as 'backbone.'"
        )
    ours = {name: getattr(arch, name)[:num_stages] for name in theirs}
    if len(theirs['depths']) < num_stages:
        raise ValueError(
            f'the checkpoint holds {len(theirs["depths"])} stage(s) of a LaViT {_name(theirs)}, '
            f'the model has {num_stages}: it was saved with smaller out_indices'
        )
    if not all(_agree(theirs[name], sizes) for name, sizes in ours.items()):
        raise ValueError(
            f'the checkpoint is a LaViT {_name(theirs)}, the model is a LaViT {_name(ours)}; '
            'set arch to the one of the checkpoint, or load another checkpoint'
        )
    projection = weights.get('patch_embed.conv1.proj.weight', weights.get(_PATCHES))
    if projection is not None and projection.shape[1] != in_channels:
        raise ValueError(
            f'the checkpoint takes in_channels={projection.shape[1]}, '
            f'the model in_channels={in_channels}'
        )


def check_options(weights: Mapping[str, Tensor], conv_stem: bool, overlap_downsample: bool) -> None:
    """Refuse the weights of a LaViT with another stem or another downsampling.

    Args:
        weights: The checkpoint's weights under LaViT's own names.
        conv_stem: Whether the model has the convolutional stem.
        overlap_downsample: Whether its downsampling overlaps.

    Raises:
        ValueError: If an option differs. The message says how to set it.
    """
    has_stem = any(name.startswith('patch_embed.conv') for name in weights)
    if (has_stem or _PATCHES in weights) and has_stem != conv_stem:
        raise ValueError(
            f'the checkpoint was saved with conv_stem={has_stem}, the model has '
            f'conv_stem={conv_stem} (older checkpoints of nano have none); give the model '
            f'conv_stem={has_stem}, or load another checkpoint'
        )
    kernels = {w.shape[-1] for name, w in weights.items() if _DOWNSAMPLE.fullmatch(name)}
    if kernels and kernels != {3 if overlap_downsample else 2}:
        raise ValueError(
            f'the checkpoint was saved with overlap_downsample={not overlap_downsample}, the model '
            f'has overlap_downsample={overlap_downsample}; give the model '
            f'overlap_downsample={not overlap_downsample}, or load another checkpoint'
        )


def _agree(observed: tuple, sizes: tuple) -> bool:
    """Whether two archs have the same sizes in the stages that both have, as far as is known."""
    return all(o is None or o == s for o, s in zip(observed, sizes, strict=False))


def _name(observed: Mapping[str, tuple]) -> str:
    """``'small' (embed_dims=..., ...)``, the name being the family's where it is one of them."""
    name = next(
        (
            name
            for name, arch in ARCHS.items()
            if all(_agree(sizes, getattr(arch, k)) for k, sizes in observed.items())
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


def fit_windows(weights: dict[str, Tensor], windows: Sequence[int]) -> list[str]:
    """Resize every ``Psi`` and ``Theta`` whose window is not the model's, in place of the old one.

    Args:
        weights: The checkpoint's weights under LaViT's own names; changed in place.
        windows: The window size of each stage of the model.

    Returns:
        The names that were resized.
    """
    resized = []
    for name, weight in weights.items():
        match = _WINDOW_WEIGHT.fullmatch(name)
        if match is None or (stage := int(match[1])) >= len(windows):
            continue
        if weight.shape != (windows[stage] ** 2,) * 2:
            weights[name] = resize_window_weight(weight, windows[stage])
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
