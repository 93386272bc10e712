"""One contract for every form in which a model runs: it computes the naive reference.

The models are written once. Beside them lie fast forms: layers in pieces for inference on a CPU,
training that keeps little, one kernel on a GPU (`ops`), and what PyTorch makes
of recorded code (compiled: `ops`). Which one runs follows from how a user calls the
model, and so it does here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import pytest
import reference
import torch
from small import (
    ARCH,
    HALVES,
    allowed,
    images,
    largest_difference,
    needs_exporter,
    sharpen,
    small_lavit,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook

WINDOWS = (4, 8, 4, 2)  # twice, once and once as large as half the windows before
PADDED, WHOLE = (37, 50), (64, 64)
Form = Callable[[nn.Module, Tensor], Sequence[Tensor]]


@torch.no_grad()
def alone(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Nobody watches and no gradients are wanted: on a CPU the layers run in pieces."""
    return model(x)


@torch.no_grad()
def watched(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Somebody watches, so modules are called."""
    handle = register_module_forward_hook(lambda *_: None)
    try:
        return model(x)
    finally:
        handle.remove()


def with_gradients(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Little is kept for the backward pass."""
    return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Layers run again in the backward pass."""
    for stage in model.stages:
        stage.with_cp = True
    return model(x)


@torch.no_grad()
def traced(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """As TorchScript and ONNX record it, of another size."""
    other = x[:, :, :-9, :-7].repeat(2, 1, 1, 1)
    with warnings.catch_warnings():
        # What is refused is found out while recording, and said so.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return torch.jit.trace(model, other)(x)


@torch.no_grad()
def made(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """As make_fx records it: in PyTorch's plain operators."""
    graph = make_fx(model)(x)
    assert namespaces(graph) == {'aten'}
    return graph(x)


def namespaces(graph: torch.fx.GraphModule) -> set[str]:
    """Where the operators of a graph are from; Python's own functions are from nowhere."""
    targets = [node.target for node in graph.graph.nodes if node.op == 'call_function']
    return {target.namespace for target in targets if hasattr(target, 'namespace')}


TRAINS: list[Form] = [with_gradients, checkpointed]
FORMS: list[Form] = [alone, watched, traced, made, *TRAINS]


def by_name(forms: Iterable[Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize('form', forms, ids=lambda form: form.__name__)


def model_for(size: tuple[int, int], **options: object) -> tuple[nn.Module, Tensor]:
    x = images(2, 3, *size)
    return sharpen(small_lavit(window_sizes=WINDOWS, **options), x), x


def expected_of(model: nn.Module, x: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    return reference.lavit(x, weights, ARCH['num_heads'], WINDOWS)


@by_name(FORMS)
@pytest.mark.parametrize('size', [PADDED, pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_maps(form, size):
    model, x = model_for(size)
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, x = model.to(dtype), x.to(dtype)
        with torch.no_grad():
            expected = expected_of(model, x, model.state_dict())
        for a, b in zip(form(model, x), expected, strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            torch.testing.assert_close(a, b, rtol=0, atol=tol)


@torch.no_grad()
@by_name([alone, watched, made, *TRAINS])
@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_under_autocast(form, dtype):
    model, x = model_for(PADDED)
    exact = expected_of(model, x, model.state_dict())
    halves = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    rough = expected_of(model, x.to(dtype), halves)
    with torch.set_grad_enabled(form in TRAINS), torch.autocast('cpu', dtype=dtype):
        found = form(model.float(), x.float())
    found = [m.detach() for m in found]
    assert largest_difference(found, exact) < allowed(exact, rough, dtype)


@needs_exporter
def test_exported_it_is_plain_operators():
    model, x = model_for(PADDED, out_indices=(0, 1))
    assert namespaces(torch.export.export(model.float(), (x.float(),)).graph_module) == {'aten'}


def test_a_recorded_training_step_is_plain_operators():
    model, x = model_for(PADDED, out_indices=(0, 1))
    parameters = list(model.float().parameters())

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(m.square().sum() for m in model(x)), parameters)

    x = x.float()
    graph = make_fx(step)(x)
    assert namespaces(graph) == {'aten'}
    for found, right in zip(graph(x), step(x), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)


def gradients(
    maps: Sequence[Tensor], given: dict[str, Tensor], graph: bool = False
) -> dict[str, Tensor]:
    factors = [images(*m.shape, seed=i) for i, m in enumerate(maps)]
    total = sum((m.square() * f).sum() for m, f in zip(maps, factors, strict=True))
    found = torch.autograd.grad(total, list(given.values()), create_graph=graph)
    return dict(zip(given, found, strict=True))


def given_to(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What gradients are wanted of: of the model, and of the reference with the same weights."""
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    images_of = {'x': x.clone().requires_grad_()}
    return dict(model.named_parameters()) | {'x': x.requires_grad_()}, weights | images_of


@by_name(TRAINS)
def test_gradients(form):
    model, x = model_for(PADDED, out_indices=(0, 1))
    given, weights = given_to(model, x)
    found = gradients(form(model, x), given)
    for name, right in gradients(expected_of(model, weights['x'], weights), weights).items():
        torch.testing.assert_close(found[name], right, rtol=1e-7, atol=1e-9, msg=name)


@by_name([with_gradients])
def test_gradients_of_gradients(form):
    model, x = model_for((9, 14), out_indices=(0, 1))
    given, weights = given_to(model, x)
    seconds = []
    for maps, of in (
        (form(model, x), given),
        (expected_of(model, weights['x'], weights), weights),
    ):
        first = gradients(maps, of, graph=True)
        penalty = first['x'].square().sum() + first['stages.0.blocks.1.attn.psi'].square().sum()
        found = torch.autograd.grad(penalty, list(of.values()), allow_unused=True)
        seconds.append(dict(zip(of, found, strict=True)))
    for name, right in seconds[1].items():
        ours = torch.zeros_like(given[name]) if seconds[0][name] is None else seconds[0][name]
        right = torch.zeros_like(ours) if right is None else right
        assert (ours - right).norm() <= 1e-8 * right.norm() + 1e-8, name


def test_gradients_of_each_image():
    """By torch.func: vmap over grad."""
    model, x = model_for((21, 30), out_indices=(0, 1))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        maps = torch.func.functional_call(model, weights, image[None])
        return sum(m.square().sum() for m in maps)

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        weights = {k: v.clone().requires_grad_() for k, v in model.state_dict().items()}
        total = sum(m.square().sum() for m in expected_of(model, image[None], weights))
        rights = torch.autograd.grad(total, list(weights.values()))
        for name, right in zip(weights, rights, strict=True):
            torch.testing.assert_close(found[name][i], right, rtol=1e-7, atol=1e-9, msg=name)
