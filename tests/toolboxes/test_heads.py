"""LaViT under heads that none of our configs has: only the backbone and in_channels are replaced.

The configs are written as a user would, on top of the installed packages'. What they change beyond
that (classes, queries, layers, points, and no stochastic depth) makes them quick and repeatable.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from small import seeded

from mmlavit.models.attention import LessAttention

SIZES = [(66, 97), (70, 50)]  # whole numbers neither of the strides nor of the windows
CLASSES = 3

COMMON = """
custom_imports = dict(imports=['mmlavit'])
custom_hooks = [dict(type='DiagonalityLossHook')]
"""
HEADS = {
    'fcos': """
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='nano', drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 160, 320]),
    bbox_head=dict(num_classes=3),
    # A model that has learned nothing is sure of nothing.
    test_cfg=dict(score_thr=0.0),
)
""",
    'rtmdet': """
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
model = dict(
    # The neck upsamples by two and concatenates, so under any backbone it needs such sizes.
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True, type='LaViT', arch='nano', out_indices=(1, 2, 3), drop_path_rate=0.0
    ),
    neck=dict(in_channels=[64, 160, 320]),
    bbox_head=dict(num_classes=3),
)
""",
    'dino': """
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
model = dict(
    num_queries=20,
    backbone=dict(
        _delete_=True, type='LaViT', arch='nano', out_indices=(1, 2, 3), drop_path_rate=0.0
    ),
    neck=dict(in_channels=[64, 160, 320]),
    encoder=dict(num_layers=1),
    decoder=dict(num_layers=2),
    bbox_head=dict(num_classes=3),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=10)),
    test_cfg=dict(max_per_img=20),
)
""",
    'mask2former': """
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(_delete_=True, type='LaViT', arch='nano', drop_path_rate=0.0),
    panoptic_head=dict(
        in_channels=[32, 64, 160, 320],
        num_things_classes=3,
        num_queries=20,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=2),
        loss_cls=dict(class_weight=[1.0] * 3 + [0.1]),
    ),
    panoptic_fusion_head=dict(num_things_classes=3),
    train_cfg=dict(num_points=256),
    test_cfg=dict(max_per_image=20),
)
""",
    'segformer': """
_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
data_preprocessor = dict(size=(128, 128))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type='LaViT', arch='nano', drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 64, 160, 320], num_classes=3),
)
""",
    'mask2former_of_mmseg': """
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
# Ours would replace the base's import, without which mmdet's parts are not found.
custom_imports = dict(imports=['mmdet.models', 'mmlavit'])
data_preprocessor = dict(size=(128, 128))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type='LaViT', arch='nano', drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[32, 64, 160, 320],
        num_classes=3,
        num_queries=20,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=2),
        loss_cls=dict(class_weight=[1.0] * 3 + [0.1]),
        train_cfg=dict(num_points=256),
    ),
)
""",
}
# The FPN of FCOS starts at the second of four maps. Everywhere else the whole backbone learns.
UNUSED = {'fcos': {'norm0.weight', 'norm0.bias'}}


@pytest.fixture(scope='module', params=HEADS)
def user(request) -> Iterator[SimpleNamespace]:
    """A config and its model on a CPU, built once for the tests of that config."""
    found = build(request.param)
    yield found
    del found.model


def build(name: str, **options: object) -> SimpleNamespace:
    cfg = Config.fromstring(COMMON + HEADS[name], '.py')
    cfg.model.backbone.update(options)
    importlib.import_module(f'{cfg.default_scope}.models')
    registry = importlib.import_module(f'{cfg.default_scope}.registry')
    print('seed 0')
    torch.manual_seed(0)
    model = revert_sync_batchnorm(registry.MODELS.build(copy.deepcopy(cfg.model)))
    model.init_weights()
    hooks = [registry.HOOKS.build(hook) for hook in cfg.custom_hooks]
    return SimpleNamespace(name=name, cfg=cfg, model=model, hooks=hooks)


def samples(user: SimpleNamespace, sizes: Sequence[tuple[int, int]] = SIZES) -> dict[str, list]:
    """Made-up images with what the toolbox's models learn from."""
    if user.cfg.default_scope == 'mmdet':
        return demo_mm_inputs(
            batch_size=2,
            image_shapes=[(3, *size) for size in sizes],
            num_items=[3, 2],
            num_classes=CLASSES,
            with_mask='mask' in user.name,
        )
    generator = seeded(2)
    inputs, data_samples = [], []
    for size in sizes:
        sample = SegDataSample(metainfo=dict(ori_shape=size, img_shape=size))
        truth = torch.randint(CLASSES, (1, *size), generator=generator)
        sample.gt_sem_seg = PixelData(data=truth)
        data_samples.append(sample)
        inputs.append(torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8))
    return dict(inputs=inputs, data_samples=data_samples)


def losses(
    user: SimpleNamespace, sizes: Sequence[tuple[int, int]] = SIZES
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses, and each of them by name."""
    model: BaseModel = user.model.train()
    print('seed 1')
    torch.manual_seed(1)
    data = model.data_preprocessor(samples(user, sizes), True)
    total, logged = model.parse_losses(model(**data, mode='loss'))
    return total, {name: value.detach() for name, value in logged.items()}


def test_learns(user):
    """The head alone sends gradients to all of the backbone; a step moves the weights that matter.

    Adam's steps on the others, with these clips and learning rates, may be too small for float32.
    """
    optim_wrapper = build_optim_wrapper(user.model, copy.deepcopy(user.cfg.optim_wrapper))
    total, logged = losses(user)
    assert 'loss_dp' not in logged
    assert all(value.isfinite().all() for value in logged.values()), logged
    total.backward()
    parameters = dict(user.model.backbone.named_parameters())
    without = {name for name, parameter in parameters.items() if parameter.grad is None}
    assert without == UNUSED.get(user.name, set())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name in parameters.keys() - without:
        assert parameters[name].grad.isfinite().all(), name
        assert parameters[name].grad.any(), name
    optim_wrapper.step()
    for name, parameter in parameters.items():
        assert parameter.isfinite().all(), name
        if name.startswith('patch_embed') or name.endswith(('psi', 'theta')):
            assert not torch.equal(parameter, before[name]), name
    optim_wrapper.zero_grad()


@pytest.mark.parametrize(
    'name, conv_stem', [('fcos', False), ('fcos', True), ('dino', False), ('segformer', True)]
)
def test_padding_does_not_drown_the_gradients(name, conv_stem):
    """From scratch, on a batch that is mostly padding, as on one that is all image.

    Padded pixels are zero. Where the first projection makes zero tokens of them, each LayerNorm
    multiplies their gradient by 1 / sqrt(eps); it then outgrows all others by many orders, and
    clipping it leaves nothing of them.
    """
    user = build(name, conv_stem=conv_stem)
    norms = []
    for sizes in ([(128, 128), (128, 128)], [(128, 128), (50, 40)]):
        user.model.zero_grad()
        losses(user, sizes)[0].backward()
        grads = [p.grad for p in user.model.backbone.parameters() if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
    print('gradient norm of the backbone without and with padding', norms)
    assert norms[1] < 5 * norms[0]


def test_learns_with_the_papers_loss(user):
    """``loss_dp`` is one more among the head's own losses, and pulls at Psi and Theta."""
    plain, own = losses(user)
    runner = SimpleNamespace(model=user.model)
    for hook in user.hooks:
        hook.before_train(runner)
    total, logged = losses(user)
    for hook in user.hooks:
        hook.after_train(runner)
    assert logged.keys() - own.keys() == {'loss_dp'}
    assert logged['loss_dp'] > 0
    torch.testing.assert_close(total, plain + logged['loss_dp'])

    weights = [
        weight
        for layer in user.model.backbone.modules()
        if isinstance(layer, LessAttention)
        for weight in (layer.psi, layer.theta)
    ]
    without = torch.autograd.grad(plain, weights)
    for grad, head_alone in zip(torch.autograd.grad(total, weights), without, strict=True):
        assert grad.isfinite().all()
        assert (grad != head_alone).any()


def test_predicts(user):
    """Images of two sizes, as loaded: finite results, of the classes, in the images' own frames."""
    model: BaseModel = user.model.eval()
    data = samples(user)
    with torch.no_grad():
        if user.cfg.default_scope == 'mmdet':
            results = model.test_step(data)
        else:
            # mmseg predicts batches of one size only.
            results = [
                model.test_step({name: [values[i]] for name, values in data.items()})[0]
                for i in range(len(SIZES))
            ]
    assert len(results) == len(SIZES)
    for result, size in zip(results, SIZES, strict=True):
        if user.cfg.default_scope == 'mmseg':
            assert result.seg_logits.data.shape == (CLASSES, *size)
            assert result.seg_logits.data.isfinite().all()
            assert torch.equal(result.pred_sem_seg.data[0], result.seg_logits.data.argmax(0))
            continue
        found = result.pred_instances
        assert len(found) > 0
        assert found.scores.isfinite().all() and found.bboxes.isfinite().all()
        assert (found.labels >= 0).all() and (found.labels < CLASSES).all()
        if 'masks' in found:
            assert found.masks.shape == (len(found), *size)
        else:
            # The made-up samples say that they were enlarged by these factors.
            height, width = size
            limits = torch.tensor([width / 1.1, height / 1.2]).repeat(2)
            assert (found.bboxes >= 0).all() and (found.bboxes <= limits + 1e-3).all()
