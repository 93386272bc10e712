"""What every test needs before it imports a toolbox, and the wheel that some look into."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmlavit.compat import repair_torchvision

repair_torchvision()

ROOT = Path(__file__).resolve().parents[1]
# What works on this repository alone is imported as its scripts do it.
sys.path.insert(0, str(ROOT / 'tools'))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that short ones are left to even out the processes that run them."""

    def length(item: pytest.Item) -> tuple[float, bool]:
        # The longest have more time than others.
        own = item.get_closest_marker('timeout')
        return (own.args[0] if own else 0, item.get_closest_marker('slow') is not None)

    items.sort(key=length, reverse=True)


@pytest.fixture
def own_scope() -> Iterator[None]:
    """A runner sets MMEngine's default scope for good; take it back."""
    from mmengine.registry import DefaultScope  # not there where MMEngine is not

    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.fixture(scope='session')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what distributions are made of; build them in copies of it."""
    copy = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md'):
        shutil.copy(ROOT / name, copy)
    shutil.copy(ROOT / 'model-index.yml', copy)
    for name in ('mmlavit', 'configs', 'tools'):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
    return copy


@pytest.fixture(scope='session')
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source tree gives."""
    tree = shutil.copytree(source, tmp_path_factory.mktemp('wheel') / 'source')
    out = tree.parent
    build = ['wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(out), '.']
    ran = subprocess.run(
        [sys.executable, '-m', 'pip', *build], cwd=tree, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(out.glob('*.whl'))
