"""torch.compile: the whole backbone in one graph, one graph for many sizes, the same numbers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small import ARCH, images, small_lavit
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

from mmlavit import LaViT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.compiler, 'is_compiling'),
        reason='torch 2.1 does not tell nested functions that it compiles',
    ),
]

# With windows of 2 x 2 tokens a side has one window up to 8 pixels, and up to 16 in the second
# stage. Sides that need padding and sides that do not, in the first stage and in the second.
SIZES = [(24, 36), (32, 32), (33, 17), (18, 64), (30, 20)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs which another is given."""

    def __init__(self, name: str) -> None:
        self.backend = lookup_backend(name)
        self.count = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.count += 1
        return self.backend(graph, inputs)


def two_stages(**options: object) -> LaViT:
    """Both attentions, both stages' windows and the stair between."""
    return small_lavit(window_sizes=(2, 2, 2, 2), out_indices=(0, 1), **options)


def assert_equal(model: nn.Module, compiled: nn.Module, x: Tensor, tol: float) -> None:
    """The same maps and, with gradients, the same gradients of their product with noise."""
    found, expected = compiled(x), model(x)
    for a, b in zip(found, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    if torch.is_grad_enabled():
        grads = [torch.randn_like(y) for y in expected]
        parameters = list(model.parameters())
        found = torch.autograd.grad(found, parameters, grads)
        for a, b in zip(found, torch.autograd.grad(expected, parameters, grads), strict=True):
            scale = b.abs().max()
            torch.testing.assert_close(a / scale, b / scale, rtol=tol, atol=tol)


@pytest.mark.parametrize('train', [False, True])
def test_one_graph_for_all_sizes(train: bool) -> None:
    """Nothing but the first size, which PyTorch takes for the only one unless told, is apart."""
    model = two_stages().train(train)
    backend = Counting('aot_eager' if train else 'eager')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch, (height, width) in zip([2, 3, 2, 5, 4], SIZES, strict=True):
        x = images(batch, 3, height, width)
        if train:
            for axis in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, axis)
        with torch.set_grad_enabled(train):
            assert_equal(model, compiled, x, 1e-10)
    assert backend.count == (1 if train else 2)


@pytest.mark.parametrize('size', [(1, 1), (5, 16), (17, 8)])
def test_sides_of_one_window(size: tuple[int, int]) -> None:
    model = two_stages()
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=True)
        assert_equal(model, compiled, images(1, 3, *size), 1e-10)


def test_training_with_chance_and_recomputation() -> None:
    """Stochastic depth, dropout and activation checkpoints break no graph either."""
    model = two_stages(drop_path_rate=0.5, drop_rate=0.1, attn_drop_rate=0.1, with_cp=True).train()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    sum(y.sum() for y in compiled(images(2, 3, 24, 36))).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.timeout(1200)  # it compiles C++
@pytest.mark.parametrize('train', [False, True])
def test_inductor(train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users get; one axis alone may change, as every further one takes long to compile."""
    # A cache of its own: a killed run leaves files there that are cut short.
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    print('seed 0')
    torch.manual_seed(0)
    model = LaViT(ARCH, drop_path_rate=0.0, out_indices=(0,)).train(train)
    # Training at any size needs this: https://github.com/pytorch/pytorch/issues/185510.
    options = {'layout_optimization': False} if train else None
    compiled = torch.compile(model, fullgraph=True, options=options)
    for height in (70, 97):
        x = torch.randn(2, 3, height, 66)
        torch._dynamo.mark_dynamic(x, 2)
        with torch.set_grad_enabled(train):
            assert_equal(model, compiled, x, 1e-4)
