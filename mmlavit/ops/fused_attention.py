"""Less attention (paper, equation 5) as one Triton kernel, on tokens where they lie in the map.

Between the projection of V and the last projection, a layer reads its scores and values once and
writes its scores and output once. Windows are never cut out, padded or put back, and in training
nothing is kept but what came in: the backward pass computes the rest again.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.windows import WindowGrid, ceil_div
from .mode import is_dispatched, is_exported, is_traced, is_transformed
from .recompute import autocast_dtype, autocasts

# Up to here a program holds whole tiles in its registers; the backward pass spills some of them. In
# float32 one tile of a 14 x 14 window, 256 places by 256, fills those of a whole processor: that
# would take kernels that go over a tile in parts.
MAX_WINDOW = 8
MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Tiles for each program: enough to load Psi and Theta seldom, few enough to spread evenly.
FORWARD_TILES = 4
# Programs for each processor, as many as its registers hold. Each has sums of its own.
BACKWARD_PROGRAMS = 2


def can_fuse(x: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, grid: WindowGrid) -> bool:
    """Whether :func:`fused_less_attention` will take these tensors and the values of ``x``.

    It wants Triton and a GPU that Triton supports (or Triton's interpreter, which the environment
    variable TRITON_INTERPRET=1 turns on), windows of at most 8 x 8 tokens, heads of at most 128
    channels, and float32, float16 or bfloat16. What torch.jit or torch.export records and
    torch.func transforms is left to PyTorch; torch.compile sees one operation.

    Args:
        x: Map of tokens (B, H, W, heads * d), which a linear layer will project to values.
        scores: ``A_{l-1}`` (windows, heads, n, n).
        psi: (n, n).
        theta: (n, n).
        grid: Grid of the windows.

    Returns:
        True or False. Where Triton ought to work and does not, a warning says so, once.
    """
    if is_exported() or not x.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return False
    tensors = x, scores, psi, theta
    head_dim = x.shape[-1] // scores.shape[1]
    return (
        grid.window <= MAX_WINDOW
        and head_dim <= MAX_HEAD_DIM
        and all(t.dtype in DTYPES and t.device == x.device for t in tensors)
        and (autocasts(x) or len({t.dtype for t in tensors}) == 1)
        and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and (is_traced() or not (is_transformed() or is_dispatched()))
        and _runs(x.device, _linear_dtype(x), grid.window, head_dim, torch.is_grad_enabled())
    )


def fused_less_attention(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, grid: WindowGrid
) -> tuple[Tensor, Tensor]:
    """``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``, where :func:`can_fuse` allows it.

    Args:
        v: Map of values (B, H, W, heads * d), as large as the grid or padded to whole windows;
            the values of padded tokens do not matter.
        scores: ``A_{l-1}`` (windows, heads, n, n), 0 at padded pairs, of any strides.
        psi: (n, n).
        theta: (n, n).
        grid: Grid of the windows.

    Returns:
        ``Z``, a map like ``v``, and ``A_l`` (windows, heads, n, n), 0 at padded pairs; both
        contiguous. They can be differentiated once.
    """
    if autocasts(v):
        # `v` comes out of a linear layer, and the products with Psi and Theta are linear layers.
        scores, psi, theta = (t.to(v.dtype) for t in (scores, psi, theta))
    tensors = v.contiguous(), scores, psi.contiguous(), theta.contiguous()
    return torch.ops.mmlavit.less_attention(*tensors, grid.height, grid.width, grid.window)


def _forward(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, height: int, width: int, window: int
) -> tuple[Tensor, Tensor]:
    """``Z`` and ``A_l``."""
    grid, num_heads = WindowGrid(height, width, window), scores.shape[1]
    out = torch.empty_like(v)
    new_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    tiles = scores.shape[0] * num_heads
    with torch.cuda.device_of(v):
        _kernels().forward[(ceil_div(tiles, FORWARD_TILES),)](
            *(scores, psi, theta, v, new_scores, out),
            *scores.stride(),
            *_sizes(v, grid, tiles, num_heads),
            **_options(v, grid, num_heads),
        )
    return out, new_scores


def _backward(
    v: Tensor,
    scores: Tensor,
    psi: Tensor,
    theta: Tensor,
    grad_out: Tensor | None,
    grad_new: Tensor | None,
    height: int,
    width: int,
    window: int,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of ``v``, ``scores``, ``psi`` and ``theta``, empty where not needed."""
    grid, num_heads = WindowGrid(height, width, window), scores.shape[1]
    of_v, of_scores, of_psi, of_theta = needed
    tiles = scores.shape[0] * num_heads
    programs = min(tiles, BACKWARD_PROGRAMS * _processors(v.device))
    grad_v = grad_scores = grad_psi = grad_theta = None
    if grad_out is not None:
        grad_out = grad_out.contiguous()
        grad_v = torch.empty_like(v) if of_v else None
    if of_scores:
        grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    # One sum for each program, added up afterwards: the same at every run, unlike atomic additions.
    if of_psi:
        grad_psi = torch.empty(programs, *psi.shape, device=v.device)
    if of_theta:
        grad_theta = torch.empty(programs, *theta.shape, device=v.device)
    with torch.cuda.device_of(v):
        _kernels().backward[(programs,)](
            *(scores, psi, theta, v, grad_out, grad_new),
            *(grad_scores, grad_psi, grad_theta, grad_v),
            *scores.stride(),
            *(scores if grad_new is None else grad_new).stride(),
            *_sizes(v, grid, tiles, num_heads),
            **_options(v, grid, num_heads),
        )
    if grad_psi is not None:
        grad_psi = grad_psi.sum(0).to(psi.dtype)
    if grad_theta is not None:
        grad_theta = grad_theta.sum(0).to(theta.dtype)
    # An operator returns tensors, always.
    grads = grad_v, grad_scores, grad_psi, grad_theta
    return tuple(v.new_empty(0) if grad is None else grad for grad in grads)


def _shapes(v: Tensor, scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Tensors like those that :func:`_forward` returns."""
    return torch.empty_like(v), scores.new_empty(scores.shape)


def _backward_shapes(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, *more: Any
) -> tuple[Tensor, ...]:
    """Tensors like those that :func:`_backward` returns."""
    grad_out, needed = more[0], more[-1]
    there = needed[0] and grad_out is not None, *needed[1:]
    tensors = zip((v, scores, psi, theta), there, strict=True)
    return tuple(t.new_empty(t.shape if is_there else 0) for t, is_there in tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_new: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_new is None:
        return (None,) * 7
    needed = list(ctx.needs_input_grad[:4])
    grads = torch.ops.mmlavit.less_attention_backward(
        *ctx.saved_tensors, grad_out, grad_new, *ctx.sizes, needed
    )
    needed[0] = needed[0] and grad_out is not None
    found = [g if is_there else None for g, is_there in zip(grads, needed, strict=True)]
    return *found, *[None] * len(ctx.sizes)


# What torch.compile sees is one operation. Triton 3 comes with torch 2.4, and so does this.
if hasattr(torch.library, 'custom_op'):
    _TENSORS = 'Tensor v, Tensor scores, Tensor psi, Tensor theta'
    _SIZES = 'int height, int width, int window'
    _less_attention = torch.library.custom_op(
        'mmlavit::less_attention',
        _forward,
        mutates_args=(),
        schema=f'({_TENSORS}, {_SIZES}) -> (Tensor, Tensor)',
    )
    _less_attention.register_fake(_shapes)
    _less_attention.register_autograd(_differentiate, setup_context=_keep)
    torch.library.custom_op(
        'mmlavit::less_attention_backward',
        _backward,
        mutates_args=(),
        schema=f'({_TENSORS}, Tensor? grad_out, Tensor? grad_new, {_SIZES}, bool[] needed)'
        ' -> (Tensor, Tensor, Tensor, Tensor)',
    ).register_fake(_backward_shapes)


def _sizes(v: Tensor, grid: WindowGrid, tiles: int, num_heads: int) -> tuple[int, ...]:
    return tiles, num_heads, grid.height, grid.width, *v.shape[1:3]


def _options(v: Tensor, grid: WindowGrid, num_heads: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    head_dim = v.shape[-1] // num_heads
    return dict(
        WINDOW=grid.window,
        HEAD_DIM=head_dim,
        N=_tile_side(grid.window**2),
        D=_tile_side(head_dim),
        PRECISION='tf32' if _allows_tf32() else 'ieee',
        HALF=v.dtype == torch.float16,
        num_warps=4 if v.element_size() == 2 else 8,
        num_stages=1,
    )


def _tile_side(size: int) -> int:
    """The power of 2, at least 16, that holds ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def _allows_tf32() -> bool:
    """Whether float32 products on a GPU may round to TF32, as for any matrix product."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9. Whoever sets it may not ask for the other.
    if hasattr(matmul, 'fp32_precision'):
        return matmul.fp32_precision == 'tf32'
    return matmul.allow_tf32


def _linear_dtype(x: Tensor) -> torch.dtype:
    """The type of what a linear layer makes of ``x``."""
    return autocast_dtype(x) if autocasts(x) else x.dtype


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernels() -> Any:
    """The kernels, or None without a Triton of version 3 or newer."""
    try:
        import triton
    except ModuleNotFoundError:
        return None
    if int(triton.__version__.partition('.')[0]) < 3:
        return None
    from . import fused_kernels

    return fused_kernels


def _runs(
    device: torch.device, dtype: torch.dtype, window: int, head_dim: int, backward: bool
) -> bool:
    """Whether the kernels run, found out by running them on one window."""
    return _try(device, dtype, window, head_dim, backward)


# torch.compile asks while it compiles, and does not look inside. This is what
# torch.compiler.assume_constant_result does, which takes two seconds to import.
_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _try(
    device: torch.device, dtype: torch.dtype, window: int, head_dim: int, backward: bool
) -> bool:
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        # Triton supports Ampere and what came after.
        return False
    try:
        kernels = _kernels()
        if kernels is None:
            return False
        v = torch.zeros(1, window, window, head_dim, dtype=dtype, device=device)
        scores = v.new_zeros(1, 1, window**2, window**2)
        psi = theta = scores[0, 0]
        try:
            given, sizes = (v, scores, psi, theta), (window, window, window)
            grads = _forward(*given, *sizes)
            if backward:
                _backward(*given, *grads, *sizes, (True,) * 4)
        except kernels.triton.OutOfResources:
            # The shared memory of smaller GPUs does not hold what float32 needs in training.
            return False
    except Exception as error:
        warnings.warn(
            f'Triton does not run on {device} ({type(error).__name__}: {error}), so '
            'less-attention layers go through PyTorch step by step; mend Triton, or set '
            'fused_attention=False',
            stacklevel=2,
        )
        return False
    return True
