"""The backbone through ``torch.hub``, with MMEngine and without anything but torch."""

import runpy
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_ran, run_python

from mmlavit import ARCHS, LaViT

MODELS = [f'lavit_{arch}' for arch in ARCHS]


def load(name: str, **options: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source='local', **options)


def test_there_is_an_entry_for_each_arch_and_no_other():
    """By the rules of ``torch.hub.list`` and ``help``, which ask GitHub alone."""
    names = runpy.run_path(str(ROOT / 'hubconf.py'))
    entries = [name for name, it in names.items() if callable(it) and not name.startswith('_')]
    assert sorted(entries) == sorted(MODELS)
    assert all('LaViT' in names[name].__doc__ for name in entries)


@pytest.mark.parametrize('arch', ARCHS)
def test_is_the_backbone(arch):
    print('seed 0')
    torch.manual_seed(0)
    loaded = load(f'lavit_{arch}', out_indices=(0, 2), window_sizes=4)
    torch.manual_seed(0)
    model = LaViT(arch, out_indices=(0, 2), window_sizes=4)
    assert type(loaded) is LaViT
    x = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        assert all(map(torch.equal, loaded.eval()(x), model.eval()(x)))


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r'pretrained=True: lavit_tiny has no trained weights'):
        load('lavit_tiny', pretrained=True)
    with pytest.raises(ValueError, match='out_indices'):
        load('lavit_tiny', out_indices=(4,))


TORCH_ALONE = """
import sys
missing = 'mmengine mmcv mmdet mmseg mmpretrain timm torchvision numpy scipy cv2 PIL matplotlib'
sys.modules.update(dict.fromkeys(missing.split()))
import torch
model = torch.hub.load(REPOSITORY, 'lavit_nano', source='local', out_indices=(1, 3))
maps = model(torch.randn(1, 3, 64, 64))
sum(m.square().mean() for m in maps).backward()
print([tuple(m.shape) for m in maps], model.feature_info.channels())
"""


def test_torch_alone_is_enough(tmp_path: Path):
    result = run_python('-c', TORCH_ALONE.replace('REPOSITORY', repr(str(ROOT))), cwd=tmp_path)
    assert_ran(result)
    assert result.stdout.splitlines()[-1] == '[(1, 64, 8, 8), (1, 320, 2, 2)] [64, 320]'
