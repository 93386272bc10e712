"""Modules are what they seem: watched, wrapped, replaced or quantized, each of them counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import images, small_lavit
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from mmlavit.models.block import DropPath

# Of the same type for all: float32 is what the fast forms are for. Padded in every stage.
SIZE = (1, 3, 44, 70)
OPTIONS = dict(window_sizes=(4, 4, 2, 2), drop_path_rate=0.0)


def lavit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return small_lavit(**{**OPTIONS, **options}).float()


def batch() -> Tensor:
    return images(*SIZE).float()


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold no others, by name."""
    return {name: m for name, m in model.named_modules() if not list(m.children())}


NAMES = list(leaves(lavit()))
MODES = [
    pytest.param(grad, train, id=f'{"grad" if grad else "no grad"}-{"train" if train else "eval"}')
    for grad in (True, False)
    for train in (True, False)
]


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Another module in a module's place; PyTorch's own set_submodule came with torch 2.5."""
    parent, _, last = name.rpartition('.')
    setattr(model.get_submodule(parent), last, module)


@contextmanager
def global_hook(hook: Callable) -> Iterator[None]:
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize('grad, train', MODES)
def test_a_hook_sees_the_one_true_input_and_output(grad, train):
    """A global one, which no module knows of: all modules, as often as they are called."""
    model = lavit().train(train)
    called = {module: name for name, module in model.named_modules()}
    seen: list[tuple[str, nn.Module, tuple, Any, list[Tensor], list[Tensor]]] = []

    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        copies = (
            [t.detach().clone() for t in tensors(args)],
            [t.detach().clone() for t in tensors(out)],
        )
        seen.append((called[module], module, args, out, *copies))

    x = batch()
    with torch.set_grad_enabled(grad):
        expected = model(x)
        with global_hook(hook):
            found = model(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    # A list of modules is never called, and dropout in the MLP is, twice.
    silent = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    assert {name for name, *_ in seen} == set(called.values()) - silent
    for name, module, args, out, args_then, out_then in seen:
        # What was given stays as it was, though somebody keeps it.
        for now, then in zip(tensors(args) + tensors(out), args_then + out_then, strict=True):
            assert torch.equal(now, then), name
        with torch.no_grad():
            again = module(*args)
        for a, b in zip(tensors(again), out_then, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('grad, train', MODES)
def test_a_hook_of_its_own_sees_the_same_as_a_global_one(grad, train):
    model, x = lavit().train(train), batch()
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            seen.setdefault(name, []).extend(t.detach().clone() for t in tensors(out))

        return hook

    names = {module: name for name, module in model.named_modules()}
    with torch.set_grad_enabled(grad):
        with global_hook(lambda module, args, out: keep(names[module])(module, args, out)):
            model(x)
        together, seen = seen, {}
        # One after the other: a form that steps in where nobody listens would show here.
        for name in NAMES:
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            model(x)
            handle.remove()
    assert seen.keys() == set(NAMES)
    for name, outs in seen.items():
        for a, b in zip(outs, together[name], strict=True):
            torch.testing.assert_close(a, b)


class Scaled(nn.Module):
    """In the place of a module: the same, times a factor. It has no attribute of the other's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Tensor:
        return 1.5 * self.inner(*args)


@pytest.mark.slow
@pytest.mark.parametrize('grad', [True, False])
def test_what_replaces_a_module_is_called(grad):
    """And so is what a hook returns: with gradients and without, the maps are those of both."""
    x, plain = batch(), lavit().eval()
    with torch.set_grad_enabled(grad):
        before = plain(x)
        for name in NAMES:
            hooked, replaced = copy.deepcopy(plain), copy.deepcopy(plain)
            hooked.get_submodule(name).register_forward_hook(lambda m, args, out: 1.5 * out)
            put(replaced, name, Scaled(replaced.get_submodule(name)))
            maps = replaced(x)
            for a, b in zip(maps, hooked(x), strict=True):
                torch.testing.assert_close(a, b)
            changed = any(not torch.allclose(a, b) for a, b in zip(maps, before, strict=True))
            assert changed, name
            if grad:
                sum(m.sum() for m in maps).backward()


@pytest.mark.parametrize('grad', [True, False])
def test_a_gelu_of_another_kind_is_the_one_computed(grad):
    x, model = batch(), lavit().eval()
    with torch.set_grad_enabled(grad):
        before = model(x)
        for name in NAMES:
            if isinstance(model.get_submodule(name), nn.GELU):
                put(model, name, nn.GELU('tanh').eval())
        after = model(x)
        for module in leaves(model).values():
            module.register_forward_hook(lambda *_: None)
        watched = model(x)
    for a, b, c in zip(after, watched, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert (a - c).abs().max() > 1e-4


@pytest.mark.parametrize(
    'options',
    [dict(kernel_size=5, padding=2), dict(kernel_size=3, padding=1, padding_mode='reflect')],
)
def test_a_convolution_with_other_settings_is_the_one_computed(options):
    """Of more tokens than are taken at a time in inference."""
    model = lavit(mix_ffn=True, window_sizes=(8, 4, 2, 2)).eval()
    x = images(1, 3, 4 * 130, 4 * 130).float()
    mlp = model.stages[0].blocks[0].mlp
    channels = mlp.dwconv.in_channels
    mlp.dwconv = nn.Conv2d(channels, channels, groups=channels, **options).eval()
    with torch.no_grad():
        maps = model(x)
        mlp.dwconv.register_forward_hook(lambda *_: None)
        watched = model(x)
    for a, b in zip(maps, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Adapted(nn.Module):
    """LoRA (arXiv 2106.09685) around a linear layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def test_lora_on_every_linear_layer():
    model, x = lavit().requires_grad_(False), batch()
    before = model.eval()(x)
    for name in linear_layers(model):
        put(model, name, Adapted(model.get_submodule(name)))
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len(linear_layers(lavit()))
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(5):
        loss = sum((m - 1).square().mean() for m in model.train()(x))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in adapters.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    # Alone, as adapters are kept; loaded into a fresh model they come to the same.
    other = lavit().eval()
    for name in linear_layers(other):
        put(other, name, Adapted(other.get_submodule(name)))
    other.load_state_dict(adapters, strict=False)
    with torch.no_grad():
        for a, b, c in zip(other(x), model.eval()(x), before, strict=True):
            torch.testing.assert_close(a, b)
            assert not torch.allclose(a, c)


def test_dynamic_quantization_reaches_every_linear_layer():
    model, x = lavit().eval(), batch()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not linear_layers(quantized)
    kinds = [type(quantized.get_submodule(name)).__module__ for name in linear_layers(model)]
    assert all('quantized' in kind for kind in kinds)
    with torch.no_grad():
        for a, b in zip(quantized(x), model(x), strict=True):
            assert 0 < (a - b).norm() / b.norm() < 0.2


def test_fake_quantization_trains():
    model, x = lavit().train(), batch()
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        layer.qconfig = torch.ao.quantization.get_default_qat_qconfig('x86')
        put(model, name, torch.ao.nn.qat.Linear.from_float(layer))
    sum(m.square().mean() for m in model(x)).backward()
    observed = [m for m in model.modules() if isinstance(m, torch.ao.nn.qat.Linear)]
    assert observed
    for layer in observed:
        assert layer.weight_fake_quant.scale.isfinite().all() and layer.weight.grad.any()
        assert (layer.weight_fake_quant.scale != 1).any()


def _parametrized(module: nn.Module) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module, 'weight', Doubled(), unsafe=True)


@pytest.mark.parametrize(
    'change, count',
    [
        (_parametrized, lambda m: isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm))),
        (
            lambda m: prune.random_unstructured(m, 'weight', amount=0.5),
            lambda m: isinstance(m, (nn.Linear, nn.Conv2d)),
        ),
        (parametrizations.weight_norm, lambda m: isinstance(m, (nn.Linear, nn.Conv2d))),
    ],
    ids=['parametrized', 'pruned', 'weight norm'],
)
@pytest.mark.parametrize('grad', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_that_are_computed_count(change, count, grad):
    """Each module alone: what it is called with now decides, not the weights of before."""
    plain, x = lavit().eval(), batch()
    with torch.set_grad_enabled(grad):
        for name in [n for n in NAMES if count(plain.get_submodule(n))]:
            model = copy.deepcopy(plain)
            module = model.get_submodule(name)
            change(module)
            if change is parametrizations.weight_norm:
                with torch.no_grad():
                    module.parametrizations.weight.original0.mul_(2)
            maps = model(x)
            # The same weights in a plain module.
            expected = copy.deepcopy(plain)
            with torch.no_grad():
                expected.get_submodule(name).weight.copy_(module.weight)
            for a, b in zip(maps, expected(x), strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f'{name}: {text}')
            changed = zip(maps, plain(x), strict=True)
            assert any(not torch.allclose(a, b) for a, b in changed), name


class Loud(Tensor):
    """Weights of another kind, which count what is done with them."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (nn.functional.linear, nn.functional.conv2d, nn.functional.layer_norm):
            cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize('grad', [True, False])
def test_weights_of_another_kind_are_asked(grad):
    plain, x = lavit().eval(), batch()
    with torch.set_grad_enabled(grad):
        before = plain(x)
        for name in NAMES:
            module = plain.get_submodule(name)
            if not isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                continue
            model = copy.deepcopy(plain)
            module = model.get_submodule(name)
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Loud))
            Loud.calls = 0
            maps = model(x)
            assert Loud.calls >= 1, name
            for a, b in zip(maps, before, strict=True):
                torch.testing.assert_close(a.as_subclass(Tensor), b)


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('kind', [nn.Dropout, DropPath])
def test_dropouts_alone_in_training_drop(kind, grad):
    """As who wants samples of a trained model does (arXiv 1506.02142)."""
    model, x = lavit(drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.5).eval(), batch()
    with torch.set_grad_enabled(grad):
        first, second = model(x), model(x)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for module in model.modules():
            module.training = isinstance(module, kind)
        torch.manual_seed(0)
        first, second = model(x), model(x)
        assert not torch.equal(first[-1], second[-1])
