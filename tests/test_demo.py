"""The demo: its bookkeeping in the short run, the whole of it in the long one."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO

from mmlavit import demo
from mmlavit.shapes import ShapesRecipe, make_shapes

REPOSITORY = Path(__file__).parents[1]


def write_run(work_dir: Path, name: str, records: list[dict]) -> None:
    path = work_dir / name / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))


@pytest.fixture
def resumed(tmp_path):
    """The log of a training that was stopped after iteration 30 and resumed from 20."""
    train = [{'loss': 3.0 / s, 'loss_dp': 0.1, 'lr': 1.0, 'step': s} for s in (10, 20, 30)]
    valid = {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.4, 'coco/bbox_mAP_l': -1.0, 'step': 1}
    write_run(tmp_path, '20260101_000000', [*train, valid])
    again = [{'loss': 9.0, 'loss_dp': 0.1, 'lr': 1.0, 'step': s} for s in (30, 40)]
    write_run(tmp_path, '20260102_000000', [*again, {**valid, 'step': 2}])
    return tmp_path


def test_a_resumed_log_is_read_as_one(resumed):
    records = demo.read_scalars(resumed)
    assert [r['step'] for r in records if 'loss' in r] == [10, 20, 30, 40]
    assert [r['loss'] for r in records if 'loss' in r][2:] == [9.0, 9.0]
    assert [r['step'] for r in records if 'loss' not in r] == [1, 2]


def test_curves_show_losses_and_precisions(resumed, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    out = demo.draw_curves(resumed, resumed / 'curves.png')
    assert cv2.imread(str(out)).shape[1] > 1000
    losses, precisions = figures[0].axes
    lines = {line.get_label(): list(line.get_xdata()) for line in losses.get_lines()}
    assert lines == {'loss': [10, 20, 30, 40], 'loss_dp': [10, 20, 30, 40]}
    lines = {line.get_label(): list(line.get_xdata()) for line in precisions.get_lines()}
    assert lines == {'coco/bbox_mAP': [1, 2], 'coco/bbox_mAP_50': [1, 2]}


def test_predictions_are_drawn_beside_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'SHAPES', tmp_path / 'shapes')
    make_shapes(demo.SHAPES, ShapesRecipe(num_train=1, num_val=4, max_shapes=2), progress=False)
    truth = COCO(str(demo.SHAPES / 'coco/annotations/instances_val2017.json'))
    samples = []
    for info in truth.loadImgs(truth.getImgIds()):
        found = truth.loadAnns(truth.getAnnIds(imgIds=[info['id']]))
        if info['id'] == 4:
            found = []
        masks = [np.asfortranarray(truth.annToMask(a)) for a in found]
        boxes = torch.tensor([a['bbox'] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        samples.append(
            dict(
                img_id=info['id'],
                img_path=str(demo.SHAPES / 'coco/val2017' / info['file_name']),
                pred_instances=dict(
                    bboxes=boxes,
                    labels=torch.tensor([a['category_id'] - 1 for a in found], dtype=torch.long),
                    scores=torch.full((len(found),), 0.9),
                    masks=[rle.encode(m) for m in masks],
                ),
            )
        )
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(samples))
    sheet = cv2.imread(str(demo.draw_predictions(tmp_path / 'p.pkl', tmp_path / 'p.png', scale=2)))
    height, width = 96 * 2 + 12, 2 * 96 * 2 + 12
    assert sheet.shape == (height, 4 * width, 3)
    for i, sample in enumerate(samples):
        tile = sheet[6:-6, i * width + 6 : (i + 1) * width - 6].astype(int)
        left, right = tile[:, :192], tile[:, 192:]
        image = cv2.imread(sample['img_path'])
        image = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC).astype(int)
        assert np.abs(left - image).max() > 50, 'the truth is drawn on the left'
        drawn = np.abs(right - image).max() > 50
        assert drawn == (sample['img_id'] != 4), 'and the prediction, if any, on the right'


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_reaches_its_targets_and_resumes(tmp_path):
    """``tools/demo.py`` as ``make demo`` runs it, killed once in the middle of training."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    command = [sys.executable, 'tools/demo.py']
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with first:
        for line in first.stdout:
            if re.search(r'Epoch\(train\) +\[2\]', line):
                break
        # The training is a child of the demo; a power cut would take both.
        os.killpg(first.pid, signal.SIGKILL)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'going on from' in done.stdout
    metrics = json.loads(max((tmp_path / 'work_dirs/demo/test').glob('*/*.json')).read_text())
    for name, least in demo.DEMOS['det'].targets.items():
        assert metrics[name] >= least, f'{name} = {metrics[name]}'
    for picture in ('curves.png', 'predictions.png'):
        assert cv2.imread(str(tmp_path / 'work_dirs/demo' / picture)) is not None
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'finished before' in again.stdout
