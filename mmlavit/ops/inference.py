"""Inference on a CPU: the layers of a stage, on few tokens at a time and in place.

It reads the weights of modules without calling them, and so serves only modules that are what they
were made as and that nobody watches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..models.windows import WindowGrid
from .convolution import convolution_gelu, sees_neighbours_alone
from .linear import linear, linear_gelu
from .pieces import Slab, cut_into_slabs, fill_padded, merge_and_crop, pad_and_partition
from .plain import are_plain, is_unwatched_inference
from .scores import scaled_product, two_sided_linear

if TYPE_CHECKING:
    from ..models.attention import LessAttention, VanillaAttention
    from ..models.block import Block
    from ..models.mlp import MLP

# A layer works on up to so many tokens at a time. Few stay in the cache, many keep products large:
# 4096 and a whole map of 800 x 1280 took 1.1 times as long on two Xeon cores, 2048 and a whole map
# 1.2 and 1.3 times on two Zen cores.
SLAB_TOKENS = 16384


def serves(blocks: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether these layers and tokens can be run here."""
    return (
        x.device.type == 'cpu'
        and is_unwatched_inference(x)
        # Whoever wants samples of a model puts its dropouts alone into training.
        and not any(part.training for block in blocks for part in block.modules())
        and os.environ.get('TRITON_INTERPRET') != '1'
        # Whoever forces the kernel of a GPU is to hear that this is none.
        and not any(getattr(part, 'fused', None) is True for b in blocks for part in b.children())
        and are_plain(blocks)
        and all(sees_neighbours_alone(c) for b in blocks if (c := cast('Block', b).mlp.dwconv))
    )


def layers(
    blocks: Sequence[nn.Module], x: Tensor, grid: WindowGrid, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the layers of a stage; arguments and result as of :func:`mmlavit.ops.layers.layers`."""
    slabs = cut_into_slabs(grid, x.shape[0], SLAB_TOKENS)
    nothing = [None] * len(slabs)
    block: Any
    given: Sequence[Tensor | None]
    scores: list[Tensor] = []
    for i, block in enumerate(blocks):
        if i == 0 and residual is not None:
            given = residual.split([slab.count for slab in slabs])
        else:
            given = scores if i and block.attn.reuses_scores else nothing
        x, scores = _layer(block, x, slabs, given)
    return x, scores[0] if len(slabs) == 1 else torch.cat(scores)


def _layer(
    block: Block, x: Tensor, slabs: Sequence[Slab], given: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    # The hidden activations of a slab stay in the cache, and memory that one slab has used serves
    # the next instead of coming fresh from the system, page by page.
    branch = block.pos_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    # Under autocast the branch is narrower than the stream, which must stay wide.
    x = branch.add_(x) if branch.dtype == x.dtype else x + branch
    # A convolution in the MLP looks from slab to slab.
    mixing = block.mlp.dwconv
    kept = []
    for slab, part in zip(slabs, given, strict=True):
        tokens = slab.of(x)
        z, scores = _attention(block.attn, block.norm1(tokens), slab.grid, part)
        tokens += z
        if mixing is None:
            tokens += _mlp(block.mlp, block.norm2(tokens))
        kept.append(scores)
    if mixing is not None:
        x = _mixing_mlp(block, mixing, x, slabs)
    return x, kept


def _attention(
    attn: VanillaAttention | LessAttention, x: Tensor, grid: WindowGrid, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    heads = attn.num_heads
    if attn.reuses_scores:
        (v,) = pad_and_partition(grid, _linear(attn.v, x), 1, heads)
        scores = two_sided_linear(cast(Tensor, given), attn.psi, attn.theta, linear)
        if grid.padded:
            fill_padded(grid, scores, queries=0.0)
    else:
        q, k, v = pad_and_partition(grid, _linear(attn.qkv, x), 3, heads)
        scores = scaled_product(q, k, attn.scale, given)
    if grid.padded:
        fill_padded(grid, scores, keys=-math.inf)
    z = scores.softmax(dim=-1) @ v
    if grid.padded:
        fill_padded(grid, scores, keys=0.0)
    return _linear(attn.proj, merge_and_crop(grid, z)), scores


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    return _linear(mlp.fc2, linear_gelu(x, mlp.fc1.weight, mlp.fc1.bias))


def _mixing_mlp(block: Block, mixing: nn.Conv2d, x: Tensor, slabs: Sequence[Slab]) -> Tensor:
    # The next slab has to see the tokens of this one as they were.
    out = x if slabs[0].is_whole(x) else torch.empty_like(x)
    for slab in slabs:
        hidden = _linear(block.mlp.fc1, block.norm2(slab.with_neighbours(x)))
        hidden = slab.without_neighbours(convolution_gelu(hidden, mixing))
        torch.add(slab.of(x), _linear(block.mlp.fc2, hidden), out=slab.of(out))
    return out


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
