"""Less attention (paper, equation 5) as one Triton kernel, on tokens where they lie in the map.

Between the projection of V and the last projection, a layer reads its scores and values once and
writes its scores and output once. Windows are never cut out, padded or put back, and in training
nothing is kept but what came in: the backward pass computes the rest again.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..models.windows import WindowGrid, ceil_div
from .mode import is_dispatched, is_exported, is_traced, is_transformed
from .recompute import autocasts

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


def obstacle(v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, grid: WindowGrid) -> str | None:
    """What keeps :func:`fused_less_attention` from taking these tensors.

    It wants Triton and a GPU that Triton supports (or Triton's interpreter, which the environment
    variable TRITON_INTERPRET=1 turns on), windows of at most 8 x 8 tokens, heads of at most 128
    channels, and float32, float16 or bfloat16. What torch.jit or torch.export records and
    torch.func transforms is left to PyTorch; torch.compile sees one operation.

    Args:
        v: Map of values (B, H, W, heads * d).
        scores: ``A_{l-1}`` (windows, heads, n, n).
        psi: (n, n).
        theta: (n, n).
        grid: Grid of the windows.

    Returns:
        Words for an error, or None for nothing.
    """
    if is_exported():
        return 'the model is being recorded to run elsewhere'
    if not v.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return 'the tensors are not on a GPU'
    if grid.window > MAX_WINDOW:
        return f'windows have more than {MAX_WINDOW} x {MAX_WINDOW} tokens'
    if v.shape[-1] // scores.shape[1] > MAX_HEAD_DIM:
        return f'heads have more than {MAX_HEAD_DIM} channels'
    tensors = v, scores, psi, theta
    if not all(t.dtype in DTYPES and t.device == v.device for t in tensors):
        return 'tensors are on several devices, or neither float32 nor float16 nor bfloat16'
    if not autocasts(v) and len({t.dtype for t in tensors}) > 1:
        return 'values, scores, Psi and Theta are of several types'
    if not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
        return 'a tensor is of a class of its own'
    if not is_traced() and (is_transformed() or is_dispatched()):
        return 'torch.func transforms the model, or somebody watches each of its operators'
    return _obstacle_on(v.device)


def fused_less_attention(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, grid: WindowGrid
) -> tuple[Tensor, Tensor]:
    """``A_l = Psi A_{l-1} Theta^T``, ``Z = softmax(A_l) V``, where there is no :func:`obstacle`.

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
    return torch.ops.mmlavit.less_attention(
        v, scores, psi, theta, grid.height, grid.width, grid.window
    )


def launch_forward(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, height: int, width: int, window: int
) -> tuple[Tensor, Tensor]:
    """Run the kernel of the forward pass.

    Args:
        v: Map of values (B, H, W, heads * d).
        scores: ``A_{l-1}`` (windows, heads, n, n).
        psi: (n, n).
        theta: (n, n).
        height: Rows of the grid, in tokens.
        width: Columns of the grid, in tokens.
        window: Side of a window, in tokens.

    Returns:
        ``Z`` and ``A_l``, contiguous.
    """
    grid, num_heads = WindowGrid(height, width, window), scores.shape[1]
    v, scores, psi, theta = map(_plainly_laid, (v, scores, psi, theta))
    out, new_scores = torch.empty_like(v), torch.empty_like(scores)
    tiles = scores.shape[0] * num_heads
    with torch.cuda.device_of(v):
        _kernels().forward[(ceil_div(tiles, FORWARD_TILES),)](
            *(scores, psi, theta, v, new_scores, out),
            *_sizes(v, grid, tiles, num_heads),
            **_options(v, grid, num_heads),
        )
    return out, new_scores


def launch_backward(
    v: Tensor,
    scores: Tensor,
    psi: Tensor,
    theta: Tensor,
    grad_out: Tensor,
    grad_new: Tensor,
    height: int,
    width: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel of the backward pass.

    It is compiled for all gradients: a variant for each choice of them would be one that nobody has
    compared with PyTorch.

    Args:
        v: As given to :func:`launch_forward`, and so the next three.
        scores: As there.
        psi: As there.
        theta: As there.
        grad_out: Gradient of ``Z``.
        grad_new: Gradient of ``A_l``.
        height: As there.
        width: As there.
        window: As there.

    Returns:
        Gradients of ``v``, ``scores``, ``psi`` and ``theta``, contiguous.
    """
    grid, num_heads = WindowGrid(height, width, window), scores.shape[1]
    given = map(_plainly_laid, (v, scores, psi, theta, grad_out, grad_new))
    v, scores, psi, theta, grad_out, grad_new = given
    grad_v, grad_scores = torch.empty_like(v), torch.empty_like(scores)
    tiles = scores.shape[0] * num_heads
    programs = min(tiles, backward_programs(v.device))
    # One sum for each program, added up afterwards: the same at every run, unlike atomic additions.
    grad_psi, grad_theta = torch.empty(2, programs, *psi.shape, device=v.device)
    with torch.cuda.device_of(v):
        _kernels().backward[(programs,)](
            *(scores, psi, theta, v, grad_out, grad_new),
            *(grad_scores, grad_psi, grad_theta, grad_v),
            *_sizes(v, grid, tiles, num_heads),
            **_options(v, grid, num_heads),
        )
    return grad_v, grad_scores, grad_psi.sum(0).to(psi.dtype), grad_theta.sum(0).to(theta.dtype)


def _plainly_laid(x: Tensor) -> Tensor:
    """``x``, contiguous and from a multiple of 16 bytes on: for all else Triton compiles anew."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _shapes(v: Tensor, scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Tensors like those that :func:`launch_forward` returns."""
    return v.new_empty(v.shape), scores.new_empty(scores.shape)


def _backward_shapes(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, *_: object
) -> tuple[Tensor, ...]:
    """Tensors like those that :func:`launch_backward` returns."""
    return tuple(t.new_empty(t.shape) for t in (v, scores, psi, theta))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:]


def _differentiate(ctx: Any, grad_out: Tensor, grad_new: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mmlavit.less_attention_backward(
        *ctx.saved_tensors, grad_out, grad_new, *ctx.sizes
    )
    return *grads, *[None] * len(ctx.sizes)


# What torch.compile sees is one operation. Triton 3 comes with torch 2.4, and so does this.
_HAS_CUSTOM_OPS = hasattr(torch.library, 'custom_op')
if _HAS_CUSTOM_OPS:
    _TENSORS = 'Tensor v, Tensor scores, Tensor psi, Tensor theta'
    _SIZES = 'int height, int width, int window'
    _less_attention = torch.library.custom_op(
        'mmlavit::less_attention',
        launch_forward,
        mutates_args=(),
        schema=f'({_TENSORS}, {_SIZES}) -> (Tensor, Tensor)',
    )
    _less_attention.register_fake(_shapes)
    _less_attention.register_autograd(_differentiate, setup_context=_keep)
    torch.library.custom_op(
        'mmlavit::less_attention_backward',
        launch_backward,
        mutates_args=(),
        schema=f'({_TENSORS}, Tensor grad_out, Tensor grad_new, {_SIZES})'
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
        PRECISION='tf32' if allows_tf32() else 'ieee',
        HALF=v.dtype == torch.float16,
        num_warps=4 if v.element_size() == 2 else 8,
        num_stages=1,
    )


def _tile_side(size: int) -> int:
    """The power of 2, at least 16, that holds ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def allows_tf32() -> bool:
    """Whether float32 products on a GPU may round to TF32, as for any matrix product."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9. Whoever sets it may not ask for the other.
    if hasattr(matmul, 'fp32_precision'):
        return matmul.fp32_precision == 'tf32'
    return matmul.allow_tf32


@functools.cache
def backward_programs(device: torch.device) -> int:
    """The most programs that a backward pass is divided among; they take the tiles by turns."""
    processors = 1
    if device.type == 'cuda':
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return BACKWARD_PROGRAMS * processors


@functools.cache
def _kernels() -> Any:
    """The kernels, or None without a Triton of version 3 or newer and a torch that goes with it."""
    try:
        import triton

        if int(triton.__version__.partition('.')[0]) < 3 or not _HAS_CUSTOM_OPS:
            return None
        from . import fused_kernels
    except ModuleNotFoundError:
        return None
    except Exception as error:
        warnings.warn(
            f'Triton cannot be imported ({type(error).__name__}: {error}), so less-attention '
            'layers go through PyTorch step by step',
            stacklevel=2,
        )
        return None
    return fused_kernels


def _obstacle_on(device: torch.device) -> str | None:
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        return 'Triton supports GPUs of compute capability 8.0 (Ampere) and newer'
    return None if _kernels() else 'there is no Triton of version 3 or newer that works'


# torch.compile asks while it compiles, and does not look inside. This is what
# torch.compiler.assume_constant_result does, which takes two seconds to import.
_obstacle_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
