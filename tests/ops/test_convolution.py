"""Depthwise convolutions of maps of one or two rows: PyTorch's numbers, without oneDNN's detour."""

from contextlib import nullcontext

import pytest
import torch
from small import seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmlavit import LaViT
from mmlavit.ops.lean import Lean


class Backwards(TorchDispatchMode):
    """Notes the rows of maps whose 3 x 3 depthwise convolutions are differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        backward = func is torch.ops.aten.convolution_backward.default
        if backward and args[2].shape[1:] == (1, 3, 3):
            self.rows.append(args[1].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('padding', [1, 2, (1, 2)])
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (2, 1), (2, 2), (2, 5), (3, 2)])
def test_low_maps_have_pytorchs_numbers(size, padding):
    print('seed 3')
    generator = seeded(3)
    conv = nn.Conv2d(4, 4, 3, groups=4, padding=padding).double()
    conv.weight.data.copy_(torch.randn(4, 1, 3, 3, generator=generator))
    x = torch.randn(2, *size, 4, generator=generator, dtype=torch.float64).permute(0, 3, 1, 2)
    found = []
    for mode in (nullcontext(), Lean()):
        x = x.detach().requires_grad_()
        with mode:
            out = conv(x)
        grads = torch.autograd.grad((out * out).sum(), (x, conv.weight, conv.bias))
        found.append((out, *grads))
    for plain, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, plain)


@pytest.mark.parametrize('side', [32, 64])
def test_no_kernel_is_higher_than_its_map_in_training(side):
    print('seed 4')
    model = LaViT('nano').train()
    image = torch.randn(2, 3, side, side, generator=seeded(4))
    with Backwards() as noted:
        model(image)[-1].sum().backward()
    # A position convolution and that of the MLP, in each layer.
    assert len(noted.rows) == 2 * sum(len(stage.blocks) for stage in model.stages)
    assert min(noted.rows) == 3
