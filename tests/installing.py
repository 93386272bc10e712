"""The ways to install mmlavit, each in a fresh clone and environment, and then a first training.

`make test-install` runs this. pytest does not find the file by itself: it needs a package index, or
what pip keeps of one, and minutes; and half an hour more where mmcv has to be compiled.
"""

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, read_log

PYTHON = os.environ.get('PYTHON', 'python3')

pytestmark = pytest.mark.timeout(3 * 3600)


def sh(script: str, cwd: Path, path: Path | None = None) -> str:
    """Run lines of a shell, which stops at the first that fails; all that they print.

    Args:
        script: The lines.
        cwd: Where to run them.
        path: A folder with programs that come first.
    """
    # Nothing of this checkout, of the environment that pytest runs in or of a make around it.
    others = 'PYTHONPATH', 'VIRTUAL_ENV', 'VENV', 'MAKEFLAGS', 'MAKEOVERRIDES'
    env = {name: value for name, value in os.environ.items() if name not in others}
    env |= {'PATH': os.pathsep.join([*[str(path)] * (path is not None), env['PATH']])}
    command = ['bash', '-euo', 'pipefail', '-c', script]
    ran = subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ran.returncode == 0, f'{script}\n{ran.stdout[-6000:]}'
    return ran.stdout


def lines_of_pip(readme: Path) -> str:
    """What README.md says to type."""
    blocks = re.findall(r'```bash\n(.*?)```', readme.read_text(encoding='utf-8'), re.DOTALL)
    (block,) = (block for block in blocks if '-m venv' in block and '[onedl]' in block)
    assert len(block.splitlines()) <= 4
    return block.replace('python3', PYTHON, 1)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """What git has of this checkout, without what is not committed."""
    if not (ROOT / '.git').exists():
        pytest.skip('this is no clone of the repository, so there is nothing to clone')
    clone = tmp_path / 'clone'
    sh(f'git clone --quiet {ROOT} {clone}', tmp_path)
    yield clone
    shutil.rmtree(clone)  # environments are large


def by_make(clone: Path) -> Path:
    sh(f'make install PYTHON={PYTHON}', clone)
    return clone / '.venv' / 'bin'


def by_pip(clone: Path) -> Path:
    sh(lines_of_pip(clone / 'README.md'), clone)
    return clone / '.venv' / 'bin'


def from_the_wheel(clone: Path) -> Path:
    """By the same lines, with the wheel in the place of the clone; which then is gone."""
    folder = clone / 'dist'
    sh(f'{PYTHON} -m pip wheel --quiet --no-deps -w {folder} .', clone)
    (wheel,) = folder.glob('mmlavit-*.whl')
    lines = lines_of_pip(clone / 'README.md')
    shutil.copy(clone / 'constraints.txt', folder)
    assert "-e '.[onedl]'" in lines
    sh(lines.replace("-e '.[onedl]'", f"'{wheel}[onedl]'"), folder)
    for path in clone.iterdir():
        if path != folder:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / '.venv' / 'bin'


@pytest.mark.parametrize('install', [by_make, by_pip, from_the_wheel], ids=lambda way: way.__name__)
def test_install_and_train(install, clone: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    bin = install(clone)
    took = time.monotonic() - start
    empty = tmp_path / 'empty'
    empty.mkdir()

    def mmlavit(arguments: str) -> str:
        return sh(f'mmlavit {arguments}', empty, bin)

    where = sh('python -c "import mmlavit; print(mmlavit.__file__)"', empty, bin)
    assert where.startswith(str(clone))
    assert 'commands:' in mmlavit('--help')
    mmlavit('shapes --num-train 4 --num-val 2 --size 64')
    short = 'train_dataloader.batch_size=2 train_cfg.max_epochs=1 default_hooks.logger.interval=1'
    config = 'maskrcnn_lavit_n_shapes'
    mmlavit(f'train {config} --work-dir run --cfg-options {short}')
    losses = [line['loss'] for line in read_log(empty / 'run') if 'loss' in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    mmlavit(f'infer {config} run/epoch_1.pth data/shapes/coco/val2017')
    found = json.loads((empty / 'predictions' / 'predictions.json').read_text())
    assert len(found['images']) == 2
    print(f'\n{install.__name__}: installed in {took:.0f} s, all in {time.monotonic() - start:.0f}')
