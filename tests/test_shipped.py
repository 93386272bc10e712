"""Where the configs that come with the package are, and that toolboxes take them from there."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_ran, run_python
from mmengine import hub
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmpretrain import get_model, list_models

from mmlavit import LaViT, compat
from mmlavit.shipped import config_path, configs, folder, weights_of

ROOT = Path(__file__).resolve().parents[1]


def test_names_of_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = ROOT / 'configs' / 'lavit_t_imagenet.py'
    for name in ('lavit_t_imagenet', 'lavit_t_imagenet.py', 'mmlavit::lavit_t_imagenet.py'):
        assert config_path(name) == ours
    for name in ('lavit_x_imagenet', 'configs/lavit_t_imagenet.py', 'mmdet::lavit_t_imagenet.py'):
        assert config_path(name) == Path(name)
    Path('lavit_t_imagenet.py').touch()
    assert config_path('lavit_t_imagenet.py') == Path('lavit_t_imagenet.py')
    assert config_path('lavit_t_imagenet') == ours


def test_configs_with_weights_are_those_of_the_model_zoo(tmp_path, monkeypatch):
    index = yaml.safe_load((ROOT / 'checkpoints' / 'metafile.yml').read_text(encoding='utf-8'))
    listed = {Path(model['Config']).stem: ROOT / model['Weights'] for model in index['Models']}
    found = {name: weights_of(path) for name, path in configs().items()}
    assert {name: Path(file) for name, file in found.items() if file} == listed
    # However the config is named; but not another one of that name.
    monkeypatch.chdir(ROOT)
    for name, file in listed.items():
        assert weights_of(Path('configs', f'{name}.py')) == str(file)
        assert weights_of(tmp_path / f'{name}.py') is None


@pytest.fixture
def in_mmengines_scope():
    """As in a process that has built nothing yet."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.mark.usefixtures('in_mmengines_scope')
@pytest.mark.parametrize('name', ['lavit_t_imagenet.py', 'lavit_t_imagenet', '_base_/lavit.py'])
def test_mmengines_hub_has_our_configs(name):
    path = folder('configs') / (name if name.endswith('.py') else f'{name}.py')
    assert get_config(f'mmlavit::{name}').to_dict() == Config.fromfile(path).to_dict()


@pytest.mark.usefixtures('in_mmengines_scope')
def test_mmengines_hub_says_what_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"'lavit_x_imagenet'.*mmlavit configs"):
        get_config('mmlavit::lavit_x_imagenet')
    for ask in (get_config, hub.get_model):
        with pytest.raises(ValueError, match=r'lavit_t_imagenet has no trained weights'):
            ask('mmlavit::lavit_t_imagenet.py', pretrained=True)
    # Of others it says what it said.
    with pytest.raises(ValueError, match='relative config path'):
        get_config('mmdet::retinanet.py')
    theirs = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert theirs.model.type == 'RetinaNet'


@pytest.mark.usefixtures('in_mmengines_scope')
def test_mmengines_hub_builds_our_models():
    model = hub.get_model('mmlavit::retinanet_lavit_n_shapes.py')
    assert type(model).__name__ == 'RetinaNet' and isinstance(model.backbone, LaViT)
    assert type(model.data_preprocessor).__name__ == 'DetDataPreprocessor'


@pytest.mark.usefixtures('in_mmengines_scope')
def test_mmengines_hub_loads_the_weights_of_the_model_zoo():
    name = 'retinanet_lavit_n_bccd'
    model = hub.get_model(f'mmlavit::{name}.py', pretrained=True)
    saved = torch.load(weights_of(config_path(name)), weights_only=True)['state_dict']
    assert model.state_dict().keys() == saved.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, saved[key].to(value), rtol=0, atol=0)


@pytest.mark.usefixtures('in_mmengines_scope')
def test_mmpretrains_hub_has_our_classifiers():
    ours = [name for name in configs() if name.startswith('lavit_') and 'shapes' not in name]
    assert list_models('lavit') == sorted(ours)
    assert list_models('*_lavit_') == []  # what it cannot build
    assert set(list_models('swin-tiny')) > {'swin-tiny_16xb64_in1k'}
    model = get_model('lavit_t_imagenet', backbone=dict(out_indices=(2, 3)))
    assert isinstance(model.backbone, LaViT) and model.head.num_classes == 1000
    maps = model.extract_feat(torch.zeros(1, 3, 64, 64), stage='backbone')
    assert [tuple(m.shape[2:]) for m in maps] == [(4, 4), (2, 2)]


@pytest.mark.usefixtures('in_mmengines_scope')
def test_mmpretrains_hub_takes_no_chance_for_trained_weights(tmp_path):
    with pytest.raises(ValueError, match=r'lavit_t_imagenet has no trained weights'):
        get_model('lavit_t_imagenet', pretrained=True)
    model = get_model('lavit_n_tinyimagenet')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'mine.pth')
    again = get_model('lavit_n_tinyimagenet', pretrained=str(tmp_path / 'mine.pth'))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize('order', ['mmlavit, mmpretrain', 'mmpretrain, mmlavit'])
def test_mmpretrains_hub_is_told_in_either_order(order, tmp_path):
    # compat.py alone, so that torchvision is repaired before any of the two is there.
    code = f"""
import runpy
compat = runpy.run_path({compat.__file__!r})
compat['repair_torchvision']()
import {order}
print(*mmpretrain.list_models('lavit_t_imagenet'))
"""
    result = run_python('-c', code, cwd=tmp_path)
    assert_ran(result)
    assert result.stdout.split() == ['lavit_t_imagenet']
