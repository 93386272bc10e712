"""Training that keeps little: the same numbers as PyTorch's own, from modules that are plain."""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from small import HALVES, seeded
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from mmlavit import LaViT
from mmlavit.compat import repair_torchvision
from mmlavit.ops.attend import masked_softmax
from mmlavit.ops.lean import Lean


@pytest.fixture(autouse=True)
def _first_weights():
    print('seed 0')
    torch.manual_seed(0)


class Normed(nn.Sequential):
    """LayerNorm, linear layer, GELU, dropout of nothing, linear layer."""

    inputs = ((3, 5, 6),)

    def __init__(self) -> None:
        layers = nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Dropout(0.0), nn.Linear(10, 4)
        super().__init__(*layers)


class Attending(nn.Module):
    """A softmax over keys, some of them padded, dropout of nothing, and a product."""

    inputs = (4, 2, 3, 3), (4, 2, 3, 5)

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, scores: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(2, 1, 1, 3, dtype=scores.dtype)
        mask[1, ..., 2] = -torch.inf
        return self.drop(masked_softmax(scores, mask)) @ v


CASES = [Normed, Attending]


def made(case: type[nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list]:
    generator = seeded(1)
    inputs = [torch.randn(shape, generator=generator) for shape in case.inputs]
    return case().to(dtype), [x.to(dtype).requires_grad_() for x in inputs]


def gradients(out: Tensor, model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    total = (out.double() * weights).square().sum()
    return list(torch.autograd.grad(total, [*inputs, *model.parameters()]))


def assert_same(lean: Tensor, plain: Tensor, model: nn.Module, inputs: list[Tensor]) -> None:
    assert torch.equal(lean, plain)
    pairs = zip(gradients(lean, model, inputs), gradients(plain, model, inputs), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize('autocast', [None, *HALVES])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('case', CASES)
def test_numbers_are_pytorchs(case, dtype, autocast):
    model, inputs = made(case, dtype)
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        with Lean():
            lean = model(*inputs)
        plain = model(*inputs)
    assert lean.dtype == plain.dtype
    tol = 1e-2 if autocast else {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(lean, plain, rtol=tol, atol=tol)
    pairs = zip(gradients(lean, model, inputs), gradients(plain, model, inputs), strict=True)
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= tol * other.norm() + 1e-12


@pytest.mark.parametrize('case', CASES)
def test_the_same_weights_train_both_ways_under_one_autocast(case):
    """Autocast keeps narrow copies of weights; those that a lean layer used have gradients, too."""
    model, inputs = made(case, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        with Lean():
            model(*inputs)
        out = model(*inputs)
    assert all(g.any() for g in gradients(out, model, inputs))


@pytest.mark.parametrize('case', CASES)
def test_gradients_and_those_of_gradients(case):
    model, inputs = made(case)

    def run(*tensors: Tensor) -> Tensor:
        with Lean():
            return model(*tensors)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize('case', CASES)
def test_only_what_is_wanted_is_computed(case):
    model, inputs = made(case)
    model.requires_grad_(False)
    inputs[0].requires_grad_(len(inputs) == 1)
    with Lean():
        out = model(*inputs)
    out.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert [x.grad is not None for x in inputs] == [x.requires_grad for x in inputs]


class Box:
    """Something kept for the backward pass, without its graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # its memory is not given to others, then


def kept(model: nn.Module, inputs: list[Tensor], lean: bool = False) -> int:
    """Bytes that wait for the backward pass, without inputs and weights."""
    boxes = weakref.WeakSet()

    def pack(x: Tensor) -> Box:
        box = Box(x)
        boxes.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: None):
        if lean:
            with Lean():
                out = model(*inputs)
        else:
            out = model(*inputs)
    assert tree_flatten(out)[0][0].requires_grad
    storages = [box.tensor.untyped_storage() for box in boxes]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for x in (*inputs, *model.parameters()):
        sizes.pop(x.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def test_hidden_activations_are_kept_once_and_attention_not_at_all():
    model, inputs = made(Normed, torch.float32)
    hidden, tokens = 15 * 10 * 4, 15 * 6 * 4
    assert kept(model, inputs, lean=False) >= tokens + 2 * hidden
    assert kept(model, inputs, lean=True) == hidden
    model, inputs = made(Attending, torch.float32)
    mask = 2 * 3 * 4
    assert kept(model, inputs, lean=True) <= mask < kept(model, inputs, lean=False)


@pytest.mark.parametrize('case', CASES)
def test_under_checkpointing(case):
    model, inputs = made(case)

    def run(*tensors: Tensor) -> Tensor:
        with Lean():
            return model(*tensors)

    lean = checkpoint(run, *inputs, use_reentrant=False)
    assert_same(lean, model(*inputs), model, inputs)


@pytest.mark.parametrize('change', [lambda x: x.mul_(2), lambda x: x * 2, lambda x: x.clone()])
@pytest.mark.parametrize('place', [0, 2])
def test_what_a_hook_makes_of_a_result_counts(change, place):
    """In place or not: the gradients are those of what was computed."""
    model, inputs = made(Normed)
    model[place].register_forward_hook(lambda module, args, out: change(out))
    with Lean():
        lean = model(*inputs)
    assert_same(lean, model(*inputs), model, inputs)


def test_an_input_that_changes_later_is_noticed():
    """As PyTorch itself notices it; nothing wrong is computed in silence."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with Lean():
        source = x * 1
        out = F.linear(F.gelu(source), weight)
        source.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_dropout_drops():
    model, inputs = made(Attending, torch.float32)
    model.drop.p = 0.5
    torch.manual_seed(3)
    with Lean():
        lean = model(*inputs)
    torch.manual_seed(3)
    plain = model(*inputs)
    assert not torch.equal(model(*inputs), plain)
    assert_same(lean, plain, model, inputs)


@pytest.mark.parametrize('most, autocast', [(0.70, True), (0.62, False)])
def test_a_training_step_keeps_less_than_swin(most, autocast):
    """LaViT-S beside mmdet's Swin-T, in bytes."""
    repair_torchvision()
    pytest.importorskip('mmdet')
    from mmdet.models.backbones.swin import SwinTransformer

    x = torch.zeros(1, 3, 512, 512)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        ours, swins = (
            kept(model(drop_path_rate=0.0), [x])
            for model in (functools.partial(LaViT, 'small'), SwinTransformer)
        )
    assert ours < most * swins
