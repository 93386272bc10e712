"""LaViT on torch and numpy alone: what `make test-oldest` runs where nothing else is installed.

pytest does not find this file by itself. With MMEngine around, `test_registry.py` blocks it.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import mmlavit
from mmlavit.models import LaViT

ABSENT = 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision', 'cv2', 'matplotlib'


@pytest.mark.parametrize('name', ABSENT)
def test_is_absent(name: str) -> None:
    assert find_spec(name) is None


def test_is_a_plain_module() -> None:
    model = LaViT('nano', out_indices=(1, 3))
    assert isinstance(model, nn.Module)
    assert {kind.__module__.split('.')[0] for kind in LaViT.__mro__} <= {
        'mmlavit',
        'torch',
        'builtins',
    }
    assert model.out_channels == (64, 320) and model.strides == (8, 32)
    assert model.feature_info.channels() == [64, 320] and model.feature_info.reduction() == [8, 32]
    assert isinstance(LaViT.out_channels, property) and isinstance(LaViT.strides, property)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('options', [{}, {'with_cp': True}], ids=['', 'with_cp'])
def test_trains(options: dict, autocast: bool) -> None:
    """And in evaluation, where other code runs, it has learned the same."""
    print('seed 0')
    torch.manual_seed(0)
    model = LaViT('nano', out_indices=(1, 3), drop_path_rate=0.0, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(2, 3, 40, 56)

    def loss_of() -> torch.Tensor:
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            maps = model(images)
        assert [tuple(m.shape) for m in maps] == [(2, 64, 5, 7), (2, 320, 2, 2)]
        return sum(m.float().square().mean() - m.float()[:, 0].mean() for m in maps)

    losses = []
    for _ in range(8):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        final = loss_of().item()
        assert model.eval() and loss_of().item() == pytest.approx(final, abs=1e-2)
    assert final < losses[-1] < losses[0]

    twin = LaViT('nano', out_indices=(1, 3), **options).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(twin(images), model(images), strict=True):
            assert torch.equal(a, b)


def test_the_loss_on_its_attention() -> None:
    attn = torch.rand(2, 1, 16, 16).softmax(dim=-1).requires_grad_()
    mmlavit.diagonality_preserving_loss(attn).backward()
    assert attn.grad.any()


def test_what_mmengine_is_needed_for_says_so() -> None:
    with pytest.raises(ImportError, match='MMEngine'):
        LaViT('nano', init_cfg=dict(checkpoint='weights.pth'))
    with pytest.raises(ImportError, match='onedl-mmengine'):
        _ = mmlavit.DiagonalityLossHook
    assert set(mmlavit.__all__) == {
        'ARCHS',
        'LaViT',
        'LogitAdjustedLoss',
        'diagonality_preserving_loss',
    }
