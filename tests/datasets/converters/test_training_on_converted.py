"""From a download to a training: what the converters write is where the configs look for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import test_bccd
import test_camvid
import test_dsb2018
import test_tinyimagenet
from helpers import ROOT, assert_ran, read_log, run_tool
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmlavit.compat import repair_torchvision

#: By config: its data set, what draws a download of it, options, and what it is measured by.
CASES = {
    'lavit_n_tinyimagenet': (
        'tinyimagenet',
        test_tinyimagenet.make,
        # The drawn one has 4 classes.
        [
            'model.head.num_classes=4',
            'data_preprocessor.num_classes=4',
            'val_evaluator.topk=(1,)',
            'test_evaluator.topk=(1,)',
        ],
        ['accuracy/top1'],
    ),
    'upernet_lavit_n_camvid': ('camvid', test_camvid.make, [], ['mIoU']),
    'maskrcnn_lavit_n_dsb2018': (
        'dsb2018',
        test_dsb2018.make,
        # The drawn images are small, and two steps find nothing of which they are sure.
        ['train_dataloader.dataset.filter_cfg.min_size=1', 'model.test_cfg.rcnn.score_thr=0.0'],
        ['coco/nucleus_precision', 'coco/segm_mAP_50', 'dsb2018/score'],
    ),
    'retinanet_lavit_n_bccd': (
        'bccd',
        test_bccd.make,
        ['train_dataloader.dataset.filter_cfg.min_size=1', 'model.test_cfg.score_thr=0.0'],
        ['coco/RBC_precision', 'coco/WBC_precision', 'coco/bbox_mAP'],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('config', CASES)
def test_converts_trains_and_tests(config: str, tmp_path: Path) -> None:
    """Without an option that names a folder."""
    name, make, options, metrics = CASES[config]
    make(tmp_path / 'download')
    converter = f'dataset_converters/{name}.py'
    assert_ran(run_tool(converter, tmp_path / 'download', cwd=tmp_path))
    shutil.rmtree(tmp_path / 'download')

    by_iteration = config.startswith('upernet')
    steps = 'train_cfg.max_iters=2' if by_iteration else 'train_cfg.max_epochs=2'
    options = [*options, steps, 'train_cfg.val_interval=2', 'default_hooks.logger.interval=1']
    # Their schedules are longer than that.
    options += ['default_hooks.checkpoint.interval=2', 'param_scheduler=None']
    options += ['train_dataloader.batch_size=2']
    file = ROOT / 'configs' / f'{config}.py'
    ran = run_tool('train.py', file, '--work-dir', 'run', '--cfg-options', *options, cwd=tmp_path)
    assert_ran(ran)
    log = read_log(tmp_path / 'run')
    losses = [line['loss'] for line in log if 'loss' in line]
    assert losses and np.isfinite(losses).all()
    (validation,) = [line for line in log if metrics[0] in line]
    assert all(name in validation for name in metrics)

    checkpoint = tmp_path / 'run' / ('iter_2.pth' if by_iteration else 'epoch_2.pth')
    options = [option for option in options if 'param_scheduler' not in option]
    ran = run_tool('test.py', file, checkpoint, '--cfg-options', *options, cwd=tmp_path)
    assert_ran(ran)
    assert all(name in ran.stdout for name in metrics)


def test_crops_hold_no_nucleus_without_a_pixel() -> None:
    """One whose box is in the crop and whose mask is not would make the loss NaN."""
    repair_torchvision()
    from mmdet.registry import TRANSFORMS
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    pipeline = Config.fromfile(
        ROOT / 'configs/maskrcnn_lavit_n_dsb2018.py'
    ).train_dataloader.dataset.pipeline
    # A frame around the image, which most crops miss, and spots of which they have some.
    size = 400
    masks = np.zeros((26, size, size), np.uint8)
    masks[0] = 1
    masks[0, 4:-4, 4:-4] = 0
    for i, (y, x) in enumerate(np.ndindex(5, 5), 1):
        masks[i, 80 * y + 30 : 80 * y + 50, 80 * x + 30 : 80 * x + 50] = 1
    instances = BitmapMasks(masks, size, size)
    boxes = instances.get_bboxes(HorizontalBoxes)
    with DefaultScope.overwrite_default_scope('mmdet'):
        crop = Compose([TRANSFORMS.build(step) for step in pipeline[2:-1]])
    np.random.seed(0)
    counts = []
    for _ in range(100):
        found = crop(
            dict(
                img=np.zeros((size, size, 3), np.uint8),
                img_shape=(size, size),
                gt_bboxes=boxes.clone(),
                gt_masks=BitmapMasks(masks.copy(), size, size),
                gt_bboxes_labels=np.zeros(26, np.int64),
                gt_ignore_flags=np.zeros(26, bool),
            )
        )
        if found is None:
            continue
        left = found['gt_bboxes']
        assert (left.widths > 0).all() and (left.heights > 0).all()
        assert len(found['gt_masks']) == len(left) == len(found['gt_bboxes_labels'])
        counts.append(len(left))
    assert max(counts) > 3
