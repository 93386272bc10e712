"""The MLP in pieces: the same values and gradients as the plain chain of modules, less kept."""

import pytest
import torch
import torch.nn.functional as F
from small import seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmlavit.models.mlp
from mmlavit.models.mlp import MLP

DIMS, HIDDEN, SHAPE = 6, 12, (2, 5, 3, 6)


def parts(dtype: torch.dtype = torch.float64) -> tuple[MLP, nn.LayerNorm, Tensor]:
    """An MLP and a norm, both far from their start, and tokens."""
    generator = seeded(1)
    mlp, norm = MLP(DIMS, HIDDEN).to(dtype), nn.LayerNorm(DIMS, eps=1e-6).to(dtype)
    for p in (*mlp.parameters(), *norm.parameters()):
        nn.init.normal_(p, generator=generator)
    x = torch.randn(SHAPE, generator=generator, dtype=dtype, requires_grad=True)
    return mlp, norm, x


def plain(mlp: MLP, norm: nn.Module, x: Tensor) -> Tensor:
    hidden = F.linear(norm(x), mlp.fc1.weight, mlp.fc1.bias)
    return F.linear(F.gelu(hidden), mlp.fc2.weight, mlp.fc2.bias)


def tensors_of(mlp: MLP, norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = {'x': x} | dict(norm.named_parameters('norm')) | dict(mlp.named_parameters())
    return {name: t for name, t in named.items() if t.requires_grad}


@pytest.fixture(params=[1, 4 * HIDDEN, 2**21], ids=['1 token', '4 tokens', 'whole'])
def chunk_size(request, monkeypatch):
    monkeypatch.setattr(mmlavit.models.mlp, 'CHUNK_SIZE', request.param)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('frozen', [(), ('x',), ('norm',), ('fc1', 'fc2'), ('x', 'norm', 'fc1')])
def test_values_and_gradients(dtype, frozen, chunk_size):
    mlp, norm, x = parts(dtype)
    for name, t in tensors_of(mlp, norm, x).items():
        t.requires_grad_(not name.startswith(frozen) if frozen else True)
    ours, expected = mlp(x, norm), plain(mlp, norm, x)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else {}
    torch.testing.assert_close(ours, expected, **tolerance)
    wanted = tensors_of(mlp, norm, x)
    grad = torch.randn(ours.shape, generator=seeded(2), dtype=dtype)
    found = torch.autograd.grad(ours, wanted.values(), grad)
    for a, b in zip(found, torch.autograd.grad(expected, wanted.values(), grad), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_second_derivatives(chunk_size):
    mlp, norm, x = parts()
    tensors = tuple(tensors_of(mlp, norm, x).values())
    assert torch.autograd.gradgradcheck(lambda *_: mlp(x, norm), tensors)


def test_inference_gives_the_same_and_changes_nothing():
    mlp, norm, x = parts()
    before = x.detach().clone()
    with torch.no_grad():
        found = mlp.eval()(x, norm)
    torch.testing.assert_close(found, plain(mlp, norm, x).detach())
    assert torch.equal(x, before)


def test_tokens_and_the_input_of_gelu_are_all_that_is_kept():
    mlp, norm, x = parts(torch.float32)
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = mlp(x, norm)
    parameters = {p.data_ptr() for p in (*mlp.parameters(), *norm.parameters())}
    sizes = [t.numel() for t in kept if t.data_ptr() not in parameters]
    assert sizes == [x.numel(), x.numel() // DIMS * HIDDEN]
    assert out.grad_fn is not None


def test_under_checkpointing():
    mlp, norm, x = parts()
    found = torch.autograd.grad(checkpoint(mlp, x, norm, use_reentrant=False).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(plain(mlp, norm, x).sum(), x))


def test_autocast_takes_the_plain_way(monkeypatch):
    monkeypatch.setattr(mmlavit.models.mlp, '_MLP', None)
    mlp, norm, x = parts(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = mlp(x, norm)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(mlp, norm, x), rtol=0.1, atol=0.3)


def test_dropout_drops():
    mlp, norm, x = parts()
    dropping = MLP(DIMS, HIDDEN, drop_rate=0.5).double()
    dropping.load_state_dict(mlp.state_dict())
    torch.testing.assert_close(dropping.eval()(x, norm), mlp(x, norm))
    print('seed 3')
    torch.manual_seed(3)
    share = (dropping.train()(x, norm) == 0).double().mean()
    assert 0.3 < share < 0.7


def test_functional_transforms():
    """Gradients of each sample, by vmap over grad."""
    mlp, norm, x = parts()
    weights = {name: p.detach() for name, p in mlp.named_parameters()}

    def ours(weights, x):
        return torch.func.functional_call(mlp, weights, (x, norm)).square().sum()

    def expected(weights, x):
        hidden = F.linear(norm(x), weights['fc1.weight'], weights['fc1.bias'])
        return F.linear(F.gelu(hidden), weights['fc2.weight'], weights['fc2.bias']).square().sum()

    results = (
        torch.func.vmap(torch.func.grad(f), (None, 0))(weights, x.detach())
        for f in (ours, expected)
    )
    torch.testing.assert_close(*results)


class Doubled(nn.Module):
    """As LoRA and quantization put a layer around another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize('with_gradients', [True, False])
@pytest.mark.parametrize('name', ['fc1', 'fc2'])
def test_another_layer_in_the_place_of_ours_is_called(name, with_gradients):
    mlp, norm, x = parts()
    inner = getattr(mlp, name)
    setattr(mlp, name, Doubled(inner))
    mlp.train(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        found = mlp(x, norm)
        hidden = 2 * mlp.fc1.inner(norm(x)) if name == 'fc1' else mlp.fc1(norm(x))
        expected = mlp.fc2(F.gelu(hidden))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('with_gradients', [True, False])
@pytest.mark.parametrize('name', ['fc1', 'fc2', 'norm'])
def test_hooks_see_what_they_watch(name, with_gradients):
    mlp, norm, x = parts()
    seen = []
    module = norm if name == 'norm' else getattr(mlp, name)
    module.register_forward_hook(lambda module, args, out: seen.append(out))
    mlp.train(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        mlp(x, norm)
        chain = {'norm': norm(x)}
        chain['fc1'] = mlp.fc1(chain['norm'])
        chain['fc2'] = mlp.fc2(F.gelu(chain['fc1']))
    # Ours, then the one just made. What a hook was given must not have been changed since.
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], chain[name])
