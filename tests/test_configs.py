"""Every config: what it says, and that its model predicts and learns on made-up samples."""

from __future__ import annotations

import ast
import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmlavit import LaViT
from mmlavit.attention import LessAttention
from mmlavit.block import DropPath

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
FILES = sorted(CONFIGS.glob('*.py'))
COCO = [file for file in FILES if file.stem.endswith('_coco')]
SCOPES = ('mmdet', 'mmseg', 'mmpretrain')
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)

# By the letter in the file's name: dims, layers, and layers of less attention. The paper's (design,
# section 2), and our own nano.
FAMILY = {
    'n': ([32, 64, 160, 320], [2, 2, 2, 2], [1, 1, 1, 1]),
    't': ([48, 96, 240, 480], [3, 3, 3, 3], [2, 2, 2, 2]),
    's': ([64, 128, 320, 640], [3, 3, 6, 3], [2, 2, 4, 2]),
    'b': ([64, 128, 320, 640], [2, 3, 18, 4], [1, 2, 16, 3]),
}


@pytest.fixture(scope='module', params=FILES, ids=lambda file: file.stem)
def experiment(request) -> Iterator[SimpleNamespace]:
    """A config and its model, built once for all tests of that config and then let go."""
    cfg = Config.fromfile(request.param)
    importlib.import_module(f'{cfg.default_scope}.models')
    models = importlib.import_module(f'{cfg.default_scope}.registry').MODELS
    torch.manual_seed(0)
    model = models.build(copy.deepcopy(cfg.model))
    model.init_weights()
    found = SimpleNamespace(file=request.param, cfg=cfg, model=model)
    yield found
    del found.model


def letter(file: Path) -> str:
    return file.stem.split('_lavit_')[1][0]


def base_files(file: Path) -> list[str]:
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            value = ast.literal_eval(node.value)
            return [value] if isinstance(value, str) else value
    return []


def without_scope(value: object) -> object:
    """A config without the ``_scope_`` that MMEngine notes in what comes from a package."""
    if isinstance(value, dict):
        return {k: without_scope(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [without_scope(v) for v in value]
    return value


def samples(model: nn.Module) -> dict:
    """Two images of different sizes, neither of which the strides divide, with boxes and masks."""
    return demo_mm_inputs(
        batch_size=2,
        image_shapes=[(3, 66, 97), (3, 70, 50)],
        num_items=[3, 2],
        num_classes=model.roi_head.bbox_head.num_classes,
        with_mask=True,
    )


def test_there_are_configs_and_they_are_flat():
    assert {'maskrcnn_lavit_n_shapes', *(f'maskrcnn_lavit_{size}_coco' for size in 'tsb')} <= {
        file.stem for file in FILES
    }
    assert sorted(CONFIGS.rglob('*.py')) == FILES


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_short_and_inheriting(file):
    assert len(file.read_text(encoding='utf-8').splitlines()) < 120
    bases = base_files(file)
    assert bases
    for base in bases:
        package, separator, _ = base.partition('::')
        assert package in SCOPES if separator else (file.parent / base).resolve() in FILES


@pytest.mark.parametrize('file', COCO, ids=lambda file: file.stem)
def test_coco_is_mmdets_own_but_for_what_we_name(file):
    """All else equals mmdet's Mask R-CNN with ResNet-50, FPN and the 1x schedule."""
    ours = Config.fromfile(file).to_dict()
    theirs = Config.fromstring("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'", '.py')
    theirs = theirs.to_dict()
    for cfg in (ours, theirs):
        del cfg['model']['backbone'], cfg['model']['neck']['in_channels']
        del cfg['optim_wrapper']['optimizer'], cfg['optim_wrapper']['type']
    for key in ('custom_imports', 'custom_hooks'):
        del ours[key]
    del ours['optim_wrapper']['paramwise_cfg']
    assert without_scope(ours) == without_scope(theirs)


def test_named_after_what_they_hold(experiment):
    cfg, backbone = experiment.cfg, experiment.model.backbone
    assert 'mmlavit' in cfg.custom_imports['imports']
    assert cfg.default_scope in SCOPES
    assert cfg.model.backbone.type == 'LaViT'
    dims, depths, less = FAMILY[letter(experiment.file)]
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == dims
    assert experiment.model.neck.in_channels == dims
    assert [len(stage.blocks) for stage in backbone.stages] == depths
    assert [
        sum(isinstance(m, LessAttention) for m in stage.modules()) for stage in backbone.stages
    ] == less


def test_pretrained_as_the_config_says(tmp_path):
    """The options that the comment names load the backbone of a classifier."""
    file = CONFIGS / 'maskrcnn_lavit_s_coco.py'
    comments = ' '.join(re.findall(r'# (.*)', file.read_text(encoding='utf-8')))
    options = dict(re.findall(r'(model\.\S+)=(\S+)', comments))
    assert 'PATH' in options.values()
    torch.manual_seed(2)
    pretrained = LaViT('small')
    weights = {f'backbone.{name}': value for name, value in pretrained.state_dict().items()}
    torch.save(
        dict(state_dict={**weights, 'head.fc.bias': torch.ones(10)}), tmp_path / 'weights.pth'
    )
    cfg = Config.fromfile(file)
    cfg.merge_from_dict(
        {
            key: value.replace('PATH', str(tmp_path / 'weights.pth'))
            for key, value in options.items()
        }
    )
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, pretrained.state_dict()[name]), name


def test_drop_path_grows_with_the_size():
    rates = {}
    for file in COCO:
        rates[letter(file)] = Config.fromfile(file).model.backbone.drop_path_rate
    assert 0 < rates['t'] < rates['s'] < rates['b'] < 0.5


def test_drop_path_of_the_config_is_the_models(experiment):
    rates = [m.drop_prob for m in experiment.model.backbone.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0 and rates == sorted(rates)
    assert rates[-1] == pytest.approx(experiment.cfg.model.backbone.drop_path_rate)


def test_weight_decay_and_learning_rate(experiment):
    """No decay on norms, biases, LayerScale, Psi and Theta; 0.05 on everything else."""
    model = experiment.model
    norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(False)}
    less = [m for m in model.modules() if isinstance(m, LessAttention)]
    optimizer = build_optim_wrapper(model, copy.deepcopy(experiment.cfg.optim_wrapper)).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = [(p, group) for group in optimizer.param_groups for p in group['params']]
    group_of = dict(groups)
    assert len(group_of) == len(groups)
    assert set(group_of) == {p for p in model.parameters() if p.requires_grad}
    free = []
    for name, parameter in model.named_parameters():
        own = name.rpartition('.')[2]
        is_free = parameter in norms or own in ('bias', 'psi', 'theta', 'layer_scale')
        assert group_of[parameter]['weight_decay'] == (0 if is_free else 0.05), name
        if experiment.file in COCO:
            assert group_of[parameter]['lr'] == 1e-4, name
        free += [own] if is_free else []
    assert free.count('psi') == free.count('theta') == len(less) > 0
    assert free.count('layer_scale') == 3  # one at every stair between stages


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_pipeline(experiment, split, tmp_path):
    """The pipelines run on an image, and the samples carry what the model asks of them."""
    cv2.imwrite(str(tmp_path / 'image.jpg'), np.full((40, 60, 3), 128, np.uint8))
    polygon = [[5.0, 5.0, 30.0, 5.0, 30.0, 25.0, 5.0, 25.0]]
    instance = dict(bbox=[5, 5, 30, 25], bbox_label=1, mask=polygon, ignore_flag=0)
    image = dict(
        img_path=str(tmp_path / 'image.jpg'), img_id=1, height=40, width=60, instances=[instance]
    )
    pipeline = experiment.cfg[f'{split}_dataloader'].dataset.pipeline
    with DefaultScope.overwrite_default_scope(experiment.cfg.default_scope):
        packed = Compose(pipeline)(image)
    assert packed['inputs'].shape[0] == 3
    sample = packed['data_samples']
    assert set(pipeline[-1].get('meta_keys', ())) <= set(sample.metainfo_keys())
    assert len(sample.gt_instances.bboxes) == 1
    assert sample.gt_instances.masks.areas.min() > 0


def test_predicts(experiment):
    model = experiment.model.eval()
    data = model.data_preprocessor(samples(model), False)
    with torch.no_grad():
        pyramid = model(data['inputs'], data['data_samples'], mode='tensor')
        results = model(**data, mode='predict')
    for output in flatten(pyramid):
        assert output.isfinite().all()
    for result, shape in zip(results, [(66, 97), (70, 50)], strict=True):
        found = result.pred_instances
        assert found.bboxes.isfinite().all() and found.scores.isfinite().all()
        assert found.masks.shape == (len(found), *shape)


def flatten(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flatten(part)]


def test_learns_with_its_hooks(experiment):
    """One step: finite losses, ``loss_dp`` among them, a gradient for every weight, and a move."""
    model, cfg = experiment.model.train(), experiment.cfg
    registry = importlib.import_module(f'{cfg.default_scope}.registry')
    hooks = [registry.HOOKS.build(hook) for hook in copy.deepcopy(cfg.custom_hooks)]
    for hook in hooks:
        hook.before_train(SimpleNamespace(model=model))
    optim_wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    torch.manual_seed(1)
    np.random.seed(1)
    data = model.data_preprocessor(samples(model), True)
    total, logged = model.parse_losses(model(**data, mode='loss'))
    wanted = {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask', 'loss_dp'}
    assert wanted <= set(logged)
    assert all(value.isfinite() for value in logged.values())
    parts = sum(value for name, value in logged.items() if 'loss_' in name)
    torch.testing.assert_close(total.detach(), parts.detach())

    total.backward()
    for name, parameter in model.named_parameters():
        # DistributedDataParallel fails on a weight without a gradient.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    psi = [m.psi for m in model.modules() if isinstance(m, LessAttention)]
    assert all(p.grad.abs().sum() > 0 for p in psi)
    before = [p.detach().clone() for p in psi]
    optim_wrapper.step()
    assert all((p != q).any() for p, q in zip(psi, before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())

    for hook in hooks:
        hook.after_train(SimpleNamespace(model=model))
    assert 'loss_dp' not in model(**data, mode='loss')
