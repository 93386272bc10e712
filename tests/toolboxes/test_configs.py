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
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, DefaultScope
from mmengine.structures import PixelData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmlavit.models.attention import LessAttention
from mmlavit.models.block import DropPath

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
FILES = sorted(CONFIGS.glob('*.py'))
# Nano is not the paper's: on made-up shapes and on photographs, for a CPU.
PAPER = [file for file in FILES if 'lavit_n_' not in file.stem]
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

# What configs/_base_/lavit.py gives to the others, and the hooks that replace MMEngine's.
OUR_NAMES = ('lavit_optim', 'lavit_hooks')
OUR_HOOKS = {
    'checkpoint': ('SafeCheckpointHook', 'CheckpointHook'),
    'sampler_seed': ('StepSeedHook', 'DistSamplerSeedHook'),
}

# The peer's experiment that each of the paper's repeats, and whether the optimizer is ours.
PEERS = {
    'lavit_?_imagenet': ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', False),
    'maskrcnn_lavit_?_coco': ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True),
    'maskrcnn_lavit_?_3x_coco': (
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
        False,
    ),
    'retinanet_lavit_?_coco': ('mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py', False),
    'retinanet_lavit_?_3x_coco': (
        'mmdet::retinanet/retinanet_r50_fpn_ms-640-800-3x_coco.py',
        True,
    ),
    'upernet_lavit_?_ade20k': (
        'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        False,
    ),
    'semfpn_lavit_?_ade20k': (
        'mmseg::twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py',
        False,
    ),
    'cascade-mask-rcnn_lavit_?_coco': (
        'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        True,
    ),
    'maskrcnn_lavit_?_amp_coco': ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_amp-1x_coco.py', True),
    'maskrcnn_lavit_?_cp_coco': ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True),
    'maskrcnn_lavit_?_lsj_coco': (
        'mmdet::mask_rcnn/mask-rcnn_r50_fpn_8xb8-amp-lsj-200e_coco.py',
        True,
    ),
    'maskrcnn_lavit_?_scratch-6x_coco': (
        'mmdet::scratch/mask-rcnn_r50-scratch_fpn_gn-all_6x_coco.py',
        True,
    ),
    'mask2former_lavit_?_coco': ('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', False),
    'mask2former_lavit_?_ade20k': (
        'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        False,
    ),
    'dino_lavit_?_coco': ('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', False),
    'rtmdet_lavit_?_coco': ('mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py', False),
}
SIZES = {
    'lavit_?_imagenet': 'bst',
    'maskrcnn_lavit_?_coco': 'bst',
    'maskrcnn_lavit_?_3x_coco': 'st',
    'retinanet_lavit_?_coco': 'st',
    'retinanet_lavit_?_3x_coco': 'st',
    'upernet_lavit_?_ade20k': 'bst',
    'semfpn_lavit_?_ade20k': 'st',
    'cascade-mask-rcnn_lavit_?_coco': 's',
    'maskrcnn_lavit_?_amp_coco': 's',
    'maskrcnn_lavit_?_cp_coco': 's',
    'maskrcnn_lavit_?_lsj_coco': 's',
    'maskrcnn_lavit_?_scratch-6x_coco': 's',
    'mask2former_lavit_?_coco': 's',
    'mask2former_lavit_?_ade20k': 's',
    'dino_lavit_?_coco': 's',
    'rtmdet_lavit_?_coco': 's',
    'lavit_?_shapes': 'n',
    'maskrcnn_lavit_?_shapes': 'n',
    'retinanet_lavit_?_shapes': 'n',
    'upernet_lavit_?_shapes': 'n',
    'lavit_?_tinyimagenet': 'n',
    'maskrcnn_lavit_?_dsb2018': 'n',
    'retinanet_lavit_?_bccd': 'n',
    'upernet_lavit_?_camvid': 'n',
}
LOSSES = {
    'lavit': {'loss'},
    'maskrcnn': {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'},
    'retinanet': {'loss_cls', 'loss_bbox'},
    'upernet': {'decode.loss_ce', 'aux.loss_ce'},
    'semfpn': {'decode.loss_ce'},
    'cascade-mask-rcnn': {
        *('loss_rpn_cls', 'loss_rpn_bbox'),
        *(f's{i}.loss_{part}' for i in range(3) for part in ('cls', 'bbox', 'mask')),
    },
    # The last layer of the decoder, and the first of those with losses of their own.
    'mask2former': {
        f'{layer}loss_{part}' for layer in ('', 'd0.') for part in ('cls', 'mask', 'dice')
    },
    'dino': {
        f'{layer}loss_{part}'
        for layer in ('', 'd0.', 'enc_', 'dn_', 'd0.dn_')
        for part in ('cls', 'bbox', 'iou')
    },
    'rtmdet': {'loss_cls', 'loss_bbox'},
}


def stem(file: Path) -> str:
    """The file's name, with a question mark for the size."""
    before, _, after = file.stem.rpartition('lavit_')
    return f'{before}lavit_?{after[1:]}'


def letter(file: Path) -> str:
    return file.stem.rpartition('lavit_')[2][0]


def models_of(cfg: Config):
    importlib.import_module(f'{cfg.default_scope}.models')
    return importlib.import_module(f'{cfg.default_scope}.registry').MODELS


# Heads that take long on a CPU, with small images too; and models that another config has as well.
LONG = re.compile('cascade-mask-rcnn|mask2former|maskrcnn_lavit_._(scratch|3x|amp|cp|lsj)')
# One of each toolbox.
QUICK = ('lavit_t_imagenet', 'maskrcnn_lavit_t_coco', 'semfpn_lavit_t_ade20k')


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(
            file,
            id=file.stem,
            marks=[pytest.mark.slow] if LONG.match(file.stem) else [],
        )
        for file in FILES
    ],
)
def experiment(request) -> Iterator[SimpleNamespace]:
    """A config and its model, built once for all tests of that config and then let go."""
    cfg = Config.fromfile(request.param)
    model_cfg = copy.deepcopy(cfg.model)
    if cfg.default_scope == 'mmpretrain':
        model_cfg.data_preprocessor = copy.deepcopy(cfg.data_preprocessor)  # as the Runner does
    # Training pads to these sizes, up to 1024 x 1024, which would take minutes.
    if cfg.default_scope == 'mmseg':
        model_cfg.data_preprocessor.size = (96, 128)
    for augment in model_cfg.get('data_preprocessor', {}).get('batch_augments') or ():
        if augment.type == 'BatchFixedSizePad':
            augment.size = (96, 128)
    # Untrained, it proposes a thousand regions and finds a hundred masks in each image.
    if 'rpn' in (test_cfg := model_cfg.get('test_cfg') or {}):
        test_cfg.rpn.max_per_img, test_cfg.rcnn.max_per_img = 100, 10
    # What else small images need: fewer queries than places, and sides that halve thrice.
    if request.param.stem.startswith('dino'):
        model_cfg.num_queries = 20
    if request.param.stem.startswith('rtmdet'):
        model_cfg.data_preprocessor.pad_size_divisor = 32
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(models_of(cfg).build(model_cfg))
        model.init_weights()
    found = SimpleNamespace(file=request.param, cfg=cfg, model=model)
    yield found
    del found.model


def base_files(file: Path) -> list[str]:
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            value = ast.literal_eval(node.value)
            return [value] if isinstance(value, str) else value
    return []


def for_cpu(optim_wrapper: dict) -> dict:
    """A config's optimizer without mixed precision, which wants a GPU."""
    return copy.deepcopy(optim_wrapper) | dict(type='OptimWrapper')


def without_scope(value: object) -> object:
    """A config without the ``_scope_`` that MMEngine notes in what comes from a package."""
    if isinstance(value, dict):
        return {k: without_scope(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [without_scope(v) for v in value]
    return value


def has_masks(file: Path) -> bool:
    return file.stem.startswith(('maskrcnn', 'cascade-mask-rcnn', 'mask2former'))


def samples(experiment: SimpleNamespace) -> dict:
    """Two images, of different sizes where the task allows it, and what is true of them."""
    scope, model = experiment.cfg.default_scope, experiment.model
    rng = np.random.default_rng(0)
    if scope == 'mmdet':
        classes = next(
            module.num_classes
            for path, module in model.named_modules()
            if path.endswith(('bbox_head', 'bbox_head.0', 'panoptic_fusion_head'))
            and hasattr(module, 'num_classes')
        )
        made = demo_mm_inputs(
            batch_size=2,
            image_shapes=[(3, 66, 97), (3, 70, 50)],
            num_items=[3, 2],
            num_classes=max(classes, 2),  # its labels start at 1
            with_mask=has_masks(experiment.file),
        )
        for sample in made['data_samples']:
            sample.gt_instances.labels %= classes
        return made
    size = (96, 128) if scope == 'mmseg' else (64, 64)
    inputs = [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for _ in range(2)]
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return dict(inputs=inputs, data_samples=[DataSample().set_gt_label(i) for i in (0, 2)])
    from mmseg.structures import SegDataSample

    data_samples = []
    for image in inputs:
        labels = rng.integers(0, model.decode_head.num_classes, (1, *size))
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(labels)), metainfo=meta)
        assert image.shape[1:] == size
        data_samples.append(sample)
    return dict(inputs=inputs, data_samples=data_samples)


def test_there_is_every_config_and_they_are_flat():
    found = {}
    for file in FILES:
        found[stem(file)] = found.get(stem(file), '') + letter(file)
    assert {name: ''.join(sorted(sizes)) for name, sizes in found.items()} == SIZES
    shared = sorted(set(CONFIGS.rglob('*.py')) - set(FILES))
    assert all(file.parent == CONFIGS / '_base_' for file in shared)
    for file in shared:
        users = [f for f in FILES if f'./_base_/{file.name}' in base_files(f)]
        assert len(users) >= 3, f'{file.name} is shared by {len(users)} configs only'


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_short_and_inheriting(file):
    assert len(file.read_text(encoding='utf-8').splitlines()) < 120
    bases = base_files(file)
    assert bases
    for base in bases:
        package, separator, _ = base.partition('::')
        assert package in SCOPES if separator else (file.parent / base).is_file()


@pytest.mark.parametrize('file', PAPER, ids=lambda file: file.stem)
def test_the_peers_own_recipe_but_for_what_we_name(file):
    """Data, schedule, heads, hooks: all else equals an experiment that the toolbox ships."""
    base, own_optimizer = PEERS[stem(file)]
    ours = Config.fromfile(file).to_dict()
    theirs = Config.fromstring(f'_base_ = {base!r}', '.py').to_dict()
    for cfg in (ours, theirs):
        model, optim_wrapper = cfg['model'], cfg['optim_wrapper']
        del model['backbone']
        for part in ('neck', 'head', 'decode_head', 'auxiliary_head', 'panoptic_head'):
            for key in ('in_channels', 'start_level'):
                model.get(part, {}).pop(key, None)
        for key in ('constructor', 'paramwise_cfg'):
            optim_wrapper.pop(key, None)
        optim_wrapper.setdefault('type', 'OptimWrapper')
        if own_optimizer:
            del optim_wrapper['optimizer']
        # Names that a config file gives to parts of itself.
        for key in ('pretrained', 'checkpoint', 'checkpoint_file', *OUR_NAMES):
            cfg.pop(key, None)
    imports, their_imports = (
        cfg.pop('custom_imports', {}).get('imports', []) for cfg in (ours, theirs)
    )
    assert set(imports) == {'mmlavit', *([their_imports] if their_imports else [])}
    custom, their_custom = ours.pop('custom_hooks'), theirs.pop('custom_hooks', [])
    assert without_scope(custom[2:]) == without_scope(their_custom)
    if file.stem.startswith('rtmdet'):
        # mmdet has 16 where its own recipe has 128.
        del ours['auto_scale_lr'], theirs['auto_scale_lr']
    hooks = ours['default_hooks'], theirs['default_hooks']
    for name, kinds in OUR_HOOKS.items():
        assert tuple(hook[name].pop('type') for hook in hooks) == kinds
    assert without_scope(ours) == without_scope(theirs)


def test_named_after_what_they_hold(experiment):
    cfg, model = experiment.cfg, experiment.model
    backbone = model.backbone
    assert 'mmlavit' in cfg.custom_imports['imports']
    assert cfg.default_scope in SCOPES
    assert cfg.model.backbone.type == 'LaViT'
    assert 'AttentionHealthHook' in [hook.type for hook in cfg.custom_hooks]
    dims, depths, less = FAMILY[letter(experiment.file)]
    wanted = [dims[i] for i in backbone.out_indices]
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == wanted
    if experiment.file.stem.startswith('lavit'):
        assert wanted == [cfg.model.head.in_channels]
    elif cfg.model.get('neck'):
        assert cfg.model.neck.in_channels == wanted
    elif experiment.file.stem.startswith('mask2former'):
        head = cfg.model.get('panoptic_head') or cfg.model.decode_head
        assert head.in_channels == wanted
    else:
        assert list(model.decode_head.in_channels) == wanted
        assert model.auxiliary_head.in_channels == wanted[2]
    assert [len(stage.blocks) for stage in backbone.stages] == depths
    assert [
        sum(isinstance(m, LessAttention) for m in stage.modules()) for stage in backbone.stages
    ] == less


def test_drop_path_grows_with_the_size():
    rates = {}
    for file in PAPER:
        rate = Config.fromfile(file).model.backbone.drop_path_rate
        assert rates.setdefault(letter(file), rate) == rate
    assert 0 < rates['t'] < rates['s'] < rates['b'] < 0.5


def test_drop_path_of_the_config_is_the_models(experiment):
    rates = [m.drop_prob for m in experiment.model.backbone.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0 and rates == sorted(rates)
    assert rates[-1] == pytest.approx(experiment.cfg.model.backbone.drop_path_rate)


def test_weight_decay_and_learning_rate(experiment):
    """No decay on norms, biases, LayerScale, Psi and Theta; the config's on everything else."""
    model, cfg = experiment.model, for_cpu(experiment.cfg.optim_wrapper)
    custom = cfg.paramwise_cfg.get('custom_keys', {})
    norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(False)}
    less = [m for m in model.modules() if isinstance(m, LessAttention)]
    with DefaultScope.overwrite_default_scope(experiment.cfg.default_scope):
        optimizer = build_optim_wrapper(model, copy.deepcopy(cfg)).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = [(p, group) for group in optimizer.param_groups for p in group['params']]
    group_of = dict(groups)
    assert len(group_of) == len(groups)
    assert set(group_of) == {p for p in model.parameters() if p.requires_grad}
    free = []
    for name, parameter in model.named_parameters():
        own = name.rpartition('.')[2]
        is_free = parameter in norms or own in ('bias', 'psi', 'theta', 'layer_scale')
        if experiment.file.stem.startswith('mask2former'):
            queries = ('query_embed', 'query_feat', 'level_embed')
            is_free = is_free or any(key in name for key in queries)
        decay = 0 if is_free else experiment.cfg.optim_wrapper.optimizer.weight_decay
        assert group_of[parameter]['weight_decay'] == decay, name
        lr_mult = custom.get('backbone', {}).get('lr_mult', 1) if name.startswith('backbone') else 1
        assert group_of[parameter]['lr'] == lr_mult * cfg.optimizer.lr, name
        free += [own] if is_free else []
    assert experiment.cfg.optim_wrapper.optimizer.weight_decay > 0
    assert ('backbone' in custom) == experiment.file.stem.startswith(('mask2former', 'dino'))
    assert free.count('psi') == free.count('theta') == len(less) > 0
    assert free.count('layer_scale') == 3  # one at every stair between stages


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_pipeline(experiment, split, tmp_path):
    """The pipelines run on an image, and the samples carry what the model asks of them."""
    cv2.imwrite(str(tmp_path / 'image.jpg'), np.full((40, 60, 3), 128, np.uint8))
    labels = np.ones((40, 60), np.uint8)
    labels[5:25, 5:30] = 2
    cv2.imwrite(str(tmp_path / 'labels.png'), labels)
    polygon = [[5.0, 5.0, 30.0, 5.0, 30.0, 25.0, 5.0, 25.0]]
    instance = dict(bbox=[5, 5, 30, 25], bbox_label=1, mask=polygon, ignore_flag=0)
    image = dict(
        img_path=str(tmp_path / 'image.jpg'),
        seg_map_path=str(tmp_path / 'labels.png'),
        seg_fields=[],
        label_map=None,
        reduce_zero_label=True,
        gt_label=1,
        img_id=1,
        height=40,
        width=60,
        instances=[instance],
    )
    dataset = experiment.cfg[f'{split}_dataloader'].dataset
    pipeline = dataset.get('dataset', dataset).pipeline
    with DefaultScope.overwrite_default_scope(experiment.cfg.default_scope):
        compose = Compose(pipeline)
        # As a data set does where a crop has no object.
        packed = next(filter(None, (compose(copy.deepcopy(image)) for _ in range(100))))
    assert packed['inputs'].shape[0] == 3
    sample = packed['data_samples']
    assert set(pipeline[-1].get('meta_keys', ())) <= set(sample.metainfo_keys())
    if experiment.cfg.default_scope == 'mmpretrain':
        assert sample.gt_label.tolist() == [1]
    elif experiment.cfg.default_scope == 'mmseg':
        assert set(sample.gt_sem_seg.data.unique().tolist()) <= {0, 1, 255}
    else:
        assert len(sample.gt_instances.bboxes) <= 1
        if has_masks(experiment.file) and len(sample.gt_instances.bboxes):
            assert sample.gt_instances.masks.areas.min() > 0


def test_predicts(experiment):
    model, scope = experiment.model.eval(), experiment.cfg.default_scope
    with DefaultScope.overwrite_default_scope(scope):
        data = model.data_preprocessor(samples(experiment), False)
        with torch.no_grad():
            if scope == 'mmseg' and experiment.file.stem.startswith('mask2former'):
                # mmseg does not hand it the samples.
                output = model.decode_head(model.extract_feat(data['inputs']), data['data_samples'])
            else:
                output = model(data['inputs'], data['data_samples'], mode='tensor')
            results = model(**data, mode='predict')
    assert all(tensor.isfinite().all() for tensor in flatten(output))
    assert len(results) == 2
    for result in results:
        if scope == 'mmpretrain':
            assert result.pred_score.sum() == pytest.approx(1, abs=1e-4)
            assert result.pred_score.shape == (experiment.cfg.model.head.num_classes,)
        elif scope == 'mmseg':
            assert result.pred_sem_seg.data.shape == (1, 96, 128)
            assert result.seg_logits.data.shape[0] == model.decode_head.num_classes
        else:
            found = result.pred_instances
            assert found.bboxes.isfinite().all() and found.scores.isfinite().all()
            if has_masks(experiment.file):
                assert found.masks.shape == (len(found), *result.ori_shape)


def flatten(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flatten(part)]


def test_learns_with_its_hooks(experiment):
    """One step: finite losses, a gradient for every weight, and a move."""
    model, cfg = experiment.model.train(), experiment.cfg
    assert cfg.custom_hooks[0].type == 'DiagonalityLossHook'
    registry = importlib.import_module(f'{cfg.default_scope}.registry')
    # Those of a peer, such as EMA, want a training around them.
    hooks = [registry.HOOKS.build(hook) for hook in copy.deepcopy(cfg.custom_hooks[:2])]
    for hook in hooks:
        hook.before_train(SimpleNamespace(model=model))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        optim_wrapper = build_optim_wrapper(model, for_cpu(cfg.optim_wrapper))
        torch.manual_seed(1)
        np.random.seed(1)
        data = model.data_preprocessor(samples(experiment), True)
        total, logged = model.parse_losses(model(**data, mode='loss'))
    prefix = 'decode.' if experiment.file.stem.startswith('mask2former_lavit_s_ade') else ''
    wanted = LOSSES[experiment.file.stem.split('_')[0]]
    assert {f'{prefix}{name}' for name in wanted} <= set(logged)
    assert 'loss_dp' not in logged
    assert all(value.isfinite() for value in logged.values())
    if parts := [v for k, v in logged.items() if 'loss_' in k]:
        torch.testing.assert_close(total.detach(), sum(parts).detach())
    torch.testing.assert_close(total.detach(), logged['loss'].detach())

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


@pytest.mark.parametrize(
    'experiment',
    [
        pytest.param(file, id=file.stem, marks=[] if file.stem in QUICK else [pytest.mark.slow])
        for file in FILES
    ],
    indirect=True,
)
def test_one_option_switches_the_diagonality_loss_on(experiment):
    """The hook is the first of every config."""
    cfg = copy.deepcopy(experiment.cfg)
    cfg.merge_from_dict({'custom_hooks.0.loss_weight': 0.1})
    hook = HOOKS.build(cfg.custom_hooks[0])
    model = experiment.model.train()
    runner = SimpleNamespace(model=model)
    hook.before_train(runner)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        data = model.data_preprocessor(samples(experiment), True)
        losses = model(**data, mode='loss')
        hook.after_train(runner)
        assert losses['loss_dp'] > 0
        assert 'loss_dp' not in model(**data, mode='loss')


@pytest.mark.parametrize('file', PAPER, ids=lambda file: file.stem)
def test_batch_size_behind_the_learning_rate(file):
    """What --auto-scale-lr scales from is the batch that the comment states."""
    cfg = Config.fromfile(file)
    said = re.search(r'(\d+) GPUs x (\d+)\simages', first_comment(file).replace('\n# ', ' '))
    gpus, images = map(int, said.groups())
    assert cfg.train_dataloader.batch_size == images
    # mmseg has no such option.
    if cfg.default_scope != 'mmseg':
        assert cfg.auto_scale_lr.base_batch_size == gpus * images
    if 'imagenet' in file.stem:
        assert cfg.optim_wrapper.optimizer.lr == 1e-3


def first_comment(file: Path) -> str:
    """The comment of a config that says how many GPUs it is for: its own, or its base's."""
    text = file.read_text(encoding='utf-8')
    if ' GPUs x ' in text:
        return text
    (base,) = base_files(file)
    return first_comment(file.parent / base)
