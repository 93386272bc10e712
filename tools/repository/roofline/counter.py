"""Counts what each operator of PyTorch reads, writes and computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

#: These return memory as it comes, or a view that their schema does not call one.
FREE = ('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_unsafe_view')
#: These do not read their first argument: they write to it, or take its shape and type.
NOT_READING = (
    *('bernoulli_', 'copy_', 'fill_', 'normal_', 'uniform_', 'zero_'),
    *('full_like', 'new_full', 'new_ones', 'new_zeros', 'ones_like', 'rand_like', 'zeros_like'),
)


@dataclass(frozen=True)
class Launch:
    """An operator that runs on the GPU.

    Args:
        name: As PyTorch calls it, such as ``'aten.addmm'``.
        read: Bytes of its tensors.
        written: Bytes of what it returns and of what it changes.
        flops: Operations of its products and convolutions; an addition counts as one and a
            multiplication as another. 0 for all else.
        dtype: What products are of; None for all else.
    """

    name: str
    read: int
    written: int
    flops: int = 0
    dtype: torch.dtype | None = None


class OperatorCounter(TorchDispatchMode):
    """On as a context: keeps a :class:`Launch` of each operator that is no view.

    It sees what autograd, autocast and PyTorch's composite functions come down to, forward and
    backward. Each operator counts as one kernel that reads each of its tensors once and writes its
    result once.

    Args:
        flops: How to count the operations of operators that PyTorch has no count of, or a wrong
            one: name -> function of the operator's arguments.
    """

    def __init__(self, flops: dict[str, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._flops = {'aten.convolution_backward': _convolution_backward, **(flops or {})}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operator and note what it took."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func.overloadpacket)
        short = name.partition('.')[2]
        returns = [r.alias_info for r in func._schema.returns]
        changes = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if short in FREE or (returns and all(returns) and not changes):
            return out
        given = args[1:] if short in NOT_READING else args
        read = _bytes((given, kwargs))
        # What is changed is returned, too.
        written = _bytes(changes if all(returns) else (out, changes))
        # What returns no tensor, or an empty one, is a question, or nothing.
        if written:
            flops = self._count(func, name, args, kwargs, out)
            dtype = next(t.dtype for t in _tensors(args)) if flops else None
            self.launches.append(Launch(name, read, written, flops, dtype))
        return out

    def _count(self, func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> int:
        if name in self._flops:
            return self._flops[name](*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        return count(*args, **kwargs, out_val=out) if count else 0


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in there, each once."""
    found = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return list(found.values())


def _bytes(values: Any) -> int:
    """Bytes of all tensors in there; what an expanded tensor repeats counts once."""
    total = 0
    for t in _tensors(values):
        sizes = zip(t.shape, t.stride(), strict=True)
        distinct = math.prod(size if stride or not size else 1 for size, stride in sizes)
        total += distinct * t.element_size()
    return total


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *options: Any, **more: Any
) -> int:
    """One convolution's operations for each gradient; PyTorch counts depthwise ones as if full."""
    of_x, of_weight, _ = options[-1]
    one = conv_flop_count(x.shape, weight.shape, grad.shape)
    return one * (of_x + of_weight)
