"""Running the tools as a user does, and what they then need: data, options, their logs."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 400  # seconds; on an idle machine no call takes more than 40
SHAPES_CONFIG = ROOT / 'configs' / 'maskrcnn_lavit_n_shapes.py'


def run_tool(
    command: Path | str,
    *args: object,
    cwd: Path,
    launcher: Sequence[str] = (),
    path: Sequence[Path] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/ in another process.

    Args:
        command: The script; a bare name is one of tools/.
        args: Its arguments.
        cwd: Where to run it; nothing is written elsewhere.
        launcher: What comes between the interpreter and the script, such as ``-m``, ``MODULE``.
        path: Folders to import from before any other.
        variables: Environment variables to add.
    """
    return _run([*launcher, ROOT / 'tools' / command, *args], cwd, path, variables)


def run_command(
    *args: object,
    cwd: Path,
    launcher: Sequence[str] = (),
    path: Sequence[Path] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``mmlavit`` in another process, as ``python -m mmlavit``.

    Args:
        args: Its arguments.
        cwd, launcher, path, variables: As of :func:`run_tool`.
    """
    return _run([*launcher, '-m', 'mmlavit', *args], cwd, path, variables)


def run_python(
    *args: object,
    cwd: Path,
    path: Sequence[Path] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python in another process.

    Args:
        args: Its arguments, such as ``-c``, ``CODE``.
        cwd, path, variables: As of :func:`run_tool`.
    """
    return _run(args, cwd, path, variables)


def _run(
    command: Sequence[object], cwd: Path, path: Sequence[Path], variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    search = [*map(str, path), str(ROOT)]
    if os.environ.get('PYTHONPATH'):
        search.append(os.environ['PYTHONPATH'])
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(search), 'COLUMNS': '100', **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except BaseException:
            # Politely, so that torchrun takes its workers along.
            process.terminate()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_tool_here(command: str, patch: pytest.MonkeyPatch, folder: Path, *args: object) -> None:
    """Run a script of tools/ in this process, which has the toolboxes imported already.

    Args:
        command: The script, below tools/.
        patch: What takes back the folder and the arguments.
        folder: Where to run it.
        args: Its arguments.
    """
    from mmengine.logging import MMLogger
    from mmengine.registry import DefaultScope

    patch.chdir(folder)
    patch.setattr(sys, 'argv', [Path(command).name, *map(str, args)])
    logger = MMLogger.get_instance('mmengine')
    level = logger.level
    try:
        with DefaultScope.overwrite_default_scope('mmengine'):
            runpy.run_path(str(ROOT / 'tools' / command), run_name='__main__')
    finally:
        logger.setLevel(level)


def assert_ran(result: subprocess.CompletedProcess[str]) -> None:
    """The command succeeded; shows the end of what it said if not."""
    assert result.returncode == 0, f'{result.stdout[-3000:]}\n{result.stderr[-6000:]}'


def the_one_line(stderr: str) -> str:
    """The only line on stderr, apart from Python's warnings (of the packages around us)."""
    warning = re.compile(r'^\S+:\d+: \w*Warning: .*\n(?:[ \t].*\n)?', re.MULTILINE)
    lines = warning.sub('', stderr).splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


def make_shapes(out: Path, train: int, val: int, size: int = 64) -> Path:
    """A small data set; its folder."""
    options = ['--num-train', train, '--num-val', val, '--size', size]
    assert_ran(run_tool('make_shapes.py', '--out', out, *options, cwd=out.parent))
    return out


def shapes_options(data: Path) -> list[str]:
    """What to give ``--cfg-options`` to use the shapes config with another data set, no workers."""
    val_json = f'{data}/coco/annotations/instances_val2017.json'
    options = [f'{split}_evaluator.ann_file={val_json}' for split in ('val', 'test')]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={data}/coco/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    return options


def read_log(work_dir: Path) -> list[dict]:
    """The JSON log of the latest run in ``work_dir``, a dict for each line."""
    log = max(work_dir.glob('*/vis_data/*_*.json'))
    return [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]


_trainings = itertools.count()


def short_training(
    name: str, shapes: Path, work_dir: Path, optimizer: dict | None = None, **more: object
) -> Config:
    """A config that trains for an iteration, without evaluation and without any hook of ours.

    Args:
        name: A config of ours on shapes, for its model and its data.
        shapes: Folder of the data, of at least two images.
        work_dir: Where the training writes.
        optimizer: In the place of the config's own, with MMEngine's constructor.
        more: Options as on a command line, with two underscores for a dot.
    """
    from mmengine.config import Config

    from mmlavit.shipped import config_path

    cfg = Config.fromfile(config_path(name))
    data = {'mmdet': 'coco', 'mmseg': 'ade', 'mmpretrain': 'imagenet'}[cfg.default_scope]
    cfg.train_dataloader.dataset.data_root = str(shapes / data)
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    for split, key in itertools.product(('val', 'test'), ('dataloader', 'cfg', 'evaluator')):
        cfg[f'{split}_{key}'] = None
    cfg.train_cfg = dict(by_epoch=False, max_iters=1)
    cfg.param_scheduler = cfg.custom_hooks = cfg.visualizer = None
    cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False))
    cfg.work_dir = str(work_dir)
    if optimizer is not None:
        cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=optimizer)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in more.items()})
    # MMEngine keeps one log for each name.
    cfg.experiment_name = f'{name}_{next(_trainings)}'
    return cfg
