"""The fused kernels against the naive reference and the plain way through PyTorch.

`ops` runs this file twice, each time in a process of its own: with
TRITON_INTERPRET=1, which Triton wants to see before it is imported, on the CPU, and without it on
the GPU where there is one.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import reference
import torch
from functorch.compile import make_boxed_func
from small import STD, STEEP, images, seeded, sharpen, small_lavit, spread
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from mmlavit.analysis.replacement import replaced
from mmlavit.models.attention import LessAttention
from mmlavit.models.windows import WindowGrid
from mmlavit.ops.fused_attention import fused_less_attention, obstacle
from mmlavit.ops.scores import zero_padded_pairs

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
HALVES = [torch.float16, torch.bfloat16]
# Height, width, window, channels of a head.
SHAPES = [(8, 16, 8, 64), (9, 5, 8, 48), (2, 3, 8, 32), (7, 9, 7, 48), (4, 9, 4, 64)]


@pytest.fixture(autouse=True, scope='module')
def _bfloat16_products():
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder,
            'create_dot',
            lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest),
        )
        yield


class Calls:
    """Counts the calls of the fused operation, as PyTorch's profiler sees them.

    Comparing it with PyTorch on first use is none of them.
    """

    def __init__(self) -> None:
        self._tiles: list[int] = []
        self._start()

    def _start(self) -> None:
        self._profile = torch.profiler.profile(record_shapes=True)
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()
        for event in self._profile.events():
            if event.name == 'mmlavit::less_attention':
                windows, heads = event.input_shapes[1][:2]
                self._tiles.append(windows * heads)

    def __call__(self) -> list[int]:
        """How many tiles each call so far had."""
        self.stop()
        self._start()
        return self._tiles


@pytest.fixture
def calls() -> Iterator[Calls]:
    counter = Calls()
    yield counter
    counter.stop()


def layer_for(window: int, head_dim: int, heads: int = 2, **options: object) -> LessAttention:
    """A layer in float64 on the CPU whose every weight is moved by noise, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layer = LessAttention(heads * head_dim, heads, window, **options).double()
    generator = seeded(5)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return layer


def scores_for(
    grid: WindowGrid, batch: int, heads: int = 2, lying: bool = False, std: float = STD
) -> Tensor:
    """Scores in float64, 0 at padded pairs as the layers keep them."""
    n = grid.window**2
    scores = std * images(batch * grid.rows * grid.cols, heads, n, n, seed=9)
    scores = zero_padded_pairs(scores, grid)
    assert spread(scores.unflatten(0, (batch, -1)), grid) > 0.8 * std
    return scores.mT.contiguous().mT if lying else scores


def moved(value: Tensor | nn.Module, dtype: torch.dtype) -> Tensor | nn.Module:
    return value.to(device=DEVICE, dtype=dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest value."""
    assert found.isfinite().all()
    assert found.shape == expected.shape
    difference = (found.detach().cpu().double() - expected.detach()).abs().max()
    return (difference / expected.detach().abs().max()).item()


def run(layer: LessAttention, x: Tensor, grid: WindowGrid, scores: Tensor, fused: bool):
    """The layer's output and its scores."""
    layer.fused = fused
    return layer(x, grid, scores)


@torch.no_grad()
@pytest.mark.parametrize('lying', [False, True])
@pytest.mark.parametrize('height, width, window, head_dim', SHAPES)
def test_it_is_equation_5(height, width, window, head_dim, lying, calls):
    grid = WindowGrid(height, width, window)
    layer, scores = layer_for(window, head_dim), scores_for(grid, 1, lying=lying)
    x = images(1, height, width, 2 * head_dim)
    prev = {
        ((i // grid.cols, i % grid.cols), h): scores[i, h]
        for i in range(scores.shape[0])
        for h in range(2)
    }
    expected, kept = reference.less_attention(x[0], prev, layer.state_dict(), 2, window)
    layer = moved(layer, torch.float32)
    out, new = run(layer, moved(x, torch.float32), grid, moved(scores, torch.float32), fused=True)
    assert calls() == [2 * grid.rows * grid.cols]
    assert error(out[0], expected) < 1e-5
    for i in range(scores.shape[0]):
        for h in range(2):
            assert error(new[i, h], kept[(i // grid.cols, i % grid.cols), h]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('std', [STD, STEEP])
@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('height, width, window, head_dim', SHAPES[:4])
def test_half_precision_is_as_good_as_without(height, width, window, head_dim, dtype, std, calls):
    grid = WindowGrid(height, width, window)
    layer, scores = layer_for(window, head_dim), scores_for(grid, 1, std=std)
    x = images(1, height, width, 2 * head_dim)
    expected = run(layer, x, grid, scores, fused=False)
    assert 0.8 * std < spread(expected[1][None], grid) < 2 * std
    given = moved(layer, dtype), moved(x, dtype), grid, moved(scores, dtype)
    plain, ours = run(*given, fused=False), run(*given, fused=True)
    assert len(calls()) == 1
    for a, b, right in zip(ours, plain, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        assert error(a, right) < 1.5 * error(b, right) + torch.finfo(dtype).eps


@pytest.mark.parametrize('psi, theta', [(3.0, 2.0), (30.0, 0.1)], ids=['last', 'between'])
def test_what_float16_cannot_hold(psi, theta, calls):
    """Saturates after either product, forward and backward, as the plain way does."""
    grid = WindowGrid(9, 5, 8)
    # Of scores that lie so, the plain way too takes the product with Psi first.
    layer, scores = layer_for(8, 32), 1e4 * scores_for(grid, 1, lying=True)
    with torch.no_grad():
        layer.psi.copy_(psi * torch.eye(64))
        layer.theta.copy_(theta * torch.eye(64))
    given = moved(layer, torch.float16), moved(images(1, 9, 5, 64), torch.float16), grid
    given = *given, moved(scores, torch.float16)
    plain, ours = run(*given, fused=False), run(*given, fused=True)
    assert len(calls()) == 1
    largest = torch.finfo(torch.float16).max
    limit = min(largest * theta, largest)
    assert (plain[1].abs() > 0.99 * limit).sum() > 50 and (plain[1].abs() < 0.9 * limit).any()
    assert error(ours[1], plain[1].double().cpu()) < 2e-3
    # So large, scores that differ in rounding alone have different softmaxes.
    assert ours[0].isfinite().all() and plain[0].isfinite().all()
    # A saturated score has no gradient. Those of Psi and Theta would leave the range, too.
    layer.requires_grad_(False)
    found, expected = (gradients(*given, fused, 'scores')['scores'] for fused in (True, False))
    assert (expected == 0).sum() > 50 and expected.any()
    assert error(found, expected.double().cpu()) < 5e-3


@torch.no_grad()
def test_a_map_may_be_padded_or_not():
    grid = WindowGrid(9, 5, 8)
    layer, scores = moved(layer_for(8, 32), torch.float32), scores_for(grid, 2)
    scores, v = moved(scores, torch.float32), moved(images(2, 9, 5, 64), torch.float32)
    matrices = layer.psi, layer.theta
    expected, new = fused_less_attention(v, scores, *matrices, grid)
    padded = grid.pad(v)
    # Whatever is in the padding, it has no part in the output.
    padded[:, 9:], padded[:, :, 5:] = float('nan'), float('inf')
    out, kept = fused_less_attention(padded, scores, *matrices, grid)
    assert out.shape == padded.shape and out.isfinite().all()
    assert torch.equal(grid.crop(out), expected)
    assert torch.equal(kept, new)


@torch.no_grad()
def test_layouts_of_the_values():
    """Values are read as they are told to lie, and written plainly."""
    grid = WindowGrid(8, 8, 8)
    layer, scores = moved(layer_for(8, 32), torch.float32), scores_for(grid, 2)
    scores, v = moved(scores, torch.float32), moved(images(2, 8, 8, 64), torch.float32)
    rest = scores, layer.psi, layer.theta, grid
    expected = fused_less_attention(v, *rest)[0]
    for lying in (v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), v.mT.contiguous().mT):
        assert not lying.is_contiguous()
        out = fused_less_attention(lying, *rest)[0]
        assert torch.equal(out, expected) and out.is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
def test_large_scores_stay_finite(dtype):
    grid = WindowGrid(8, 8, 8)
    layer = LessAttention(64, 2, 8).double()
    x, scores = images(1, 8, 8, 64), 1e3 * scores_for(grid, 1)
    expected = run(layer, x, grid, scores.to(dtype).double(), fused=False)
    given = moved(layer, dtype), moved(x, dtype), grid, moved(scores, dtype)
    for ours, right in zip(run(*given, fused=True), expected, strict=True):
        assert error(ours, right) < 10 * torch.finfo(dtype).eps


@torch.no_grad()
def test_with_identity_psi_and_theta_the_scores_stay_bit_for_bit():
    grid = WindowGrid(9, 5, 7)
    scores = moved(scores_for(grid, 1), torch.float32)
    layer, x = LessAttention(64, 2, 7).to(DEVICE), moved(images(1, 9, 5, 64), torch.float32)
    assert torch.equal(run(layer, x, grid, scores, fused=True)[1], scores)


def loss_of(through: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of output and scores that has other gradients everywhere."""

    def weighted(x: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device)
        return (x * weights.view(x.mT.shape).mT).sum()

    return {
        'output': lambda out, scores: weighted(out),
        'scores': lambda out, scores: weighted(scores),
        'both': lambda out, scores: weighted(out) + weighted(scores),
    }[through]


def gradients(
    layer: LessAttention, x: Tensor, grid: WindowGrid, scores: Tensor, fused: bool, through: str
) -> dict[str, Tensor | None]:
    """Gradients of all that went in, by name."""
    x, scores = x.detach().requires_grad_(), scores.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    loss_of(through)(*run(layer, x, grid, scores, fused)).backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    return {'x': x.grad, 'scores': scores.grad, **found}


def assert_gradients(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tol: float
) -> None:
    # No gradient and one of zeros are the same: who asks for less may get less.
    for name, right in expected.items():
        if right is None or not right.any():
            assert found[name] is None or not found[name].any(), name
        else:
            assert error(found[name], right) < tol, name


@pytest.mark.parametrize('through', ['output', 'scores', 'both'])
@pytest.mark.parametrize('height, width, window, head_dim', SHAPES)
def test_gradients(height, width, window, head_dim, through, calls):
    grid = WindowGrid(height, width, window)
    layer = layer_for(window, head_dim)
    scores = scores_for(grid, 2, lying=through == 'both')
    x = images(2, height, width, 2 * head_dim)
    expected = gradients(layer, x, grid, scores, False, through)
    given = moved(layer_for(window, head_dim), torch.float32), moved(x, torch.float32), grid
    found = gradients(*given, moved(scores, torch.float32), True, through)
    assert len(calls()) == 1
    assert_gradients(found, expected, 1e-4)


@pytest.mark.parametrize('std', [STD, STEEP])
@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_gradients_in_half_precision_are_as_good_as_without(dtype, std):
    grid = WindowGrid(9, 5, 8)
    layer, scores, x = layer_for(8, 48), scores_for(grid, 2, std=std), images(2, 9, 5, 96)
    expected = gradients(layer, x, grid, scores, False, 'both')
    layer = moved(layer_for(8, 48), dtype)
    given = layer, moved(x, dtype), grid, moved(scores, dtype)
    plain = gradients(*given, False, 'both')
    for name, ours in gradients(*given, True, 'both').items():
        assert ours.dtype == dtype
        bound = 1.5 * error(plain[name], expected[name]) + torch.finfo(dtype).eps
        assert error(ours, expected[name]) < bound, name


@pytest.mark.parametrize('trained', ['v', 'scores', 'psi', 'theta'])
def test_gradients_of_one_tensor_alone(trained):
    grid = WindowGrid(3, 4, 4)
    layer = layer_for(4, 32)
    given = {'v': images(1, 3, 4, 64), 'scores': scores_for(grid, 1)}
    given |= {'psi': layer.psi.detach(), 'theta': layer.theta.detach()}
    given = {name: moved(t, torch.float32) for name, t in given.items()}
    all_given = [t.clone().requires_grad_() for t in given.values()]
    loss = loss_of('both')(*fused_less_attention(*all_given, grid))
    expected = dict(zip(given, torch.autograd.grad(loss, all_given), strict=True))[trained]
    given[trained] = given[trained].clone().requires_grad_()
    loss_of('both')(*fused_less_attention(*given.values(), grid)).backward()
    assert torch.equal(given[trained].grad, expected)
    assert all(t.grad is None for name, t in given.items() if name != trained)


def test_gradients_are_the_same_every_time():
    grid = WindowGrid(5, 9, 4)
    given = moved(layer_for(4, 32), torch.float32), moved(images(1, 5, 9, 64), torch.float32), grid
    given = *given, moved(scores_for(grid, 1), torch.float32), True, 'both'
    first = gradients(*given)
    for name, grad in gradients(*given).items():
        assert torch.equal(grad, first[name]), name


def test_second_derivatives_are_refused():
    grid = WindowGrid(4, 4, 4)
    x = moved(images(1, 4, 4, 64), torch.float32).requires_grad_()
    layer, scores = moved(layer_for(4, 32), torch.float32), scores_for(grid, 1)
    out, _ = run(layer, x, grid, moved(scores, torch.float32), fused=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='less_attention_backward'):
        grad.sum().backward()


def test_autocast():
    """In float32 layers under autocast all comes out in the types of the plain way."""
    dtype = torch.bfloat16
    grid = WindowGrid(9, 5, 8)
    layer, x = layer_for(8, 32), images(1, 9, 5, 64)
    scores = scores_for(grid, 1)
    expected = gradients(layer, x, grid, scores, False, 'both')
    layer = moved(layer_for(8, 32), torch.float32)
    x = moved(x, torch.float32)
    for given in (moved(scores, torch.float32), moved(scores, dtype)):
        with torch.autocast(DEVICE, dtype=dtype):
            plain, ours = (run(layer, x, grid, given, fused) for fused in (False, True))
            assert [t.dtype for t in ours] == [t.dtype for t in plain] == [dtype, dtype]
            assert obstacle(x, given, layer.psi, layer.theta, grid) is None
            worse = {
                k: g.clone() for k, g in gradients(layer, x, grid, given, False, 'both').items()
            }
            found = gradients(layer, x, grid, given, True, 'both')
        for name, right in expected.items():
            assert found[name].dtype == worse[name].dtype, name
            bound = 1.5 * error(worse[name], right) + torch.finfo(dtype).eps
            assert error(found[name], right) < bound, name


@pytest.mark.parametrize('options', [{}, {'with_cp': True}], ids=str)
def test_a_whole_lavit(options, calls):
    x = images(1, 3, 44, 70)
    expected = sharpen(small_lavit(fused_attention=False), x)
    model = small_lavit(**options)
    model.load_state_dict(expected.state_dict())
    model = moved(model, torch.float32)
    with torch.no_grad():
        for ours, right in zip(model(moved(x, torch.float32)), expected(x), strict=True):
            assert error(ours, right) < 1e-4
    assert len(calls()) == 4
    for out, given in ((model.train()(moved(x, torch.float32)), model), (expected(x), expected)):
        sum(map.square().mean() for map in out).backward()
        assert all(p.grad is not None for p in given.parameters())
    assert len(calls()) == (12 if options else 8)
    for (name, p), right in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert error(p.grad, right.grad) < 1e-3, name


def test_attention_that_is_replaced_is_not_fused(calls):
    """The kernel has a softmax of its own, which would go on with the scores as they are."""
    x, model = moved(images(1, 3, 32, 32), torch.float32), moved(small_lavit(), torch.float32)
    with torch.no_grad(), replaced(model, 'even'):
        model(x)
        assert calls() == []


def test_the_switch(calls):
    x = moved(images(1, 3, 32, 32), torch.float32)
    with torch.no_grad():
        moved(small_lavit(fused_attention=False), torch.float32)(x)
        assert calls() == []
        for count, fused in ((4, 'auto'), (8, True)):
            moved(small_lavit(fused_attention=fused), torch.float32)(x)
            assert len(calls()) == count


def test_compiled_it_is_one_operation(calls):
    grid, seen = WindowGrid(9, 5, 4), []

    def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable:
        seen.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    given = moved(layer_for(4, 32), torch.float32), moved(images(2, 9, 5, 64), torch.float32), grid
    given = *given, moved(scores_for(grid, 2), torch.float32)
    expected = gradients(*given, True, 'both')
    layer = torch.compile(given[0], backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    found = gradients(layer, *given[1:], True, 'both')
    assert [graph.count('mmlavit.less_attention.default') for graph in seen] == [1, 0]
    assert seen[1].count('mmlavit.less_attention_backward.default') == 1
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name.removeprefix('_orig_mod.')])


class TestLeftToPyTorch:
    """What the kernels do not do runs without them, and is right."""

    def check(self, calls, layer=None, dtype=torch.float32, window=4, function=None) -> None:
        grid = WindowGrid(window, window, window)
        layer = moved(layer or layer_for(window, 32), dtype)
        assert layer.fused == 'auto'
        x, scores = moved(images(1, window, window, 64), dtype), moved(scores_for(grid, 1), dtype)
        out, _ = (layer if function is None else function)(x, grid, scores)
        assert calls() == []
        layer.fused = False
        torch.testing.assert_close(out, layer(x, grid, scores)[0])

    def test_large_windows(self, calls):
        self.check(calls, window=9)

    def test_wide_heads(self, calls):
        grid = WindowGrid(4, 4, 4)
        layer = moved(LessAttention(144, 1, 4), torch.float32)
        scores = moved(scores_for(grid, 1, heads=1), torch.float32)
        layer(moved(images(1, 4, 4, 144), torch.float32), grid, scores)
        assert calls() == []

    def test_float64(self, calls):
        self.check(calls, dtype=torch.float64)

    def test_attention_dropout_while_it_is_active(self, calls):
        layer = layer_for(4, 32, attn_drop_rate=0.5)
        x, grid = moved(images(1, 4, 4, 64), torch.float32), WindowGrid(4, 4, 4)
        scores = moved(scores_for(grid, 1), torch.float32)
        moved(layer, torch.float32)(x, grid, scores)
        assert calls() == []
        layer.eval()(x, grid, scores)
        assert len(calls()) == 1

    def test_recorded(self, calls):
        grid, layer = WindowGrid(4, 4, 4), moved(layer_for(4, 32), torch.float32)
        x, scores = images(1, 4, 4, 64), scores_for(grid, 1)

        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
                return self.layer(x, grid, scores)

        given = moved(x, torch.float32), moved(scores, torch.float32)
        torch.jit.trace(Wrapper(), given, check_trace=False)  # which would also just run it
        torch.export.export(Wrapper(), given)
        assert calls() == []

    def test_functions_of_functions(self, calls):
        layer = layer_for(4, 32)

        def mapped(x: Tensor, grid: WindowGrid, scores: Tensor):
            outs = torch.func.vmap(lambda t: layer(t, grid, scores)[0])(x[None])
            return outs[0], scores

        with torch.no_grad():
            self.check(calls, layer, function=mapped)


@pytest.mark.skipif(INTERPRETED, reason='takes 12 GiB, which the interpreter would copy')
@torch.no_grad()
def test_scores_of_more_than_two_to_the_31_elements():
    last = WindowGrid(8, 8, 8)
    windows = 2**31 // 64**2 + 1
    layer = moved(layer_for(8, 16, heads=1), torch.float16)
    scores = moved(scores_for(last, 1, heads=1), torch.float16)
    v = moved(images(1, 8, 8, 16), torch.float16)
    many_scores, many = scores.new_zeros(windows, *scores.shape[1:]), v.new_zeros(windows, 8, 8, 16)
    many_scores[-1:], many[-1:] = scores, v
    found = fused_less_attention(many, many_scores, layer.psi, layer.theta, last)
    expected = fused_less_attention(v, scores, layer.psi, layer.theta, last)
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours[-1:], right)
