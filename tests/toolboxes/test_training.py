"""A real training through tools/train.py on a few images, and what a user does after it."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    SHAPES_CONFIG,
    assert_ran,
    make_shapes,
    read_log,
    run_tool,
    shapes_options,
    the_one_line,
)

IMAGES, BATCH, EPOCHS = 12, 4, 8
STEPS = IMAGES // BATCH
METRICS = [f'coco/{kind}_mAP{which}' for kind in ('bbox', 'segm') for which in ('', '_50')]


class Run(NamedTuple):
    """A finished training."""

    folder: Path
    data: Path
    options: list[str]
    log: list[dict]

    @property
    def work_dir(self) -> Path:
        return self.folder / 'run'

    @property
    def steps(self) -> list[dict]:
        """The log of every iteration."""
        return [line for line in self.log if 'loss' in line]

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / f'epoch_{EPOCHS}.pth'


def train(folder: Path, options: list[str], *args: object, work_dir: str = 'run'):
    return run_tool(
        *('train.py', SHAPES_CONFIG, '--work-dir', work_dir, *args, '--cfg-options', *options),
        cwd=folder,
    )


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Iterator[Run]:
    """Overfits a dozen images: two dozen iterations, validated in the middle and at the end."""
    folder = tmp_path_factory.mktemp('training')
    data = make_shapes(folder / 'shapes', IMAGES, 4)
    options = [
        *shapes_options(data),
        f'train_dataloader.batch_size={BATCH}',
        f'train_cfg.max_epochs={EPOCHS}',
        f'train_cfg.val_interval={EPOCHS // 2}',
        'param_scheduler.0.end=3',
        f'param_scheduler.1.T_max={EPOCHS}',
        'default_hooks.logger.interval=1',
        'log_processor.window_size=1',
        'custom_hooks.0.loss_weight=0.1',
    ]
    assert_ran(train(folder, options))
    yield Run(folder, data, options, read_log(folder / 'run'))
    shutil.rmtree(folder)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']


def logged_metrics(stdout: str) -> dict[str, float]:
    """The metrics of the last evaluation in a console log."""
    line = re.findall(r'Epoch\((?:val|test)\).*coco/bbox_mAP: .*', stdout)[-1]
    return {name: float(value) for name, value in re.findall(r'(coco/\w+): (-?[\d.]+)', line)}


def test_every_iteration_is_logged_with_loss_dp(run):
    assert [step['step'] for step in run.steps] == list(range(1, EPOCHS * STEPS + 1))
    for step in run.steps:
        assert np.isfinite(list(step.values())).all()
        assert step['loss_dp'] > 0
        # It is part of what is minimised, and once.
        parts = [value for name, value in step.items() if name.startswith('loss_')]
        assert step['loss'] == pytest.approx(sum(parts), rel=1e-5)


def test_loss_falls(run):
    """From about 3.5 to 2 on two dozen iterations; a model that gets no gradient stays."""
    first, last = run.steps[:STEPS], run.steps[-STEPS:]
    for name, factor in (
        ('loss', 0.8),
        ('loss_mask', 0.8),
        ('loss_rpn_cls', 0.9),
    ):
        before = np.mean([step[name] for step in first])
        after = np.mean([step[name] for step in last])
        assert after < factor * before, (name, before, after)


def test_all_of_the_backbone_moves(run):
    """Every weight of the checkpoint differs from the one that was saved an epoch before."""
    before, after = weights(run.work_dir / f'epoch_{EPOCHS - 1}.pth'), weights(run.checkpoint)
    assert before.keys() == after.keys()
    still = [name for name in after if torch.equal(before[name], after[name])]
    assert [name for name in still if name.startswith('backbone.')] == []
    assert all(value.isfinite().all() for value in after.values())


def test_validation_is_logged_and_the_best_checkpoint_kept(run):
    validations = [line for line in run.log if METRICS[0] in line]
    assert [line['step'] for line in validations] == [EPOCHS // 2, EPOCHS]
    for line in validations:
        assert all(0 <= line[name] <= 1 for name in METRICS)
    assert len(list(run.work_dir.glob('best_coco_segm_mAP_epoch_*.pth'))) == 1
    kept = sorted(path.name for path in run.work_dir.glob('epoch_*.pth'))
    assert kept == [f'epoch_{EPOCHS - 1}.pth', f'epoch_{EPOCHS}.pth']


def test_test_py_prints_the_same_coco_metrics(run):
    result = run_tool(
        *('test.py', SHAPES_CONFIG, run.checkpoint, '--work-dir', 'tested', '--out', 'found.pkl'),
        *('--show-dir', 'pictures', '--cfg-options', *shapes_options(run.data)),
        cwd=run.folder,
    )
    assert_ran(result)
    assert 'Average Precision' in result.stdout
    printed = logged_metrics(result.stdout)
    validated = [line for line in run.log if METRICS[0] in line][-1]
    for name in METRICS:
        assert printed[name] == pytest.approx(validated[name], abs=1e-3), name
    with open(run.folder / 'found.pkl', 'rb') as source:
        found = pickle.load(source)
    assert sorted(prediction['img_id'] for prediction in found) == [1, 2, 3, 4]
    assert len(list((run.folder / 'tested').glob('*/pictures/*.jpg'))) == 4


def test_resume_continues(run):
    """After an interruption in the last epoch: that epoch again, alone, with the same losses."""
    work_dir = shutil.copytree(run.work_dir, run.folder / 'resumed')
    for checkpoint in work_dir.glob(f'*epoch_{EPOCHS}.pth'):
        checkpoint.unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / f'epoch_{EPOCHS - 1}.pth'))
    assert_ran(train(run.folder, run.options, '--resume', work_dir='resumed'))
    steps = [line for line in read_log(work_dir) if 'loss' in line]
    expected = run.steps[-STEPS:]
    for key in ('step', 'epoch', 'lr', *(key for key in expected[0] if 'loss' in key)):
        assert [step[key] for step in steps] == [step[key] for step in expected]
    again, undisturbed = weights(work_dir / f'epoch_{EPOCHS}.pth'), weights(run.checkpoint)
    assert [name for name in undisturbed if not torch.equal(again[name], undisturbed[name])] == []


def test_missing_checkpoint(run):
    result = run_tool(
        *('test.py', SHAPES_CONFIG, 'nowhere.pth', '--cfg-options', *shapes_options(run.data)),
        cwd=run.folder,
    )
    assert result.returncode == 2
    assert 'nowhere.pth' in the_one_line(result.stderr)


@pytest.mark.slow
def test_missing_image(run, tmp_path):
    data = shutil.copytree(run.data, tmp_path / 'shapes')
    image = data / 'coco' / 'train2017' / '000000000003.jpg'
    image.unlink()
    result = train(tmp_path, [*run.options, *shapes_options(data)])
    assert result.returncode == 2
    assert str(image) in the_one_line(result.stderr)


@pytest.mark.slow
def test_same_seed_same_weights(run):
    """Bitwise, and so are the optimizer's averages; another seed, other weights."""
    short = [*run.options, 'train_cfg.max_epochs=2']
    found = []
    for i, seed in enumerate((5, 5, 6)):
        work_dir = run.folder / f'seeded_{i}'
        assert_ran(train(run.folder, [*short, f'randomness.seed={seed}'], work_dir=work_dir))
        found.append(torch.load(work_dir / 'epoch_2.pth', map_location='cpu', weights_only=False))
    first, again, other = (checkpoint['state_dict'] for checkpoint in found)
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert any(not torch.equal(first[name], other[name]) for name in first)
    averages = [checkpoint['optimizer']['state'] for checkpoint in found[:2]]
    for i, state in averages[0].items():
        for name, value in state.items():
            assert torch.equal(value, averages[1][i][name])


@pytest.mark.slow
def test_the_data_at_its_default_place(run, tmp_path):
    """As in the README: make the data, train, without an option that names a folder."""
    assert_ran(run_tool('make_shapes.py', '--num-train', 4, '--num-val', 2, cwd=tmp_path))
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
    ]
    result = run_tool('train.py', SHAPES_CONFIG, '--cfg-options', *options, cwd=tmp_path)
    assert_ran(result)
    work_dir = tmp_path / 'work_dirs' / SHAPES_CONFIG.stem
    assert [line['step'] for line in read_log(work_dir) if 'loss_mask' in line] == [1]
    assert set(METRICS) <= set(logged_metrics(result.stdout))


@pytest.mark.slow
def test_mixed_precision(run):
    """MMEngine has it for accelerators only, and says so on a CPU."""
    options = [*run.options, 'train_cfg.max_epochs=1']
    result = train(run.folder, options, '--amp', work_dir='amp')
    if torch.cuda.is_available():
        assert_ran(result)
        steps = [line for line in read_log(run.folder / 'amp') if 'loss_dp' in line]
        assert len(steps) == STEPS and np.isfinite([step['loss'] for step in steps]).all()
    else:
        assert result.returncode == 1
        assert 'only available training on gpu' in result.stderr.splitlines()[-1]
