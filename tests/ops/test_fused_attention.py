"""Runs `ops` with and without a GPU; the rest holds without Triton, too."""

import os
import re
import subprocess
import sys
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
from mmlavit.ops.fused_attention import can_fuse

CASES = Path(__file__).with_name('fused_attention_cases.py')
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
        cwd=CASES.parents[2],
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.parametrize(
    'variables',
    [
        pytest.param({'TRITON_INTERPRET': '1'}, id='interpreter'),
        pytest.param(
            {},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'),
            id='GPU',
        ),
    ],
)
def test_kernels(variables):
    """In a process of its own: Triton has to know who runs the kernels before it is imported."""
    ran = python('-m', 'pytest', '-q', '--tb=short', '-p', 'no:cacheprovider', CASES, **variables)
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


@pytest.mark.parametrize('triton', [None, SimpleNamespace(__version__='2.1.0')], ids=str)
def test_without_a_triton_that_fits_there_are_no_kernels(triton, monkeypatch, recwarn):
    fused_attention._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, 'triton', triton)
    assert fused_attention._kernels() is None
    fused_attention._kernels.cache_clear()

    monkeypatch.setattr(fused_attention, '_kernels', lambda: None)
    fused_attention._try.cache_clear()
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    layer, grid = LessAttention(64, 2, 4), WindowGrid(4, 4, 4)
    x, scores = images(1, 4, 4, 64).float(), images(1, 2, 16, 16).float()
    assert not can_fuse(x, scores, layer.psi, layer.theta, grid)
    assert layer(x, grid, scores)[0].shape == x.shape
    fused_attention._try.cache_clear()
    assert not recwarn


def test_the_switch_reaches_every_less_attention_layer():
    for options, fused in (({}, True), (dict(fused_attention=False), False)):
        layers = [m for m in LaViT('nano', **options).modules() if isinstance(m, LessAttention)]
        assert layers and all(layer.fused is fused for layer in layers)


def test_the_switch_does_not_change_the_weights():
    expected = small_lavit().state_dict()
    found = small_lavit(fused_attention=False).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
