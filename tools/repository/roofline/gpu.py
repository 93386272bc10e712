"""Models as on a GPU, on a machine that has none: tensors without values, CUDA's autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import _scoped_library

from mmlavit import ops
from mmlavit.models.windows import WindowGrid
from mmlavit.ops.fused_attention import fused_less_attention

_HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Leave all tensors without values: only their shapes are computed.

    Args:
        model: Its parameters and buffers become such tensors, for good.
    """
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(_like(p), p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _like(buffer)
        yield


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Let ``torch.autocast('cpu')`` follow the rules of CUDA.

    PyTorch without CUDA cannot differentiate tensors that say they are on a GPU. So they are on the
    CPU, and its autocast gets the two rules of CUDA's that these models meet and it does not have:
    layer norms and softmaxes are computed in float32, and return it.
    """
    with _scoped_library('aten', 'IMPL') as library:
        library.impl('layer_norm', _layer_norm, 'AutocastCPU')
        library.impl('softmax.int', _softmax, 'AutocastCPU')
        yield


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    with torch.autocast('cpu', enabled=False):
        return torch.layer_norm(_wide(x), shape, _wide(weight), _wide(bias), eps)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast('cpu', enabled=False):
        if dtype is None and x.dtype == torch.float16:
            # One kernel, which CUDA has for float16 alone.
            return torch._softmax(x, dim, half_to_float=True)
        return torch.softmax(x if dtype else _wide(x), dim, dtype)


def _wide(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in _HALVES else x


@contextmanager
def triton_kernel() -> Iterator[None]:
    """Let all less-attention layers use the operator that is a Triton kernel on a GPU."""

    def in_one(v: Tensor, *given: Tensor | WindowGrid, fused: object) -> tuple[Tensor, Tensor]:
        return fused_less_attention(v, *given[:-1])

    with mock.patch.object(ops, 'less_attention', in_one):
        yield


def less_attention_flops(v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, *sizes: int) -> int:
    """Operations of that operator: ``Psi A Theta^T`` and ``softmax(A) V``."""
    n, head_dim = psi.shape[0], v.shape[-1] // scores.shape[1]
    return scores.numel() * 2 * (2 * n + head_dim)


def less_attention_backward_flops(
    v: Tensor, scores: Tensor, psi: Tensor, theta: Tensor, *rest: object
) -> int:
    """Operations of its gradient, which computes the scores again.

    Scores take two products of (n, n) matrices, their gradient, that of ``Psi`` and that of
    ``Theta`` four; those of the attention and of the values are products over d channels.
    """
    n, head_dim = psi.shape[0], v.shape[-1] // scores.shape[1]
    return scores.numel() * 2 * (6 * n + 2 * head_dim)
