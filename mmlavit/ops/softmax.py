"""The softmax over a window's keys and its product with the values, keeping only the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .recompute import gradients, recomputes


def softmax_product(scores: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(A + mask) V``, computing the softmax again in the backward pass.

    The scores are kept anyway, for the layer that transforms them. The softmax, which is as large,
    is then had again for little. The numbers stay the same. Under autocast and when recorded,
    nothing is computed again.

    Args:
        scores: ``A`` (windows, heads, n, n).
        v: Values (windows, heads, n, d).
        mask: What is added to the scores, broadcast over images and heads: (windows of an image,
            1, 1, n); None for nothing.

    Returns:
        Tensor (windows, heads, n, d).
    """
    if recomputes(scores) and (scores.requires_grad or v.requires_grad):
        return _SoftmaxProduct.apply(scores, v, mask)
    return masked_softmax(scores, mask) @ v


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(A + mask)`` over the keys; shapes as in :func:`softmax_product`."""
    if mask is not None:
        # The windows of an image apart from the batch, to meet the mask.
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask).view(scores.shape)
    return scores.softmax(dim=-1)


class _SoftmaxProduct(torch.autograd.Function):
    @staticmethod
    def forward(scores: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return masked_softmax(scores, mask) @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scores, v, mask = ctx.saved_tensors
        needed = of_scores, of_v = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            out = masked_softmax(scores, mask) @ v
            return *gradients(out, (scores, v), needed, grad, create_graph=True), None
        scores = scores.detach().requires_grad_(of_scores)
        with torch.enable_grad():
            attn = masked_softmax(scores, mask)
        grad_v = attn.detach().mT @ grad if of_v else None
        grad_attn = grad @ v.mT if of_scores else None
        return *gradients(attn, (scores,), (of_scores,), grad_attn), grad_v, None
