"""``mmlavit`` as a person types it: its help, what it hands over, its exit codes."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from helpers import (
    ROOT,
    assert_ran,
    make_shapes,
    read_log,
    run_command,
    shapes_options,
    the_one_line,
)
from mmengine.registry import DefaultScope

import mmlavit
from mmlavit.__main__ import main
from mmlavit.engine.launch import scripts

COMMANDS = ['train', 'test', 'infer', 'configs', 'tool', 'export', 'attention', 'saturation']
COMMANDS += ['replacement', 'shapes', 'benchmark']


class Outcome(NamedTuple):
    """How a call in this process ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, tmp_path, capsys) -> Iterator:
    """``mmlavit ARGS`` in ``tmp_path``, without the cost of another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', [*sys.path])

    def run(*args: object, script: str = '') -> Outcome:
        """With a script, ``python tools/SCRIPT ARGS`` instead."""
        capsys.readouterr()
        words = [str(arg) for arg in args]
        try:
            if script:
                monkeypatch.setattr(sys, 'argv', [script, *words])
                code = runpy.run_path(str(ROOT / 'tools' / script), run_name='__main__') and 0
            else:
                code = main(words)
        except SystemExit as stop:
            code = stop.code
        return Outcome(code or 0, *capsys.readouterr())

    with DefaultScope.overwrite_default_scope('mmengine'):
        yield run


def options(text: str) -> set[str]:
    """The long options that a help text describes."""
    return set(re.findall(r'^ +(?:-\w(?: \w+)?, )?(--[\w-]+)', text, re.MULTILINE))


def test_help_names_every_command(tmp_path):
    result = run_command('--help', cwd=tmp_path)
    assert_ran(result)
    listed = re.findall(r'^  (\w+) +\w', result.stdout.partition('commands:')[2], re.MULTILINE)
    assert listed == COMMANDS
    assert result.stdout.startswith('usage: mmlavit ')
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_version(call):
    assert call('--version') == (0, f'mmlavit {mmlavit.__version__}\n', '')


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize(
    'args',
    [
        ['configs'],
        pytest.param(['tool', '--help'], marks=pytest.mark.slow),
        ['train', '--help'],
    ],
)
def test_ends_without_a_word_where_nobody_reads(args, unbuffered, tmp_path):
    """As in ``mmlavit configs | head -1``, with the status of a program that SIGPIPE ends."""
    read, write = os.pipe()
    os.close(read)
    variables = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': unbuffered}
    command = [sys.executable, '-W', 'ignore', '-m', 'mmlavit', *args]
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, env=variables)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, b'')


def test_an_error_is_told_where_nobody_reads_the_rest(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, '-m', 'mmlavit', 'configs', 'path', 'nowhere']
    variables = {**os.environ, 'PYTHONPATH': str(ROOT)}
    options = dict(cwd=tmp_path, env=variables, text=True)
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, **options)
    os.close(write)
    assert ran.returncode == 2 and "'nowhere'" in the_one_line(ran.stderr)


def test_without_a_command_and_with_one_that_is_none(call):
    nothing = call()
    assert nothing.code == 2 and nothing.out == ''
    assert all(name in nothing.err for name in COMMANDS)
    unknown = call('trian')
    assert unknown.code == 2 and "'trian'" in unknown.err and "'train'" in unknown.err


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help_under_its_own_name(call, command):
    outcome = call(command, '--help')
    assert outcome.code == 0 and outcome.err == ''
    assert re.search(rf'^usage: mmlavit {command}\b', outcome.out, re.MULTILINE)


@pytest.mark.parametrize('command', ['train', 'test'])
@pytest.mark.parametrize(
    'config, toolbox',
    [
        (None, 'mmdet'),
        ('maskrcnn_lavit_n_shapes', 'mmdet'),
        ('upernet_lavit_n_shapes', 'mmseg'),
        ('lavit_n_shapes', 'mmpretrain'),
    ],
)
def test_help_of_train_and_test_is_ours_and_the_toolboxs(call, command, config, toolbox):
    outcome = call(command, *[config] * (config is not None), '--help')
    assert outcome.code == 0
    ours, _, theirs = outcome.out.partition('usage: ')
    assert f'torchrun --nproc_per_node=8 -m mmlavit {command}' in ours
    assert f"{toolbox}'s own {command}.py" in ours
    path = ROOT / 'configs' / f'{config or "maskrcnn_lavit_n_shapes"}.py'
    original = options(call(path, '--help', script=f'{command}.py').out)
    assert original > {'--help', '--cfg-options', '--launcher', '--work-dir'}
    assert options(theirs) == original and not options(ours)


def test_help_of_tool_lists_every_script(call):
    text = call('tool', '--help').out
    for names in scripts().values():
        assert {name.rpartition('/')[2] for name in names} <= set(text.split())
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize('script', ['export', 'attention', 'saturation', 'replacement', 'shapes'])
def test_scripts_have_the_options_of_their_tools(call, script):
    tool = {'export': 'export.py', 'shapes': 'make_shapes.py'}.get(script, f'analysis/{script}.py')
    original = call('--help', script=tool)
    assert options(call(script, '--help').out) == options(original.out) > {'--help', '--out'}


@pytest.mark.parametrize(
    'args, pieces',
    [
        (['train', 'nowhere.py'], ['config file not found: nowhere.py']),
        (['train', 'no_such_name'], ['config file not found: no_such_name', 'mmlavit configs']),
        (['test', 'nowhere', 'weights.pth'], ['nowhere']),
        (['tool'], ['NAME', '--help']),
        (['tool', 'no_such', 'lavit_n_shapes'], ["'no_such'", 'mmlavit tool --help']),
        (['export', 'nowhere', '--out', 'a.onnx'], ['nowhere']),
        (['export', 'lavit_n_shapes', 'no.pth', '--out', 'a.onnx'], ['no.pth']),
        (['attention', 'lavit_n_shapes', 'none', 'no.jpg'], ['no.jpg']),
        (['saturation', 'mmlavit::nowhere.py'], ['nowhere']),
        (['replacement', 'lavit_n_shapes', 'no.pth'], ['no.pth']),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line_and_2(call, args, pieces):
    outcome = call(*args)
    assert outcome.code == 2
    line = the_one_line(outcome.err)
    assert line.startswith('mmlavit: ') and all(piece in line for piece in pieces), line


def test_an_error_in_a_real_process(tmp_path):
    """In an empty folder, on a config by its name."""
    result = run_command('train', 'retinanet_lavit_n_shapes', '--work-dir', 'run', cwd=tmp_path)
    assert result.returncode == 2
    line = the_one_line(result.stderr)
    assert line.startswith('mmlavit: ') and 'data/shapes' in line and 'README.md' in line


def test_wrong_options_are_told_by_the_name_that_was_typed(call):
    for args in (['train', 'lavit_n_shapes', '--no'], ['export', 'lavit_n_shapes', '--no']):
        outcome = call(*args)
        assert outcome.code == 2
        assert outcome.err.startswith(f'usage: mmlavit {args[0]} ')
        assert f'mmlavit {args[0]}: error: ' in outcome.err


@pytest.mark.slow
def test_a_beginners_morning(tmp_path):
    """Data, a training of two steps, its test, and a tool, with names of configs alone."""
    make_shapes(tmp_path / 'shapes', 4, 2)
    name = 'retinanet_lavit_n_shapes'
    changes = ['--cfg-options', *shapes_options(tmp_path / 'shapes')]
    short = ['train_dataloader.batch_size=2', 'train_cfg.max_epochs=1']
    short += ['default_hooks.logger.interval=1']
    assert_ran(run_command('train', name, *changes, *short, cwd=tmp_path))
    losses = [line['loss'] for line in read_log(tmp_path / 'work_dirs' / name) if 'loss' in line]
    assert len(losses) == 2
    checkpoint = tmp_path / 'work_dirs' / name / 'epoch_1.pth'
    every_box = 'model.test_cfg.score_thr=0'
    tested = run_command('test', name, checkpoint, *changes, every_box, cwd=tmp_path)
    assert_ran(tested)
    assert 'coco/bbox_mAP: ' in tested.stdout
    printed = run_command('tool', 'print_config', name, cwd=tmp_path)
    assert_ran(printed)
    assert 'AttentionHealthHook' in printed.stdout
    file = tmp_path / 'backbone.onnx'
    small = ['--fixed', '--size', 64, 64]
    assert_ran(run_command('export', name, checkpoint, '--out', file, *small, cwd=tmp_path))
    assert file.stat().st_size > 100_000


def test_benchmark_is_that_of_the_clone(call):
    assert '--suites' in call('benchmark', '--help').out
    refused = call('benchmark', '--rounds', '0')
    assert refused.code == 2 and '--rounds' in refused.err


def test_nothing_but_the_model_where_there_is_no_mmengine(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text("import sys\nsys.modules['mmengine'] = None\n")
    result = run_command('train', 'lavit_n_shapes', cwd=tmp_path, path=[tmp_path])
    assert result.returncode == 2
    assert 'onedl-mmengine' in the_one_line(result.stderr)
    assert 'commands:' in run_command('--help', cwd=tmp_path, path=[tmp_path]).stdout
