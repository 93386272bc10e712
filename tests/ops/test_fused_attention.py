"""Runs `ops` with and without a GPU; the rest holds without Triton, too."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import images, small_lavit

from mmlavit import LaViT
from mmlavit.models.attention import LessAttention
from mmlavit.models.windows import WindowGrid
from mmlavit.ops import fused_attention
from mmlavit.ops.fused_attention import obstacle

HERE = Path(__file__).parent
CASES = 'fused_attention_cases.py', 'fused_check_cases.py'
# Not by importing it, which would be for the whole session.
TRITON = {d.name.lower(): d.version for d in distributions() if d.name}.get('triton', '0')
needs_triton = pytest.mark.skipif(
    int(TRITON.partition('.')[0]) < 3, reason='there is no Triton of version 3 or newer'
)


def python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository, with or without Triton's interpreter as the variables say."""
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=HERE.parents[1],
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.parametrize('cases', CASES)
@pytest.mark.parametrize(
    'variables',
    [
        # Most of a minute of one core, in the interpreter.
        pytest.param({'TRITON_INTERPRET': '1'}, marks=pytest.mark.slow, id='interpreter'),
        pytest.param(
            {},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'),
            id='GPU',
        ),
    ],
)
def test_kernels(cases, variables):
    """In a process of its own: Triton has to know who runs the kernels before it is imported."""
    options = '-q', '--tb=short', '-p', 'no:cacheprovider'
    ran = python('-m', 'pytest', *options, HERE / cases, **variables)
    assert ran.returncode == 0, f'{ran.stdout[-8000:]}\n{ran.stderr[-2000:]}'
    assert re.search(r'\d\d passed', ran.stdout), ran.stdout


def test_a_cpu_never_loads_the_kernels():
    code = (
        'import sys, torch, mmlavit\n'
        'with torch.no_grad():\n'
        '    mmlavit.LaViT("nano").eval()(torch.zeros(1, 3, 32, 32))\n'
        'assert "mmlavit.ops.fused_kernels" not in sys.modules\n'
    )
    ran = python('-W', 'ignore', '-c', code)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def loading(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """The kernels are looked for anew, here and once more after the test."""
    fused_attention._kernels.cache_clear()
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    yield monkeypatch
    fused_attention._kernels.cache_clear()


@pytest.mark.parametrize('triton', [None, SimpleNamespace(__version__='2.1.0')], ids=str)
def test_without_a_triton_that_fits_pytorch_does_it(triton, loading, recwarn):
    loading.setitem(sys.modules, 'triton', triton)
    layer, grid = LessAttention(64, 2, 4), WindowGrid(4, 4, 4)
    x, scores = images(1, 4, 4, 64).float(), images(1, 2, 16, 16).float()
    assert 'Triton' in obstacle(x, scores, layer.psi, layer.theta, grid)
    assert layer(x, grid, scores)[0].shape == x.shape
    assert not recwarn
    layer.fused = True
    with pytest.raises(RuntimeError, match='fused_attention=True, but .*Triton'):
        layer(x, grid, scores)


def test_a_triton_that_cannot_be_imported(loading):
    loading.setitem(sys.modules, 'triton', SimpleNamespace())
    layer, grid = LessAttention(64, 2, 4), WindowGrid(4, 4, 4)
    x, scores = images(1, 4, 4, 64).float(), images(1, 2, 16, 16).float()
    with pytest.warns(UserWarning, match='Triton cannot be imported.*AttributeError') as warned:
        for _ in range(2):
            assert layer(x, grid, scores)[0].shape == x.shape
    assert len(warned) == 1


@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='the kernel can run')
def test_forced_on_a_cpu_it_is_an_error_that_says_so():
    model = LaViT('nano', fused_attention=True).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match='fused_attention=True.*not on a GPU'):
        model(images(1, 3, 32, 32).float())


def test_the_switch_reaches_every_less_attention_layer():
    for options, fused in (({}, 'auto'), *((dict(fused_attention=f), f) for f in (True, False))):
        layers = [m for m in LaViT('nano', **options).modules() if isinstance(m, LessAttention)]
        assert layers and all(layer.fused == fused for layer in layers)


def test_the_switch_does_not_change_the_weights():
    expected = small_lavit().state_dict()
    for fused in (True, False):
        found = small_lavit(fused_attention=fused).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
