"""Checks of classes before the first step: what they must let pass, and what they then still see.

What they refuse through the front door is in tests/toolboxes/test_bad_input.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from mmlavit.datasets.shapes import ShapesRecipe, make_shapes
from mmlavit.engine.data_checks import DataError, check_classes, check_labels
from mmlavit.shipped import config_path


@pytest.fixture(autouse=True)
def own_scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


def registry(scope: str):
    importlib.import_module(f'{scope}.models')
    importlib.import_module(f'{scope}.datasets')
    return importlib.import_module(f'{scope}.registry')


def build(name: str, **changes: object) -> tuple[nn.Module, SimpleNamespace]:
    """The model of a toolbox's config, and what its training data say of their classes."""
    scope = name.partition('::')[0]
    path, _ = Config._get_cfg_path(name, '')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(changes)
    with DefaultScope.overwrite_default_scope(scope):
        model = registry(scope).MODELS.build(cfg.model)
        dataset = (cfg.train_dataloader or cfg.val_dataloader).dataset
        dataset = dataset.get('dataset', dataset)
        metainfo = registry(scope).DATASETS.get(dataset.type).METAINFO
    return model, SimpleNamespace(metainfo={**metainfo, **dataset.get('metainfo', {})})


class Head(nn.Module):
    """What the checks look at of a head."""

    def __init__(self, num_classes: int, **options: object) -> None:
        super().__init__()
        self.num_classes = num_classes
        vars(self).update(options)


# Configs of the toolboxes, and an option by which one of their heads has another number.
HARMLESS = {
    # An RPN tells things from the rest, whatever the things are.
    'mmdet::rpn/rpn_r50_fpn_1x_coco.py': None,
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': 'roi_head.bbox_head.num_classes',
    'mmdet::solov2/solov2_r50_fpn_1x_coco.py': 'mask_head.num_classes',
    # 80 things have boxes, and 53 kinds of stuff have none.
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': 'roi_head.bbox_head.num_classes',
    'mmdet::maskformer/maskformer_r50_ms-16xb1-75e_coco.py': 'panoptic_head.num_stuff_classes',
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': 'panoptic_head.num_things_classes',
    # One of its auxiliary heads finds edges: two classes beside the nineteen.
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py': 'decode_head.num_classes',
    # The zero label is none of its 150 classes.
    'mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py': 'auxiliary_head.num_classes',
    # It follows pedestrians, of 13 classes.
    'mmdet::sort/sort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py': None,
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py': 'head.num_classes',
}


@pytest.mark.parametrize('name', HARMLESS)
def test_the_toolboxes_own_configs_pass(name):
    check_classes(*build(name))


@pytest.mark.parametrize('name', [name for name, option in HARMLESS.items() if option])
def test_and_with_another_number_they_do_not(name):
    model, dataset = build(name, **{f'model.{HARMLESS[name]}': 7})
    with pytest.raises(DataError, match=r'has num_classes=\d+, .* has \d+ classes \('):
        check_classes(model, dataset)


def test_masks_that_are_the_same_for_all_classes():
    name = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    options = {'model.roi_head.mask_head.num_classes': 1}
    with pytest.raises(DataError, match=r'mask_head has num_classes=1'):
        check_classes(*build(name, **options))
    check_classes(*build(name, **options, **{'model.roi_head.mask_head.class_agnostic': True}))


def test_heads_that_count_something_else():
    """Words of a text (Grounding DINO), and classes but the background (SAN)."""
    model = nn.ModuleDict({'bbox_head': Head(256), 'backbone': nn.Identity()})
    dataset = SimpleNamespace(metainfo=dict(classes=('background', 'a', 'b')))
    with pytest.raises(DataError, match='num_classes=256'):
        check_classes(model, dataset)
    model.language_model = nn.Identity()
    check_classes(model, dataset)
    model = nn.Module()
    model.module = nn.ModuleDict({'decode_head': Head(2)})
    check_classes(model, dataset)
    with pytest.raises(DataError, match='^decode_head has num_classes=2, .* 3 classes'):
        check_classes(model, SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c'))))


@pytest.mark.parametrize('augments, refused', [(None, False), ({'type': 'Mixup'}, True)])
def test_classes_of_the_preprocessor_count_where_images_are_mixed(augments, refused):
    preprocessor = nn.Module()
    preprocessor.num_classes, preprocessor.batch_augments = 1000, augments
    model = nn.ModuleDict({'data_preprocessor': preprocessor, 'head': nn.Module()})
    model['head'].num_classes = 3
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c')))
    if not refused:
        return check_classes(model, dataset)
    with pytest.raises(DataError, match='data_preprocessor has num_classes=1000'):
        check_classes(model, dataset)


# ---- Labels, of data sets as the toolboxes read them ---------------------------------------------


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('checks')
    make_shapes(folder, ShapesRecipe(4, 2, size=64), progress=False)
    return folder


def segmentation(shapes: Path):
    """The training data of UPerNet on shapes: the labels 0 to 3, of what was 1 to 4."""
    cfg = Config.fromfile(config_path('upernet_lavit_n_shapes')).train_dataloader.dataset
    cfg.data_root = str(shapes / 'ade')
    with DefaultScope.overwrite_default_scope('mmseg'):
        return registry('mmseg').DATASETS.build(cfg)


@pytest.mark.parametrize(
    'head, refused',
    [
        (Head(4, ignore_index=255), False),
        (Head(3, ignore_index=255), True),
        # It has an output too many, which is the other check's matter.
        (Head(9), False),
        (Head(3, ignore_index=3), False),
        (Head(1, out_channels=1), True),
    ],
)
def test_labels_of_pixels(shapes, head, refused):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    model = nn.ModuleDict({'decode_head': head})
    dataset = segmentation(shapes)
    before = np.asarray(PIL.Image.open(dataset.get_data_info(0)['seg_map_path']))
    if refused:
        with pytest.raises(DataError, match=r'training.*\.png has the label 3, and decode_head'):
            check_labels(model, dataset)
    else:
        check_labels(model, dataset)
    # The training that follows is the same as without.
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()
    after = np.asarray(PIL.Image.open(dataset.get_data_info(0)['seg_map_path']))
    assert (before == after).all()


def test_a_head_of_one_output_tells_two_labels_apart(shapes):
    dataset = segmentation(shapes)
    for index in range(len(dataset)):
        file = dataset.get_data_info(index)['seg_map_path']
        labels = np.asarray(PIL.Image.open(file))
        PIL.Image.fromarray(np.minimum(labels, 2)).save(file)
    check_labels(nn.ModuleDict({'decode_head': Head(1, out_channels=1)}), dataset)
    classes = SimpleNamespace(metainfo=dict(classes=('ground', 'thing')))
    check_classes(nn.ModuleDict({'decode_head': Head(1, out_channels=1)}), classes)
    with pytest.raises(DataError, match='num_classes=1'):
        check_classes(nn.ModuleDict({'decode_head': Head(1, out_channels=1)}), segmentation(shapes))


def listed(shapes: Path, labels: list[int], **options: object):
    """Images with labels from a list, wrapped as ``RepeatDataset`` wraps them."""
    files = sorted((shapes / 'imagenet' / 'train').rglob('*.jpg'))
    lines = [f'{file} {label}' for file, label in zip(files, labels, strict=True)]
    (shapes / 'list.txt').write_text('\n'.join(lines))
    dataset = dict(
        type='CustomDataset', ann_file=str(shapes / 'list.txt'), data_prefix='', **options
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return registry('mmpretrain').DATASETS.build(
            dict(type='RepeatDataset', times=2, dataset=dataset)
        )


def test_labels_of_images(shapes):
    model = nn.ModuleDict({'head': Head(3)})
    check_labels(model, listed(shapes, [0, 0, 2, 1]))
    # A class without an image, as in a part of ImageNet.
    check_labels(model, listed(shapes, [0, 0, 1, 1], metainfo=dict(classes=('a', 'b', 'c'))))
    with pytest.raises(DataError, match=r'\.jpg has the label 3, and head has num_classes=3'):
        check_labels(model, listed(shapes, [0, 3, 2, 1]))


def boxes(shapes: Path, **options: object):
    dataset = dict(
        type='CocoDataset',
        data_root=str(shapes / 'coco'),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017'),
        **options,
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        return registry('mmdet').DATASETS.build(dataset)


def test_some_of_the_categories_of_a_file(shapes):
    """Whoever names some trains on those; who names one that is not there has made a mistake."""
    model = nn.ModuleDict({'bbox_head': Head(2)})
    check_labels(model, boxes(shapes, metainfo=dict(classes=('circle', 'triangle'))))
    with pytest.raises(DataError, match=r'3 categories \(circle, square, triangle\).* 2 classes'):
        check_labels(model, boxes(shapes, metainfo=dict(classes=('circle', 'disc'))))
