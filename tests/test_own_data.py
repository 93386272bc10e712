"""The guide to one's own data: each of its commands and configs runs, in the order of the page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, TIMEOUT, read_log
from mmengine.config import Config

from mmlavit import LaViT
from mmlavit.models.windows import WindowGrid

GUIDE = (ROOT / 'docs' / 'own_data.md').read_text(encoding='utf-8')
# What makes a model small enough for two cores, by toolbox. One that has hardly been trained finds
# a hundred masks in each image.
NANO = {
    'mmdet': [
        *('model.backbone.arch=nano', 'model.neck.in_channels=[32,64,160,320]'),
        *('model.test_cfg.rpn.max_per_img=50', 'model.test_cfg.rcnn.max_per_img=5'),
    ],
    'mmseg': [],
    'mmpretrain': ['model.backbone.arch=nano', 'model.head.in_channels=320'],
}
SHORT = {
    'mmdet': [
        *('train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=4'),
        *('val_dataloader.dataset.indices=2', 'model.train_cfg.rcnn.sampler.num=16'),
    ],
    'mmseg': [
        *('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2'),
        *('default_hooks.checkpoint.interval=2', 'default_hooks.logger.interval=1'),
    ],
    'mmpretrain': [
        *('train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=4'),
        *('train_dataloader.batch_size=2', 'val_dataloader.batch_size=2'),
        'param_scheduler.1.begin=0',  # not after a warm-up of 20 epochs
    ],
}


def blocks(kind: str) -> list[str]:
    return re.findall(rf'^```{kind}\n(.*?)^```$', GUIDE, flags=re.MULTILINE | re.DOTALL)


def steps() -> Iterator[tuple[str, str]]:
    """Command lines, and configs with their names, as they come."""
    for kind, text in re.findall(
        r'^```(bash|python)\n(.*?)^```$', GUIDE, flags=re.MULTILINE | re.DOTALL
    ):
        if kind == 'bash':
            for line in text.splitlines():
                yield 'bash', line
        else:
            yield re.match(r'# (\w+\.py)\n', text)[1], text


def smaller(config: Path) -> list[str]:
    """Options that make a training of a config one of seconds."""
    options = [*SHORT[Config.fromfile(config).default_scope]]
    for split in ('train', 'val'):
        loader = f'{split}_dataloader'
        options += [f'{loader}.num_workers=0', f'{loader}.persistent_workers=False']
    return options + small(config, 'train', 'val')


def small(config: Path, *splits: str) -> list[str]:
    """Options that make the model of a config nano, and a detector's images of these sets small."""
    cfg = Config.fromfile(config)
    options = [*NANO[cfg.default_scope]]
    for loader in (f'{split}_dataloader' for split in splits):
        for index, step in enumerate(cfg[loader].dataset.pipeline):
            if cfg.default_scope == 'mmdet' and step.type in ('Resize', 'RandomResize'):
                options.append(f'{loader}.dataset.pipeline.{index}.scale=(96,96)')
    return options


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a line of the guide, with the schedule shortened, as a shell does."""
    monkeypatch.chdir(tmp_path)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path[:1]])}
    python = shlex.quote(sys.executable)
    start = f'mmlavit() {{ {python} -m mmlavit "$@"; }}\n'
    start += f'torchrun() {{ {python} -m torch.distributed.run "$@"; }}\n'

    def in_shell(line: str) -> None:
        words = shlex.split(line)
        config = next((Path(w) for w in words if re.fullmatch(r'\w+\.py', w)), None)
        options = []
        if 'train' in words:
            options = smaller(config)
        elif words[1] in ('test', 'infer'):
            options = small(config, 'test')
        if words[0] == 'torchrun':
            # On two processes, and without a GPU.
            line = line.replace('--nproc_per_node=8', '--nproc_per_node=2')
            options.append('env_cfg.dist_cfg.backend=gloo')
        if options:
            line = shlex.join([*shlex.split(line), '--cfg-options', *options])
        done = subprocess.run(
            ['bash', '-c', start + line], capture_output=True, text=True, env=env, timeout=TIMEOUT
        )
        assert done.returncode == 0, f'{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'

    return in_shell


def last_checkpoint(config: str | Path) -> str:
    """The name of the last checkpoint by a config's own schedule."""
    schedule = Config.fromfile(config).train_cfg
    kind = 'iter' if 'max_iters' in schedule else 'epoch'
    return f'{kind}_{schedule[f"max_{kind}s"]}.pth'


def as_after_the_whole_schedule(work_dir: Path) -> None:
    """The checkpoint by the name that the config's own schedule gives it, as the guide does."""
    whole = work_dir / last_checkpoint(f'{work_dir.name}.py')
    if not whole.exists():
        kind = whole.name.partition('_')[0]
        whole.symlink_to(next(work_dir.glob(f'{kind}_*.pth')).name)


def test_checkpoints_of_the_guide_are_those_of_its_configs():
    started = re.findall(r'configs new --from (\w+) .*--out (\w+)\.py', GUIDE)
    expected = {name: last_checkpoint(ROOT / 'configs' / f'{base}.py') for base, name in started}
    named = re.findall(r'work_dirs/(\w+)/(\w+\.pth)', GUIDE)
    assert len(named) >= 4
    for name, checkpoint in named:
        assert checkpoint == expected[name], name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guide_runs_from_top_to_bottom(run):
    trained, configs = set(), []
    for what, text in steps():
        if what == 'bash':
            run(text)
            if work_dir := re.search(r'mmlavit train (\w+)\.py$', text):
                as_after_the_whole_schedule(Path('work_dirs', work_dir[1]))
                trained.add(work_dir[1])
        elif Path(what).exists():
            assert text == f'# {what}\n{Path(what).read_text()}', 'what configs new writes'
        else:
            Path(what).write_text(text)
            configs.append(what)
    assert trained == {'parts', 'pixels', 'sorted'} and len(configs) >= 4
    for folder in ('found', 'found_pixels', 'found_sorted'):
        assert list(Path(folder, 'pictures').iterdir())
    assert list(Path('look').iterdir())
    # What the page shows as configs to go on with.
    for config in configs:
        run(f'mmlavit train {config}')
        losses = [r['loss'] for r in read_log(Path('work_dirs', Path(config).stem)) if 'loss' in r]
        assert losses and all(loss == loss for loss in losses)
    slow = Config.fromfile('parts_slow.py')
    model = LaViT(**{k: v for k, v in slow.model.backbone.items() if k != 'type'})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any(n.startswith('patch_embed') for n in frozen) and len(frozen) > 10


def test_windows_of_the_guide_waste_nothing():
    """Each stage's tokens are whole windows, and LaViT takes them."""
    rows = re.findall(r'^\| (\d+ x \d+.*?) \| `(\([\d, ]+\))` \|$', GUIDE, flags=re.MULTILINE)
    assert len(rows) >= 4
    for sizes, windows in rows:
        windows = tuple(int(w) for w in windows.strip('()').split(','))
        LaViT('nano', window_sizes=windows)
        for side in {int(s) for s in re.findall(r'\d+', sizes)}:
            for stage, window in enumerate(windows):
                grid = WindowGrid(-(-side // (4 << stage)), -(-side // (4 << stage)), window)
                assert grid.rows * window == grid.height, (side, windows)


@pytest.mark.parametrize('line', [line for text in blocks('bash') for line in text.splitlines()])
def test_configs_of_the_guide_are_there(line):
    from mmlavit.shipped import configs

    for name in re.findall(r'--from (\S+)', line):
        assert name in configs()


def test_bases_that_the_guide_recommends():
    from mmlavit.shipped import configs

    (table,) = re.findall(r'\| GPU \| CPU.*?\n\n', GUIDE, flags=re.DOTALL)
    names = re.findall(r'`(\w+)`', table)
    assert len(names) == 8 and set(names) <= set(configs())
