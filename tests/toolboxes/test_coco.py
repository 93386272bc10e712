"""COCO's own files, crowds and all: Mask R-CNN's config trains on a piece of them and evaluates."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_ran, read_log, run_tool
from mmengine.config import Config
from mmengine.registry import DefaultScope

CONFIG = ROOT / 'configs' / 'maskrcnn_lavit_t_coco.py'
METRICS = [f'coco/{kind}_mAP{which}' for kind in ('bbox', 'segm') for which in ('', '_50', '_s')]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder to start from, with 50 images each of train and val where the config looks."""
    if 'MMLAVIT_DATA' not in os.environ:
        pytest.skip('MMLAVIT_DATA, the folder of real images, is not set')
    source = Path(os.environ['MMLAVIT_DATA'], 'coco50')
    if not source.is_dir():
        pytest.skip(f'{source} is not there')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'coco').symlink_to(source)
    return tmp_path


def annotations(folder: Path, split: str) -> dict:
    path = folder / 'data' / 'coco' / 'annotations' / f'instances_{split}2017.json'
    return json.loads(path.read_text())


def test_crowds_are_loaded_to_be_ignored(folder, monkeypatch):
    """Their masks are uncompressed run lengths, the others' polygons."""
    import mmdet.datasets  # noqa: F401
    from mmdet.registry import DATASETS

    monkeypatch.chdir(folder)
    content = annotations(folder, 'train')
    crowds = Counter(a['image_id'] for a in content['annotations'] if a['iscrowd'])
    assert sum(crowds.values()) == 5
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(Config.fromfile(CONFIG).train_dataloader.dataset)
    found = {}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found[info['img_id']] = sum(i['ignore_flag'] for i in info['instances'])
        if info['img_id'] in crowds:
            sample = dataset[index]['data_samples']
            assert len(sample.ignored_instances.masks.masks) == crowds[info['img_id']]
            assert (sample.ignored_instances.masks.areas > 0).all()
    assert {image: number for image, number in found.items() if number} == crowds


@pytest.mark.slow
def test_trains_and_evaluates(folder):
    """An epoch of images of at most 160 pixels, and some to evaluate; the loss falls."""
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.dataset.pipeline.2.scale=(160,112)',
        'default_hooks.logger.interval=1',
        'log_processor.window_size=1',
        'optim_wrapper.optimizer.lr=1e-3',
        # Most of its time goes to a thousand regions an image.
        'model.train_cfg.rpn_proposal.max_per_img=100',
        'model.train_cfg.rcnn.sampler.num=64',
        'model.test_cfg.rpn.max_per_img=100',
        'param_scheduler.0.end=5',
        'randomness.seed=0',
        # So short a training is sure of nothing, and without any object nothing is evaluated.
        'model.test_cfg.rcnn.score_thr=0',
    ]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    for split in ('val', 'test'):
        options += [
            f'{split}_dataloader.dataset.pipeline.1.scale=(160,112)',
            f'{split}_evaluator.outfile_prefix=found',
            f'{split}_dataloader.dataset.indices=12',
        ]
    ran = run_tool(
        *('train.py', CONFIG, '--work-dir', 'run', '--cfg-options', *options), cwd=folder
    )
    assert_ran(ran)
    log = read_log(folder / 'run')
    steps = [line for line in log if 'loss' in line]
    # Two images a step, which are both wide or both tall.
    content = annotations(folder, 'train')
    labelled = {a['image_id'] for a in content['annotations'] if not a['iscrowd']}
    images = [i for i in content['images'] if i['id'] in labelled]
    wide = sum(i['width'] >= i['height'] for i in images)
    assert len(steps) == -(-wide // 2) + -(-(len(images) - wide) // 2)
    assert all(np.isfinite(list(step.values())).all() for step in steps)
    first, last = ([s['loss'] for s in part] for part in (steps[:5], steps[-5:]))
    assert np.mean(last) < 0.8 * np.mean(first)

    (validation,) = [line for line in log if METRICS[0] in line]
    assert all(0 <= validation[name] <= 1 for name in METRICS)
    found = json.loads((folder / 'found.segm.json').read_text())
    known = {image['id'] for image in annotations(folder, 'val')['images']}
    assert {f['image_id'] for f in found} <= known and len(found) > 0
