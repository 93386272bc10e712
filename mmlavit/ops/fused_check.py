"""Whether the Triton kernels of less attention agree with PyTorch here, found out on first use.

Compilers, drivers and GPUs differ, and none of ours has seen yours. So before the kernels compute
anything that counts, they run once on made-up tensors, and what comes out is held against float64.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.windows import WindowGrid
from .fused_attention import allows_tf32, backward_programs, launch_backward, launch_forward
from .mode import is_traced
from .plain_less_attention import plain_less_attention
from .scores import zero_padded_pairs

# The kernels may be off by so many times what PyTorch's own operators are off in the same type, and
# by so many roundings of it beside that. The order in which sums are added up is theirs.
TIMES = 4
ROUNDINGS = 2

NAMES = ('Z', 'A', *(f'the gradient of {name}' for name in ('V', 'scores', 'Psi', 'Theta')))


class ShapeClass(NamedTuple):
    """What decides which compiled kernels run. Batch, heads and the size of the map do not.

    Args:
        device: Where.
        dtype: Of all tensors.
        window: Side of a window, in tokens.
        head_dim: Channels of a head.
        tf32: Whether float32 products may round to TF32.
        backward: Whether there will be gradients.
    """

    device: torch.device
    dtype: torch.dtype
    window: int
    head_dim: int
    tf32: bool
    backward: bool

    @property
    def eps(self) -> float:
        """What one rounding of a number near 1 may change."""
        is_tf32 = self.tf32 and self.dtype == torch.float32
        return 2**-10 if is_tf32 else torch.finfo(self.dtype).eps

    def __str__(self) -> str:
        where = str(self.device)
        if self.device.type == 'cuda':
            where += f' ({torch.cuda.get_device_name(self.device)})'
        kind = str(self.dtype).removeprefix('torch.')
        sizes = f'windows of {self.window} x {self.window} tokens, heads of {self.head_dim}'
        passes = 'forward and backward' if self.backward else 'forward'
        return f'{where}, {kind}{" as TF32" * self.tf32}, {sizes} channels, {passes}'


_verdicts: dict[ShapeClass, bool] = {}
_unchecked: set[ShapeClass] = set()
_lock = threading.Lock()


def has_agreed(v: Tensor, scores: Tensor, grid: WindowGrid) -> bool:
    """Whether the kernels, which can run, agree with PyTorch on tensors such as these.

    They are compared the first time that somebody asks, once in a process for each
    :class:`ShapeClass`. Where they differ or do not run, a warning says so, once. While
    torch.compile records or a CUDA graph is captured nothing is compared: then what has not agreed
    before goes through PyTorch, and a warning says that, too.

    Args:
        v: Map of values (B, H, W, heads * d).
        scores: (windows, heads, n, n).
        grid: Grid of the windows.
    """
    head_dim = v.shape[-1] // scores.shape[1]
    with_gradients = torch.is_grad_enabled()
    return _has_agreed(v.device, v.dtype, grid.window, head_dim, with_gradients, is_traced())


def _has_agreed(
    device: torch.device,
    dtype: torch.dtype,
    window: int,
    head_dim: int,
    backward: bool,
    recorded: bool,
) -> bool:
    tf32 = dtype == torch.float32 and device.type == 'cuda' and allows_tf32()
    kind = ShapeClass(device, dtype, window, head_dim, tf32, backward)
    recorded |= device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
    with _lock:
        if kind in _verdicts or (recorded and kind in _unchecked):
            return _verdicts.get(kind, False)
        if recorded:
            _unchecked.add(kind)
            problem = (
                'cannot be compared with PyTorch while a model is compiled or captured; run it '
                'once before that'
            )
        else:
            problem = disagreement(kind)
            _verdicts[kind] = not problem
    if problem:
        warnings.warn(
            f'The Triton kernel of less attention {problem} ({kind}). So such layers go through '
            'PyTorch step by step. fused_attention=False does so without asking; True forces the '
            'kernel',
            stacklevel=2,
        )
    return not problem


# torch.compile asks while it compiles, and does not look inside, as in fused_attention.py.
_has_agreed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def disagreement(kind: ShapeClass) -> str:
    """Run the kernels of a class and PyTorch on the same tensors, and compare.

    Leaves random generators as they are. Takes two launches of kernels, and one without gradients.

    Args:
        kind: The class.

    Returns:
        How they differ, or why the kernels do not run, in words; empty where they agree.
    """
    try:
        with _undisturbed(kind.device):
            return _compare(kind)
    except Exception as error:
        return f'does not run: {type(error).__name__}: {error}'


def _undisturbed(device: torch.device) -> ExitStack:
    """No modes of the caller's: autocast, inference, hooks on what autograd keeps."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
    return stack


def _itself(x: Tensor) -> Tensor:
    return x


def _compare(kind: ShapeClass) -> str:
    grid, given, grads = _examples(kind)
    sizes = grid.height, grid.width, grid.window
    v, scores, psi, theta = given
    found = [*launch_forward(v, scores, psi, theta, *sizes)]
    if kind.backward:
        grad_out, grad_new = grads
        found += launch_backward(v, scores, psi, theta, grad_out, grad_new, *sizes)
    plain = _plain(grid, given, grads, kind.backward)
    right = _plain(grid, [t.double() for t in given], [t.double() for t in grads], kind.backward)
    for name, ours, theirs, exact in zip(NAMES, found, plain, right, strict=False):
        for order, words in ((2, 'on average'), (float('inf'), 'at most')):
            error, usual = (_relative(t, exact, order) for t in (ours, theirs))
            # Not the other way round: NaN is no agreement.
            if not error <= TIMES * usual + ROUNDINGS * kind.eps:
                return f'is wrong: {name} is off by {error:.2g} {words}, PyTorch by {usual:.2g}'
    return ''


def _examples(kind: ShapeClass) -> tuple[WindowGrid, list[Tensor], list[Tensor]]:
    """Values, scores, Psi and Theta, and gradients of Z and A.

    Whole windows and windows that hold padding; so many tiles that a program takes several.
    """
    grid = WindowGrid(2 * kind.window - 1, kind.window + 1, kind.window)
    windows, heads, n = grid.rows * grid.cols, 2, kind.window**2
    batch = backward_programs(kind.device) // (windows * heads) + 1
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, std: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device='cpu')
        return (std * x).to(kind.device, kind.dtype)

    def pairs(std: float) -> Tensor:
        return zero_padded_pairs(noise(batch * windows, heads, n, n, std=std), grid)

    values = batch, grid.height, grid.width, heads * kind.head_dim
    # Scores of trained models differ by about so much over the keys.
    given = [noise(*values), pairs(3.0), *(noise(n, n, std=n**-0.5) for _ in range(2))]
    return grid, given, [noise(*values), pairs(1.0)]


def _plain(
    grid: WindowGrid, given: Sequence[Tensor], grads: Sequence[Tensor], backward: bool
) -> tuple[Tensor, ...]:
    """What PyTorch makes of it: Z, A and, if wanted, the gradients of what was given."""
    v, scores, psi, theta = (t.detach().requires_grad_(backward) for t in given)
    out = plain_less_attention(v, scores, psi, theta, grid, _itself)
    if not backward:
        return out
    found = torch.autograd.grad(out, (v, scores, psi, theta), grads)
    return *(t.detach() for t in out), *found


def _relative(found: Tensor, right: Tensor, order: float) -> float:
    """How far it is off, over how large it is."""
    norm = torch.linalg.vector_norm
    return (norm(found.double() - right, order) / norm(right, order)).item()
