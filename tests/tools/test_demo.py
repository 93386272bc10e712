"""The demo: its bookkeeping in the short run, the whole of it in the long one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from repository import demo

REPOSITORY = Path(__file__).parents[2]


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


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    return figures


def lines_of(panel) -> dict[str, list]:
    return {line.get_label(): list(line.get_xdata()) for line in panel.get_lines()}


def test_curves_show_losses_and_precisions(resumed, drawn):
    out = demo.draw_curves(resumed, resumed / 'curves.png')
    assert cv2.imread(str(out)).shape[1] > 1000
    losses, boxes = drawn[0].axes
    assert set(map(tuple, lines_of(losses).values())) == {(10, 20, 30, 40)}
    assert len(lines_of(losses)) == 2 and 'loss_dp' in lines_of(losses)
    assert list(lines_of(boxes).values()) == [[1, 2], [1, 2]]
    assert [list(line.get_ydata()) for line in boxes.get_lines()] == [[0.2, 0.2], [0.4, 0.4]]


@pytest.mark.parametrize(
    'values, name, axis, top',
    [
        ([0.2, 0.9], 'coco/bbox_mAP', 'box AP', 1),
        ([0.2, 1.0], 'coco/segm_mAP', 'mask AP', 1),
        ([20.0, 90.0], 'mIoU', 'percent', 100),
        ([0.5], 'accuracy/top1', 'top-1 accuracy, percent', 100),
    ],
)
@pytest.mark.parametrize('unit', ['epoch', 'iteration'])
def test_axes_of_curves(tmp_path, drawn, values, name, axis, top, unit):
    """In the toolboxes' scales, and in what the training counted; never 1.25 epochs."""
    records = [{name: v, 'step': i} for i, v in enumerate(values, 1)]
    trained = {'loss': 1.0, 'step': 1, **({'epoch': 1} if unit == 'epoch' else {})}
    write_run(tmp_path, 'run', [trained, *records])
    demo.draw_curves(tmp_path, tmp_path / 'curves.png')
    losses, panel = drawn[0].axes
    assert (losses.get_xlabel(), losses.get_ylabel()) == ('iteration', 'loss')
    assert (panel.get_xlabel(), panel.get_ylabel()) == (unit, axis)
    bottom, end = panel.get_ylim()
    assert bottom == 0 and top < end < 1.1 * top
    assert all(float(tick).is_integer() for tick in panel.get_xticks())


def test_no_curve_hides_another(tmp_path, drawn):
    """Boxes and masks were as good in every epoch: two panels."""
    same = {f'coco/{kind}_mAP{end}': 0.9 for kind in ('bbox', 'segm') for end in ('', '_50')}
    same |= {f'coco/{kind}_mAP': 0.8 for kind in ('bbox', 'segm')}
    records = [{**same, 'step': step} for step in (1, 2)]
    write_run(tmp_path, 'run', [{'loss': 1.0, 'step': 1, 'epoch': 1}, *records])
    demo.draw_curves(tmp_path, tmp_path / 'curves.png')
    shown = [tuple(line.get_ydata()) for panel in drawn[0].axes[1:] for line in panel.get_lines()]
    assert sorted(shown) == [(0.8, 0.8)] * 2 + [(0.9, 0.9)] * 2
    for panel in drawn[0].axes:
        curves = [tuple(line.get_ydata()) for line in panel.get_lines()]
        assert len(set(curves)) == len(curves)


def test_knows_when_each_training_is_over():
    """The checkpoint that ends it is one that its config lets MMEngine write."""
    for task in demo.DEMOS.values():
        cfg = Config.fromfile(REPOSITORY / task.config)
        kind, count = re.fullmatch(r'(epoch|iter)_(\d+)\.pth', demo.last_checkpoint(cfg)).groups()
        loop = cfg.train_cfg
        assert int(count) == loop['max_iters' if kind == 'iter' else 'max_epochs']
        assert int(count) % cfg.default_hooks.checkpoint.interval == 0
        assert cfg.default_hooks.checkpoint.get('by_epoch', True) == (kind == 'epoch')


@pytest.mark.parametrize('validated', [True, False])
def test_a_training_is_over_when_its_last_model_was_validated(tmp_path, monkeypatch, validated):
    calls = []
    monkeypatch.setattr(demo, '_tool', lambda *args: calls.append(args))
    config = REPOSITORY / demo.DEMOS['cls'].config
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_20.pth'))
    (tmp_path / 'best_accuracy_top1_epoch_19.pth').touch()
    steps = (19, 20) if validated else (19,)
    write_run(tmp_path, '20260101_000000', [{'accuracy/top1': 50.0, 'step': s} for s in steps])
    demo.train(config, tmp_path)
    assert [args[0] for args in calls] == ([] if validated else ['train.py'])


# By demo: what is shorter in its schedule; a line of the log after the first checkpoint; what it
# then reaches, where naming the commonest class has 23 % mIoU and 33 % accuracy. The whole of them
# takes 40 minutes of a core: CONTRIBUTING.md says when to run it.
SHORT = {
    'det': (
        {
            'max_epochs=3': 'max_epochs=2',
            'T_max=3': 'T_max=2',
            # Half of the images.
            'batch_size=8,\n    dataset=dict(': 'batch_size=8,\n    dataset=dict(indices=1500,',
        },
        r'Epoch\(train\) +\[2\]',
        {'coco/bbox_mAP_50': 0.85, 'coco/segm_mAP_50': 0.85, 'coco/bbox_mAP': 0.60},
    ),
    'seg': (
        {
            'max_iters=1250, val_interval=250': 'max_iters=300, val_interval=150',
            'end=1250': 'end=300',
            'interval=250, max_keep': 'interval=150, max_keep',
        },
        r'Iter\(train\) \[ *175/',
        {'mIoU': 30.0},
    ),
    'cls': (
        {'max_epochs=20': 'max_epochs=2', 'T_max=20': 'T_max=2'},
        r'Epoch\(train\) +\[2\]',
        {'accuracy/top1': 60.0},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize('task', SHORT)
def test_the_demo_reaches_its_targets_and_resumes(tmp_path, task):
    """``tools/demo.py`` as ``make demo`` runs it, killed once in the middle of training.

    On one thread, as all tests: two take 40 % more of the processors, which other tests use.
    """
    schedule, after_a_checkpoint, targets = SHORT[task]
    work_dir = tmp_path / demo.DEMOS[task].work_dir
    (tmp_path / 'tools').symlink_to(REPOSITORY / 'tools')
    shutil.copytree(REPOSITORY / 'configs', tmp_path / 'configs')
    config = tmp_path / demo.DEMOS[task].config
    text = config.read_text()
    for long, short in schedule.items():
        assert long in text
        text = text.replace(long, short)
    config.write_text(text)
    command = [sys.executable, 'tools/demo.py', task]
    run = partial(subprocess.run, command, cwd=tmp_path, capture_output=True, text=True)
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with first:
        for line in first.stdout:
            if re.search(after_a_checkpoint, line):
                break
        # The training is a child of the demo; a power cut would take both.
        os.killpg(first.pid, signal.SIGKILL)
    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'going on from' in done.stdout
    metrics = json.loads(max((work_dir / 'test').glob('*/*.json')).read_text())
    for name, least in targets.items():
        assert metrics[name] >= least, f'{name} = {metrics[name]}'
    for picture in ('curves.png', 'predictions.png'):
        assert cv2.imread(str(work_dir / picture)) is not None
    again = run()
    assert 'finished before' in again.stdout
