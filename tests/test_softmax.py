"""The softmax computed again in the backward pass: the same values and gradients, less kept."""

import math

import pytest
import torch
from small import seeded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmlavit.ops.softmax
from mmlavit.ops.softmax import softmax_product

WINDOWS, IMAGES, HEADS, N, D = 2, 3, 2, 5, 4


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Scores and values."""
    shapes = (N, N), (N, D)
    return [
        torch.randn(IMAGES * WINDOWS, HEADS, *s, generator=seeded(1), dtype=dtype).requires_grad_()
        for s in shapes
    ]


def key_mask() -> Tensor:
    """The second window of every image has two padded keys."""
    mask = torch.zeros(WINDOWS, 1, 1, N, dtype=torch.float64)
    mask[1, ..., -2:] = -math.inf
    return mask


def naive(scores: Tensor, v: Tensor, masked: bool) -> Tensor:
    """Window by window, over the real keys alone."""
    out = []
    for i, (a, values) in enumerate(zip(scores, v, strict=True)):
        keys = N - 2 if masked and i % WINDOWS == 1 else N
        weights = a[..., :keys].exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ values[:, :keys])
    return torch.stack(out)


@pytest.mark.parametrize('frozen', [None, 0, 1])
@pytest.mark.parametrize('masked', [False, True])
def test_values_and_gradients(masked, frozen):
    tensors = inputs()
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    ours = softmax_product(*tensors, key_mask() if masked else None)
    expected = naive(*tensors, masked)
    torch.testing.assert_close(ours, expected)
    wanted = [t for t in tensors if t.requires_grad]
    grad = torch.randn(ours.shape, generator=seeded(2), dtype=ours.dtype)
    found = torch.autograd.grad(ours, wanted, grad)
    for a, b in zip(found, torch.autograd.grad(expected, wanted, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(masked):
    mask = key_mask() if masked else None
    tensors = [t[:WINDOWS, :1].detach().requires_grad_() for t in inputs()]
    assert torch.autograd.gradcheck(lambda a, v: softmax_product(a, v, mask), tensors)
    assert torch.autograd.gradgradcheck(lambda a, v: softmax_product(a, v, mask), tensors)


def test_only_what_is_there_anyway_is_kept():
    tensors, mask, kept = inputs(), key_mask(), []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        softmax_product(*tensors, mask)
    assert kept == [t.data_ptr() for t in (*tensors, mask)]


def test_under_checkpointing():
    tensors = inputs()
    found = torch.autograd.grad(
        checkpoint(softmax_product, *tensors, key_mask(), use_reentrant=False).sum(), tensors
    )
    expected = torch.autograd.grad(naive(*tensors, masked=True).sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_takes_the_plain_way(monkeypatch):
    monkeypatch.setattr(mmlavit.ops.softmax, '_SoftmaxProduct', None)
    tensors = inputs(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = softmax_product(*tensors)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), naive(*tensors, masked=False), rtol=0.02, atol=0.02)


def test_no_gradient_reaches_a_step_with_none_wanted():
    scores, v = (t.detach() for t in inputs())
    assert not softmax_product(scores, v).requires_grad
