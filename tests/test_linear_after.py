"""Computed again in the backward pass: the same values and gradients, with less kept."""

import pytest
import torch
import torch.nn.functional as F
from small import seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmlavit.ops.linear
from mmlavit.ops.linear import Linear, linear, linear_after, linear_after_norm, linear_backward


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


FUNCTIONS = {'gelu': (F.gelu, 0), 'norm': (norm, 2)}


def inputs(count: int, dtype: torch.dtype = torch.float32, biased: bool = True) -> list[Tensor]:
    """x, weight, bias and ``count`` parameters of the function."""
    shapes = [(2, 5, 6), (7, 6), (7,), *[(6,)] * count]
    tensors = [torch.randn(s, generator=seeded(1)).to(dtype).requires_grad_() for s in shapes]
    return tensors if biased else [t if i != 2 else None for i, t in enumerate(tensors)]


def choose_route(monkeypatch: pytest.MonkeyPatch, slow_mkl: bool) -> None:
    monkeypatch.setattr(mmlavit.ops.linear, '_mkl_is_slow', lambda: slow_mkl)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)


def gradients(out: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return list(torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel()).view_as(out)))


@pytest.mark.parametrize('slow_mkl', [False, True], ids=['', 'slow MKL'])
@pytest.mark.parametrize('frozen', [(), (0,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize('biased', [True, False])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_values_and_gradients_are_those_without(name, biased, frozen, slow_mkl, monkeypatch):
    choose_route(monkeypatch, slow_mkl)
    function, count = FUNCTIONS[name]
    tensors = inputs(count, biased=biased)
    for i in frozen:
        if tensors[i] is not None:
            tensors[i].requires_grad_(False)
    x, weight, bias, *parameters = tensors
    plain = linear(function(x, *parameters), weight, bias)
    ours = linear_after(function, x, weight, bias, *parameters)
    assert torch.equal(ours, plain)
    if ours.requires_grad:
        for a, b in zip(gradients(ours, tensors), gradients(plain, tensors), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_gradcheck(name):
    function, count = FUNCTIONS[name]
    tensors = inputs(count, torch.float64)

    def layer(*args: Tensor) -> Tensor:
        return linear_after(function, *args)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


@pytest.mark.parametrize('slow_mkl', [False, True])
def test_linear_backward_is_autograds(slow_mkl, monkeypatch):
    choose_route(monkeypatch, slow_mkl)
    x, weight, bias = inputs(0)
    grad = torch.randn(2, 5, 7, generator=seeded(2))
    wanted = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), grad)
    for needed in [(True, True, True), (True, False, True), (False, True, False)]:
        found = linear_backward(grad, x.detach(), weight.detach(), needed)
        for a, b, is_needed in zip(found, wanted, needed, strict=True):
            if is_needed:
                torch.testing.assert_close(a, b)
            else:
                assert a is None


def test_what_comes_out_of_the_function_is_not_kept():
    x, weight, bias = inputs(0)
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_after(F.gelu, x, weight, bias)
    assert sizes == [x.shape, weight.shape, bias.shape]


def test_under_checkpointing():
    tensors = inputs(0)
    out = checkpoint(linear_after, F.gelu, *tensors, use_reentrant=False)
    plain = linear(F.gelu(tensors[0]), *tensors[1:])
    for a, b in zip(gradients(out, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_takes_the_plain_way(monkeypatch):
    monkeypatch.setattr(mmlavit.ops.linear, '_LinearAfter', None)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = linear_after(F.gelu, *inputs(0))
    assert out.dtype == torch.bfloat16


def test_functional_transforms():
    """Gradients of each sample, by vmap over grad."""
    x, weight, bias = (t.detach() for t in inputs(0))

    def loss(weight: Tensor, x: Tensor, layer) -> Tensor:
        return layer(F.gelu, x, weight, bias).square().sum()

    def plain(function, x, weight, bias):
        return F.linear(function(x), weight, bias)

    found, expected = (
        torch.func.vmap(torch.func.grad(lambda w, x: loss(w, x, layer)), (None, 0))(weight, x)  # noqa: B023
        for layer in (linear_after, plain)
    )
    torch.testing.assert_close(found, expected)


def pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 2))


@pytest.mark.parametrize('between', [None, pad], ids=['', 'padded'])
def test_after_a_norm_values_and_gradients_are_those_without(between):
    norm, layer = nn.LayerNorm(6), Linear(6, 7)
    nn.init.normal_(norm.weight, generator=seeded(3))
    x = torch.randn(2, 5, 6, generator=seeded(1), requires_grad=True)
    tensors = [x, *norm.parameters(), *layer.parameters()]
    plain = layer(between(norm(x)) if between else norm(x))
    ours = linear_after_norm(layer, norm, x, between)
    assert type(ours.grad_fn) is not type(plain.grad_fn)
    assert torch.equal(ours, plain)
    for a, b in zip(gradients(ours, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_see_the_norm_and_the_layer():
    """As Grad-CAM asks for the activations and the gradients of a norm."""
    layer, norm, seen = Linear(6, 12), nn.LayerNorm(6), []
    for module in (norm, layer):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    out = linear_after_norm(layer, norm, torch.randn(3, 6, generator=seeded(1)))
    assert [t.shape for t in seen] == [(3, 6), (3, 12)]
    assert torch.autograd.grad(out.sum(), seen[:1])[0].abs().sum() > 0


def test_another_norm_in_the_place_of_ours_is_called():
    layer = Linear(6, 12)
    x = torch.randn(3, 6, generator=seeded(1))
    doubled = nn.Linear(6, 6, bias=False)
    nn.init.eye_(doubled.weight).data.mul_(2)
    torch.testing.assert_close(linear_after_norm(layer, doubled, x), layer(2 * x))
