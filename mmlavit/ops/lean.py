"""Training that keeps little for the backward pass, from modules that know nothing of it.

While :class:`Lean` is on, it sees every function that the modules call. Of what a LayerNorm, a GELU
or a softmax returns it notes how it came about; where a linear layer or a product then wants to
keep that for the backward pass, it keeps instead what it came from, which is kept anyway, and
computes it again. The numbers are the same. A result that anybody has changed or replaced on the
way, such as a hook, is not recognized and is kept as always.

Depthwise convolutions of low maps take another way there too (:mod:`.convolution`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .attend import masked_softmax
from .convolution import is_low, on_more_rows
from .linear import linear, linear_backward
from .mode import is_traced, is_transformed
from .recompute import autocast_dtype, autocasts, gradients


@dataclass(frozen=True)
class Recipe:
    """How a tensor came about.

    Args:
        function: Makes it again of the inputs.
        inputs: Tensors, or None.
        versions: How often each had been written to, so that a later change is seen.
        version: The same of the tensor itself.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    version: int


class Lean(TorchFunctionMode):
    """On as a context: linear layers and products keep little for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self._recipes = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Take a call of ``func`` over, or leave it as it is."""
        form = _FORMS.get(func) if set(types) <= _PLAIN else None
        kwargs = kwargs or {}
        return func(*args, **kwargs) if form is None else form(self, func, *args, **kwargs)

    def note(self, out: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Remember how ``out`` came about; returns it."""
        versions = tuple(0 if t is None else t._version for t in inputs)
        self._recipes[out] = Recipe(function, inputs, versions, out._version)
        return out

    def recipe(self, x: Tensor) -> Recipe | None:
        """How ``x`` came about, if that is known and still true."""
        found = self._recipes.get(x)
        if found is None or found.version != x._version:
            return None
        now = tuple(0 if t is None else t._version for t in found.inputs)
        return found if now == found.versions else None


def lean(forward: Callable) -> Callable:
    """Let a module's ``forward`` train with little memory."""

    @functools.wraps(forward)
    def lean_forward(self: Any, x: Tensor, *args: Any) -> Any:
        on = torch.is_grad_enabled() and not is_traced() and not is_transformed()
        with Lean() if on else nullcontext():
            return forward(self, x, *args)

    return lean_forward


def _layer_norm(
    mode: Lean,
    func: Callable,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    return mode.note(again(x, weight, bias), again, x, weight, bias)


def _gelu(mode: Lean, func: Callable, x: Tensor, approximate: str = 'none') -> Tensor:
    again = functools.partial(F.gelu, approximate=approximate)
    return mode.note(again(x), again, x)


def _linear(
    mode: Lean, func: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    recipe = mode.recipe(x)
    if recipe is None:
        return linear(x, weight, bias)
    return _LinearAfter.apply(recipe.function, x.detach(), weight, bias, *recipe.inputs)


class _LinearAfter(torch.autograd.Function):
    """A linear layer of ``function(*inputs)``, which it does not keep."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.function = function
        ctx.autocast = _Autocast(x)
        ctx.save_for_backward(weight, bias, *inputs)
        with ctx.autocast.again():
            return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *inputs = ctx.saved_tensors
        of_weight, of_bias, *of_inputs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            with ctx.autocast.again():
                out = F.linear(ctx.function(*inputs), weight, bias)
            needed = (of_weight, of_bias, *of_inputs)
            found = gradients(out, (weight, bias, *inputs), needed, grad, create_graph=True)
            return None, None, *found
        inputs = _leaves(inputs, of_inputs)
        with torch.enable_grad(), ctx.autocast.again():
            x = ctx.function(*inputs)
        wanted = any(of_inputs), of_weight, of_bias
        of_x, grad_weight, grad_bias = linear_backward(
            grad, x.detach().to(grad.dtype), weight, wanted
        )
        of_x = None if of_x is None else of_x.to(x.dtype)
        return None, None, grad_weight, grad_bias, *gradients(x, inputs, of_inputs, of_x)


class _Autocast:
    """The autocast of now, to be had again.

    It keeps no narrow copies of weights. Those made here have no gradient, and torch 2.1 would give
    them to whoever uses the weights next.
    """

    def __init__(self, x: Tensor) -> None:
        self.kind = x.device.type
        self.enabled = autocasts(x)
        self.dtype = autocast_dtype(x) if self.enabled else None

    def again(self) -> Any:
        """A context, in the forward or the backward pass."""
        if not self.enabled:
            return nullcontext()
        return torch.autocast(self.kind, self.dtype, cache_enabled=False)


def _masked_softmax(
    mode: Lean, func: Callable, scores: Tensor, mask: Tensor | None = None
) -> Tensor:
    return mode.note(masked_softmax(scores, mask), masked_softmax, scores, mask)


def _conv2d(
    mode: Lean,
    func: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *settings: Any,
    **named: Any,
) -> Tensor:
    if x.device.type == 'cpu' and is_low(x, weight, *settings, **named):
        return on_more_rows(func, x, weight, bias, *settings, **named)
    return func(x, weight, bias, *settings, **named)


def _dropout(
    mode: Lean,
    func: Callable,
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    # What nothing is dropped from stays itself, so that it is recognized.
    return func(x, p, training, inplace) if p and training else x


def _matmul(mode: Lean, func: Callable, a: Tensor, b: Tensor) -> Tensor:
    recipe = mode.recipe(a) if isinstance(a, Tensor) else None
    if recipe is None:
        return func(a, b)
    return _ProductAfter.apply(recipe.function, a.detach(), b, *recipe.inputs)


class _ProductAfter(torch.autograd.Function):
    """``function(*inputs) @ b``, of which the first factor is not kept."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], a: Tensor, b: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        ctx.function = function
        ctx.autocast = _Autocast(a)
        ctx.save_for_backward(b, *inputs)
        with ctx.autocast.again():
            return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b, *inputs = ctx.saved_tensors
        of_b, *of_inputs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            # Gradients of gradients are wanted, so PyTorch has to see the whole computation.
            with ctx.autocast.again():
                out = ctx.function(*inputs) @ b
            found = gradients(out, (b, *inputs), (of_b, *of_inputs), grad, create_graph=True)
            return None, None, *found
        inputs = _leaves(inputs, of_inputs)
        with torch.enable_grad(), ctx.autocast.again():
            a = ctx.function(*inputs)
        grad_b = (a.detach().to(grad.dtype).mT @ grad).to(b.dtype) if of_b else None
        if not any(of_inputs):
            return None, None, grad_b, *[None] * len(inputs)
        grad_a = (grad @ b.to(grad.dtype).mT).to(a.dtype)
        return None, None, grad_b, *gradients(a, inputs, of_inputs, grad_a)


def _leaves(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """The same values, to be differentiated anew."""
    pairs = zip(tensors, needed, strict=True)
    return [t if t is None else t.detach().requires_grad_(n) for t, n in pairs]


# Other kinds (quantized, fake, traced) compute by rules of their own.
_PLAIN = {Tensor, nn.Parameter}
_FORMS: dict[Callable, Callable] = {
    F.conv2d: _conv2d,
    F.dropout: _dropout,
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    Tensor.matmul: _matmul,
    torch.matmul: _matmul,
    masked_softmax: _masked_softmax,
}
