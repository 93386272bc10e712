"""Training under autocast to bfloat16: a step against one by hand, and in each toolbox."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import short_training
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from small import ARCH, images
from torch import nn

from mmlavit import LaViT
from mmlavit.compat import repair_torchvision
from mmlavit.datasets.shapes import ShapesRecipe, make_shapes


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('shapes')
    make_shapes(root, ShapesRecipe(4, 2, 96), progress=False)
    return root


def lavit() -> LaViT:
    torch.manual_seed(0)
    return LaViT(ARCH, drop_path_rate=0.0)


def loss_of(model: LaViT, x: torch.Tensor) -> torch.Tensor:
    return sum((y.float() ** 2).mean() for y in model(x))


def outputs_of_linear_layers(model: nn.Module) -> list[torch.dtype]:
    """Filled with what the first linear layer gives, each time that it is called."""
    seen: list[torch.dtype] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    return seen


@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_a_step_is_one_by_hand(accumulative_counts):
    model, x = lavit(), images(2, 3, 32, 48).float()
    by_hand = copy.deepcopy(model)
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='BFloat16OptimWrapper',
            optimizer=dict(type='SGD', lr=0.1),
            accumulative_counts=accumulative_counts,
        ),
    )
    wrapper.initialize_count_status(model, 0, 2)
    seen = outputs_of_linear_layers(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for step in range(2):
        with wrapper.optim_context(model):
            loss = loss_of(model, x)
        wrapper.update_params(loss)
        with torch.autocast('cpu', torch.bfloat16):
            expected = loss_of(by_hand, x)
        assert torch.equal(loss, expected)
        (expected / accumulative_counts).backward()
        if (step + 1) % accumulative_counts == 0:
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b), name
    assert seen == [torch.bfloat16] * 2
    # Outside it is float32, as in validation.
    loss_of(model, x)
    assert seen[2:] == [torch.float32]


@pytest.mark.parametrize(
    'name',
    [
        *('lavit_n_shapes', 'upernet_lavit_n_shapes', 'retinanet_lavit_n_shapes'),
        'maskrcnn_lavit_n_shapes',
    ],
)
def test_trains_in_each_toolbox_and_goes_on_in_float32(name, shapes, tmp_path):
    repair_torchvision()
    kind = dict(optim_wrapper__type='BFloat16OptimWrapper')
    runner = Runner.from_cfg(short_training(name, shapes, tmp_path, **kind))
    seen = outputs_of_linear_layers(runner.model.backbone)
    runner.train()
    assert seen == [torch.bfloat16]
    weights = runner.model.state_dict().values()
    assert all(w.isfinite().all() and w.dtype != torch.bfloat16 for w in weights)

    more = dict(train_cfg__max_iters=2, resume=True)
    again = Runner.from_cfg(short_training(name, shapes, tmp_path, **more))
    again.train()
    assert again.iter == 2
