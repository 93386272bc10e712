"""Trainings that are killed, and disks that are full: what resuming makes of them."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, the_one_line

from mmlavit import LaViT
from mmlavit.datasets.shapes import ShapesRecipe, make_shapes
from mmlavit.engine.hooks.safe_checkpoint import (
    CheckpointError,
    SafeCheckpointHook,
    SafeLocalBackend,
    damage,
    require_whole,
)
from mmlavit.engine.hooks.step_seed import NumberedBatches, seed_process

# Random crops, flips, dropout and dropped paths, an average of the weights: all that a resumed
# training could lose. Three batches an epoch, twelve in all.
BASE = f"""
_base_ = {str(ROOT / 'configs' / 'lavit_n_shapes.py')!r}
arch = dict(
    _delete_=True, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 2, 2, 1),
    vanilla_depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2),
)
model = dict(
    backbone=dict(arch=arch, window_sizes=(4, 4, 4, 2), drop_path_rate=0.3, drop_rate=0.1),
    head=dict(in_channels=32),
)
del arch
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False,
    dataset=dict(
        data_root='shapes/imagenet',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=32, padding=4, padding_mode='reflect'),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False,
    dataset=dict(data_root='shapes/imagenet'),
)
test_dataloader = val_dataloader
custom_hooks = [dict(type='DiagonalityLossHook'), dict(type='EMAHook', momentum=0.1)]
train_cfg = dict(max_epochs=4)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=9)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=1))
"""
# Checkpoints inside epochs and between accumulated batches.
INSIDE = """
_base_ = './epoch.py'
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2, filename_tmpl='iter_{}.pth'))
optim_wrapper = dict(accumulative_counts=3)
"""
# No epochs; workers, which draw the augmentation.
ITER = """
_base_ = './epoch.py'
train_dataloader = dict(
    num_workers=2, persistent_workers=True, sampler=dict(_delete_=True, type='InfiniteSampler')
)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=12, val_interval=4)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
log_processor = dict(by_epoch=False)
"""
CONFIGS = {'epoch': BASE, 'inside': INSIDE, 'iter': ITER}
# What the message hub keeps for those who go on with the training.
KEPT = ('best_score', 'keep_ckpt_ids', 'sampler_seed', 'batches_per_epoch')
LAST = {'epoch': 'epoch_4.pth', 'inside': 'iter_12.pth', 'iter': 'iter_12.pth'}


class Lab:
    """A folder with data, configs and trainings, and the process that forks them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_shapes(folder / 'shapes', ShapesRecipe(num_train=12, num_val=4, size=64))
        for name, text in CONFIGS.items():
            (folder / f'{name}.py').write_text(text)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        self.zygote = subprocess.Popen(
            [sys.executable, Path(__file__).with_name('zygote.py')],
            env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._undisturbed: dict[str, tuple[Path, float]] = {}

    def start(self, config: str, name: str, *argv: object, file_limit: int = 0) -> int:
        """Start a training into the folder ``name``; its process id."""
        argv = [f'{config}.py', '--work-dir', name, *map(str, argv)]
        order = dict(argv=argv, cwd=str(self.folder), log=f'{name}.log', file_limit=file_limit)
        print(json.dumps(order), file=self.zygote.stdin, flush=True)
        return int(self.zygote.stdout.readline())

    def wait(self) -> int:
        """The exit status of the training that runs."""
        return int(self.zygote.stdout.readline())

    def train(self, config: str, name: str, *argv: object, **options: int) -> Path:
        """A training from its start to its end; its folder."""
        self.start(config, name, *argv, **options)
        assert self.wait() == 0, (self.folder / f'{name}.log').read_text()[-6000:]
        return self.folder / name

    def refused(self, config: str, name: str, *argv: object, **options: int) -> str:
        """A training that fails; the line that it says last."""
        self.start(config, name, *argv, **options)
        code = self.wait()
        log = (self.folder / f'{name}.log').read_text()
        assert code == 2, log[-6000:]
        return the_one_line(log.splitlines()[-1])

    def undisturbed(self, config: str) -> tuple[Path, float]:
        """A training that nobody stops, and the seconds that it takes."""
        if config not in self._undisturbed:
            name = f'undisturbed_{config}'
            self.start(config, name)
            start = time.monotonic()
            assert self.wait() == 0, (self.folder / f'{name}.log').read_text()[-6000:]
            self._undisturbed[config] = self.folder / name, time.monotonic() - start
        return self._undisturbed[config]

    def copy(self, config: str, name: str) -> Path:
        """A copy of an undisturbed training."""
        folder = shutil.copytree(self.undisturbed(config)[0], self.folder / name)
        (folder / 'last_checkpoint').write_text(f'{name}/{LAST[config]}')
        return folder


@pytest.fixture(scope='module')
def lab(tmp_path_factory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp('resume'))
    with lab.zygote:
        yield lab
        lab.zygote.stdin.close()


def load(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def leaves(value: object, name: str = '') -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from leaves(part, f'{name}.{key}')
    else:
        yield name, value


def assert_same_training(folder: Path, expected: Path, last: str) -> None:
    """Bitwise: weights, their averages, the optimizer's, schedules, the best model, its score."""
    names = {path.name for path in folder.glob('*.pth*')}
    wanted = {path.name for path in expected.glob('*.pth*')}
    assert wanted <= names and not any(name.endswith('.tmp') for name in names)
    for name in sorted(wanted):
        mine, theirs = load(folder / name), load(expected / name)
        assert mine.keys() == theirs.keys()
        for part in mine.keys() - {'meta', 'message_hub'}:
            found, right = dict(leaves(mine[part])), dict(leaves(theirs[part]))
            assert found.keys() == right.keys()
            for key, value in right.items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(found[key], value), f'{name}: {part}{key} differs'
        for part, keys in (('meta', ('epoch', 'iter')), ('runtime_info', KEPT)):
            infos = [c.get(part) or c['message_hub'][part] for c in (mine, theirs)]
            for key in keys:
                assert infos[0].get(key) == infos[1].get(key), f'{name}: {key} differs'
    assert Path((folder / 'last_checkpoint').read_text()).name == last


# -- Killed ----------------------------------------------------------------------------------------


def kill(lab: Lab, work_dir: Path, pid: int, moment: float | int) -> str:
    """Kill a training and its workers: after so many seconds, or in its n-th writing of a file.

    Returns:
        How far it was.
    """
    started, writings, writing = time.monotonic(), 0, []
    while alive(pid):
        before, writing = writing, [n for n in listing(work_dir) if n.endswith('.tmp')]
        writings += bool(writing and not before)
        if time.monotonic() - started > moment if isinstance(moment, float) else writings == moment:
            os.killpg(pid, signal.SIGKILL)
            break
        time.sleep(2e-4)
    return f'status {lab.wait()}, writing {writing}'


def alive(pid: int) -> bool:
    """Whether the zygote's child has not been waited for."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def listing(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def moments(seed: int, count: int, seconds: float) -> list[float | int]:
    """Random times after a training's preparations, and as many of its writings of checkpoints."""
    generator = random.Random(seed)
    times = [generator.uniform(seconds / 3, seconds) for _ in range(count // 2)]
    return times + [generator.randint(1, 6) for _ in range(count - count // 2)]


def kill_and_resume(lab: Lab, config: str, moments: list[float | int]) -> None:
    expected, _ = lab.undisturbed(config)
    for i, moment in enumerate(moments):
        name = f'killed_{config}_{i}'
        pid = lab.start(config, name)
        where = kill(lab, lab.folder / name, pid, moment)
        print(f'{config} {moment}: {where}; {sorted(listing(lab.folder / name))}')
        folder = lab.train(config, name, '--resume')
        assert_same_training(folder, expected, LAST[config])
        shutil.rmtree(folder)


def test_killed_and_resumed(lab):
    """The short version of the next: one training, killed in the middle and in writing."""
    expected, seconds = lab.undisturbed('epoch')
    work_dir = lab.folder / 'killed_twice'
    for argv, moment in (([], seconds * 0.6), (['--resume'], 2)):
        pid = lab.start('epoch', work_dir.name, *argv)
        print(moment, kill(lab, work_dir, pid, moment), sorted(listing(work_dir)))
    assert_same_training(lab.train('epoch', work_dir.name, '--resume'), expected, LAST['epoch'])


@pytest.mark.slow
@pytest.mark.parametrize('config', CONFIGS)
def test_killed_at_many_moments_and_resumed(lab, config):
    seed = int(time.time())
    print('seed', seed)
    kill_and_resume(lab, config, moments(seed, 7, lab.undisturbed(config)[1]))


@pytest.mark.slow
@pytest.mark.parametrize('content', ['', None, 'elsewhere/epoch_4.pth'])
def test_a_checkpoint_that_nobody_points_to(lab, content):
    """As after a kill while last_checkpoint is being written, or a move: all work is kept."""
    work_dir = lab.copy('epoch', 'pointer')
    pointer = work_dir / 'last_checkpoint'
    pointer.unlink() if content is None else pointer.write_text(content)
    folder = lab.train('epoch', work_dir.name, '--resume')
    assert_same_training(folder, lab.undisturbed('epoch')[0], LAST['epoch'])
    log = lab.folder / f'{work_dir.name}.log'
    text = log.read_text()
    assert 'Epoch(train)' not in text and f'here is {work_dir}/epoch_4.pth' in text
    shutil.rmtree(work_dir)
    log.unlink()


@pytest.mark.slow
def test_nothing_to_resume_from_starts_from_the_beginning(lab):
    folder = lab.train('epoch', 'from_nothing', '--resume')
    assert_same_training(folder, lab.undisturbed('epoch')[0], LAST['epoch'])


# -- Damaged ---------------------------------------------------------------------------------------

DAMAGES = {
    'truncated': lambda data: data[: len(data) // 2],
    'short of a byte': lambda data: data[:-1],
    'empty': lambda data: b'',
    'zeros': lambda data: bytes(len(data)),
    'no checkpoint': lambda data: b'<html><body>404 Not Found</body></html>',
    'a flipped bit': lambda data: flipped(data, len(data) // 2),
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.fixture(scope='module')
def two_checkpoints(lab) -> Path:
    """A training that keeps two checkpoints."""
    return lab.train('epoch', 'two', '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=2')


@pytest.mark.parametrize('kind', DAMAGES)
def test_damage_is_refused_and_the_checkpoint_before_it_named(tmp_path, kind):
    """The newest good one before it: neither a later one, nor one that is damaged as well."""
    for n in (1, 2, 3, 10):
        torch.save({'state_dict': torch.ones(5000)}, tmp_path / f'epoch_{n}.pth')
    for n in (2, 3):
        path = tmp_path / f'epoch_{n}.pth'
        path.write_bytes(DAMAGES[kind](path.read_bytes()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    require_whole(tmp_path / 'epoch_10.pth', 'epoch_{}.pth')
    with pytest.raises(CheckpointError) as caught:
        require_whole(tmp_path / 'epoch_3.pth', 'epoch_{}.pth')
    message = str(caught.value)
    assert message.startswith(f'cannot resume from {tmp_path}/epoch_3.pth: ')
    assert message.endswith(f'with --resume {tmp_path}/epoch_1.pth. Nothing was deleted')
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['truncated', 'a flipped bit'])
def test_damaged_newest_checkpoint(lab, two_checkpoints, kind):
    """One line that names it and the one before it; nothing is deleted; the one before it works."""
    work_dir = lab.folder / f'damaged_{kind.replace(" ", "_")}'
    shutil.copytree(two_checkpoints, work_dir)
    newest, older = (f'{work_dir.name}/epoch_{n}.pth' for n in (4, 3))
    (work_dir / 'last_checkpoint').write_text(newest)
    data = (lab.folder / newest).read_bytes()
    (lab.folder / newest).write_bytes(DAMAGES[kind](data))
    before = {path.name: path.read_bytes() for path in work_dir.glob('*.pth')}
    line = lab.refused('epoch', work_dir.name, '--resume')
    assert line.startswith(f'mmlavit: cannot resume from {newest}: ')
    assert f'--resume {older}' in line and 'Nothing was deleted' in line
    assert before == {path.name: path.read_bytes() for path in work_dir.glob('*.pth')}
    # What the line says, done.
    argv = ['--resume', older, '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=2']
    folder = lab.train('epoch', work_dir.name, *argv)
    assert_same_training(folder, two_checkpoints, LAST['epoch'])


@pytest.mark.slow
def test_checkpoint_that_is_gone(lab, two_checkpoints):
    work_dir = shutil.copytree(two_checkpoints, lab.folder / 'gone')
    (work_dir / 'last_checkpoint').write_text('gone/epoch_4.pth')
    (work_dir / 'epoch_4.pth').unlink()
    line = lab.refused('epoch', 'gone', '--resume')
    assert 'gone/epoch_4.pth: there is no such file' in line
    assert '--resume gone/epoch_3.pth' in line
    (work_dir / 'epoch_3.pth').write_bytes(b'')
    line = lab.refused('epoch', 'gone', '--resume')
    assert 'has no good one before it' in line and 'epoch_3.pth' not in line


def test_flipped_bits_are_found_where_they_change_what_is_loaded(tmp_path):
    """The checksums see what ``torch.load`` does not; what neither sees, changes nothing."""
    seed = int(time.time())
    print('seed', seed)
    generator = random.Random(seed)
    weights = {'a': torch.arange(1000.0), 'b': torch.ones(7, 9)}
    torch.save(weights, tmp_path / 'whole.pth')
    data = (tmp_path / 'whole.pth').read_bytes()
    assert damage(tmp_path / 'whole.pth') is None
    unseen_by_torch = 0
    for _ in range(200):
        (tmp_path / 'flipped.pth').write_bytes(flipped(data, generator.randrange(len(data))))
        try:
            loaded = load(tmp_path / 'flipped.pth')
            same = all(torch.equal(loaded[key], weights[key]) for key in weights)
        except Exception:  # torch has many ways to say so
            continue
        if not same:
            unseen_by_torch += 1
            assert damage(tmp_path / 'flipped.pth') is not None
    assert unseen_by_torch > 0


@pytest.mark.parametrize('cut', [0, 1000])
@pytest.mark.parametrize('form', ['bare pickle', 'without checksums'])
def test_files_without_checksums_are_damaged_only_where_they_are(tmp_path, form, cut):
    path = tmp_path / 'epoch_1.pth'
    weights = {'a': torch.arange(1000.0)}
    if form == 'bare pickle':
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    elif not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip(f'torch {torch.__version__} always saves checksums')
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(weights, path)
        finally:
            torch.serialization.set_crc32_options(True)
    path.write_bytes(path.read_bytes()[: -cut or None])
    assert (damage(path) is None) == (cut == 0)
    if not cut:
        require_whole(path, 'epoch_{}.pth')


# -- Full disks ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_disk_full_while_saving(lab):
    """The process may write no file as large as a checkpoint: one line, and nothing is lost."""
    half = lab.train('epoch', 'full', '--cfg-options', 'train_cfg.max_epochs=2')
    size = (half / 'epoch_2.pth').stat().st_size
    before = {path.name: path.read_bytes() for path in half.glob('*.pth')}
    line = lab.refused('epoch', 'full', '--resume', file_limit=size // 2)
    assert line.startswith(f'mmlavit: cannot write {half}/epoch_3.pth: {os.strerror(errno.EFBIG)}')
    assert 'make room and go on with --resume' in line
    assert before == {path.name: path.read_bytes() for path in half.glob('*.pth*')}
    assert (half / 'last_checkpoint').read_text() == f'{half}/epoch_2.pth'
    folder = lab.train('epoch', 'full', '--resume')
    assert_same_training(folder, lab.undisturbed('epoch')[0], LAST['epoch'])


class FullDisk:
    """A file that takes half of what it is given."""

    def __init__(self, sink):
        self.sink = sink

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.sink.close()

    def write(self, data):
        self.sink.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / 'sub' / 'epoch_1.pth'
    backend = SafeLocalBackend()
    backend.put(b'before', path)
    real_open = open
    monkeypatch.setattr('builtins.open', lambda *args: FullDisk(real_open(*args)))
    with pytest.raises(CheckpointError) as caught:
        backend.put(b'afterwards', path)
    monkeypatch.undo()
    assert str(path) in str(caught.value) and os.strerror(errno.ENOSPC) in str(caught.value)
    assert path.read_bytes() == b'before' and os.listdir(path.parent) == [path.name]
    backend.put(b'afterwards', path)
    assert path.read_bytes() == b'afterwards'


def test_nothing_goes_before_what_replaces_it_is_there(tmp_path):
    backend = SafeLocalBackend()
    for name in ('a', 'b'):
        backend.put(b'', tmp_path / name)
        backend.remove(str(tmp_path / name))
    backend.put(b'', tmp_path / 'c')
    assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'c']
    backend.flush()
    assert os.listdir(tmp_path) == ['c']


# -- What the hooks are for ------------------------------------------------------------------------

MMENGINES = [
    'default_hooks.checkpoint.type=CheckpointHook',
    'default_hooks.sampler_seed.type=DistSamplerSeedHook',
]


@pytest.mark.slow
def test_mmengines_own_hooks_lose_what_ours_keep(lab):
    """Whoever sees this fail may see whether our hooks are still needed."""
    expected = lab.train('epoch', 'mmengine', '--cfg-options', *MMENGINES)
    half = lab.train(
        'epoch', 'mmengine_half', '--cfg-options', *MMENGINES, 'train_cfg.max_epochs=2'
    )
    shutil.copytree(half, lab.folder / 'mmengine_full')
    resumed = lab.train('epoch', half.name, '--resume', '--cfg-options', *MMENGINES)
    mine, theirs = (load(folder / LAST['epoch'])['state_dict'] for folder in (resumed, expected))
    far = max((mine[name] - theirs[name]).abs().max().item() for name in theirs)
    print('largest difference', far)
    assert far > 0

    # A disk that is full: the checkpoint before is gone, and a torn one bears the name of the new.
    work_dir = lab.folder / 'mmengine_full'
    (work_dir / 'last_checkpoint').write_text('mmengine_full/epoch_2.pth')
    limit = (work_dir / 'epoch_2.pth').stat().st_size // 2
    lab.start('epoch', work_dir.name, '--resume', '--cfg-options', *MMENGINES, file_limit=limit)
    assert lab.wait() == 1
    left = list(work_dir.glob('epoch_*.pth'))
    print('left', left)
    assert [path.name for path in left] == ['epoch_3.pth'] and damage(left[0]) is not None
    lab.start('epoch', work_dir.name, '--resume', '--cfg-options', *MMENGINES)
    assert lab.wait() != 0

    # Flipped bits: trained on.
    flipped_dir = lab.copy('epoch', 'mmengine_flipped')
    path = flipped_dir / LAST['epoch']
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) // 2))
    options = [*MMENGINES, 'train_cfg.max_epochs=5']
    lab.train('epoch', flipped_dir.name, '--resume', '--cfg-options', *options)


# -- Determinism -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_seed_same_training(lab):
    """Again, and with other numbers of workers; another seed, another training."""
    for config, options in (
        ('epoch', []),
        ('epoch', ['train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True']),
        ('iter', ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']),
    ):
        argv = ['--cfg-options', *options] if options else []
        folder = lab.train(config, f'again_{config}_{len(options)}', *argv)
        assert_same_training(folder, lab.undisturbed(config)[0], LAST[config])
    folder = lab.train('epoch', 'other_seed', '--cfg-options', 'randomness.seed=1')
    mine, theirs = (
        load(path / LAST['epoch'])['state_dict'] for path in (folder, lab.undisturbed('epoch')[0])
    )
    name = 'backbone.stages.0.blocks.0.mlp.fc1.weight'
    assert not torch.equal(mine[name], theirs[name])


@pytest.mark.slow
def test_seed_that_was_not_given_is_resumed_too(lab):
    """Weights and shuffling are those of an undisturbed training with the seed that was drawn."""
    lab.train('epoch', 'drawn', '--cfg-options', 'randomness.seed=None', 'train_cfg.max_epochs=2')
    seed = load(lab.folder / 'drawn' / 'epoch_2.pth')['meta']['seed']
    print('seed', seed)
    resumed = lab.train('epoch', 'drawn', '--resume', '--cfg-options', 'randomness.seed=None')
    expected = lab.train('epoch', 'given', '--cfg-options', f'randomness.seed={seed}')
    assert_same_training(resumed, expected, LAST['epoch'])


def test_test_mode_draws_nothing():
    """With every dropout on; the generators are left as they were."""
    backbone = LaViT(
        arch='nano', drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, out_indices=(3,)
    ).eval()
    images = torch.randn(2, 3, 64, 48)
    found = []
    for seed in (1, 2):
        seed_process(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with torch.no_grad():
            found.append(backbone(images)[0])
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(*found)
    with torch.no_grad():
        assert not torch.equal(backbone.train()(images)[0], found[0])


class Batches(list):
    """A batch sampler of given batches, which notes its epochs."""

    @property
    def sampler(self):
        return self

    def set_epoch(self, epoch: int) -> None:
        self[:] = [[index + 10 for index in batch] for batch in self]


def test_batches_are_numbered_and_left_out():
    batches = NumberedBatches(Batches([[1, 2], [3]]), seed=5, endless=False)
    assert list(batches) == [[1, 2], [3]] == list(batches) and len(batches) == 2
    assert [batch.key for batch in batches] == [(5, 0, 0, 0), (5, 0, 0, 1)]
    batches.skip = 1
    assert [batch.key for batch in batches] == [(5, 0, 0, 1)]
    assert list(batches) == [[1, 2], [3]]

    def first(count: int, skip: int) -> list:
        batches = NumberedBatches(Batches([[1, 2], [3]]), seed=5, endless=True)
        batches.skip = skip
        return [(batch, batch.key) for batch, _ in zip(batches, range(count), strict=False)]

    whole = first(6, 0)
    assert [batch for batch, _ in whole] == [[1, 2], [3], [11, 12], [13], [21, 22], [23]]
    assert len({key for _, key in whole}) == 6
    assert first(3, 3) == whole[3:]
    assert list(NumberedBatches(Batches(), seed=5, endless=True)) == []


# -- Options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options',
    [
        dict(backend_args=dict(backend='petrel')),
        dict(file_client_args=dict(backend='disk')),
        dict(out_dir='s3://bucket/checkpoints'),
    ],
    ids=lambda options: next(iter(options)),
)
def test_local_files_only(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=name) as caught:
        SafeCheckpointHook(interval=1, **options)
    assert repr(value) in str(caught.value) and 'CheckpointHook' in str(caught.value)
