"""The kernels are compared with PyTorch before they compute anything that counts.

`test_fused_attention.py` runs this file as it does `fused_attention_cases.py`. What was found is
kept for the process, so each test has sizes of its own, which nobody has compared yet.
"""

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from fused_attention_cases import DEVICE, INTERPRETED, gradients, layer_for, moved, scores_for
from small import images, small_lavit
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmlavit.models.attention import LessAttention
from mmlavit.models.windows import WindowGrid
from mmlavit.ops import fused_kernels
from mmlavit.ops.fused_check import ShapeClass, disagreement, has_agreed

# Channels of a head: a value for each test, or case of it.
FRESH = itertools.count(17)
# What a kernel writes, and where it is among its arguments.
FORWARD = {'A': 4, 'Z': 5}
BACKWARD = {'scores': 6, 'Psi': 7, 'Theta': 8, 'V': 9}


class Launches:
    """Kernels in the place of both, which count how often they are launched."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts = {'forward': 0, 'backward': 0}
        self.after: dict[str, Callable[[tuple], None]] = {}
        for name in self.counts:
            patch.setattr(fused_kernels, name, self._kernel(name, getattr(fused_kernels, name)))

    def _kernel(self, name: str, kernel: object) -> object:
        outer = self

        class Kernel:
            def __getitem__(self, programs: tuple[int]) -> Callable[..., None]:
                def launch(*args: object, **options: object) -> None:
                    outer.counts[name] += 1
                    kernel[programs](*args, **options)
                    outer.after.get(name, lambda args: None)(args)

                return launch

        return Kernel()

    def __call__(self) -> tuple[int, int]:
        """How many since the last call: forward, backward."""
        found = tuple(self.counts.values())
        self.counts = dict.fromkeys(self.counts, 0)
        return found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.fixture(autouse=True)
def _no_other_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='The Triton kernel')
        yield


def case(
    dtype: torch.dtype = torch.float32, window: int = 4, batch: int = 2
) -> tuple[LessAttention, Tensor, WindowGrid, Tensor]:
    """A layer of a class of its own, and what it takes."""
    head_dim = next(FRESH)
    grid = WindowGrid(window + 1, 2 * window, window)
    layer = moved(layer_for(window, head_dim), dtype)
    x = moved(images(batch, grid.height, grid.width, 2 * head_dim), dtype)
    return layer, x, grid, moved(scores_for(grid, batch), dtype)


def plain(layer: LessAttention, x: Tensor, grid: WindowGrid, scores: Tensor) -> tuple:
    layer = copy.deepcopy(layer)
    layer.fused = False
    return layer(x, grid, scores)


def assert_same(found: tuple, expected: tuple) -> None:
    """What PyTorch computed, to the last bit."""
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_on_first_use_it_is_compared_and_from_then_on_used(launches):
    layer, *given = case()
    with torch.no_grad():
        found = layer(*given)
        assert launches() == (2, 0)
        for ours, right in zip(found, plain(layer, *given), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
        layer(*given)
        copy.deepcopy(layer)(*given)
        assert launches() == (2, 0)
    # With gradients another kernel runs as well.
    layer(*given)[0].sum().backward()
    assert launches() == (2, 2)
    layer(*given)[0].sum().backward()
    assert launches() == (1, 1)


@pytest.mark.skipif(not INTERPRETED, reason='a GPU multiplies bfloat16')
def test_a_machine_that_computes_wrongly():
    """Triton's interpreter, as it comes, takes the bits of bfloat16 for whole numbers."""
    x = images(1, 3, 33, 40).bfloat16()
    model = small_lavit(window_sizes=8).bfloat16()
    expected = small_lavit(window_sizes=8, fused_attention=False).bfloat16()
    with torch.no_grad(), pytest.warns(UserWarning, match='kernel .* is wrong') as warned:
        for _ in range(2):
            assert_same(model(x), expected(x))
    assert len(warned) == 1
    said = str(warned[0].message)
    assert all(part in said for part in ('cpu', 'bfloat16', '8 x 8', 'Z is off by', 'PyTorch by'))


def double(x: Tensor) -> None:
    x *= 2


def one_number(x: Tensor) -> None:
    x.view(-1)[x.numel() // 2] += 1 + x.abs().max()


def nothing_there(x: Tensor) -> None:
    x.view(-1)[-1] = float('nan')


@pytest.mark.parametrize('spoil', [double, one_number, nothing_there])
@pytest.mark.parametrize('name', [*FORWARD, *BACKWARD])
def test_a_kernel_that_is_wrong_in_one_place(name, spoil, launches):
    where = FORWARD | BACKWARD
    launches.after['forward' if name in FORWARD else 'backward'] = lambda args: spoil(
        args[where[name]]
    )
    layer, *given = case()
    with pytest.warns(UserWarning, match=f'wrong: (the gradient of )?{name} is off') as warned:
        found = [gradients(layer, *given, 'auto', 'both') for _ in range(2)]
    assert len(warned) == 1
    assert launches() == (1, 1)
    expected = gradients(layer, *given, False, 'both')
    assert all(torch.equal(grads[key], expected[key]) for grads in found for key in expected)


def test_forward_may_be_right_where_backward_is_not(launches):
    launches.after['backward'] = lambda args: args[BACKWARD['Psi']].mul_(1.01)
    layer, *given = case()
    with torch.no_grad():
        layer(*given)
        assert launches() == (2, 0)
    with pytest.warns(UserWarning, match='the gradient of Psi is off'):
        layer(*given)
    with torch.no_grad():
        layer(*given)
    assert launches() == (2, 1)


@pytest.mark.parametrize('kernel', ['forward', 'backward'])
def test_a_kernel_that_does_not_run(kernel, launches):
    def fail(args: tuple) -> None:
        raise RuntimeError('Failed to find C compiler')

    launches.after[kernel] = fail
    layer, *given = case()
    said = 'does not run: RuntimeError: Failed to find C compiler'
    with pytest.warns(UserWarning, match=said) as warned:
        found = [layer(*given) for _ in range(2)]
    assert len(warned) == 1
    for each in found:
        assert_same(each, plain(layer, *given))


def test_forced_nothing_is_compared(launches):
    launches.after['forward'] = lambda args: double(args[FORWARD['Z']])
    layer, *given = case()
    right = plain(layer, *given)[0]
    bias = layer.proj.bias
    layer.fused = True
    found = layer(*given)[0]
    torch.testing.assert_close(found - bias, 2 * (right - bias), rtol=1e-4, atol=1e-4)
    assert launches() == (1, 0)
    layer.fused = False
    assert torch.equal(layer(*given)[0], right)
    assert launches() == (0, 0)


def exported(layer: nn.Module, x: Tensor, grid: WindowGrid, scores: Tensor) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x, grid, scores)

    torch.jit.trace(Wrapper(), (x, scores), check_trace=False)


def transformed(layer: nn.Module, x: Tensor, grid: WindowGrid, scores: Tensor) -> None:
    torch.func.vmap(lambda t: layer(t, grid, scores)[0])(x[None])


def counted(layer: nn.Module, x: Tensor, grid: WindowGrid, scores: Tensor) -> None:
    with FlopCounterMode(display=False):
        layer(x, grid, scores)


def called(layer: nn.Module, *given: object) -> None:
    layer(*given)


@pytest.mark.parametrize(
    'options, call, said',
    [
        (dict(window=9), called, 'more than 8 x 8'),
        (dict(dtype=torch.float64), called, 'neither float32'),
        (dict(), exported, 'recorded'),
        (dict(), transformed, 'torch.func'),
        (dict(), counted, 'operators'),
    ],
    ids=str,
)
def test_forced_where_it_cannot_run(options, call, said):
    layer, *given = case(**options)
    layer.fused = True
    with pytest.raises(RuntimeError, match=f"fused_attention=True, but .*{said}.*'auto'"):
        call(layer, *given)
    layer.fused = 'auto'
    call(layer, *given)


def test_forced_with_dropout():
    layer, *given = case()
    layer.fused, layer.attn_drop.p = True, 0.5
    with pytest.raises(RuntimeError, match='attention dropout is active'):
        layer(*given)
    layer.eval()(*given)


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that return anything but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(r.alias_info is None for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('backward, limit', [(False, 200), (True, 400)])
def test_what_a_comparison_costs(backward, limit, launches):
    device = moved(images(1), torch.float32).device
    kind = ShapeClass(device, torch.float16, 8, 64, False, backward)
    with Operators() as operators:
        assert disagreement(kind) == ''
    assert launches() == (1, int(backward))
    assert 100 < operators.count < limit


class TestTheComparisonIsNotNoticed:
    def test_random_numbers(self, launches):
        layer, *given = case()
        state = torch.get_rng_state()
        layer(*given)
        assert launches() == (2, 1)
        assert torch.equal(torch.get_rng_state(), state)
        if not INTERPRETED:
            layer, *given = case()
            state = torch.cuda.get_rng_state()
            layer(*given)
            assert torch.equal(torch.cuda.get_rng_state(), state)

    @pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_modes(self, mode, launches):
        layer, *given = case()
        with mode(), torch.autocast(DEVICE, dtype=torch.float16):
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            out = layer(*given)[0]
            after = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            # Autocast is on as before.
            assert layer.v(given[0]).dtype == out.dtype == torch.float16
        assert after == before
        assert launches() == (2, int(mode is torch.enable_grad))

    def test_defaults(self, launches):
        layer, *given = case()
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        try:
            layer(*given)
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
        assert launches() == (2, 1)

    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpoints(self, reentrant, launches):
        """A reentrant one asks for gradients for the first time in the backward pass."""
        layer, x, grid, scores = case()
        x = x.requires_grad_()
        out = checkpoint(layer, x, grid, scores, use_reentrant=reentrant)[0]
        out.sum().backward()
        assert launches() == ((4, 2) if reentrant else (3, 2))
        found, x.grad = x.grad, None
        plain(layer, x, grid, scores)[0].sum().backward()
        torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-4)

    def test_what_the_caller_keeps(self):
        layer, *given = case()
        kept: list[int] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                layer(*given)
        first, second = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        assert first == second

    def test_threads_compare_once(self, launches):
        layer, x, grid, scores = case()
        start, found = threading.Barrier(4), []

        def ask() -> None:
            start.wait()
            found.append(has_agreed(layer.v(x), scores, grid))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 4
        assert launches() == (1, 1)


class TestCompiled:
    """Nothing is compared while a model is recorded."""

    def compile(self, layer: LessAttention) -> tuple[nn.Module, list[list[str]]]:
        seen: list[list[str]] = []

        def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable:
            seen.append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        compiler = aot_autograd(fw_compiler=backend)
        return torch.compile(copy.deepcopy(layer), backend=compiler, fullgraph=True), seen

    def test_before_it_was_compared(self, launches):
        layer, *given = case()
        expected = plain(layer, *given)
        with pytest.warns(UserWarning, match='run it once before') as warned:
            for _ in range(2):
                compiled, seen = self.compile(layer)
                for ours, right in zip(compiled(*given), expected, strict=True):
                    torch.testing.assert_close(ours, right)
                assert seen and not any('mmlavit' in name for graph in seen for name in graph)
        assert len(warned) == 1
        assert launches() == (0, 0)
        # It is still compared when it is first run.
        layer(*given)
        assert launches() == (2, 1)

    @pytest.mark.parametrize('forced', [False, True])
    def test_compared_before_or_forced(self, forced, launches):
        layer, *given = case()
        if forced:
            layer.fused = True
        else:
            layer(*given)
            assert launches() == (2, 1)
        compiled, seen = self.compile(layer)
        compiled(*given)[0].sum().backward()
        assert seen[0].count('mmlavit.less_attention.default') == 1
        assert launches() == (1, 1)

    @pytest.mark.skipif(INTERPRETED, reason='a GPU alone has CUDA graphs')
    def test_captured_before_it_was_compared(self, launches):
        layer, *given = case()
        with torch.no_grad():
            expected = plain(layer, *given)
            with pytest.warns(UserWarning, match='run it once before'):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = layer(*given)
            graph.replay()
        assert_same(found, expected)
        assert launches() == (0, 0)
