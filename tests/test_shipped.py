"""Where the configs that come with the package are, and that toolboxes take them from there."""

from pathlib import Path

import pytest
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmpretrain import get_model, list_models
from mmpretrain.apis import ModelHub

from mmlavit import LaViT
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


def test_no_config_has_weights_yet():
    """When this fails, README.md and docs/command_line.md have something to tell."""
    assert [name for name, path in configs().items() if weights_of(path)] == []


def test_mmengines_hub_knows_no_other_packages():
    """What docs/upstream.md says. When this fails, it may be told of ours."""
    with pytest.raises(ValueError, match='relative config path'):
        get_config('mmlavit::lavit_t_imagenet.py')
    with pytest.raises(AssertionError, match='does not support'):
        get_config('mmlavit::imagenet/lavit_t_imagenet.py')


def test_mmpretrains_hub_takes_our_models():
    """As docs/command_line.md does it."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        top = folder('configs').parent
        ModelHub.register_model_index(top / 'model-index.yml', config_prefix=top)
        assert list_models('lavit_?_imagenet') == [f'lavit_{size}_imagenet' for size in 'bst']
        model = get_model('lavit_t_imagenet')
    assert isinstance(model.backbone, LaViT) and model.head.num_classes == 1000
