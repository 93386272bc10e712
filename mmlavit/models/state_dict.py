"""What stands between a checkpoint and a model: the arch it was made for, and its windows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import ARCHS, Arch

_BLOCK = re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.(.+)')
_RESIDUAL = re.compile(r'stages\.(\d+)\.attention_residual\.pwconv\.weight')
_DOWNSAMPLE = re.compile(r'stages\.\d+\.downsample\.proj\.weight')
_MLP = re.compile(r'stages\.\d+\.blocks\.\d+\.mlp\.fc1\.weight')
_MLP_CONV = re.compile(r'stages\.\d+\.blocks\.\d+\.mlp\.dwconv\.weight')
_PATCHES = 'patch_embed.proj.weight'
_STAGES = re.compile(r'stages\.\d+\.(blocks|downsample|attention_residual)\.')
_OURS = re.compile(r'(patch_embed|stages|norm[0-3])\.')
# What torch.compile, DDP, FSDP and checkpointing put into the names of what they wrap.
_WRAPPERS = re.compile(r'\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')


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


@dataclass
class _Observed:
    """What a state dict shows of a stage; None and nothing where it does not."""

    embed_dims: int | None = None
    num_heads: int | None = None
    hidden_dims: int | None = None
    kinds: dict[int, str | None] = field(default_factory=dict)  # by layer: 'qkv', 'v' or None

    @property
    def mlp_ratio(self) -> float | None:
        """Hidden channels over channels."""
        if not self.hidden_dims or not self.embed_dims:
            return None
        return self.hidden_dims / self.embed_dims


def _observe(weights: Mapping[str, Tensor]) -> dict[int, _Observed]:
    """What a state dict shows of each stage that it has something of."""
    stages: dict[int, _Observed] = {}
    for name, weight in weights.items():
        if match := _RESIDUAL.fullmatch(name):
            m = int(match[1])
            heads, prev_heads = weight.shape[:2]
            stages.setdefault(m, _Observed()).num_heads = heads
            if m == 1:
                stages.setdefault(0, _Observed()).num_heads = prev_heads
        elif match := _BLOCK.fullmatch(name):
            stage, i, rest = stages.setdefault(int(match[1]), _Observed()), int(match[2]), match[3]
            stage.kinds.setdefault(i, None)
            if rest == 'norm1.weight':
                stage.embed_dims = weight.shape[0]
            elif rest == 'mlp.fc1.weight':
                stage.hidden_dims = weight.shape[0]
            elif rest.startswith('attn.qkv.'):
                stage.kinds[i] = 'qkv'
            elif rest.startswith(('attn.v.', 'attn.psi', 'attn.theta')):
                stage.kinds[i] = 'v'
    return stages


def _holds_all(weights: Mapping[str, Tensor], stages: Mapping[int, _Observed]) -> bool:
    """Whether these seem to be all the weights of a LaViT, so that layers that lack are none.

    Weights of adapters alone, of some layers, or of one part are not.
    """
    starts = {name.partition('.')[0] for name in weights}
    return 'patch_embed' in starts and all(
        m in stages and all(stages[m].kinds.get(i) for i in range(1 + max(stages[m].kinds)))
        for m in range(1 + max(stages, default=-1))
    )


def check_arch(
    weights: Mapping[str, Tensor], arch: Arch, num_stages: int, in_channels: int
) -> None:
    """Refuse the weights of another arch.

    Only what the weights show is compared. Weights that are missing are the business of ``strict``,
    and stages that only the checkpoint has are what a smaller ``out_indices`` leaves out of the
    model.

    Args:
        weights: The checkpoint's weights under LaViT's own names; some may be missing.
        arch: Arch of the model.
        num_stages: How many stages the model built.
        in_channels: Input channels of the model.

    Raises:
        ValueError: If the weights are no LaViT's, or of another arch, or take other input channels,
            or are all the weights of a LaViT with fewer stages. The message names both archs.
    """
    if not (any(map(_STAGES.match, weights)) or all(map(_OURS.match, weights))):
        raise ValueError(
            f'the state dict holds no LaViT weights (it starts with {list(weights)[:3]}); to load '
            "the backbone of a larger model, give init_cfg a prefix such as 'backbone.'"
        )
    weights = {_WRAPPERS.sub('', name): weight for name, weight in weights.items()}
    stages = _observe(weights)
    whole = _holds_all(weights, stages)
    if whole and stages and len(stages) < num_stages:
        raise ValueError(
            f'the checkpoint holds {len(stages)} stage(s) of a LaViT {_name(stages)}, '
            f'the model has {num_stages}: it was saved with smaller out_indices'
        )
    ours = {m: _expected(arch, m) for m in range(num_stages)}
    if not all(_agree(stages[m], ours[m], whole) for m in ours if m in stages):
        raise ValueError(
            f'the checkpoint is a LaViT {_name(stages)}, the model is a LaViT {_name(ours)}; '
            'set arch to the one of the checkpoint, or load another checkpoint'
        )
    projection = weights.get('patch_embed.conv1.proj.weight', weights.get(_PATCHES))
    if projection is not None and projection.shape[1] != in_channels:
        raise ValueError(
            f'the checkpoint takes in_channels={projection.shape[1]}, '
            f'the model in_channels={in_channels}; to go on with its weights, build the model with '
            f'in_channels={projection.shape[1]}, or repeat or average the channels of '
            f'{_PATCHES} (dim 1) and save them again'
        )


def check_options(
    weights: Mapping[str, Tensor], conv_stem: bool, overlap_downsample: bool, mix_ffn: bool
) -> None:
    """Refuse the weights of a LaViT with another stem, other downsampling or other MLPs.

    Args:
        weights: The checkpoint's weights under LaViT's own names.
        conv_stem: Whether the model has the convolutional stem.
        overlap_downsample: Whether its downsampling overlaps.
        mix_ffn: Whether its MLPs hold a convolution.

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
    has_convs = any(map(_MLP_CONV.fullmatch, weights))
    has_mlps = any(map(_MLP.fullmatch, weights))
    if (has_convs or has_mlps) and has_convs != mix_ffn:
        raise ValueError(
            f'the checkpoint was saved with mix_ffn={has_convs}, the model has mix_ffn={mix_ffn} '
            f'(older checkpoints of nano have none); give the model mix_ffn={has_convs}, or load '
            'another checkpoint'
        )


def _expected(arch: Arch, stage: int) -> _Observed:
    """What all weights of a stage of an arch would show."""
    kinds = ['qkv' if i < arch.vanilla_depths[stage] else 'v' for i in range(arch.depths[stage])]
    dims = arch.embed_dims[stage]
    return _Observed(
        dims, arch.num_heads[stage], int(dims * arch.mlp_ratios[stage]), dict(enumerate(kinds))
    )


def _agree(observed: _Observed, expected: _Observed, whole: bool) -> bool:
    """Whether what was seen of a stage fits, as far as it is known."""
    if whole and len(observed.kinds) != len(expected.kinds):
        return False
    pairs = [(getattr(observed, n), getattr(expected, n)) for n in ('embed_dims', 'num_heads')]
    pairs += [(observed.hidden_dims, expected.hidden_dims)]
    # A layer that the model does not have fits nothing.
    pairs += [(kind or 'any', expected.kinds.get(i)) for i, kind in observed.kinds.items()]
    return all(o in (None, e) or (o == 'any' and e) for o, e in pairs)


def _name(stages: Mapping[int, _Observed]) -> str:
    """``'small' (embed_dims=..., ...)``, the name being the family's where it is one of them."""
    names = [
        name
        for name, arch in ARCHS.items()
        if all(_agree(stage, _expected(arch, m), whole=True) for m, stage in stages.items())
    ]
    by_stage = [stages[m] for m in sorted(stages)]
    sizes = {
        'embed_dims': tuple(s.embed_dims for s in by_stage),
        'num_heads': tuple(s.num_heads for s in by_stage),
        'depths': tuple(len(s.kinds) for s in by_stage),
        'vanilla_depths': tuple(list(s.kinds.values()).count('qkv') for s in by_stage),
        'mlp_ratios': tuple(s.mlp_ratio for s in by_stage),
    }
    listing = ', '.join(f'{name}={values}' for name, values in sizes.items())
    return f'{(names or ["custom"])[0]!r} ({listing})'


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


def windows_of(weights: Mapping[str, Tensor]) -> dict[int, int]:
    """The window size of each stage that shows it, read off ``Psi`` or ``Theta``."""
    return {
        int(match[1]): math.isqrt(weight.shape[0])
        for name, weight in weights.items()
        if (match := _BLOCK.fullmatch(name)) and match[3] in ('attn.psi', 'attn.theta')
    }
