"""What the wheel asks for: a user's MMEngine, MMCV and toolboxes are never touched."""

import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmlavit

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ['3.10', '3.11', '3.12']

# Every distribution that provides one of the import names mmengine, mmcv, mmdet, mmseg, mmpretrain.
ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
}
OPENMMLAB = {
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
}
PROVIDERS = {*ONEDL, *OPENMMLAB, 'mmengine-lite', 'mmcv-full', 'mmcv-lite', 'mmcls'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the build leaves nothing in the source tree."""
    source = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ('mmlavit', 'configs', 'tools', 'tests'):
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns('__pycache__')
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    out = tmp_path_factory.mktemp('wheel')
    build = ['wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(out), '.']
    ran = subprocess.run(
        [sys.executable, '-m', 'pip', *build], cwd=source, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope='module')
def requirements(metadata: email.message.Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all('Requires-Dist')]


def of_extra(requirements: list[Requirement], extra: str, python: str = '3.11') -> dict:
    """Name -> specifier of what an extra asks for; the empty extra is the bare package."""
    env = {'extra': extra, 'python_version': python, 'python_full_version': f'{python}.0'}
    return {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(env)
    }


def pins(python: str) -> dict[str, str]:
    """Name -> version in constraints.txt, on one Python."""
    found: dict[str, str] = {}
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        if not line or line.startswith('#'):
            continue
        requirement = Requirement(line)
        env = {'python_version': python}
        if requirement.marker is None or requirement.marker.evaluate(env):
            (specifier,) = requirement.specifier
            assert specifier.operator == '==', line
            name = canonicalize_name(requirement.name)
            assert name not in found, f'{name} is pinned twice on Python {python}'
            found[name] = specifier.version
    return found


@pytest.mark.parametrize('python', PYTHONS)
def test_hard_requirements_are_torch_and_numpy(
    requirements: list[Requirement], python: str
) -> None:
    hard = of_extra(requirements, '', python)
    assert set(hard) == {'torch', 'numpy'}
    assert '2.1.0' in hard['torch']
    assert '2.0.1' not in hard['torch']


def test_no_provider_without_an_extra(requirements: list[Requirement]) -> None:
    for requirement in requirements:
        if canonicalize_name(requirement.name) in PROVIDERS:
            assert 'extra ==' in str(requirement.marker)


def test_each_extra_is_of_one_family(
    metadata: email.message.Message, requirements: list[Requirement]
) -> None:
    extras = metadata.get_all('Provides-Extra')
    assert set(extras) == {'onedl', 'openmmlab', 'dev'}
    families = {
        extra: {name for name in of_extra(requirements, extra) if name in PROVIDERS}
        for extra in extras
    }
    assert families == {'onedl': set(ONEDL), 'openmmlab': set(OPENMMLAB), 'dev': set()}


@pytest.mark.parametrize(('extra', 'tried'), [('onedl', ONEDL), ('openmmlab', OPENMMLAB)])
def test_extras_take_what_was_tried(
    requirements: list[Requirement], extra: str, tried: dict[str, str]
) -> None:
    wanted = of_extra(requirements, extra)
    for name, version in tried.items():
        assert version in wanted[name], name


def test_python_that_torch_and_the_code_need(metadata: email.message.Message) -> None:
    assert metadata['Requires-Python'] == '>=3.10'
    assert metadata['Name'] == 'mmlavit'
    assert metadata['Version'] == mmlavit.__version__


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
    modules = (ROOT / 'mmlavit').rglob('*.py')
    assert names == {str(module.relative_to(ROOT)) for module in modules}


def test_installing_it_here_would_install_nothing_else(wheel: Path) -> None:
    dry = ['install', '--dry-run', '--no-index', '--quiet', '--report', '-', str(wheel)]
    ran = subprocess.run([sys.executable, '-m', 'pip', *dry], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert {entry['metadata']['name'] for entry in report['install']} <= {'mmlavit'}


@pytest.mark.parametrize('python', PYTHONS)
def test_constraints_fit_the_extras(requirements: list[Requirement], python: str) -> None:
    pinned = pins(python)
    for extra in ('onedl', 'dev'):
        for name, specifier in of_extra(requirements, extra, python).items():
            assert pinned[name] in specifier, name
    for name, version in ONEDL.items():
        assert pinned[name] == version
    assert not set(OPENMMLAB).intersection(pinned)


def test_constraints_leave_the_build_of_torch_open() -> None:
    # torch==2.13.0+cpu would not be found where only a CUDA build is, and the other way round.
    assert re.fullmatch(r'[\d.]+', pins('3.11')['torch'])


def test_setuptools_still_has_pkg_resources() -> None:
    assert int(pins('3.11')['setuptools'].split('.')[0]) < 81
