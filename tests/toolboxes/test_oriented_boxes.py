"""The page on oriented boxes: its config trains and is tested, where mmrotate is installed."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, assert_ran, read_log, run_tool

PAGE = (ROOT / 'docs' / 'oriented_boxes.md').read_text(encoding='utf-8')
# What makes the model and its images small.
SMALL = [
    *('model.backbone.arch=nano', 'model.neck.in_channels=[32,64,160,320]'),
    *('train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'default_hooks.logger.interval=1'),
    'train_dataloader.dataset.pipeline.3.scale=(128,128)',
    *(f'{split}_dataloader.dataset.pipeline.1.scale=(128,128)' for split in ('val', 'test')),
    *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
    *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
]


def draw(folder: Path, number: int) -> None:
    """Images of a tilted boat and a tilted quay, labelled as DOTA is."""
    rng = np.random.default_rng(0)
    for kind in ('images', 'annfiles'):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        image, lines = np.full((128, 128, 3), 60, np.uint8), []
        for name, colour in (('boat', (40, 200, 240)), ('quay', (200, 120, 60))):
            place, size = rng.uniform(30, 98, 2), (rng.uniform(30, 50), rng.uniform(10, 18))
            corners = cv2.boxPoints((tuple(place), size, rng.uniform(0, 180)))
            cv2.fillPoly(image, [corners.astype(int)], colour)
            lines.append(' '.join(f'{v:.1f}' for v in corners.ravel()) + f' {name} 0\n')
        cv2.imwrite(str(folder / 'images' / f'{i:03d}.png'), image)
        (folder / 'annfiles' / f'{i:03d}.txt').write_text(''.join(lines))


@pytest.mark.slow
def test_the_config_of_the_page_trains_and_is_tested(tmp_path):
    pytest.importorskip('mmrotate', reason='onedl-mmrotate is not installed')
    for split, number in (('train', 8), ('val', 2)):
        draw(tmp_path / 'data' / 'boats' / split, number)
    (config,) = re.findall(r'^```python\n(# boats\.py\n.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / 'boats.py').write_text(config)
    assert_ran(run_tool('train.py', 'boats.py', '--cfg-options', *SMALL, cwd=tmp_path))
    log = read_log(tmp_path / 'work_dirs' / 'boats')
    losses = [line['loss'] for line in log if 'loss' in line]
    assert len(losses) == 8 and np.isfinite(losses).all()
    assert [line for line in log if 'dota/mAP' in line]
    checkpoint = 'work_dirs/boats/epoch_2.pth'
    ran = run_tool('test.py', 'boats.py', checkpoint, '--cfg-options', *SMALL, cwd=tmp_path)
    assert_ran(ran)
    assert 'dota/AP50' in ran.stdout
