"""tools/train.py and tools/test.py: whom they hand over to, and what they say when they cannot."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from helpers import (
    ROOT,
    SHAPES_CONFIG,
    assert_ran,
    make_shapes,
    read_log,
    run_command,
    run_tool,
    shapes_options,
    the_one_line,
)

from mmlavit.engine import launch

SCOPES = {
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
TOOLS = ('train.py', 'test.py')
COCO_CONFIG = ROOT / 'configs' / 'maskrcnn_lavit_s_coco.py'


class Outcome(NamedTuple):
    """How a call in this process ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, tmp_path, capsys) -> Callable[..., Outcome]:
    """``python tools/NAME ARGS`` in ``tmp_path``, without the cost of another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '100')

    def run(name: str, *args: object, main: Callable[[str], None] = launch.main) -> Outcome:
        monkeypatch.setattr(sys, 'argv', [str(ROOT / 'tools' / name), *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main(name)
        except SystemExit as stop:
            code = stop.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def fake_toolboxes(monkeypatch, tmp_path) -> Path:
    """Toolboxes in place of the installed ones; their scripts note how they were called."""
    folder = tmp_path / 'fake'
    for package in SCOPES:
        tools = folder / package / '.mim' / 'tools'
        tools.mkdir(parents=True)
        (folder / package / '__init__.py').touch()
        for name in TOOLS:
            (tools / name).write_text(
                'import json, sys\n'
                "with open('called.json', 'w') as sink:\n"
                f'    json.dump([{package!r}, {name!r}, __name__, sys.argv], sink)\n'
            )
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(folder)
    return folder


def write_config(path: Path, scope: str | None, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (*lines, f'default_scope = {scope!r}') if scope else lines
    path.write_text('\n'.join([*lines, '']), encoding='utf-8')
    return path


def refusal(outcome: Outcome) -> str:
    """The one line with which a call was refused."""
    assert outcome.code == 2, outcome
    line = the_one_line(outcome.err)
    assert line.startswith('mmlavit: ')
    return line


# -- Whom they hand over to ------------------------------------------------------------------------


@pytest.mark.parametrize('name', TOOLS)
def test_help_is_the_installed_packages_own(call, tmp_path, name):
    def usage(*args: object, **options: object) -> str:
        outcome = call(name, *args, **options)
        assert outcome.code == 0
        return outcome.out[outcome.out.index('usage: ') :]  # packages greet on their first import

    def original(package: str) -> str:
        script = Path(find_spec(package).origin).parent / '.mim' / 'tools' / name
        return usage('-h', main=lambda _: runpy.run_path(str(script), run_name='__main__'))

    helps = {package: original(package) for package in SCOPES}
    assert len(set(helps.values())) == len(SCOPES)
    for package, wanted in helps.items():
        config = write_config(tmp_path / f'{package}.py', package)
        for option in ('--help', '-h'):
            assert usage(config, option) == wanted
            assert usage(option, config) == wanted
    assert usage('--help') == helps['mmdet']


@pytest.mark.parametrize(
    'argv, wanted',
    [
        (['lr=0.001/seg.py', '--resume'], 'lr=0.001/seg.py'),
        (['--out', 'result.json', 'configs/a.py'], 'configs/a.py'),
        (['--cfg-options', 'x=configs/a.py', '--work-dir', 'old.yml', 'b.yaml'], 'b.yaml'),
        (['--out=configs/a.py', 'missing.py', 'weights.pth'], 'missing.py'),
        (['--cfg-options', 'load_from=weights.py'], None),
        (['--help'], None),
    ],
)
def test_the_config_is_the_argument_that_is_one(tmp_path, monkeypatch, argv, wanted):
    monkeypatch.chdir(tmp_path)
    for name in ('lr=0.001/seg.py', 'configs/a.py', 'result.json', 'b.yaml'):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert launch.find_config(argv) == (wanted and Path(wanted))


PURE = """
from mmdet.models.detectors import RetinaNet
from mmengine.config import read_base
model = dict(type=RetinaNet)
"""


def test_a_config_of_pure_python_belongs_to_the_package_of_its_model(tmp_path):
    config = tmp_path / 'pure.py'
    config.write_text(PURE)
    assert launch.read_scope(config) == 'mmdet'


def test_errors_inside_errors_keep_their_traceback(call, tmp_path, monkeypatch):
    """Only what mmlavit raised in the end is a line."""
    script = tmp_path / 'script.py'
    monkeypatch.setattr(launch, 'find_script', lambda *_: script)
    refused = 'from mmlavit import LaViT\ntry:\n    LaViT("huge")\nexcept ValueError as error:\n'
    script.write_text(f'{refused}    raise type(error)(f"class LaViT in x.py: {{error}}")\n')
    assert 'arch must be one of' in refusal(call('train.py'))
    script.write_text(f'{refused}    raise KeyError("unrelated")\n')
    with pytest.raises(KeyError, match='unrelated'):
        call('train.py')


@pytest.mark.parametrize('name', TOOLS)
@pytest.mark.parametrize('package', SCOPES)
def test_errors_of_the_arguments_are_argparses(call, tmp_path, name, package):
    config = write_config(tmp_path / 'config.py', package)
    checkpoint = ['weights.pth'] if name == 'test.py' else []
    for extra, complaint in [
        (['--no-such-option'], 'unrecognized arguments: --no-such-option'),
        (['--launcher', 'carrier-pigeon'], "invalid choice: 'carrier-pigeon'"),
        (['--work-dir'], 'expected one argument'),
    ]:
        outcome = call(name, config, *checkpoint, *extra)
        assert outcome.code == 2
        assert outcome.err.startswith(f'usage: {name}')
        assert complaint in outcome.err and 'mmlavit:' not in outcome.err
    # Without a config at all, the arguments are still argparse's matter.
    assert 'arguments are required: config' in call(name).err


@pytest.mark.parametrize('name', TOOLS)
@pytest.mark.parametrize('package', SCOPES)
@pytest.mark.parametrize(
    'args',
    [
        ['{config}'],
        ['{config}', 'weights.pth', '--out', 'found.pkl', '--tta', '--show-dir', 'pictures'],
        ['--work-dir', 'x', '{config}'],
        ['--work-dir=other.py', '{config}'],
        ['--cfg-options', 'a=other.py', 'b.c=[1,2]', '--amp', '{config}'],
        ['--cfg-options=a=other.py', '{config}', '--launcher', 'pytorch'],
        ['--resume', 'weights.pth', '--work-dir', 'x', '{config}'],
        ['{config}', '--resume', '--auto-scale-lr', '--local-rank=1', '--cfg-options', 'a="b c"'],
        ['{config}', '--cfg-options', 'load_from=other.json', '--launcher', 'slurm'],
    ],
    ids=' '.join,
)
def test_every_argument_reaches_the_original(call, tmp_path, fake_toolboxes, name, package, args):
    config = write_config(tmp_path / 'deep er' / 'config.py', package)
    args = [arg.format(config=config) for arg in args]
    assert call(name, *args) == Outcome(0, '', '')
    *called, argv = json.loads((tmp_path / 'called.json').read_text())
    assert called == [package, name, '__main__']
    assert Path(argv[0]).name == name and argv[1:] == args


@pytest.mark.parametrize('form', ['{}', '{}.py', 'mmlavit::{}.py'])
def test_configs_of_ours_by_name(call, tmp_path, fake_toolboxes, monkeypatch, form):
    """As the first argument; a file of that name goes first, and options keep their values."""
    name = form.format('upernet_lavit_n_shapes')
    path = str(ROOT / 'configs' / 'upernet_lavit_n_shapes.py')
    monkeypatch.setitem(sys.modules, 'mmseg', None)
    assert 'onedl-mmsegmentation' in refusal(call('train.py', name))

    def called(*args: object) -> list:
        assert call('train.py', *args).code == 0
        return json.loads((tmp_path / 'called.json').read_text())

    monkeypatch.delitem(sys.modules, 'mmseg')
    base = write_config(tmp_path / 'base.py', 'mmdet')
    package, *_, argv = called(base, '--work-dir', name)
    assert package == 'mmdet' and argv[1:] == [str(base), '--work-dir', name]
    write_config(tmp_path / name, 'mmdet')
    assert called(name)[-1][1:] == [name]
    assert path not in called(name)[-1]


@pytest.mark.parametrize('suffix', ['.json', '.yaml', '.yml'])
def test_other_kinds_of_config(call, tmp_path, fake_toolboxes, suffix):
    config = tmp_path / f'config{suffix}'
    config.write_text('{"default_scope": "mmseg"}')
    assert call('train.py', config).code == 0
    assert json.loads((tmp_path / 'called.json').read_text())[0] == 'mmseg'


def test_scope_is_inherited(call, tmp_path, fake_toolboxes, monkeypatch):
    write_config(tmp_path / 'base.py', 'mmpretrain')
    write_config(tmp_path / 'sub' / 'config.py', None, "_base_ = '../base.py'")
    assert call('test.py', 'sub/config.py', 'weights.pth').code == 0
    assert json.loads((tmp_path / 'called.json').read_text())[0] == 'mmpretrain'


@pytest.mark.parametrize('package', SCOPES)
def test_bases_of_every_toolbox(call, tmp_path, package):
    """Although MMEngine looks for distributions of the original names."""
    base = f"_base_ = ['{package}::_base_/default_runtime.py']"
    outcome = call('train.py', write_config(tmp_path / 'config.py', None, base), '--help')
    assert outcome.code == 0, outcome


@pytest.mark.parametrize('statement, code', [('sys.exit(7)', 7), ('sys.exit()', 0), ('pass', 0)])
def test_exit_status_is_the_originals(call, tmp_path, fake_toolboxes, statement, code):
    config = write_config(tmp_path / 'config.py', 'mmdet')
    (fake_toolboxes / 'mmdet/.mim/tools/train.py').write_text(f'import sys\n{statement}\n')
    assert call('train.py', config).code == code


@pytest.mark.parametrize(
    'statement, kind',
    [
        ("raise RuntimeError('broken')", RuntimeError),
        ('1 / 0', ZeroDivisionError),
        ("raise FileNotFoundError('no such luck')", FileNotFoundError),
    ],
)
def test_other_errors_of_the_original_pass(call, tmp_path, fake_toolboxes, statement, kind):
    config = write_config(tmp_path / 'config.py', 'mmdet')
    (fake_toolboxes / 'mmdet/.mim/tools/train.py').write_text(statement)
    with pytest.raises(kind):
        call('train.py', config)


def test_a_real_process(tmp_path):
    """The script itself, from another folder, on a config that names no toolbox we have loaded."""
    config = write_config(tmp_path / 'config.py', 'mmpretrain')
    result = run_tool('train.py', config, '--help', cwd=tmp_path)
    assert_ran(result)
    assert '--no-validate' in result.stdout  # only mmpretrain has it
    result = run_tool('test.py', 'nowhere.py', 'weights.pth', cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ''
    assert the_one_line(result.stderr) == 'mmlavit: config file not found: nowhere.py'


def test_config_that_imports_another_toolbox(tmp_path):
    """As when mmdet trains with a backbone of mmpretrain, whose import needs torchvision."""
    imports = "custom_imports = dict(imports=['mmlavit', 'mmpretrain.models'])"
    config = write_config(tmp_path / 'config.py', 'mmdet', imports)
    result = run_tool('train.py', config, '--help', cwd=tmp_path)
    assert_ran(result)
    assert 'usage: train.py' in result.stdout


# -- What they say when they cannot ----------------------------------------------------------------


@pytest.mark.parametrize('name', TOOLS)
@pytest.mark.parametrize(
    'path', ['nowhere.py', 'no/where.json', 'nowhere', 'configs/', 'folder.py']
)
def test_missing_config(call, tmp_path, name, path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'folder.py').mkdir()
    for args in ([path], [path, '--work-dir', 'x'], ['--work-dir', 'x', path]):
        line = refusal(call(name, *args, *(['weights.pth'] if name == 'test.py' else [])))
        assert path.rstrip('/') in line and 'not found' in line


@pytest.mark.parametrize('text', ['', 'model = dict()', "default_scope = ''", 'default_scope = 1'])
def test_no_scope(call, tmp_path, text):
    (tmp_path / 'config.py').write_text(text)
    line = refusal(call('train.py', 'config.py'))
    assert 'config.py' in line and 'default_scope' in line
    assert all(package in line for package in SCOPES)


def test_unknown_scope(call, tmp_path):
    write_config(tmp_path / 'config.py', 'mmpose')
    line = refusal(call('train.py', 'config.py'))
    assert 'config.py' in line and "'mmpose'" in line
    assert all(package in line for package in SCOPES)


@pytest.mark.parametrize(
    'file, text, reason',
    [
        ('config.py', "default_scope = 'mmdet'\nmodel = dict(\n", 'was never closed'),
        ('config.py', 'model = nonsense', 'nonsense'),
        ('config.py', "raise ValueError('two\\nlines')", 'two lines'),
        ('config.py', "_base_ = './nowhere.py'", 'nowhere.py'),
        ('config.py', "_base_ = 'mmdet::no/where.py'", 'where.py'),
        ('config.py', "custom_imports = dict(imports=['no_such_module'])", 'no_such_module'),
        ('config.json', '{"default_scope": ', 'Expecting value'),
        ('config.py', b"default_scope = 'mmdet'  # \xe9t\xe9\n", 'utf-8'),
    ],
    ids=['syntax', 'name', 'error', 'base', "package's base", 'import', 'json', 'encoding'],
)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_broken_config(call, tmp_path, file, text, reason):
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(call('train.py', file))
    assert file in line and reason in line


@pytest.mark.parametrize('package', [*SCOPES, 'mmrotate'])
@pytest.mark.parametrize('how', ['scope', 'base', 'base of base'])
def test_toolbox_not_installed(call, monkeypatch, tmp_path, package, how):
    """The line names both distributions: the import name is the wrong one for pip."""
    monkeypatch.setitem(sys.modules, package, None)
    base = f"_base_ = ['{package}::_base_/default_runtime.py']"
    if how == 'scope':
        write_config(tmp_path / 'config.py', package)
    elif how == 'base':
        write_config(tmp_path / 'config.py', None, base)
    else:
        write_config(tmp_path / 'base.py', None, base)
        write_config(tmp_path / 'config.py', None, "_base_ = './base.py'")
    line = refusal(call('train.py', 'config.py'))
    assert re.search(rf'\b{package}\b.* not installed', line)
    for distribution in {**SCOPES, 'mmrotate': ('onedl-mmrotate', 'mmrotate')}[package]:
        assert re.search(rf'\b{distribution}\b', line.partition('not installed')[2]), line


def test_other_toolboxes_need_not_be_installed(call, monkeypatch, tmp_path):
    for package in ('mmdet', 'mmpretrain'):
        monkeypatch.setitem(sys.modules, package, None)
    outcome = call('train.py', '--help')
    assert outcome.code == 0 and 'usage: train.py' in outcome.out
    assert call('train.py', write_config(tmp_path / 'config.py', 'mmseg'), '-h') == outcome


def test_no_toolbox_at_all_in_a_real_process(tmp_path):
    text = 'import sys\n' + ''.join(f'sys.modules[{package!r}] = None\n' for package in SCOPES)
    (tmp_path / 'sitecustomize.py').write_text(text)
    for args in (['--help'], [COCO_CONFIG]):
        result = run_tool('train.py', *args, cwd=tmp_path, path=[tmp_path])
        assert result.returncode == 2 and result.stdout == ''
        line = the_one_line(result.stderr)
        assert 'not installed' in line or 'none' in line
        assert 'onedl' in line or 'README.md' in line


def test_toolbox_without_its_tools(call, tmp_path, fake_toolboxes):
    """As after an installation in development mode, where .mim is not made."""
    (fake_toolboxes / 'mmdet/.mim/tools/test.py').unlink()
    config = write_config(tmp_path / 'config.py', 'mmdet')
    line = refusal(call('test.py', config, 'weights.pth'))
    assert line.startswith('mmlavit: mmdet is installed without its tools')
    assert str(fake_toolboxes / 'mmdet/.mim/tools/test.py') in line


def test_remains_of_a_toolbox(call, monkeypatch, tmp_path):
    """A folder without __init__.py, such as pip leaves where files were added to a package."""
    remains = ModuleType('mmdet')
    remains.__spec__ = ModuleSpec('mmdet', None, is_package=True)
    monkeypatch.setitem(sys.modules, 'mmdet', remains)
    config = write_config(tmp_path / 'config.py', 'mmdet')
    assert 'mmdet' in refusal(call('train.py', config))


# -- Files that the original cannot find -----------------------------------------------------------


@pytest.mark.parametrize(
    'error',
    [
        "FileNotFoundError(2, 'No such file or directory', 'data/coco/list.json')",
        # As MMEngine's original build function and torch's workers repeat it.
        "FileNotFoundError('class `A` in b.py: [Errno 2] No such file or directory: '"
        ' + repr("data/coco/list.json"))',
    ],
    ids=['plain', 'repeated'],
)
def test_missing_data(call, tmp_path, fake_toolboxes, error):
    config = write_config(tmp_path / 'config.py', 'mmdet')
    (fake_toolboxes / 'mmdet/.mim/tools/train.py').write_text(f'raise {error}')
    line = refusal(call('train.py', config))
    assert 'data/coco/list.json' in line and str(tmp_path) in line and '"Data"' in line


def test_the_readme_has_the_section_that_the_message_names():
    assert re.search(r'^#+ Data$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.MULTILINE)


def test_missing_coco(tmp_path):
    result = run_tool('train.py', COCO_CONFIG, cwd=tmp_path)
    assert result.returncode == 2 and 'Traceback' not in result.stdout
    line = the_one_line(result.stderr)
    assert line.startswith('mmlavit: ')
    for part in ('data/coco/annotations/instances_train2017.json', str(tmp_path), 'README.md'):
        assert part in line
    assert 'section "Data"' in line


@pytest.mark.slow
@pytest.mark.parametrize('size', ['t', 'b'])
def test_missing_coco_in_a_test(tmp_path, size):
    config = ROOT / 'configs' / f'maskrcnn_lavit_{size}_coco.py'
    result = run_tool('test.py', config, 'weights.pth', cwd=tmp_path)
    assert result.returncode == 2
    assert 'data/coco/annotations/instances_val2017.json' in the_one_line(result.stderr)


# -- Other scripts ---------------------------------------------------------------------------------


SCHEDULE = ['--dataset-size', '64', '--save-path', 'a.png']


@pytest.mark.slow
@pytest.mark.parametrize(
    'script, config, arguments, said',
    [
        ('analysis_tools/get_flops.py', 'semfpn_lavit_t_ade20k', [], 'Flops'),
        ('analysis_tools/get_flops.py', 'lavit_t_imagenet', [], 'Flops'),
        ('misc/print_config.py', 'retinanet_lavit_n_shapes', [], 'AttentionHealthHook'),
        ('visualization/vis_scheduler.py', 'maskrcnn_lavit_n_shapes', SCHEDULE, ''),
        ('visualization/vis_scheduler.py', 'lavit_n_shapes', SCHEDULE, ''),
    ],
)
def test_any_script_of_a_toolbox_starts(tmp_path, script, config, arguments, said):
    path = ROOT / 'configs' / f'{config}.py'
    result = run_tool('tool.py', script, path, *arguments, cwd=tmp_path)
    assert_ran(result)
    assert said in result.stdout + result.stderr
    assert '--save-path' not in arguments or (tmp_path / 'a.png').stat().st_size > 1000


def test_a_script_that_no_toolbox_has(tmp_path):
    result = run_tool('tool.py', 'no.py', ROOT / 'configs/lavit_n_shapes.py', cwd=tmp_path)
    assert result.returncode == 2
    line = the_one_line(result.stderr)
    assert "no toolbox has a script 'no.py'" in line and 'mmlavit tool --help' in line


@pytest.mark.parametrize(
    'name, config, found',
    [
        ('get_flops', 'maskrcnn_lavit_n_shapes', 'mmdet/.mim/tools/analysis_tools/get_flops.py'),
        ('get_flops.py', 'upernet_lavit_n_shapes', 'mmseg/.mim/tools/analysis_tools/get_flops.py'),
        # mmdet has two; that of object tracking is one folder further down.
        ('browse_dataset', 'retinanet_lavit_n_shapes', 'analysis_tools/browse_dataset.py'),
        (
            'browse_dataset',
            'lavit_n_shapes',
            'mmpretrain/.mim/tools/visualization/browse_dataset.py',
        ),
        ('vis_cam', 'maskrcnn_lavit_n_shapes', 'mmpretrain/.mim/tools/visualization/vis_cam.py'),
        ('misc/print_config.py', 'lavit_n_shapes', 'mmpretrain/.mim/tools/misc/print_config.py'),
    ],
)
def test_scripts_by_their_names(name, config, found):
    """In the config's own toolbox first."""
    script = launch.find_script(name, [str(ROOT / 'configs' / f'{config}.py')])
    assert script.as_posix().endswith(found) and script.is_file()


def test_the_list_of_scripts_is_what_the_toolboxes_have():
    listed = launch.scripts()
    assert set(listed) == set(SCOPES)
    for package, names in listed.items():
        folder = Path(find_spec(package).origin).parent / '.mim' / 'tools'
        assert {folder / name for name in names} == set(folder.glob('**/*.py'))


# -- Launchers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slurm_launcher_is_the_originals(tmp_path):
    """MMEngine's slurm launcher cannot run without a GPU; that it is asked is what we can see."""
    result = run_tool('train.py', COCO_CONFIG, '--launcher', 'slurm', cwd=tmp_path)
    assert result.returncode == 1 and "KeyError: 'SLURM_PROCID'" in result.stderr


# At the end of a process, what is left of its process group: a gloo thread that still runs while
# Python shuts down may abort it.
PROBE = """
import atexit
import os
from pathlib import Path

import torch

def note():
    threads = [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]
    left = [torch.distributed.is_initialized(), [name for name in threads if 'gloo' in name]]
    Path(f'left-{os.environ["RANK"]}').write_text(repr(left))

atexit.register(note)
"""


@pytest.mark.slow
def test_torchrun(tmp_path):
    """Two processes on the CPU share the images, and ``loss_dp`` comes through DDP.

    By either door: ``mmlavit train`` and tools/test.py.
    """
    (tmp_path / 'probe.py').write_text(PROBE)
    config = write_config(
        tmp_path / 'config.py',
        None,
        f'_base_ = {str(SHAPES_CONFIG)!r}',
        "custom_imports = dict(imports=['mmlavit', 'probe'])",
    )
    data = make_shapes(tmp_path / 'shapes', 16, 2)

    def run_both(run: Callable, name: str, *args: object) -> str:
        result = run(
            name,
            *(*args, '--launcher', 'pytorch', '--work-dir', tmp_path / name, '--cfg-options'),
            *shapes_options(data),
            *('env_cfg.dist_cfg.backend=gloo', 'train_dataloader.batch_size=2'),
            *('train_cfg.max_epochs=2', 'train_cfg.val_interval=2'),
            *('default_hooks.logger.interval=1', 'custom_hooks.0.loss_weight=0.1'),
            cwd=tmp_path,
            path=[tmp_path],
            launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'],
            CUDA_VISIBLE_DEVICES='',
        )
        assert_ran(result)
        assert 'Distributed training: True' in result.stdout and 'GPU number: 2' in result.stdout
        notes = [tmp_path / f'left-{rank}' for rank in (0, 1)]
        assert [note.read_text() for note in notes] == ['[False, []]'] * 2
        for note in notes:
            note.unlink()
        return result.stdout

    said = run_both(run_command, 'train', config)
    assert said.count('starts from scratch') == 1
    steps = [line for line in read_log(tmp_path / 'train') if 'loss_dp' in line]
    assert len(steps) == 2 * 16 // (2 * 2)
    assert all(0 < step['loss_dp'] < step['loss'] < 100 for step in steps)
    checkpoint = tmp_path / 'train' / 'epoch_2.pth'
    assert 'coco/segm_mAP: ' in run_both(run_tool, 'test.py', config, checkpoint)
