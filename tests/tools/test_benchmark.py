"""The benchmark runs, and what it says follows from what it measured."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn

from mmlavit.models.arch import Arch
from repository.benchmark import memory, models, report, suites, timing
from repository.benchmark.workload import BackboneWorkload, Settings, Task

REPOSITORY = Path(__file__).parents[2]
SMALL = [Task('inference', (1, 3, 64, 96)), Task('training', (2, 3, 64, 64))]


class TwoConvolutions(nn.Module):
    """A backbone that keeps a record of what it was given."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.calls = []
        self.conv.weight.register_hook(lambda grad: self.calls.append('gradient'))

    def forward(self, x):
        self.calls.append((self.training, x.is_contiguous(), torch.is_grad_enabled()))
        return (self.conv(x), 2 * self.conv(x))


class TestWorkload:
    def test_a_training_step_computes_gradients_and_drops_them(self):
        work = BackboneWorkload(TwoConvolutions, Task('training', (1, 3, 4, 4)), Settings())
        work.step()
        assert work.model.calls == [(True, True, True), 'gradient']
        assert work.model.conv.weight.grad is None

    def test_inference_computes_none(self):
        work = BackboneWorkload(TwoConvolutions, Task('inference', (1, 3, 4, 4)), Settings())
        work.step()
        assert work.model.calls == [(False, True, False)]

    def test_memory_format_of_model_and_images(self):
        task = Task('inference', (1, 3, 4, 4))
        work = BackboneWorkload(TwoConvolutions, task, Settings(), torch.channels_last)
        work.step()
        assert work.model.calls == [(False, False, False)]
        assert work.model.conv.weight.is_contiguous(memory_format=torch.channels_last)

    def test_autocast(self):
        seen = []
        work = BackboneWorkload(
            TwoConvolutions, Task('training', (1, 3, 4, 4)), Settings(amp='bf16')
        )
        work.model.register_forward_hook(lambda m, x, y: seen.append(y[0].dtype))
        work.step()
        assert seen == [torch.bfloat16]


class TestTiming:
    def test_everything_takes_turns_after_a_warm_up(self):
        calls = []
        steps = {'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}
        seconds = timing.interleave(steps, 3)
        assert ''.join(calls) == 'abababab'
        assert {name: len(s) for name, s in seconds.items()} == {'a': 3, 'b': 3}
        assert min(seconds['a']) > 0

    def test_a_slower_step_has_more_seconds(self):
        steps = {'quick': lambda: None, 'slow': lambda: torch.randn(400, 400).svd()}
        seconds = timing.interleave(steps, 2)
        assert min(seconds['slow']) > max(seconds['quick'])

    def test_rate_of_products_is_that_of_a_product(self):
        x = torch.randn(1024, 1024)
        seconds = min(timing.interleave({'product': lambda: x @ x}, 5)['product'])
        rate = timing.product_rate(Settings())
        assert 0.2 < rate / (2 * 1024**3 / seconds) < 20


class TestModels:
    @pytest.mark.parametrize('name', models.BACKBONES)
    def test_all_give_the_four_maps(self, name):
        model = models.BACKBONES[name]()
        model.eval()
        with torch.no_grad():
            maps = model(torch.zeros(1, 3, 64, 96))
        assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]

    def test_the_twin_differs_in_its_attention_alone(self):
        ours, twin = models.BACKBONES['LaViT-S'](), models.BACKBONES['LaViT-S all-vanilla']()
        assert twin.arch.vanilla_depths == twin.arch.depths == ours.arch.depths
        assert twin.arch.embed_dims == ours.arch.embed_dims == Arch.of('small').embed_dims

    @pytest.mark.parametrize('conv_stem', [False, True])
    @pytest.mark.parametrize('overlap', [False, True])
    def test_each_option_has_its_entry(self, conv_stem, overlap):
        name = 'LaViT-S' + ' conv-stem' * conv_stem + ' overlap' * overlap
        model = models.BACKBONES[name]()
        assert (model.conv_stem, model.overlap_downsample) == (conv_stem, overlap)
        assert model.arch == Arch.of('small')

    @pytest.mark.parametrize('name', ['LaViT-S', 'Swin-T', 'ResNet-50'])
    def test_flops_are_those_of_mmengine(self, name):
        """Another counter, which counts norms and activations too."""
        build = models.BACKBONES[name]
        counted = suites.count_flops(build, Task('inference', (1, 3, 224, 224))) / 2
        model = build()
        model.eval()
        theirs = get_model_complexity_info(model, (3, 224, 224), show_table=False, show_arch=False)[
            'flops'
        ]
        assert counted == pytest.approx(theirs, rel=0.06)

    @pytest.mark.parametrize('side', [256, 224])
    def test_a_training_step_has_three_times_the_flops(self, side):
        build, shape = models.BACKBONES['LaViT-S'], (1, 3, side, side)
        ahead, both = (suites.count_flops(build, Task(n, shape)) for n in ('inference', 'training'))
        assert both == 3 * ahead


class TestSuites:
    def test_backbones(self):
        names = ['LaViT-S', 'ResNet-50']
        comparisons = list(suites.backbones(names, SMALL, Settings(), 2, 1e10))
        assert [[row.model for row in rows] for rows in comparisons] == [names, names]
        assert [rows[0].task for rows in comparisons] == ['inference', 'training']
        for row in sum(comparisons, []):
            assert len(row.seconds) == 2 and 0 < min(row.seconds) <= row.median
            assert row.memory > 0 and row.params > 2e7
            assert row.floor == pytest.approx(row.gflops * 2e9 / 1e10)
            assert row.memory_format in suites.FORMATS

    def test_every_model_gets_its_faster_format(self, monkeypatch):
        works = {
            name: BackboneWorkload(TwoConvolutions, SMALL[0], Settings()) for name in ('a', 'b')
        }
        times = iter([{'a': [1.0, 2.0], 'b': [3.0, 4.0]}, {'a': [0.9, 8.0], 'b': [3.1, 3.1]}])
        monkeypatch.setattr(suites, 'interleave', lambda *args: next(times))
        assert suites._choose_formats(works, '') == {'a': 'NHWC', 'b': 'NCHW'}
        assert not works['a'].images.is_contiguous() and works['b'].images.is_contiguous()

    def test_attention(self):
        comparisons = list(suites.attention(Settings(), 1))
        assert [row.model for rows in comparisons for row in rows] == ['LA layer', 'VA layer'] * 4
        assert len({rows[0].input for rows in comparisons}) == 4

    @pytest.mark.slow
    def test_detectors(self):
        (rows,) = suites.detectors(tuple(models.DETECTORS), Settings(), 1)
        assert [row.model for row in rows] == list(models.DETECTORS)
        assert all(row.params > 4e7 for row in rows)


def test_peak_memory_is_of_the_task_alone():
    """A larger image takes more, however much memory this process has used before."""
    ballast = torch.ones(300 * 2**20 // 4)
    little, much = (
        memory.peak_memory(
            partial(models.build, 'LaViT-S'), Task('inference', (1, 3, n, n)), Settings()
        )
        for n in (128, 512)
    )
    assert ballast.sum() > 0
    assert 0 < little < much < 300


@pytest.fixture
def comparison() -> list[suites.Row]:
    ours = suites.Row('inference', '2 x 3 x 8 x 8', 2, 'LaViT-S', [0.5, 0.4, 0.6], 'NHWC', 100.0)
    ours.params, ours.gflops, ours.floor = 22_000_000, 3.0, 0.25
    return [ours, suites.Row('inference', '2 x 3 x 8 x 8', 2, 'Swin-T', [1.0, 1.0, 1.5])]


class TestReport:
    MACHINE = {'date': '2026-01-01', 'processor': 'Abacus', 'threads': 2}

    def test_markdown(self, comparison):
        text = report.markdown(self.MACHINE, [comparison])
        assert 'processor Abacus, threads 2' in text
        head, *lines = [line for line in text.splitlines() if line.startswith('|')]
        cells = [[c.strip() for c in line.split('|')[1:-1]] for line in lines[1:]]
        names = [c.strip() for c in head.split('|')[1:-1]]
        ours, swin = (dict(zip(names, row, strict=True)) for row in cells)
        assert (ours['model'], swin['model']) == ('LaViT-S', 'Swin-T')
        assert re.fullmatch(r'0\.5 \(0\.4 - 0\.6\)', ours['seconds'])
        assert float(ours['images/s']) == 4 and float(swin['images/s']) == 2
        assert (ours['time ratio'], swin['time ratio']) == ('**1.00**', '**2.00**')
        assert (ours['peak MiB'], ours['params M'], ours['GFLOPs']) == ('100', '22.0', '3.0')
        assert ours['time / floor'] == '2.00' and swin['time / floor'] == ''

    def test_files(self, comparison, tmp_path):
        out = tmp_path / 'a' / 'b'
        files = report.write(out, self.MACHINE, [comparison, comparison])
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in files)
        saved = json.loads((out / 'results.json').read_text())
        assert saved['machine'] == self.MACHINE
        assert [row['seconds'] for row in saved['rows']] == [r.seconds for r in comparison] * 2
        assert cv2.imread(str(out / 'speed.png')) is not None

    def test_plot_shows_relative_speed(self, comparison, tmp_path, monkeypatch):
        import matplotlib.pyplot as plt

        figures = []
        monkeypatch.setattr(plt, 'close', figures.append)
        report.draw(self.MACHINE, [comparison], tmp_path / 's.png')
        (panel,) = figures[0].axes
        assert [bar.get_width() for bar in panel.patches] == [1.0, 0.5]


def test_the_command(tmp_path):
    command = [sys.executable, REPOSITORY / 'tools' / 'benchmark.py', '--rounds', '1']
    command += ['--suites', 'backbones', '--models', 'LaViT-T', 'Swin-T', '--no-memory']
    command += ['--inference', '1x64x64', '--training', '--out', 'out']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '| LaViT-T |' in done.stdout and '| Swin-T |' in done.stdout
    machine = json.loads((tmp_path / 'out' / 'results.json').read_text())['machine']
    assert machine['type'] == 'fp32' and machine['rounds'] == 1
