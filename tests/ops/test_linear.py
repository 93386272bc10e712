"""The linear layer by whichever route: the same numbers, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from mmlavit.ops.linear import linear, linear_gelu, prefers_onednn

SHAPES = [(1, 5), (7, 3), (2, 3, 4, 6), (1, 1, 1, 9), (2, 24, 24, 32), (5, 2, 16, 16)]


def inputs(shape: tuple[int, ...], out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    print('seed 0')
    torch.manual_seed(0)
    shapes = (shape, (out, shape[-1]), (out,))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize('out', [1, 8, 33])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('biased', [True, False])
def test_values_and_gradients_are_those_of_float64(shape, out, biased):
    x, weight, bias = inputs(shape, out, torch.float64)
    args = (x, weight, bias) if biased else (x, weight)
    expected = F.linear(*args)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, args, grad)
    single = [a.detach().float().requires_grad_() for a in args]
    got = linear(*single)
    assert got.shape == expected.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, single, grad.float()), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    'view',
    [
        lambda x: x.mT,
        lambda x: x[:, ::2],
        lambda x: x[:, 1:, 1:],
        lambda x: x.permute(2, 1, 0),
        lambda x: x[:1].expand(4, -1, -1),
    ],
)
def test_views(view):
    x, weight, bias = inputs((4, 9, 9), 5, torch.float32)
    x = view(x)
    weight = weight[:, : x.shape[-1]]
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_other_types_take_pytorchs_route(dtype):
    x, weight, bias = inputs((3, 4), 5, dtype)
    assert not prefers_onednn(x)
    if dtype == torch.float64:  # torch 2.1 has no products in float16 on a CPU
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        # Which leaves float64 as it is.
        assert prefers_onednn(x) == (dtype == torch.float16 and has_bfloat16())


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('biased', [True, False])
@pytest.mark.parametrize('kind', ['bfloat16', 'autocast', 'autocast of bfloat16'])
def test_values_and_gradients_in_bfloat16(shape, biased, kind):
    """As far from float64 as PyTorch's own linear layer is, at most, and of the same types."""
    wide = inputs(shape, 33, torch.float64)[: 3 if biased else 2]
    narrow = torch.bfloat16
    types = [narrow if kind == 'bfloat16' else torch.float32] * len(wide)
    if kind == 'autocast of bfloat16':
        types[0] = narrow
    # What bfloat16 can hold, so that only the computation rounds.
    wide = [a.detach().to(narrow).double().requires_grad_() for a in wide]
    given = [a.detach().to(t).requires_grad_() for a, t in zip(wide, types, strict=True)]
    expected = F.linear(*wide)
    grad = torch.randn_like(expected).to(narrow)
    wanted = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    found = []
    for function in (linear, F.linear):
        with torch.autocast('cpu', dtype=narrow, enabled=kind != 'bfloat16'):
            out = function(*given)
        found.append([out, *torch.autograd.grad(out, given, grad)])
    for ours, theirs, exact in zip(*found, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        # Half a unit in the last place, of the largest, on top: the order of a sum is free.
        slack = exact.abs().max() * 2**-9
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + slack
    with torch.no_grad(), torch.autocast('cpu', dtype=narrow, enabled=kind != 'bfloat16'):
        assert torch.equal(linear(*given), found[0][0])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_gelu_after_a_linear_layer(shape, dtype):
    x, weight, bias = (a.detach() for a in inputs(shape, 33, dtype))
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    got = linear_gelu(x, weight, bias)
    assert got.dtype == dtype and got.shape == expected.shape
    eps = torch.finfo(dtype).eps
    largest = F.linear(x.double(), weight.double(), bias.double()).abs().max()
    assert (got.double() - expected).abs().max() <= 4 * eps * largest + 1e-6


def test_mixed_types_are_refused_as_by_pytorch():
    x, weight, bias = inputs((3, 4), 5, torch.float32)
    for function in (linear, F.linear):
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match='dtype|type'):
                function(x.bfloat16(), weight, bias)


def has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_compiling'),
    reason='torch 2.1 does not tell nested functions that it compiles',
)
def test_compiled_as_a_plain_linear_layer():
    found = []

    def backend(graph, example_inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(linear, backend=backend)(torch.zeros(2, 4), torch.zeros(3, 4))
    assert found and not any('conv' in name for name in found)


def test_the_fast_route_is_taken_where_it_can_be(monkeypatch):
    x = torch.zeros(2, 3)
    assert prefers_onednn(x) == torch.backends.mkldnn.is_available()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert prefers_onednn(x) == has_bfloat16()
    monkeypatch.setattr('mmlavit.ops.linear._onednn_linear', None)
    assert not prefers_onednn(x)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='torch without oneDNN')
@pytest.mark.parametrize('grad', [False, True])
def test_onednn_can_be_switched_off(grad, monkeypatch):
    """By PyTorch's own switch, which PyTorch itself honours in its convolutions."""
    # As on an AMD processor with several threads, where gradients go to oneDNN too.
    monkeypatch.setattr('mmlavit.ops.linear._mkl_is_slow', lambda: True)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    detours = {'mkldnn::_linear_pointwise'}
    if grad:
        detours.add('aten::convolution_backward')
    with torch.backends.mkldnn.flags(enabled=False):
        assert not detours & operators_of_a_step(grad)
    assert detours <= operators_of_a_step(grad)


def operators_of_a_step(grad: bool) -> set[str]:
    """What PyTorch is asked to compute for a linear layer, and its gradients if wanted."""
    args = inputs((5, 4), 3, torch.float32)
    with torch.profiler.profile() as profile, torch.set_grad_enabled(grad):
        y = linear(*args)
        if grad:
            y.sum().backward()
    return {event.name for event in profile.events()}


def test_flops_are_counted():
    x, weight, bias = inputs((5, 4), 3, torch.float32)
    counts = []
    for function in (linear, F.linear):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(x, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 5 * 4 * 3] * 2


def test_recorded_as_a_plain_linear_layer():
    """What is exported holds no detour that pays only here."""
    given = torch.zeros(2, 4), torch.zeros(3, 4)
    traced = torch.jit.trace(linear, given)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert 'aten::linear' in kinds and 'aten::_convolution' not in kinds
    with torch.no_grad():
        made = make_fx(lambda x, weight: linear(x, weight))(*given)
    assert all(n.target.namespace == 'aten' for n in made.graph.nodes if n.op == 'call_function')


def test_second_derivatives():
    x, weight, bias = inputs((3, 4), 5, torch.float32)
    found = []
    for function in (linear, F.linear):
        (grad,) = torch.autograd.grad(function(x, weight, bias).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, weight, bias)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_functional_transforms():
    """Gradients of each sample, by vmap over grad."""
    x, weight, bias = (t.detach() for t in inputs((3, 4), 5, torch.float32))
    found = []
    for function in (linear, F.linear):

        def loss(w, x, function=function):
            return function(x, w, bias).square().sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x))
    torch.testing.assert_close(*found)
