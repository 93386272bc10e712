"""The route of linear layers: each model's own, or LaViT's for all of them.

PyTorch sends float32 products on a CPU to MKL, LaViT sends its linear layers to oneDNN
(:mod:`mmlavit.ops.linear`). On an AMD processor MKL uses half of the vector width, so that a peer
may be slow there for where its products go, not for what it computes. bfloat16 goes to oneDNN in
both, but PyTorch takes another pass over the output for the bias. Anybody who cares could send
them where ours go; here that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlavit.ops.linear import linear, prefers_onednn

from .workload import Settings


@contextmanager
def our_linear_layers() -> Iterator[None]:
    """Lets whoever calls ``F.linear`` have LaViT's, forward and backward, where ours has its own.

    ``nn.Linear`` and ``nn.MultiheadAttention`` look the function up at each call. The results are
    the same but for rounding. Not for a LaViT that trains: it has them anyway, and what it keeps
    for the backward pass it knows by the function.
    """
    own = F.linear

    def routed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias) if prefers_onednn(x) else own(x, weight, bias)

    F.linear = routed
    try:
        yield
    finally:
        F.linear = own


#: Name of a route and the context of a step that takes it; LaViT's own and ours are the same.
ROUTES: dict[str, Callable[[], AbstractContextManager]] = {
    'own': nullcontext,
    'same': nullcontext,
    'ours': our_linear_layers,
}


def routes_differ(settings: Settings) -> bool:
    """Whether LaViT's linear layers go another way than PyTorch's own under these settings."""
    if settings.compile or settings.device != 'cpu':
        return False
    with settings.autocast():
        return prefers_onednn(torch.empty(1, 1, dtype=settings.weights))


def has_linear_layers(model: nn.Module) -> bool:
    """Whether a model has anything that the route of linear layers is about."""
    kinds = (nn.Linear, nn.MultiheadAttention)
    return any(isinstance(module, kinds) for module in model.modules())
