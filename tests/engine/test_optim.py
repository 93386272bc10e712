"""Learning rates and weight decay of the parameters of detectors, segmentors and classifiers."""

from __future__ import annotations

import copy
import importlib
import logging
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import short_training
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from small import ARCH
from torch import nn

from mmlavit import LaViT, LaViTOptimWrapperConstructor
from mmlavit.datasets.shapes import ShapesRecipe, make_shapes
from mmlavit.models.attention import LessAttention
from mmlavit.models.attention_residual import AttentionResidual

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
LR, DECAY = 1e-3, 0.05
# One of each toolbox; small, and with heads whose names hold no 'backbone'.
NAMES = ('maskrcnn_lavit_n_shapes', 'upernet_lavit_n_shapes', 'lavit_n_shapes')


@pytest.fixture(scope='module', params=NAMES)
def experiment(request) -> Iterator[SimpleNamespace]:
    """A config and its model, built once for all tests of that config."""
    cfg = Config.fromfile(CONFIGS / f'{request.param}.py')
    importlib.import_module(f'{cfg.default_scope}.models')
    models = importlib.import_module(f'{cfg.default_scope}.registry').MODELS
    model_cfg = copy.deepcopy(cfg.model)
    if cfg.default_scope == 'mmpretrain':
        model_cfg.data_preprocessor = copy.deepcopy(cfg.data_preprocessor)  # as the Runner does
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(models.build(model_cfg))
    yield SimpleNamespace(cfg=cfg, model=model)
    del model


def groups_of(model: nn.Module, optim_wrapper: dict) -> dict[str, dict]:
    """The group of each parameter by the parameter's name, in the optimizer's order."""
    wrapper = build_optim_wrapper(model, copy.deepcopy(optim_wrapper))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    assert all(len(group['params']) == 1 for group in groups)
    return {names[group['params'][0]]: group for group in groups}


def rates(model: nn.Module, cfg: Config, **paramwise: object) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter, as multiples of the config's."""
    changed = copy.deepcopy(cfg)
    changed.merge_from_dict(dict(optim_wrapper=dict(paramwise_cfg=paramwise)))
    base = changed.optim_wrapper.optimizer
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        found = groups_of(model, changed.optim_wrapper)
    return {n: (g['lr'] / base.lr, g['weight_decay'] / base.weight_decay) for n, g in found.items()}


def toy_rates(model: nn.Module, **paramwise: object) -> dict[str, tuple[float, float]]:
    """The same of any model."""
    cfg = dict(
        constructor='LaViTOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise,
    )
    found = groups_of(model, cfg)
    return {n: (g['lr'] / LR, g['weight_decay'] / DECAY) for n, g in found.items()}


def kinds(backbone: nn.Module) -> dict[str, str]:
    """What each parameter of a LaViT is, found by the modules."""
    found = {}
    for path, module in backbone.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            kind = 'weight'
            if isinstance(module, nn.LayerNorm):
                kind = 'norm'
            elif own == 'bias':
                kind = 'bias'
            elif isinstance(module, (LessAttention, AttentionResidual)):
                kind = own
            found[f'{path}.{own}'] = kind
    assert set(found.values()) == {'weight', 'norm', 'bias', 'psi', 'theta', 'layer_scale'}
    return found


def close(found: dict[str, tuple[float, float]], expected: dict[str, tuple[float, float]]) -> None:
    assert found.keys() == expected.keys()
    wrong = {n: (found[n], expected[n]) for n in found if found[n] != pytest.approx(expected[n])}
    assert not wrong


class Two(nn.Module):
    """A LaViT under any name, beside something else."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.ModuleDict(dict(backbone=LaViT(ARCH))))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


@pytest.fixture
def log(request) -> StringIO:
    """What MMEngine's newest logger, which is the one that is used, writes."""
    stream = StringIO()
    logger = MMLogger.get_instance(request.node.name, log_level='INFO')
    logger.addHandler(logging.StreamHandler(stream))
    return stream


# -- Weight decay and custom keys ------------------------------------------------------------------


def test_a_smaller_rate_in_the_backbone_leaves_decay_as_it_is(experiment):
    """Row for row what the config alone gives, and a tenth of the rate in the backbone."""
    model, cfg = experiment.model, experiment.cfg
    plain = rates(model, cfg)
    found = rates(model, cfg, custom_keys={'backbone': dict(lr_mult=0.1)})
    expected = {n: (0.1 if n.startswith('backbone.') else 1.0, d) for n, (_, d) in plain.items()}
    close(found, expected)
    for name, kind in kinds(model.backbone).items():
        assert found[f'backbone.{name}'] == pytest.approx((0.1, float(kind == 'weight'))), name


def test_a_decay_of_the_whole_backbone_scales_what_decay_there_is(experiment):
    model, cfg = experiment.model, experiment.cfg
    found = rates(model, cfg, custom_keys={'backbone': dict(lr_mult=0.1, decay_mult=0.5)})
    for name, kind in kinds(model.backbone).items():
        expected = (0.1, 0.5 if kind == 'weight' else 0.0)
        assert found[f'backbone.{name}'] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ('key', 'kind'),
    [
        *(('psi', 'psi'), ('attn.theta', 'theta'), ('attention_residual.layer_scale',) * 2),
        *(('norm', 'norm'), ('bias', 'bias')),
    ],
)
def test_a_key_that_names_a_parameter_is_the_users_own_wish(experiment, key, kind):
    """Shorter or longer than 'backbone', and all of it."""
    model, cfg = experiment.model, experiment.cfg
    kind = kind.rpartition('.')[2]
    keys = {'backbone': dict(lr_mult=0.1), key: dict(decay_mult=2.0)}
    both = {'backbone': dict(lr_mult=0.1, decay_mult=0.5), key: dict(decay_mult=2.0, lr_mult=3.0)}
    found, of_both = (rates(model, cfg, custom_keys=k) for k in (keys, both))
    for name, its in kinds(model.backbone).items():
        named = its == kind or (kind == 'bias' and name.endswith('.bias'))
        decay = 2.0 if named else float(its == 'weight')
        assert found[f'backbone.{name}'] == pytest.approx((0.1, decay)), name
        if named:
            assert of_both[f'backbone.{name}'] == pytest.approx((3.0, 2.0)), name


def test_a_key_about_a_module_names_nothing_in_it():
    model = Two('a')
    found = toy_rates(
        model, custom_keys={key: dict(lr_mult=0.5, decay_mult=3.0) for key in ('attn.', 'merging')}
    )
    for name, kind in kinds(model.a.backbone).items():
        inside = '.attn.' in name
        expected = (0.5 if inside else 1.0, (3.0 if inside else 1.0) if kind == 'weight' else 0.0)
        assert found[f'a.backbone.{name}'] == pytest.approx(expected), name
    everything = toy_rates(model, custom_keys={'': dict(lr_mult=0.5, decay_mult=3.0)})
    assert everything['a.backbone.norm0.weight'] == everything['a.backbone.norm0.bias'] == (0.5, 0)
    assert everything['head.0.bias'] == pytest.approx((0.5, 3))


def test_the_longest_key_about_a_module_decides_as_in_mmengine():
    keys = {'backbone': dict(lr_mult=0.1), 'backbone.stages.1': dict(lr_mult=0.2)}
    found = toy_rates(Two('a'), custom_keys=keys)
    for own in ('psi', 'theta', 'proj.weight', 'proj.bias'):
        assert found[f'a.backbone.stages.0.blocks.1.attn.{own}'][0] == pytest.approx(0.1)
        assert found[f'a.backbone.stages.1.blocks.1.attn.{own}'][0] == pytest.approx(0.2)
    assert found['a.backbone.stages.1.attention_residual.layer_scale'] == pytest.approx((0.2, 0))


def test_mmengines_options_mean_what_they_mean_elsewhere():
    model = Two('a')
    options = dict(norm_decay_mult=0.3, bias_decay_mult=0.4, bias_lr_mult=2.0)
    plain = toy_rates(model, **options)
    below = toy_rates(model, **options, custom_keys={'backbone': dict(lr_mult=0.1)})
    expected = {
        'norm': (1, 0.3),
        'bias': (2, 0.4),
        'weight': (1, 1),
        **dict.fromkeys(('psi', 'theta', 'layer_scale'), (1, 0)),
    }
    for name, kind in kinds(model.a.backbone).items():
        rate, decay = expected[kind]
        assert plain[f'a.backbone.{name}'] == pytest.approx((rate, decay)), name
        # A custom key puts the others out of force; the decay of these it leaves alone.
        assert below[f'a.backbone.{name}'] == pytest.approx((0.1, decay)), name
    assert plain['head.1.bias'] == pytest.approx((1, 0.3))

    flat = toy_rates(model, flat_decay_mult=0.2, dwconv_decay_mult=0.6)
    assert flat['a.backbone.norm0.weight'][1] == pytest.approx(0.2)
    assert flat['a.backbone.stages.1.attention_residual.layer_scale'][1] == pytest.approx(0.2)
    block = 'a.backbone.stages.1.blocks.1'
    assert (
        flat[f'{block}.pos_conv.bias'][1]
        == flat[f'{block}.pos_conv.weight'][1]
        == (pytest.approx(0.6))
    )
    assert flat[f'{block}.attn.psi'][1] == 0


def test_outside_of_a_lavit_all_is_mmengines(experiment):
    model, cfg = experiment.model, experiment.cfg
    keys = {'head': dict(lr_mult=0.3), 'bias': dict(decay_mult=0.7)}
    options = dict(norm_decay_mult=0.2, flat_decay_mult=0.1, custom_keys=keys)
    theirs = copy.deepcopy(cfg)
    theirs.optim_wrapper.pop('constructor')
    ours, theirs = (rates(model, c, **options) for c in (cfg, theirs))
    assert list(ours) == list(theirs)
    outside = [n for n in ours if not n.startswith('backbone.')]
    assert outside and all(ours[n] == theirs[n] for n in outside)


def test_what_else_a_key_sets_is_handed_over():
    keys = {
        'backbone': dict(lr_mult=0.1, eps=1e-6, weight_decay=0.3, decay_mult=0.5),
        'psi': dict(weight_decay=0.01),
    }
    cfg = dict(
        constructor='LaViTOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=dict(custom_keys=keys),
    )
    groups = groups_of(Two('a'), cfg)
    for own, decay in (('psi', 0.01), ('theta', 0.0), ('proj.bias', 0.0), ('proj.weight', 0.3)):
        group = groups[f'a.backbone.stages.0.blocks.1.attn.{own}']
        found = group['lr'], group['eps'], group['weight_decay']
        assert found == pytest.approx((LR * 0.1, 1e-6, decay)), own
        # Which MMEngine's log shows.
        assert ('decay_mult' in group) == (own == 'proj.weight'), own


def test_without_any_option_or_a_weight_decay_in_the_config():
    """AdamW has one of its own."""
    cfg = dict(constructor='LaViTOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=LR))
    for paramwise in ({}, dict(paramwise_cfg=None), dict(paramwise_cfg={})):
        found = groups_of(LaViT(ARCH), cfg | paramwise)
        assert found['stages.0.blocks.1.attn.psi']['weight_decay'] == 0
        assert found['norm3.bias']['weight_decay'] == found['norm3.weight']['weight_decay'] == 0
        assert found['stages.0.blocks.1.attn.proj.weight']['weight_decay'] == 0.01


# -- Layer-wise learning rates ---------------------------------------------------------------------

# By hand for nano, whose stages have two layers each: ten depths, of which the patch embedding is
# the first and the output norms are the last.
EXPONENTS = {
    'patch_embed.conv1.proj.weight': 9,
    'patch_embed.conv2.norm.bias': 9,
    'stages.0.blocks.0.pos_conv.weight': 8,
    'stages.0.blocks.0.attn.qkv.bias': 8,
    'stages.0.blocks.1.attn.psi': 7,
    'stages.1.downsample.proj.weight': 7,
    'stages.1.downsample.norm.weight': 7,
    'stages.1.attention_residual.layer_scale': 6,
    'stages.1.attention_residual.pwconv.weight': 6,
    'stages.1.blocks.0.mlp.fc1.weight': 6,
    'stages.1.blocks.1.attn.theta': 5,
    'stages.2.downsample.proj.bias': 5,
    'stages.2.blocks.0.norm1.weight': 4,
    'stages.2.blocks.1.attn.v.weight': 3,
    'stages.3.downsample.proj.bias': 3,
    'stages.3.attention_residual.layer_scale': 2,
    'stages.3.blocks.0.attn.qkv.weight': 2,
    'stages.3.blocks.1.attn.psi': 1,
    'stages.3.blocks.1.mlp.fc2.bias': 1,
    'norm3.weight': 0,
}


@pytest.mark.parametrize('lr_mult', [1.0, 0.1])
def test_layer_wise_rates(experiment, lr_mult):
    model, cfg = experiment.model, experiment.cfg
    plain = rates(model, cfg)
    keys = {} if lr_mult == 1 else dict(custom_keys={'backbone': dict(lr_mult=lr_mult)})
    found = rates(model, cfg, layer_decay_rate=0.8, **keys)
    for name, exponent in EXPONENTS.items():
        assert found[f'backbone.{name}'][0] == pytest.approx(lr_mult * 0.8**exponent), name
    for name, (rate, decay) in found.items():
        assert decay == plain[name][1], name
        if not name.startswith('backbone.'):
            assert rate == 1, name
            continue
        # And the rule behind it, for all of them.
        if 'patch_embed' in name:
            exponent = 9
        elif stage := re.search(r'stages\.(\d)\.(?:(downsample)|blocks\.(\d)|)', name):
            layer = -1 if stage[2] else int(stage[3] or 0)
            exponent = 8 - 2 * int(stage[1]) - layer
        else:
            exponent = 0
        assert rate == pytest.approx(lr_mult * 0.8**exponent), name


@pytest.mark.parametrize(
    'name', ['maskrcnn_lavit_s_coco', 'upernet_lavit_s_ade20k', 'lavit_s_imagenet']
)
def test_what_the_guide_says(name):
    """Its config, and its figures for the 15 layers of LaViT-S."""
    text = (CONFIGS / 'README.md').read_text(encoding='utf-8')
    code = re.search(r'^```python\n(_base_ = .*?)^```', text, re.MULTILINE | re.DOTALL)[1]
    assert f'{name}.py' in code
    code = re.sub(r'mmlavit::\w+\.py', f'mmlavit::{name}.py', code)
    cfg = Config.fromstring(code, '.py')
    model = nn.ModuleDict(dict(backbone=LaViT('small'), head=nn.Linear(2, 2)))
    rate = cfg.optim_wrapper.optimizer.lr
    found = {n: g['lr'] / rate for n, g in groups_of(model, cfg.optim_wrapper).items()}
    assert found['head.weight'] == pytest.approx(1)
    for parameter, factor in (
        ('backbone.stages.3.blocks.2.attn.psi', 0.8),
        ('backbone.stages.0.blocks.0.attn.qkv.weight', 0.035),
        ('backbone.patch_embed.proj.weight', 0.028),
    ):
        assert found[parameter] == pytest.approx(0.1 * factor, rel=0.02), parameter
        assert f'{factor}' in text


@pytest.mark.parametrize('experiment', ['lavit_n_shapes'], indirect=True)
def test_the_rates_of_mmpretrains_constructor(experiment):
    """Which knows classifiers alone."""
    cfg = dict(
        constructor='LearningRateDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=dict(layer_decay_rate=0.6),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = groups_of(experiment.model, cfg)
        ours = groups_of(experiment.model, cfg | dict(constructor='LaViTOptimWrapperConstructor'))
    assert list(ours) == list(theirs)
    assert all(ours[n]['lr'] == pytest.approx(theirs[n]['lr']) for n in ours)


def test_every_lavit_wherever_it_is():
    """A teacher that learns nothing, a student, and one with fewer stages."""
    model = Two('teacher', 'student')
    model.teacher.requires_grad_(False)
    model.third = LaViT(ARCH, out_indices=(1,))
    found = toy_rates(model, layer_decay_rate=0.5, custom_keys={'student': dict(lr_mult=0.1)})
    assert not any(name.startswith('teacher') for name in found)
    assert found['third.patch_embed.proj.weight'] == pytest.approx((0.5**5, 1))
    assert found['third.stages.1.blocks.1.attn.psi'] == pytest.approx((0.5, 0))
    assert found['head.0.weight'] == (1, 1)


def test_in_mmdets_soft_teacher():
    """Two detectors in one model; only the student is trained."""
    base = 'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
    cfg = Config.fromstring(
        f"""
_base_ = {base!r}
custom_imports = dict(imports=['mmlavit'])
backbone = dict(_delete_=True, type='LaViT', arch='nano')
model = dict(detector=dict(backbone=backbone, neck=dict(in_channels=[32, 64, 160, 320])))
optim_wrapper = dict(
    constructor='LaViTOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.8, custom_keys={{'backbone': dict(lr_mult=0.1)}}),
)
""",
        '.py',
    )
    importlib.import_module('mmdet.models')
    models = importlib.import_module('mmdet.registry').MODELS
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = models.build(cfg.model)
    found = rates(model, cfg)
    assert not any(name.startswith('teacher') for name in found)
    for name, exponent in EXPONENTS.items():
        rate, decay = found[f'student.backbone.{name}']
        assert rate == pytest.approx(0.1 * 0.8**exponent), name
        assert decay == (kinds(model.student.backbone)[name] == 'weight'), name
    assert found['student.rpn_head.rpn_conv.weight'] == (1, 1)


# -- Frozen, shared, wrapped -----------------------------------------------------------------------


def test_frozen_stages_are_left_out():
    model = nn.ModuleDict(dict(backbone=LaViT(ARCH, frozen_stages=2)))
    found = toy_rates(model, layer_decay_rate=0.5)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith('backbone.stages.1.') for name in found)
    assert found['backbone.stages.2.downsample.proj.weight'] == pytest.approx((0.5**6, 1))


def test_shared_parameters():
    """Refused by PyTorch, as under MMEngine's constructor, or taken once."""
    model = Two('a', 'b')
    model.b.backbone = model.a.backbone
    with pytest.raises(ValueError, match='more than one parameter group'):
        toy_rates(model, layer_decay_rate=0.5)
    found = toy_rates(model, layer_decay_rate=0.5, bypass_duplicate=True)
    close(found, toy_rates(Two('a'), layer_decay_rate=0.5))


def test_in_distributed_data_parallel(process_group):
    model = Two('a')
    wrapped = MMDistributedDataParallel(model)
    keys = {'backbone': dict(lr_mult=0.1)}
    expected = toy_rates(model, layer_decay_rate=0.5, custom_keys=keys)
    found = toy_rates(wrapped, layer_decay_rate=0.5, custom_keys=keys)
    assert {f'module.{name}': rate for name, rate in expected.items()} == found


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4),
    reason='FSDP of torch before 2.4 wants a GPU',
)
@pytest.mark.filterwarnings('ignore:FSDP is switching to use')
@pytest.mark.parametrize('use_orig_params', [True, False])
def test_in_fsdp(process_group, use_orig_params, log):
    """Which flattens the parameters of a layer into one, if it may."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    from mmlavit import wrap_lavit_blocks

    torch.manual_seed(0)
    wrapped = FullyShardedDataParallel(
        Two('a'),
        auto_wrap_policy=wrap_lavit_blocks,
        device_id=torch.device('cpu'),
        use_orig_params=use_orig_params,
    )
    if use_orig_params:
        keys = {'backbone': dict(lr_mult=0.1)}
        found = toy_rates(wrapped, layer_decay_rate=0.5, custom_keys=keys)
        names = {name.replace('_fsdp_wrapped_module.', ''): rate for name, rate in found.items()}
        close(names, toy_rates(Two('a'), layer_decay_rate=0.5, custom_keys=keys))
        return
    with pytest.raises(ValueError, match=r'layer_decay_rate=0.5 needs use_orig_params=True'):
        toy_rates(wrapped, layer_decay_rate=0.5)
    toy_rates(wrapped)
    assert 'FSDP has flattened parameters' in log.getvalue()


def test_what_mmengine_logs_is_what_holds(log):
    toy_rates(Two('a'), layer_decay_rate=0.5, custom_keys={'backbone': dict(lr_mult=0.1)})
    said = log.getvalue()
    psi = 'paramwise_options -- a.backbone.stages.3.blocks.1.attn.psi'
    lines = [line[line.index(psi) :] for line in said.splitlines() if psi in line]
    assert f'{psi}:lr={LR * 0.1 * 0.5}' in lines and f'{psi}:weight_decay=0.0' in lines
    assert len(lines) == 3  # and lr_mult


# -- Trainings -------------------------------------------------------------------------------------


class Classifier(BaseModel):
    """A small LaViT and the mean of its last map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = LaViT(ARCH, drop_path_rate=0.0, out_indices=(3,))
        self.head = nn.Linear(ARCH['embed_dims'][-1], 3)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str) -> dict:
        logits = self.head(self.backbone(inputs)[0].mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, labels))


# What our configs had before there was a constructor.
BEFORE = dict(
    norm_decay_mult=0.0,
    bias_decay_mult=0.0,
    custom_keys={key: dict(decay_mult=0.0) for key in ('psi', 'theta', 'layer_scale')},
)


def train(folder: Path, steps: int, paramwise: dict, resume: str | None = None, **more) -> Runner:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = [
        dict(inputs=torch.randn(3, 32, 32, generator=generator), labels=i % 3) for i in range(4)
    ]
    runner = Runner(
        model=Classifier(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=data,
            batch_size=2,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=steps),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.5),
            paramwise_cfg=paramwise,
            **more,
        ),
        param_scheduler=dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=3),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        load_from=resume,
        resume=resume is not None,
        experiment_name=f'{folder.name}_{steps}_{len(more)}',
        log_level='WARNING',
    )
    runner.train()
    return runner


def test_a_training_of_before_goes_on_as_if_nothing_had_changed(tmp_path):
    """Bitwise: the same groups in the same order, with the same decay, from its checkpoint on."""
    undisturbed = train(tmp_path / 'all', 4, BEFORE)
    train(tmp_path / 'parts', 2, BEFORE)
    ours = dict(norm_decay_mult=0.0, bias_decay_mult=0.0)
    resumed = train(
        *(tmp_path / 'parts', 4, ours, str(tmp_path / 'parts' / 'iter_2.pth')),
        constructor='LaViTOptimWrapperConstructor',
    )
    assert resumed.iter == undisturbed.iter == 4
    weights, expected = resumed.model.state_dict(), undisturbed.model.state_dict()
    start = Classifier().state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not torch.equal(weights['head.weight'], start['head.weight'])


def test_a_training_moves_what_has_a_rate(tmp_path):
    """Adam's first step is the learning rate itself, whatever the gradient."""
    keys = {'backbone': dict(lr_mult=0.1)}
    runner = train(
        *(tmp_path, 1, dict(layer_decay_rate=0.1, custom_keys=keys, bias_decay_mult=0.0)),
        constructor='LaViTOptimWrapperConstructor',
    )
    torch.manual_seed(0)
    start, weights = Classifier().state_dict(), runner.model.state_dict()
    rate = 0.5 * 1e-2  # the schedule begins at half
    for name, factor in (
        ('head.bias', 1),
        ('backbone.norm3.bias', 0.1),
        ('backbone.stages.3.blocks.1.attn.proj.bias', 0.1 * 0.1),
        ('backbone.stages.3.blocks.0.attn.proj.bias', 0.1 * 0.1**2),
    ):
        moved = (weights[name] - start[name]).abs().max().item()
        assert moved == pytest.approx(rate * factor, rel=0.02), name


@pytest.mark.parametrize('name', ['retinanet_lavit_n_shapes', *NAMES[1:]])
def test_layer_wise_rates_in_a_training_of_each_toolbox(name, tmp_path):
    """What a parameter moves by in Adam's first step is what the depth gives it."""
    make_shapes(tmp_path / 'shapes', ShapesRecipe(4, 2, size=64), progress=False)
    cfg = short_training(name, tmp_path / 'shapes', tmp_path / 'run')
    cfg.optim_wrapper.update(paramwise_cfg=dict(layer_decay_rate=0.5, bias_decay_mult=0.0))
    with DefaultScope.overwrite_default_scope('mmengine'):
        runner = Runner.from_cfg(cfg)
        runner.model.init_weights()
        start = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
        runner.train()
    moved = {n: (p - start[n]).abs().max().item() for n, p in runner.model.named_parameters()}
    base = cfg.optim_wrapper.optimizer.lr
    biases = {n: e for n, e in EXPONENTS.items() if n.endswith('.bias')}
    assert len(biases) > 4
    for own, exponent in biases.items():
        assert moved[f'backbone.{own}'] == pytest.approx(base * 0.5**exponent, rel=0.02), own
    heads = [n for n in moved if not n.startswith('backbone.') and n.endswith('.bias')]
    assert max(moved[n] for n in heads) == pytest.approx(base, rel=0.02)


def test_mixed_precision_and_accumulation():
    """What is not about parameters goes to the wrapper; Amp's own wants a GPU."""
    cfg = dict(
        type='OptimWrapper',
        accumulative_counts=2,
        clip_grad=dict(max_norm=1.0),
        constructor='LaViTOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=0.1, momentum=0.9),
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )
    wrapper = build_optim_wrapper(Two('a'), cfg)
    assert wrapper._accumulative_counts == 2
    assert wrapper.clip_grad_kwargs['max_norm'] == 1.0
    if torch.cuda.is_available():
        build_optim_wrapper(Two('a'), cfg | dict(type='AmpOptimWrapper'))


# -- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('paramwise', 'error', 'said'),
    [
        (dict(layer_decay_rate='0.8'), TypeError, "layer_decay_rate must be a number, got '0.8'"),
        (dict(layer_decay_rate=True), TypeError, 'layer_decay_rate must be a number, got True'),
        (dict(layer_decay_rate=None), TypeError, 'layer_decay_rate must be a number, got None'),
        (dict(layer_decay_rate=0), ValueError, 'layer_decay_rate must be above 0 and at most 1'),
        (dict(layer_decay_rate=1.1), ValueError, 'at most 1, got 1.1'),
        (dict(layer_decay_rate=float('nan')), ValueError, 'at most 1, got nan'),
        (dict(norm_decay_mult='no'), TypeError, "norm_decay_mult must be a number, got 'no'"),
        (dict(bias_lr_mult=-1), ValueError, 'bias_lr_mult must be finite and at least 0, got -1'),
        (dict(custom_keys={'psi': 0}), TypeError, "custom_keys['psi'] must be a dict"),
        (
            dict(custom_keys={'psi': dict(lr_mult='1')}),
            TypeError,
            "custom_keys['psi'].lr_mult must be a number, got '1'",
        ),
        (
            dict(custom_keys={'psi': dict(decay_mult=-0.5)}),
            ValueError,
            "custom_keys['psi'].decay_mult must be finite and at least 0, got -0.5",
        ),
        (dict(custom_keys=['psi']), TypeError, 'custom_keys must be a dict'),
        ([], TypeError, 'paramwise_cfg should be None or a dict'),
        # mmdet's and mmseg's names for it.
        (dict(decay_rate=0.8, decay_type='layer_wise'), ValueError, "'decay_rate' means nothing"),
    ],
)
def test_what_is_refused(paramwise, error, said):
    with pytest.raises(error, match=re.escape(said)):
        LaViTOptimWrapperConstructor(
            dict(optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY)), paramwise
        )


def test_layer_wise_rates_need_a_rate_and_a_lavit(log):
    with pytest.raises(ValueError, match=r'layer_decay_rate=0.5 needs the lr of the optimizer'):
        LaViTOptimWrapperConstructor(dict(optimizer=dict(type='AdamW')), dict(layer_decay_rate=0.5))
    other = nn.ModuleDict(dict(backbone=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r'layer_decay_rate=0.5 needs a model with a LaViT'):
        toy_rates(other, layer_decay_rate=0.5)
    assert toy_rates(other, layer_decay_rate=1)['backbone.weight'] == (1, 1)
    # The stand-in of the tools that draw schedules.
    assert toy_rates(nn.Sequential(nn.Linear(2, 2)), layer_decay_rate=0.5)['0.weight'] == (1, 1)
    assert 'so there is nothing to do' in log.getvalue()
