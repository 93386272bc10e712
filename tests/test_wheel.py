"""The wheel where a stranger has installed it: the repository is out of sight."""

import json
import math
import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_ran, read_log, the_one_line
from mmengine.config import Config
from modelindex import load_model_index

from mmlavit import LaViT

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds; on an idle machine no call takes more than 20

Run = Callable[..., subprocess.CompletedProcess[str]]

# A whole config of their own, and one that starts from ours.
OWN = """
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmlavit', 'witness'])
model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='nano'),
    neck=dict(in_channels=[32, 64, 160, 320], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3),
)
shapes = dict(
    data_root='data/shapes/coco/', metainfo=dict(classes=('circle', 'square', 'triangle'))
)
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    resize,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=train_pipeline, **shapes),
)
"""
INHERITED = """
_base_ = 'mmlavit::maskrcnn_lavit_n_shapes.py'
custom_imports = dict(imports=['mmlavit', 'witness'])
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
"""
SHORT = """
val_cfg = val_dataloader = val_evaluator = None
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""
WITNESS = """
from pathlib import Path

import mmlavit

Path('witness.txt').write_text(mmlavit.__file__)
"""


@pytest.fixture(scope='module')
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel, and all that is installed around it here.

    The packages here come by a path that is only searched: their own .pth files, one of which may
    lead to this repository, are not followed.
    """
    env = tmp_path_factory.mktemp('env')
    venv.create(env, symlinks=True)
    python = env / 'bin' / 'python'
    # An mmlavit that the new environment sees elsewhere (PYTHONPATH) does not count as installed.
    install = ['install', '--no-deps', '--no-index', '--ignore-installed', '--quiet', str(wheel)]
    pip = [sys.executable, '-m', 'pip', '--python', str(python), *install]
    subprocess.run(pip, check=True)
    (site_packages,) = env.glob('lib/python*/site-packages')
    (site_packages / 'around.pth').write_text('\n'.join(site.getsitepackages()))
    return python


@pytest.fixture(scope='module')
def package(python: Path) -> Path:
    """The package where the wheel put it."""
    (package,) = python.parents[1].glob('lib/python*/site-packages/mmlavit')
    return package


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stranger's folder, with a module that says which mmlavit it met."""
    project = tmp_path_factory.mktemp('project')
    (project / 'witness.py').write_text(WITNESS)
    return project


@pytest.fixture(scope='module')
def run(python: Path, project: Path) -> Run:
    """Runs that Python in the stranger's project, which its modules are imported from."""

    def run(*arguments: object, program: Path = python) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *map(str, arguments)],
            cwd=project,
            env={**os.environ, 'PYTHONPATH': str(project), 'OMP_WAIT_POLICY': 'PASSIVE'},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    return run


@pytest.fixture(scope='module')
def shapes(run: Run, package: Path) -> None:
    """Data of the wheel's own making, in the stranger's project, where the configs look for it."""
    counts = ['--num-train', 4, '--num-val', 1, '--size', 64]
    assert_ran(run(package / '.mim' / 'tools' / 'make_shapes.py', *counts))


def test_repository_is_out_of_sight(run: Run, package: Path) -> None:
    ran = run('-c', 'import sys, mmlavit; print(mmlavit.__file__, *sys.path, sep="\\n")')
    assert_ran(ran)
    file, *path = ran.stdout.splitlines()
    assert Path(file) == package / '__init__.py'
    assert str(ROOT) not in path


def test_mmengine_and_mim_find_what_they_look_for(run: Run, package: Path) -> None:
    ran = run('-c', 'from mmengine.utils import get_installed_path as p; print(p("mmlavit"))')
    assert_ran(ran)
    assert Path(ran.stdout.strip()) == package
    mim = package / '.mim'
    index = load_model_index.load(str(mim / 'model-index.yml'))
    assert index.check(silent=True) == []
    assert len(index.models) > 0
    for model in index.models:
        assert (mim / model.config).is_file(), model.name


IN_THE_HUBS = """
import mmlavit
from mmengine import hub
from mmlavit.compat import repair_torchvision
repair_torchvision()
from mmpretrain import get_model, list_models
print(hub.get_config('mmlavit::lavit_t_imagenet.py').filename)
print(*list_models('lavit_t'))
print(type(get_model('lavit_t_imagenet').backbone).__module__)
get_model('lavit_t_imagenet', pretrained=True)
"""


def test_hubs_have_what_the_wheel_brought(run: Run, package: Path) -> None:
    ran = run('-W', 'ignore', '-c', IN_THE_HUBS)
    config = package / '.mim' / 'configs' / 'lavit_t_imagenet.py'
    found = ran.stdout.splitlines()
    assert found[:2] == [str(config), 'lavit_t_imagenet'], ran.stderr
    assert 'mmlavit.models.lavit' in found
    assert ran.stderr.splitlines()[-1].startswith('ValueError: lavit_t_imagenet has no trained')


def test_repository_serves_its_own_configs(tmp_path: Path) -> None:
    name = 'maskrcnn_lavit_n_shapes.py'
    heir = tmp_path / 'heir.py'
    heir.write_text(f"_base_ = 'mmlavit::{name}'")
    # Equal: nothing is marked with a scope that has no registry.
    inherited = Config.fromfile(heir).to_dict()
    assert inherited == Config.fromfile(ROOT / 'configs' / name).to_dict()
    heir.write_text("_base_ = 'mmlavit::missing.py'")
    with pytest.raises(FileNotFoundError, match=r'missing\.py'):
        Config.fromfile(heir)


@pytest.mark.slow
@pytest.mark.usefixtures('shapes')
@pytest.mark.parametrize('config', [OWN, INHERITED], ids=['own', 'inherited'])
def test_strangers_project_trains(
    run: Run, package: Path, project: Path, config: str, tmp_path: Path
) -> None:
    witness = project / 'witness.txt'
    witness.unlink(missing_ok=True)
    file = tmp_path / 'experiment.py'
    file.write_text(config + SHORT)
    assert_ran(run(package / '.mim' / 'tools' / 'train.py', file, '--work-dir', tmp_path))

    assert Path(witness.read_text()) == package / '__init__.py'
    losses = [line['loss'] for line in read_log(tmp_path) if 'loss' in line]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    trained = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    prefix = 'backbone.'
    backbone = {k.removeprefix(prefix): v for k, v in trained.items() if k.startswith(prefix)}
    LaViT('nano').load_state_dict(backbone)


@pytest.fixture(scope='module')
def command(run: Run, python: Path) -> Run:
    """Runs the command ``mmlavit`` that the wheel has installed."""

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return run(*arguments, program=python.with_name('mmlavit'))

    return command


def test_command_knows_what_the_wheel_brought(command: Run, package: Path) -> None:
    path = command('configs', 'path', 'lavit_t_imagenet')
    assert_ran(path)
    assert Path(path.stdout.strip()) == package / '.mim' / 'configs' / 'lavit_t_imagenet.py'
    benchmark = command('benchmark', '--help')
    assert benchmark.returncode == 2
    assert 'clone' in the_one_line(benchmark.stderr)


@pytest.mark.slow
def test_command_on_strangers_data(command: Run, project: Path) -> None:
    """Data, a config for them, a training, its test and predictions, all by the command."""
    assert_ran(command('shapes', '--out', 'mine', '--num-train', 4, '--num-val', 2, '--size', 64))
    new = ['configs', 'new', '--from', 'maskrcnn_lavit_n_shapes', '--data', 'mine/coco']
    assert_ran(command(*new, '--out', 'mine.py'))
    options = ['--cfg-options', 'default_hooks.logger.interval=1', 'train_cfg.max_epochs=1']
    options += ['train_dataloader.batch_size=2', 'default_hooks.checkpoint.save_best=None']
    assert_ran(command('train', 'mine.py', '--work-dir', 'run', *options))
    losses = [line['loss'] for line in read_log(project / 'run') if 'loss' in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert_ran(command('test', 'mine.py', 'run/epoch_1.pth'))
    assert_ran(command('infer', 'mine.py', 'run/epoch_1.pth', 'mine/coco/val2017'))
    found = json.loads((project / 'predictions' / 'predictions.json').read_text())
    assert len(found['images']) == 2
    assert [c['name'] for c in found['categories']] == ['circle', 'square', 'triangle']
    assert len(list((project / 'predictions' / 'pictures').iterdir())) == 2


@pytest.mark.slow
def test_a_wheel_has_no_weights(command: Run) -> None:
    """The model zoo's are in the repository; the one line says so."""
    refused = command('infer', 'retinanet_lavit_n_bccd', 'image.jpg', '--out', 'again')
    assert refused.returncode == 2
    line = the_one_line(refused.stderr)
    assert 'without weights' in line and 'checkpoints' in line
