"""A small LaViT with weights far from their start, and what tests need around it."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mmlavit import LaViT
from mmlavit.analysis.record import LayerAttention, recording
from mmlavit.models.attention import LessAttention
from mmlavit.models.block import Block
from mmlavit.models.windows import WindowGrid

ARCH = dict(
    embed_dims=(16, 32, 48, 64),
    num_heads=(1, 2, 3, 4),
    depths=(2, 2, 3, 2),
    vanilla_depths=(1, 1, 2, 1),
    mlp_ratios=(2, 2, 2, 2),
)


# torch 2.1 multiplies no float16 matrices on a CPU.
needs_cpu_float16 = pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='torch before 2.3 has no float16 on a CPU'
)
HALVES = [torch.bfloat16, pytest.param(torch.float16, marks=needs_cpu_float16)]
# torch.export of 2.1 cannot take the model apart.
needs_exporter = pytest.mark.skipif(
    not hasattr(getattr(torch.export, 'Dim', None), 'DYNAMIC'),
    reason='the exporter came with torch 2.6',
)


def seeded(seed: int) -> torch.Generator:
    """A generator whose seed is printed, so that a failure can be repeated."""
    print(f'seed {seed}')
    return torch.Generator().manual_seed(seed)


def small_lavit(seed: int = 0, scale: float = 0.1, **options: object) -> LaViT:
    """A float64 LaViT of :data:`ARCH` whose every weight is moved by noise.

    So Psi and Theta are not the identity, LayerScale is not small and norms are not trivial.
    """
    generator = seeded(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LaViT(**{'arch': ARCH, 'drop_path_rate': 0.0, **options}).double().eval()
    return move_weights(model, generator, scale)


@torch.no_grad()
def move_weights(model: LaViT, generator: torch.Generator, scale: float = 0.1) -> LaViT:
    """Add normal noise to every weight of ``model``, in place."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter += scale * noise
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    """Normal float64 noise."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# ---- How far lower precisions may be off ---------------------------------------------------------

# They are compared with the reference in float64, and may be off by a few times what the reference
# itself is off in that precision: how far that is depends on the weights and the image, as
# LayerNorm enlarges what varies little.
TIMES = 6  # the reference's own error
ROUNDINGS = 8  # of the largest value, beside that


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude; NaN if there is one."""
    return torch.stack([t.abs().max() for t in tensors]).max().item()


def largest_difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference, in the precision of ``exact``."""
    return largest([a.to(b.dtype) - b for a, b in zip(found, exact, strict=True)])


def allowed(exact: Sequence[Tensor], rough: Sequence[Tensor], dtype: torch.dtype) -> float:
    """How far results in ``dtype`` may be off, by those of the reference in float64 and in it."""
    roundings = ROUNDINGS * torch.finfo(dtype).eps * largest(exact)
    return TIMES * largest_difference(rough, exact) + roundings


# ---- Attention that is far from even -------------------------------------------------------------

# At nearly even attention a fault in the scores hardly shows, and no score needs many digits.
STD = 1.5  # of a query's scores over its keys
STEEP = 5.0


def spread(scores: Tensor, grid: WindowGrid) -> float:
    """The standard deviation of a query's scores over its keys, as a mean over all queries.

    Args:
        scores: Scores (B, windows of an image, heads, n, n); padded tokens do not count.
        grid: Grid of the windows.

    Returns:
        NaN if no window has two real tokens.
    """
    per_query = [
        scores[:, i][..., real, :][..., real].std(dim=-1).flatten()
        for i, real in enumerate(grid.valid(scores.device))
        if real.sum() > 1
    ]
    return torch.cat(per_query).mean().item() if per_query else math.nan


def spreads(model: LaViT, x: Tensor) -> list[float]:
    """:func:`spread` of every layer, on images."""

    def of(layer: LayerAttention) -> float:
        return spread(layer.scores, layer.grid)

    with recording(model, of) as found, torch.no_grad():
        model(x)
    return found


@torch.no_grad()
def sharpen(model: LaViT, x: Tensor, std: float = STD) -> LaViT:
    """Scale what makes the scores, in place, until every layer's have one :func:`spread`.

    Q and what the stage before brings down are scaled together in a vanilla layer, Psi in one of
    less attention. A layer on ``x`` in which no window has two tokens stays as it is.

    Args:
        model: A model in evaluation.
        x: The images on which it is to be so.
        std: The spread wanted.

    Returns:
        The model.
    """

    def scale(block: Block, args: tuple, output: tuple) -> tuple:
        tokens, grid, given = args
        found = spread(output[1].unflatten(0, (len(tokens), -1)), grid)
        if math.isnan(found):
            return output
        factor = std / found
        if isinstance(block.attn, LessAttention):
            block.attn.psi *= factor
        else:
            for parameter in block.attn.qkv.parameters():
                parameter[: block.attn.proj.in_features] *= factor
            if given is not None:
                residuals[block].layer_scale *= factor
                given = factor * given
        return block.forward(tokens, grid, given)

    residuals = {stage.blocks[0]: stage.attention_residual for stage in model.stages}
    hooks = [b.register_forward_hook(scale) for stage in model.stages for b in stage.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    found = spreads(model, x)
    assert all(s == pytest.approx(std, rel=1e-3) for s in found if not math.isnan(s)), found
    return model
