"""mmlavit/compat.py, each case in an interpreter of its own: what is tested happens on import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmlavit import compat

# compat.py alone, so that nothing but the case itself has been imported before.
LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location('compat', {str(Path(compat.__file__))!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
"""

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == {name!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Block())
"""

# What torchvision does when its compiled library cannot be loaded, submodule and all.
TRAP = """
import torch
from torchvision import extension
describe = getattr(torch.library, 'register_fake', None) or torch.library.impl_abstract
@describe('torchvision::nms')
def nms(dets, scores, iou_threshold): ...
@describe('torchvision::qnms')
def qnms(dets, scores, iou_threshold): ...
"""


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with `path` in front of what is installed."""
    env = {**os.environ, 'PYTHONPATH': str(path or '')}
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True
    )


def passes(code: str, path: Path | None = None) -> None:
    ran = run(code, path)
    assert ran.returncode == 0, ran.stderr


def fake_torchvision(folder: Path, source: str) -> Path:
    package = folder / 'torchvision'
    package.mkdir()
    (package / '__init__.py').write_text(source)
    (package / 'extension.py').write_text('')
    return folder


@pytest.fixture(scope='module')
def real_trap() -> None:
    ran = run('import torchvision')
    if ran.returncode == 0:
        pytest.skip('the torchvision that is installed here is healthy')
    if 'operator torchvision::nms does not exist' not in ran.stderr:
        pytest.skip('torchvision is missing or broken in another way here')


class TestRealTorchvision:
    """The torchvision that is installed, where it has fallen into the trap."""

    @pytest.fixture(autouse=True)
    def _only_in_the_trap(self, real_trap: None) -> None:
        """Every test here needs it."""

    @pytest.mark.parametrize('module', ['torchvision', 'mmdet.apis', 'mmpretrain'])
    def test_imports_work_once_repaired(self, module: str) -> None:
        if module != 'torchvision':
            pytest.importorskip(module.split('.')[0])
            pytest.importorskip('mmcv')
        passes(f'{LOAD}\nassert compat.repair_torchvision() is True\nimport {module}')

    def test_works_after_somebody_tried(self) -> None:
        passes(f"""{LOAD}
try:
    import torchvision
except RuntimeError:
    pass
assert compat.repair_torchvision() is True
import torchvision
""")

    def test_second_call_does_nothing(self) -> None:
        passes(f"""{LOAD}
assert compat.repair_torchvision() is True
first = sys.modules['torchvision']
assert compat.repair_torchvision() is False
assert sys.modules['torchvision'] is first
assert len(compat._declarations) == 1
""")

    def test_the_operators_still_say_what_is_wrong(self) -> None:
        ran = run(f"""{LOAD}
compat.repair_torchvision()
import torch, torchvision
torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
""")
        assert "Couldn't load custom C++ ops" in ran.stderr

    def test_transforms_work(self) -> None:
        passes(f"""{LOAD}
compat.repair_torchvision()
import torch, torchvision
assert torchvision.transforms.CenterCrop(2)(torch.rand(3, 4, 4)).shape == (3, 2, 2)
""")


@pytest.mark.skipif(
    not hasattr(torch.library, 'register_fake') and not hasattr(torch.library, 'impl_abstract'),
    reason='torchvision describes its operators to torch 2.2 and later only',
)
def test_the_trap_wherever_this_runs(tmp_path: Path) -> None:
    path = fake_torchvision(tmp_path, TRAP)
    bare = run('import torchvision', path)
    assert 'operator torchvision::nms does not exist' in bare.stderr
    passes(
        f"""{LOAD}
assert compat.repair_torchvision() is True
import torchvision.extension
assert torchvision.extension is sys.modules['torchvision.extension']
assert compat.repair_torchvision() is False
""",
        path,
    )


@pytest.mark.slow
@pytest.mark.parametrize('kept', [0.0, 0.5, 0.99])
def test_yapf_is_imported_where_its_cache_is_torn(tmp_path: Path, monkeypatch, kept: float) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    passes('import yapf')
    caches = {path: path.read_bytes() for path in tmp_path.rglob('*.pickle')}
    assert len(caches) == 2
    for path, content in caches.items():
        path.write_bytes(content[: int(kept * len(content))])
    error = run('import yapf').stderr.splitlines()[-1]
    assert error.startswith(('EOFError: ', '_pickle.UnpicklingError: '))
    passes(f"""{LOAD}
compat.import_yapf()
from yapf.yapflib.yapf_api import FormatCode
assert FormatCode('a =   3')[0] == 'a = 3\\n'
""")
    passes("""
import mmlavit
from mmengine.config import Config
assert Config(dict(a=3)).pretty_text == 'a = 3\\n'
""")


def test_without_yapf_nothing_happens() -> None:
    passes(f'{LOAD}{BLOCK.format(name="yapf")}\ncompat.import_yapf()')


def test_other_errors_of_yapf_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / 'yapf.py').write_text("raise RuntimeError('no such grammar')")
    assert 'RuntimeError: no such grammar' in run(f'{LOAD}\ncompat.import_yapf()', tmp_path).stderr


def test_healthy_torchvision_is_left_as_it_is(tmp_path: Path) -> None:
    # A healthy one declares its operators itself; declared twice, this would fail.
    source = """
import torch
library = torch.library.Library('torchvision', 'DEF')
library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
"""
    passes(
        f"""{LOAD}
assert compat.repair_torchvision() is False
assert compat._declarations == []
import torchvision
assert compat.repair_torchvision() is False
""",
        fake_torchvision(tmp_path, source),
    )


def test_without_torchvision_nothing_happens() -> None:
    passes(f"""{LOAD}{BLOCK.format(name='torchvision')}
assert compat.repair_torchvision() is False
assert compat._declarations == []
assert not any(name.split('.')[0] == 'torchvision' for name in sys.modules)
""")


def test_import_error_is_left_to_meet(tmp_path: Path) -> None:
    path = fake_torchvision(tmp_path, "raise ImportError('libjpeg is missing')")
    ran = run(f'{LOAD}\nassert compat.repair_torchvision() is False\nimport torchvision', path)
    assert ran.stderr.splitlines()[-1] == 'ImportError: libjpeg is missing'


@pytest.mark.parametrize(
    'error', ["RuntimeError('compiled with another CUDA')", "OSError('disk is gone')"]
)
def test_other_errors_are_passed_on(tmp_path: Path, error: str) -> None:
    ran = run(f'{LOAD}\ncompat.repair_torchvision()', fake_torchvision(tmp_path, f'raise {error}'))
    kind, message = error[:-2].split("('")
    assert ran.stderr.splitlines()[-1] == f'{kind}: {message}'


def test_what_is_patched_is_patched_once() -> None:
    passes("""
import sys
import mmlavit
from mmengine.config import Config
from mmengine.config import utils
from mmengine.config.utils import MODULE2PACKAGE
from mmengine import hub
from mmengine.runner import Runner
from mmlavit.hub import serve_mmengines_hub, serve_mmpretrains_hub
from mmlavit.compat import let_cpus_take_part, read_metafiles_once, repair_config_bases
from mmlavit.compat import serve_config_bases
from mmlavit.engine.data_checks import check_data

def state():
    names = 'build_dataloader', 'build_train_loop', 'build_val_loop', 'wrap_model'
    found = [getattr(Runner, name) for name in names]
    found += [Config._get_cfg_path, dict(MODULE2PACKAGE), hub.get_config, hub.get_model]
    found += [utils.load]
    return found, list(sys.meta_path)

patches = let_cpus_take_part, repair_config_bases, serve_config_bases, read_metafiles_once
patches += check_data, serve_mmengines_hub, serve_mmpretrains_hub
for patch in patches:
    patch()
before = state()
for patch in patches:
    patch()
assert state() == before
""")


def test_compat_needs_only_torch() -> None:
    passes(f"""{LOAD}
assert not any(name.split('.')[0] in {{'mmengine', 'mmcv', 'torchvision'}} for name in sys.modules)
""")


def test_missing_mmengine_names_both_distributions() -> None:
    """Where something is asked for that needs it."""
    ran = run("import sys\nsys.modules['mmengine'] = None\nfrom mmlavit import DiagonalityLossHook")
    last = ran.stderr.splitlines()[-1]
    assert last.startswith('ImportError: mmlavit needs MMEngine')
    for name in ('onedl-mmengine', 'or mmengine', 'README.md'):
        assert name in last
    assert 'During handling' not in ran.stderr
    assert 'direct cause' not in ran.stderr


def test_what_mmengine_itself_misses_is_passed_on() -> None:
    ran = run(f'{LOAD}{BLOCK.format(name="addict")}\ncompat.require_mmengine()')
    assert ran.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'addict'"
