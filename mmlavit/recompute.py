"""Linear layers that keep what comes into the function before them, not what comes out of it.

A linear layer keeps its input for the backward pass. After GELU or LayerNorm that is a tensor that
can be had again, for little, from the input of GELU or LayerNorm, which these keep anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import is_traced, linear, linear_backward


def linear_after(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *parameters: Tensor,
) -> Tensor:
    """``function(x, *parameters) W^T + b``, computing ``function`` again in the backward pass.

    The same numbers as without. Under autocast and when recorded, nothing is computed again.

    Args:
        function: From tokens (..., in_features) to tokens of the same shape; cheap, and without
            chance.
        x: Tokens (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        parameters: What else ``function`` takes.

    Returns:
        Tokens (..., out_features).
    """
    if not torch.is_grad_enabled() or is_traced() or _autocasts(x):
        return linear(function(x, *parameters), weight, bias)
    return _LinearAfter.apply(function, x, weight, bias, *parameters)


def _autocasts(x: Tensor) -> bool:
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_enabled(x.device.type)
    # Before torch 2.4 there is a function for each kind of device.
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


class _LinearAfter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, weight, bias, *parameters)
        return linear(function(x, *parameters), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *parameters = ctx.saved_tensors
        _, of_x, of_weight, of_bias, *of_parameters = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            tensors, needed = (x, weight, bias, *parameters), ctx.needs_input_grad[1:]
            out = linear(ctx.function(x, *parameters), weight, bias)
            return None, *_gradients(out, tensors, needed, grad, create_graph=True)
        tensors, needed = (x, *parameters), (of_x, *of_parameters)
        tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            y = ctx.function(*tensors)
        wanted = any(needed), of_weight, of_bias
        grad_y, grad_weight, grad_bias = linear_backward(grad, y.detach(), weight, wanted)
        grad_x, *rest = _gradients(y, tensors, needed, grad_y)
        return None, grad_x, grad_weight, grad_bias, *rest


def _gradients(
    out: Tensor,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor | None,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of ``out`` with respect to the tensors that need one, None for the others."""
    wanted = [t for t, is_needed in zip(tensors, needed, strict=True) if is_needed]
    found = torch.autograd.grad(out, wanted, grad, create_graph=create_graph) if wanted else ()
    grads = iter(found)
    return [next(grads) if is_needed else None for is_needed in needed]
