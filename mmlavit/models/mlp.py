"""The MLP of a layer; it works on few tokens at a time and keeps little in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import Linear, linear, linear_backward
from ..ops.mode import keeps_activations
from ..ops.recompute import gradients, is_plain, recomputes
from .windows import ceil_div

# Hidden activations that a piece of the tokens has: 8 MiB of float32 stay in the cache, and larger
# tensors would come fresh from the system, page by page.
CHUNK_SIZE = 2**21


class MLP(nn.Module):
    """Two linear layers with GELU between.

    Args:
        embed_dims: Channels of a token.
        hidden_dims: Channels between the layers.
        drop_rate: Dropout after each layer.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dims, hidden_dims)
        self.fc2 = Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """``fc2(GELU(fc1(norm(x))))``.

        Args:
            x: Tokens (..., embed_dims).
            norm: The LayerNorm.

        Returns:
            Tokens (..., embed_dims).
        """
        drops = self.training and self.drop.p > 0
        if drops or not (is_plain(norm, nn.LayerNorm) and is_plain(self.fc1, Linear)):
            return self.drop(self.fc2(self.drop(F.gelu(self.fc1(norm(x))))))
        if not keeps_activations(self):
            # In place: a second tensor of this size would come fresh from the system.
            return self.fc2(torch.ops.aten.gelu_(self.fc1(norm(x))))
        if not recomputes(x) or not is_plain(self.fc2, Linear):
            return self.fc2(F.gelu(self.fc1(norm(x))))
        fc1, fc2 = self.fc1, self.fc2
        parameters = norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return _MLP.apply(norm.eps, x, *parameters)


class _MLP(torch.autograd.Function):
    """Keeps the tokens and the input of GELU; computes LayerNorm and GELU again."""

    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, *parameters: Tensor) -> Tensor:
        gamma, beta, w1, b1, w2, b2 = parameters
        hidden, out = [], []
        for rows in _pieces(x, w1):
            hidden.append(linear(F.layer_norm(rows, gamma.shape, gamma, beta, eps), w1, b1))
            out.append(linear(F.gelu(hidden[-1]), w2, b2))
        ctx.eps = eps
        ctx.save_for_backward(x, *parameters, *hidden)
        return torch.cat(out).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, w1, b1, w2, b2, *hidden = ctx.saved_tensors
        eps, needed = ctx.eps, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            tensors = (x, gamma, beta, w1, b1, w2, b2)
            h = F.linear(F.layer_norm(x, gamma.shape, gamma, beta, eps), w1, b1)
            out = F.linear(F.gelu(h), w2, b2)
            return None, *gradients(out, tensors, needed, grad, create_graph=True)
        sums: list[Tensor | None] = [None] * 6
        of_rows = []
        for rows, g, h in zip(_pieces(x, w1), _pieces(grad, w1), hidden, strict=True):
            g, *of_fc2 = linear_backward(g, F.gelu(h), w2, (True, *needed[5:]))
            g = torch.ops.aten.gelu_backward(g, h)
            tensors = [t.detach() for t in (rows, gamma, beta)]
            for t, is_needed in zip(tensors, needed[:3], strict=True):
                t.requires_grad_(is_needed)
            with torch.enable_grad():
                normed = F.layer_norm(tensors[0], gamma.shape, *tensors[1:], eps)
            wanted = any(needed[:3]), *needed[3:5]
            g, *of_fc1 = linear_backward(g, normed.detach(), w1, wanted)
            row_grad, *of_norm = gradients(normed, tensors, needed[:3], g)
            of_rows.append(row_grad)
            for i, part in enumerate((*of_norm, *of_fc1, *of_fc2)):
                sums[i] = part if sums[i] is None else sums[i].add_(part)
        grad_x = torch.cat(of_rows).view(x.shape) if needed[0] else None
        return None, grad_x, *sums


def _pieces(x: Tensor, w1: Tensor) -> tuple[Tensor, ...]:
    """Tokens (..., embed_dims) in equal pieces (tokens, embed_dims)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.tensor_split(ceil_div(rows.shape[0] * w1.shape[0], CHUNK_SIZE))
