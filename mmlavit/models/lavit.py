"""LaViT, the Less-Attention Vision Transformer (CVPR 2024, arXiv 2406.00427)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from .arch import NUM_STAGES, Arch, as_int, as_ints, is_int, per_stage_ints
from .attention import LessAttention, VanillaAttention
from .attention_residual import AttentionResidual
from .base import BaseModule, register, say
from .block import Block, ConvStem, PatchEmbed
from .feature_info import FeatureInfo
from .state_dict import (
    are_flattened,
    check_arch,
    check_options,
    strip_prefix,
    windows_of,
)
from .windows import WindowGrid, nesting_ratio

# Standard deviation, at the start, of the weights of position convolutions (before they are
# centred) and of projections that write to the tokens, in a stage of at most START_LAYERS layers;
# in deeper ones it falls with the square root of the depth.
POSITION_STD = 0.2
PROJECTION_STD = 0.02  # as in Swin and PVT
START_LAYERS = 3


class Stage(nn.Module):
    """Patch merging (from the second stage on), then vanilla layers, then less-attention layers.

    Args:
        downsample: The merging before the layers, or None.
        attention_residual: What brings the previous stage's scores down, or None.
        blocks: The layers.
        window: Side of the windows, in tokens.
        with_cp: Whether to recompute each layer in the backward pass instead of storing it.
    """

    def __init__(
        self,
        downsample: PatchEmbed | None,
        attention_residual: AttentionResidual | None,
        blocks: Sequence[Block],
        window: int,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.attention_residual = attention_residual
        # Type checkers know of a ModuleList only that it holds some modules.
        self.blocks: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.window = window
        self.with_cp = with_cp

    def forward(
        self, x: Tensor, scores: Tensor | None, prev: WindowGrid | None
    ) -> tuple[Tensor, Tensor, WindowGrid]:
        """Run the stage.

        Args:
            x: Map of tokens (B, H', W', C') of the previous stage (or the patch embedding's).
            scores: The previous stage's last scores, or None.
            prev: The previous stage's grid, or None.

        Returns:
            The map (B, H, W, C), its last scores (windows, heads, n, n), and its grid.
        """
        if self.downsample is not None:
            x = self.downsample(x)
        height, width = x.shape[1:3]
        grid = WindowGrid(height, width, self.window)
        residual = None
        if self.attention_residual is not None:
            residual = self.attention_residual(scores, prev, grid)
        x, scores = ops.layers(self.blocks, x, grid, residual, self.with_cp)
        return x, scores, grid


@register
class LaViT(BaseModule):
    """Less-Attention Vision Transformer.

    "You Only Need Less Attention at Each Stage in Vision Transformers", CVPR 2024,
    https://arxiv.org/abs/2406.00427. Four stages at strides 4, 8, 16, 32. The first layers of a
    stage compute attention scores; the others transform the scores of the layer before. The last
    scores of a stage are passed on to the next. Scores live in windows (our answer to a point that
    the paper leaves open), so the same weights serve every image size.

    Args:
        arch: ``'nano'``, ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``,
            ``num_heads``, ``depths``, ``vanilla_depths`` and ``mlp_ratios``, each with a value for
            every stage, or an :class:`~mmlavit.models.arch.Arch`. Defaults to ``'small'``.
        in_channels: Channels of the image. Defaults to 3.
        window_sizes: Side of the windows of each stage, in tokens, or one for all. Windows nest:
            ``2 * w[m] / w[m-1]`` is a whole number and ``w[m-1]`` is even. ``(56, 28, 14, 7)`` is
            the paper to the letter at 224 x 224. Defaults to (8, 8, 8, 8).
        out_indices: Stages to return, ascending, or a single one; -1 is the last. Later stages are
            not built. Defaults to (0, 1, 2, 3).
        conv_stem: Ours, not the paper's: two 3 x 3 convolutions of stride 2
            (:class:`~mmlavit.models.block.ConvStem`) in place of the 4 x 4 patches. Defaults to
            None: what ``arch`` says, which is True for ``'nano'`` and False for all others.
        overlap_downsample: Ours, not the paper's: 3 x 3 convolutions of stride 2 in place of 2 x 2
            between stages. Defaults to None: what ``arch`` says, which is False for all.
        mix_ffn: Ours, not the paper's: a 3 x 3 depthwise convolution inside each MLP, as in
            SegFormer's Mix-FFN and PVTv2 (:class:`~mmlavit.models.mlp.MLP`). Defaults to None: what
            ``arch`` says, which is True for ``'nano'`` and False for all others.
        drop_rate: Dropout after the projections and in the MLPs. Defaults to 0.
        attn_drop_rate: Dropout on the attention after the softmax. Defaults to 0.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0.
            Defaults to 0.1.
        qkv_bias: Whether the projections to Q, K and V have a bias. Defaults to True.
        frozen_stages: Freeze the patch embedding and this many stages, with their output norms;
            -1 freezes nothing, 0 the patch embedding alone. Defaults to -1.
        with_cp: Recompute each layer in the backward pass to save memory. Defaults to False.
        fused_attention: Whether one Triton kernel computes the attention of a less-attention layer;
            it reads and writes scores once and keeps nothing between. ``'auto'``: where it can (on
            a GPU that Triton supports, for windows of at most 8 x 8 tokens, without attention
            dropout, outside torch.export and the like), once it has been compared with PyTorch
            there (:mod:`mmlavit.ops.fused_check`); elsewhere PyTorch computes the same. True: in
            any case, unchecked; a layer where it cannot run raises a RuntimeError. False: never,
            as second derivatives want it. Defaults to ``'auto'``.
        init_cfg: As everywhere in MMEngine. ``dict(type='Pretrained', checkpoint=...,
            prefix='backbone.')`` loads the backbone of a classifier, detector or segmentor; weights
            made for other ``window_sizes`` are resized. These type and prefix are what a dict
            without a ``type`` gets, so ``--cfg-options model.backbone.init_cfg.checkpoint=...`` is
            enough on a command line. A backbone that was published alone loads with and without
            that prefix. Defaults to None.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument does not fit. Both name the argument and the value.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch = 'small',
        in_channels: int = 3,
        window_sizes: int | Sequence[int] = (8, 8, 8, 8),
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        conv_stem: bool | None = None,
        overlap_downsample: bool | None = None,
        mix_ffn: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        qkv_bias: bool = True,
        frozen_stages: int = -1,
        with_cp: bool = False,
        fused_attention: bool | Literal['auto'] = 'auto',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=_complete_init_cfg(init_cfg))
        arch = Arch.of(arch)
        if is_int(window_sizes):
            window_sizes = (window_sizes,) * NUM_STAGES
        window_sizes = per_stage_ints('window_sizes', window_sizes)
        for prev_window, window in zip(window_sizes[:-1], window_sizes[1:], strict=True):
            nesting_ratio(prev_window, window)
        self.arch = arch
        self.window_sizes = window_sizes
        self.in_channels = as_int('in_channels', in_channels, 1)
        self.out_indices = _check_out_indices(out_indices)
        self.frozen_stages = as_int('frozen_stages', frozen_stages, -1, NUM_STAGES)
        self.conv_stem = _check_option('conv_stem', conv_stem, arch)
        self.overlap_downsample = _check_option('overlap_downsample', overlap_downsample, arch)
        self.mix_ffn = _check_option('mix_ffn', mix_ffn, arch)
        drop_rate = _check_rate('drop_rate', drop_rate)
        attn_drop_rate = _check_rate('attn_drop_rate', attn_drop_rate)
        drop_path_rate = _check_rate('drop_path_rate', drop_path_rate)
        qkv_bias = _check_bool('qkv_bias', qkv_bias)
        with_cp = _check_bool('with_cp', with_cp)
        fused_attention = _check_fused(fused_attention)

        num_stages = self.out_indices[-1] + 1
        self.depths = arch.depths[:num_stages]
        total = sum(self.depths)
        drop_paths = iter(drop_path_rate * i / max(total - 1, 1) for i in range(total))

        self.patch_embed: ConvStem | PatchEmbed
        if self.conv_stem:
            self.patch_embed = ConvStem(in_channels, arch.embed_dims[0])
        else:
            self.patch_embed = PatchEmbed(in_channels, arch.embed_dims[0], 4)
        stages = []
        for m in range(num_stages):
            dims, heads, window = arch.embed_dims[m], arch.num_heads[m], window_sizes[m]
            blocks = []
            for i in range(arch.depths[m]):
                attn: VanillaAttention | LessAttention
                if i < arch.vanilla_depths[m]:
                    attn = VanillaAttention(dims, heads, qkv_bias, attn_drop_rate, drop_rate)
                else:
                    attn = LessAttention(
                        *(dims, heads, window, qkv_bias, attn_drop_rate, drop_rate),
                        fused=fused_attention,
                    )
                blocks.append(
                    Block(
                        *(dims, attn, arch.mlp_ratios[m], self.mix_ffn),
                        *(drop_rate, next(drop_paths)),
                    )
                )
            downsample = residual = None
            if m > 0:
                downsample = PatchEmbed(
                    arch.embed_dims[m - 1], dims, 2, overlap=self.overlap_downsample
                )
                residual = AttentionResidual(
                    arch.num_heads[m - 1], heads, window_sizes[m - 1], window
                )
            stages.append(Stage(downsample, residual, blocks, window, with_cp))
        self.stages: Sequence[Stage] = nn.ModuleList(stages)  # type: ignore[assignment]
        for m in self.out_indices:
            self.add_module(f'norm{m}', nn.LayerNorm(arch.embed_dims[m], eps=1e-6))

        self._reset_parameters()
        self._made = self._writes()
        self._freeze_stages()

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of the maps that :meth:`forward` returns."""
        return tuple(self.arch.embed_dims[m] for m in self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one token to the next in those maps."""
        return tuple(4 << m for m in self.out_indices)

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, strides and modules of those maps, as timm's models tell them."""
        return FeatureInfo(
            dict(num_chs=channels, reduction=stride, module=f'norm{m}')
            for channels, stride, m in zip(
                self.out_channels, self.strides, self.out_indices, strict=True
            )
        )

    def init_weights(self) -> None:
        """Initial weights by ``init_cfg``, as everywhere in MMEngine.

        Without one they are as they were made or loaded, unless the model around has drawn them by
        kind of layer: mmpretrain's configs of transformers have every linear layer start at a
        standard deviation of 0.02, with which attention starts nearly even. They are drawn anew
        then, as LaViT draws them.

        Raises:
            FileNotFoundError: If the checkpoint of ``init_cfg`` does not exist.
            ValueError: If it is none, is damaged, holds anything but weights, holds none under
                ``prefix``, or is of another arch.
        """
        if not self.is_init and self._drawn_by_others():
            self._reset_parameters()
        if not self.is_init and (cfgs := _pretrained(self.init_cfg)):
            from ..engine.checkpoint_file import check_pretrained

            for cfg in cfgs:
                path, wanted = cfg['checkpoint'], cfg.get('prefix')
                prefix = check_pretrained(path, wanted)
                if prefix != wanted:
                    say(f'LaViT: {path} is a backbone alone; its weights have no prefix {wanted!r}')
                    cfg['prefix'] = prefix
        super().init_weights()

    def _writes(self) -> dict[str, int]:
        """How often each weight has been written to, as far as PyTorch counts it."""
        return {
            name: 0 if weight.is_inference() else weight._version
            for name, weight in self.named_parameters()
        }

    def _drawn_by_others(self) -> bool:
        """Whether somebody else has drawn weights by kind of layer.

        Whoever does leaves alone what lies in no layer of PyTorch's: Psi, Theta and LayerScale.
        Loading weights writes to those too, and what was loaded has to stay.
        """
        written = {k for k, n in self._writes().items() if n > self._made.get(k, n)}
        loaded = any(k.endswith(('.psi', '.theta', '.layer_scale')) for k in written)
        # A first stage of vanilla layers has none of these.
        return bool(written) and not loaded and written != set(self._made)

    def _reset_parameters(self) -> None:
        """Initial weights; ``Psi``, ``Theta`` and LayerScale set their own."""
        self._first_projection.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # What reads normalized tokens gives features, and scores, of a standard deviation
                # near 1 from any number of channels. Not a truncated normal: its bounds are -2 and
                # 2 in Swin and PVT, and now and then a weight lies on them, 100 standard deviations
                # out, one to five in a LaViT-B.
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            else:
                continue
            # Zero-padded patches would become zero tokens, which LayerNorm multiplies by
            # 1 / sqrt(eps), layer after layer, in the backward pass. As in Swin, the first
            # projection keeps the bias that PyTorch gave it.
            if module.bias is not None and module is not self._first_projection:
                nn.init.zeros_(module.bias)
        if isinstance(self.patch_embed, ConvStem):
            _centre(self.patch_embed.conv2.proj.weight, dim=(1, 2, 3))
        for stage in self.stages:
            # What writes to the tokens adds little, and the less the more layers there are, so that
            # the tokens of a stage grow by a bounded factor at any depth.
            share = min(1, math.sqrt(START_LAYERS / len(stage.blocks)))
            for block in stage.blocks:
                nn.init.normal_(block.pos_conv.weight, std=share * POSITION_STD)
                _centre(block.pos_conv.weight, dim=(2, 3))
                for projection in (block.attn.proj, block.mlp.fc2):
                    nn.init.normal_(projection.weight, std=share * PROJECTION_STD)

    @property
    def _first_projection(self) -> nn.Conv2d:
        """The convolution that the image meets first."""
        stem = self.patch_embed
        return (stem.conv1 if isinstance(stem, ConvStem) else stem).proj

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [self.patch_embed, *self.stages[: self.frozen_stages]]
        frozen += [
            self.get_submodule(f'norm{m}') for m in self.out_indices if m < self.frozen_stages
        ]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> LaViT:
        """Set the mode; frozen stages stay in evaluation."""
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps.

        Args:
            x: Images (B, in_channels, H, W), any H, W >= 1, any memory format.

        Returns:
            For each of ``out_indices`` a map (B, embed_dims[m], ceil(H / s), ceil(W / s)) with
            s = 4, 8, 16, 32. Maps are always NCHW-contiguous: mmcv's RoIAlign is silently wrong on
            any other layout (open-mmlab/mmcv#2203).

        Pixels that are NaN or infinite are not looked for, which would stall a GPU. They make the
        maps of their own image NaN and leave those of the other images as they are.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If its shape is wrong.
        """
        self._check_input(x)
        # Three channels are soon put in order; of a convolution's result it would be all of them.
        x = self.patch_embed(x.permute(0, 2, 3, 1).contiguous())
        scores = grid = None
        maps = []
        for m, stage in enumerate(self.stages):
            x, scores, grid = stage(x, scores, grid)
            if m in self.out_indices:
                norm = self.get_submodule(f'norm{m}')
                maps.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return tuple(maps)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f'x must be a floating-point tensor of images, got {kind}')
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape:
            raise ValueError(
                f'x must have shape (B, {self.in_channels}, H, W) with B, H, W >= 1, '
                f'got {tuple(x.shape)}'
            )

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """The depth of a parameter, for mmpretrain's layer-wise learning-rate decay.

        Args:
            param_name: Full name of the parameter in the model.
            prefix: What comes before the backbone's own names, such as ``'backbone.'``.

        Returns:
            The depth, and the number of depths: 0 is the patch embedding, the last is what follows
            the stages.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split('.')
        if parts[0] == 'patch_embed':
            return 0, num_layers
        if parts[0] != 'stages':
            return num_layers - 1, num_layers
        before = sum(self.depths[: int(parts[1])])
        if parts[2] == 'downsample':
            # Merging closes the previous stage, as in Swin.
            return before, num_layers
        layer = int(parts[3]) if parts[2] == 'blocks' else 0
        return before + layer + 1, num_layers

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Refuse another arch's weights and fit other windows', however the weights come in.

        PyTorch and MMEngine both call this first, with the whole state dict.
        """
        weights = strip_prefix(state_dict, prefix)
        # Not our own state dict: FSDP would gather all weights for it, and keep them from all but
        # the first process.
        modules = {name for name, _ in self.named_modules() if name}
        is_ours = not prefix or any(name.rpartition('.')[0] in modules for name in weights)
        if is_ours and not are_flattened(weights):
            check_arch(weights, self.arch, len(self.stages), self.in_channels)
            check_options(weights, self.conv_stem, self.overlap_downsample, self.mix_ffn)
            theirs = windows_of(weights)
            changes = [
                f'{theirs[m]} to {window} in stage {m + 1}'
                for m, window in enumerate(self.window_sizes[: len(self.stages)])
                if theirs.get(m, window) != window
            ]
            if changes:
                say(
                    'LaViT: Psi and Theta are interpolated to other windows: '
                    f'from {", ".join(changes)}'
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def _centre(kernels: Tensor, dim: tuple[int, ...]) -> None:
    """Make kernels sum to 0 over some dims: they answer to what differs along them.

    Neighbours are alike. Of position kernels that do not sum to 0 the answer is mostly the token
    again, times a random factor for each channel, and outlines are lost in it. GELU leaves channels
    that are alike, above 0 in the mean: of such stem kernels, a third of the answer would be one
    vector that all tokens share, and attention has little to tell them apart by.
    """
    kernels -= kernels.mean(dim, keepdim=True)


def _complete_init_cfg(init_cfg: dict | list[dict] | None) -> dict | list[dict] | None:
    cfgs = init_cfg if isinstance(init_cfg, Sequence) else [init_cfg]
    if init_cfg is not None and not all(isinstance(cfg, Mapping) for cfg in cfgs):
        raise TypeError(f'init_cfg must be a dict, a list of dicts or None, got {init_cfg!r}')
    if isinstance(init_cfg, Mapping) and 'type' not in init_cfg and 'checkpoint' in init_cfg:
        init_cfg = {'type': 'Pretrained', 'prefix': 'backbone.', **init_cfg}
    for cfg in _pretrained(init_cfg):
        for name in ('checkpoint', 'prefix'):
            value = cfg.get(name)
            if not isinstance(value, str) and (name == 'checkpoint' or value is not None):
                raise TypeError(f'{name} of init_cfg must be a string, got {value!r}')
    return init_cfg


def _pretrained(init_cfg: dict | list[dict] | None) -> list[dict]:
    """Those of the initialisations that load a checkpoint."""
    cfgs = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or []
    if untyped := [cfg for cfg in cfgs if 'type' not in cfg]:
        raise ValueError(f'init_cfg must have a type or a checkpoint, got {untyped[0]!r}')
    names = 'Pretrained', 'PretrainedInit'
    return [cfg for cfg in cfgs if getattr(cfg['type'], '__name__', cfg['type']) in names]


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')
    return value


def _check_fused(value: object) -> bool | Literal['auto']:
    if value == 'auto':
        return 'auto'
    if not isinstance(value, bool):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"fused_attention must be 'auto', True or False, got {value!r}")
    return value


def _check_option(name: str, value: object, arch: Arch) -> bool:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f'{name} must be True, False or None, got {value!r}')
    return getattr(arch, name) if value is None else value


def _check_rate(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not 0 <= value < 1:
        raise ValueError(f'{name} must be in [0, 1), got {value}')
    return float(value)


def _check_out_indices(values: object) -> tuple[int, ...]:
    if is_int(values):
        values = (values,)
    given = as_ints('out_indices', values)
    stages = [v + NUM_STAGES if v < 0 else v for v in given]
    fits = all(0 <= m < NUM_STAGES for m in stages)
    if not stages or not fits or stages != sorted(set(stages)):
        raise ValueError(
            'out_indices must be ascending stages out of (0, 1, 2, 3), or -4 to -1 counted from '
            f'the last, without repeats, got {values!r}'
        )
    return tuple(stages)
