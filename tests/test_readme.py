"""README.md: what it says to write does what it says."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmlavit import LaViT

PAGES = {name: (ROOT / name).read_text(encoding='utf-8') for name in ('README.md',)}
PAGES['get_started.md'] = (ROOT / 'docs/get_started.md').read_text(encoding='utf-8')


def the_block(page: str, what: str) -> str:
    """The block of Python that holds some words."""
    blocks = re.findall(r'^```python\n(.*?)^```', PAGES[page], flags=re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if what in block)
    return block


@pytest.mark.parametrize('page', PAGES)
def test_the_config_starts_from_a_checkpoint_and_spares_psi_and_theta(page, tmp_path):
    pytest.importorskip('mmdet')
    from mmdet.utils import register_all_modules
    from mmengine.optim import build_optim_wrapper

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    trained = LaViT('small')
    weights = {f'backbone.{name}': value for name, value in trained.state_dict().items()}
    torch.save({'state_dict': weights, 'meta': {}}, tmp_path / 'classifier.pth')
    file = tmp_path / 'config.py'
    file.write_text(the_block(page, '_base_').replace('PATH', str(tmp_path / 'classifier.pth')))
    cfg = Config.fromfile(file)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        model.init_weights()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(model.backbone) is LaViT
    found = dict(model.backbone.named_parameters())
    assert all(map(torch.equal, found.values(), dict(trained.named_parameters()).values()))
    decays = {
        id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']
    }
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {decays[id(p)] for name, p in found.items() if name.endswith(('psi', 'theta'))} == {0}
    assert decays[id(found['stages.0.blocks.0.mlp.fc1.weight'])] == 0.05
    # Channels fit.
    with torch.no_grad():
        model.eval().extract_feat(torch.rand(1, 3, 64, 96))


def test_the_plain_module():
    values = {'images': torch.rand(1, 3, 64, 96)}
    exec(the_block('README.md', 'mmlavit.models'), values)
    shapes = [tuple(m.shape) for m in values['maps']]
    assert len(shapes) == 4
    info = values['model'].feature_info
    assert [shape[1] for shape in shapes] == list(info.channels())
    assert [64 // shape[2] for shape in shapes] == list(info.reduction())
