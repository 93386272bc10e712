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
import torch.nn.functional as F
from mmengine.analysis import get_model_complexity_info
from small import needs_exporter
from torch import nn

from mmlavit.export.onnx import export_onnx
from mmlavit.models.arch import Arch
from mmlavit.ops.linear import linear as our_linear
from repository.benchmark import exported, memory, models, report, routes, suites, timing
from repository.benchmark.workload import BackboneWorkload, Settings, Task

REPOSITORY = Path(__file__).parents[2]
SMALL = [Task('inference', (1, 3, 64, 96)), Task('training', (2, 3, 64, 64))]


class TwoConvolutions(nn.Module):
    """A backbone that keeps a record of what it was given."""

    def __init__(self, task=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.calls = []
        self.conv.weight.register_hook(lambda grad: self.calls.append('gradient'))

    def forward(self, x):
        self.calls.append((self.training, x.is_contiguous(), torch.is_grad_enabled()))
        return (self.conv(x), 2 * self.conv(x))


class OneConvolution(nn.Module):
    """A backbone of one map."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)

    def forward(self, x):
        return (self.conv(x),)


def build(name: str, task: Task = SMALL[0]) -> nn.Module:
    return models.BACKBONES[name](task)


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

    @pytest.mark.parametrize(
        ('precision', 'weights', 'maps'),
        [
            ('fp32', torch.float32, torch.float32),
            ('bf16-amp', torch.float32, torch.bfloat16),
            ('bf16', torch.bfloat16, torch.bfloat16),
        ],
    )
    def test_precision(self, precision, weights, maps):
        seen = []
        work = BackboneWorkload(
            TwoConvolutions, Task('training', (1, 3, 4, 4)), Settings(precision=precision)
        )
        work.model.register_forward_hook(lambda m, x, y: seen.append((x[0].dtype, y[0].dtype)))
        work.step()
        assert seen == [(weights, maps)]
        assert work.model.conv.weight.dtype == weights

    @pytest.mark.slow
    def test_more_models_of_a_class_than_torch_compiles_by_default(self):
        """They share compiled code, of which PyTorch makes eight variants and then none."""
        task, settings = Task('inference', (1, 3, 4, 4)), Settings(compile=True)
        counted = torch._dynamo.utils.counters['stats']
        before = counted['unique_graphs']
        with suites.fresh_compiler(settings):
            for width in range(1, 12):
                BackboneWorkload(lambda task, n=width: OneConvolution(n), task, settings).step()
        assert counted['unique_graphs'] - before == 11


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


@pytest.mark.slow
class TestModels:
    @pytest.mark.parametrize('name', models.BACKBONES)
    def test_all_give_the_four_maps(self, name):
        for task in SMALL:
            model = build(name, task)
            model.eval()
            with torch.no_grad():
                maps = model(torch.zeros(1, 3, 64, 96))
            assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]

    @pytest.mark.parametrize('name', ['LaViT-S', 'Swin-T', 'ResNet-50'])
    def test_all_take_the_image_of_a_detector(self, name):
        """On the meta device, which computes sizes alone."""
        model = build(name, Task('inference', (1, 3, 800, 1280))).to('meta')
        model.eval()
        maps = model(torch.empty(1, 3, 800, 1280, device='meta'))
        assert [tuple(m.shape[2:]) for m in maps] == [(200, 320), (100, 160), (50, 80), (25, 40)]

    def test_fastvit_for_inference_is_the_one_that_trains(self):
        """Its branches merged, with statistics that are not those of the start."""
        trained = build('FastViT-SA24', SMALL[1])
        generator = torch.Generator().manual_seed(0)
        for module in trained.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        trained.eval()
        merged = models.merge_branches(trained)
        x = torch.randn(1, 3, 64, 96, generator=generator)
        with torch.no_grad():
            for a, b in zip(merged(x), trained(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        convolutions = [
            sum(isinstance(module, nn.Conv2d) for module in model.modules())
            for model in (trained, merged, build('FastViT-SA24', SMALL[0]))
        ]
        assert convolutions[0] > convolutions[1] == convolutions[2]

    def test_without_timm_in_one_line(self, monkeypatch):
        models.require_packages(models.BACKBONES)
        monkeypatch.setitem(sys.modules, 'timm', None)
        models.require_packages(['LaViT-S', 'Swin-T', 'ResNet-50'])
        with pytest.raises(ModuleNotFoundError, match='^Hiera-T need.* timm.*pip install timm'):
            models.require_packages(['LaViT-S', 'Hiera-T'])

    def test_the_twin_differs_in_its_attention_alone(self):
        ours, twin = build('LaViT-S'), build('LaViT-S all-vanilla')
        assert twin.arch.vanilla_depths == twin.arch.depths == ours.arch.depths
        assert twin.arch.embed_dims == ours.arch.embed_dims == Arch.of('small').embed_dims

    @pytest.mark.parametrize('conv_stem', [False, True])
    @pytest.mark.parametrize('overlap', [False, True])
    @pytest.mark.parametrize('mix_ffn', [False, True])
    def test_each_option_has_its_entry(self, conv_stem, overlap, mix_ffn):
        name = 'LaViT-S' + ' conv-stem' * conv_stem + ' overlap' * overlap + ' mix-ffn' * mix_ffn
        model = build(name)
        options = model.conv_stem, model.overlap_downsample, model.mix_ffn
        assert options == (conv_stem, overlap, mix_ffn)
        assert model.arch == Arch.of('small')

    @pytest.mark.parametrize('name', ['LaViT-S', 'Swin-T', 'ResNet-50'])
    def test_flops_are_those_of_mmengine(self, name):
        """Another counter, which counts norms and activations too."""
        task = Task('inference', (1, 3, 224, 224))
        counted = suites.count_flops(models.BACKBONES[name], task) / 2
        model = build(name)
        model.eval()
        theirs = get_model_complexity_info(model, (3, 224, 224), show_table=False, show_arch=False)[
            'flops'
        ]
        assert counted == pytest.approx(theirs, rel=0.06)

    @pytest.mark.parametrize('side', [256, 224])
    def test_a_training_step_has_three_times_the_flops(self, side):
        lavit, shape = models.BACKBONES['LaViT-S'], (1, 3, side, side)
        ahead, both = (suites.count_flops(lavit, Task(n, shape)) for n in ('inference', 'training'))
        assert both == 3 * ahead


def operators(work: BackboneWorkload) -> set[str]:
    """What a step asks PyTorch to compute."""
    with torch.profiler.profile() as profile:
        work.step()
    return {event.name for event in profile.events()}


def has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.slow
@pytest.mark.skipif(not routes.routes_differ(Settings()), reason='torch without oneDNN')
class TestLinearLayers:
    """The route of LaViT's linear layers, for whoever has some."""

    @pytest.mark.parametrize(
        ('name', 'task'),
        [(name, SMALL[0]) for name in models.DEFAULT_BACKBONES]
        + [(name, SMALL[1]) for name in ('LaViT-S', 'Swin-T', 'PVTv2-B2')],
        ids=lambda value: getattr(value, 'name', value),
    )
    def test_all_of_a_peer_go_where_ours_go(self, name, task):
        own, ours = (
            operators(BackboneWorkload(models.BACKBONES[name], task, Settings(), route=route))
            for route in (routes.ROUTES['own'], routes.ROUTES['ours'])
        )
        by_pytorch, by_lavit = {'aten::linear', 'aten::addmm'}, 'mkldnn::_linear_pointwise'
        assert not ours & by_pytorch
        if name.startswith('LaViT'):
            assert by_lavit in own and not own & by_pytorch
        elif name == 'ResNet-50':
            assert ours == own
        else:
            assert own & by_pytorch and by_lavit in ours - own

    @pytest.mark.parametrize('name', models.DEFAULT_BACKBONES[2:])
    def test_results_are_the_same_but_for_rounding(self, name):
        print('seed 0')
        torch.manual_seed(0)
        model, x = build(name, SMALL[1]), torch.randn(2, 3, 64, 64)
        model.eval()
        with torch.no_grad():
            weights = [torch.randn_like(y) for y in model(x)]
        found = []
        for linear in ('own', 'ours'):
            with routes.ROUTES[linear]():
                maps = model(x)
                sum((y * w).sum() for y, w in zip(maps, weights, strict=True)).backward()
            found.append([*maps, *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        assert len(found[0]) > 50
        for own, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, own, rtol=0, atol=1e-4 * own.abs().max().item())

    def test_nothing_is_left_behind(self):
        before = F.linear
        with pytest.raises(RuntimeError), routes.our_linear_layers():
            nn.Linear(2, 3)(torch.zeros(1, 5))
        assert F.linear is before

    @pytest.mark.parametrize(
        ('settings', 'differ'),
        [
            (Settings(), True),
            (Settings(precision='bf16-amp'), has_bfloat16()),
            (Settings(precision='bf16'), has_bfloat16()),
            (Settings(precision='fp16-amp'), False),
            (Settings(compile=True), False),
        ],
        ids=str,
    )
    def test_where_routes_differ(self, settings, differ):
        """A linear layer of LaViT, as against nn.Linear, under these settings."""
        assert routes.routes_differ(settings) == differ
        if settings.compile:
            return
        x = torch.zeros(2, 4, dtype=settings.weights)
        weight = torch.zeros(3, 4, dtype=settings.weights)
        bias = torch.zeros(3, dtype=settings.weights)
        seen = []
        for function in (F.linear, our_linear):
            with torch.profiler.profile() as profile, torch.no_grad(), settings.autocast():
                function(x, weight, bias)
            seen.append({event.name for event in profile.events()})
        assert (seen[0] != seen[1]) == differ


class TestSuites:
    @pytest.mark.slow
    def test_backbones(self):
        names = ['LaViT-S', 'ResNet-50', 'Swin-T']
        options = dict(memory=False, routes=('own', 'ours'))
        found = list(suites.backbones(names, SMALL, Settings(threads=1), 2, 1e10, **options))
        assert [c.task for c in found] == ['inference', 'training']
        for comparison in found:
            assert comparison.absent == {}
            assert {'fp32', 'eager', '1 thread'} < set(comparison.conditions.split(', '))
            assert [(row.model, row.linear) for row in comparison.rows] == [
                ('LaViT-S', 'same'),
                ('ResNet-50', 'same'),
                ('Swin-T', 'own'),
                ('Swin-T', 'ours'),
            ]
            for row in comparison.rows:
                assert len(row.seconds) == 2 and 0 < min(row.seconds) <= row.median
                assert row.params > 2e7
                assert row.floor == pytest.approx(row.gflops * 2e9 / 1e10)
                assert row.format in suites.FORMATS
                assert row.memory is None

    def test_fastvit_is_not_trained_in_nhwc(self, monkeypatch):
        """On a CPU it would take the process with it; so a model that tells stands in its place."""
        seen = []

        class Telling(nn.Conv2d):
            def forward(self, x):
                if self.training:
                    seen.append(x.is_contiguous(memory_format=torch.channels_last))
                return [super().forward(x)]

        for name in ('FastViT-SA24', 'MambaOut-T'):
            monkeypatch.setitem(models.BACKBONES, name, lambda task: Telling(3, 8, 3))
            seen.clear()
            (found,) = suites.backbones([name], SMALL[1:], Settings(), 1, 1e10, memory=False)
            assert any(seen) == (name != 'FastViT-SA24') and seen
            assert name != 'FastViT-SA24' or found.rows[0].format == 'NCHW'

    @pytest.mark.slow
    def test_memory_is_measured_once_a_model(self):
        options = dict(routes=('own', 'ours'))
        (found,) = suites.backbones(['ConvNeXt-T'], SMALL[1:], Settings(), 1, 1e10, **options)
        own, ours = found.rows
        assert own.memory > 0 and ours.memory is None

    def test_who_cannot_is_left_out_and_said_to_be(self):
        """mmdet's Swin takes no bfloat16 weights."""
        names, settings = ['LaViT-T', 'Swin-T', 'ResNet-50'], Settings(precision='bf16')
        (found,) = suites.backbones(names, SMALL[:1], settings, 1, 1e10, memory=False)
        assert [row.model for row in found.rows] == ['LaViT-T', 'ResNet-50']
        assert list(found.absent) == ['Swin-T']
        assert 'bfloat16' in found.absent['Swin-T']

    def test_every_model_gets_its_faster_format(self, monkeypatch):
        works = {
            name: BackboneWorkload(TwoConvolutions, SMALL[0], Settings()) for name in ('a', 'b')
        }
        times = iter([{'a': [1.0, 2.0], 'b': [3.0, 4.0]}, {'a': [0.9, 8.0], 'b': [3.1, 3.1]}])
        monkeypatch.setattr(suites, 'interleave', lambda *args: next(times))
        assert suites._choose_formats(works, '') == {'a': 'NHWC', 'b': 'NCHW'}
        assert not works['a'].images.is_contiguous() and works['b'].images.is_contiguous()

    def test_attention(self):
        found = list(suites.attention(Settings(), 1))
        assert [row.model for c in found for row in c.rows] == ['LA layer', 'VA layer'] * 4
        assert len({c.input for c in found}) == 4

    @pytest.mark.slow
    def test_detectors(self):
        options = dict(routes=('own', 'ours'), size=(160, 224))
        (found,) = suites.detectors(tuple(models.DETECTORS), Settings(), 1, **options)
        assert found.input == '1 x 3 x 160 x 224'
        expected = [(name, linear) for name in models.DETECTORS for linear in ('own', 'ours')]
        assert [(row.model, row.linear) for row in found.rows] == expected
        assert all(row.params > 4e7 for row in found.rows)


class Mixer(nn.Module):
    """A backbone of a convolution and, if wanted, a linear layer over channels."""

    def __init__(self, linear=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, 4)
        self.linear = nn.Linear(32, 48) if linear else nn.Identity()

    def forward(self, x):
        if x.shape[2] == 20:
            raise ValueError('20 rows are too few')
        return (self.linear(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)


@needs_exporter
class TestExported:
    @pytest.fixture(autouse=True)
    def mixers(self, monkeypatch):
        monkeypatch.setitem(models.BACKBONES, 'Mixer', lambda task: Mixer())
        monkeypatch.setitem(models.BACKBONES, 'Convolution', lambda task: Mixer(linear=False))

    def test_float_and_int8_with_each_number_of_threads(self):
        tasks = [Task('inference', (2, 3, 32, 48)), Task('training', (2, 3, 32, 48))]
        found = list(exported.exported(['Mixer', 'Convolution'], tasks, [1, 2], 3))
        conditions = [c.conditions.split(', ') for c in found]
        assert [(c[0], c[-1]) for c in conditions] == [
            ('fp32', '1 thread'),
            ('INT8', '1 thread'),
            ('fp32', '2 threads'),
            ('INT8', '2 threads'),
        ]
        for comparison in found:
            assert (comparison.images, comparison.input) == (2, '2 x 3 x 32 x 48')
            assert comparison.absent == {}
            assert [row.model for row in comparison.rows] == ['Mixer', 'Convolution']
            assert all(len(row.seconds) == 3 for row in comparison.rows)
        mixer, convolution = found[1].rows
        assert mixer.format in exported.QUANTIZED
        # It has no linear layer.
        assert convolution.format == 'linear, conv'

    def test_what_is_not_exported_is_said(self):
        tasks = [Task('inference', (1, 3, 20, 20))]
        for comparison in exported.exported(['Mixer'], tasks, [1], 1):
            assert comparison.rows == []
            assert '20 rows are too few' in comparison.absent['Mixer']

    def test_quantized_files_compute_nearly_the_same(self, tmp_path):
        print('seed 0')
        torch.manual_seed(0)
        model, file = Mixer(), tmp_path / 'mixer.onnx'
        export_onnx(model, file, (32, 48), dynamic=False, batch=2)
        x = torch.randn(2, 3, 32, 48)
        made = exported.quantize(file)
        assert set(made) == set(exported.QUANTIZED)
        for path in made.values():
            (found,) = exported.run_by_onnxruntime(path, x, 1)()
            error = (torch.from_numpy(found) - model(x)[0]).std() / model(x)[0].std()
            # Half a step of 1/127 of the largest value, of which weights and pixels are thirds.
            assert 0 < error < 0.03

    @pytest.mark.slow
    @pytest.mark.parametrize('name', ['LaViT-S', 'Swin-T', 'ResNet-50'])
    def test_can_be_exported_and_quantized(self, name, tmp_path):
        print('seed 0')
        torch.manual_seed(0)
        model, file = build(name), tmp_path / 'a.onnx'
        model.eval()
        export_onnx(model, file, (64, 96), dynamic=False, batch=2)
        x = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            expected = model(x)
        made = exported.quantize(file)
        assert ('linear' in made) == (name != 'ResNet-50')
        for path in made.values():
            for found, y in zip(exported.run_by_onnxruntime(path, x, 1)(), expected, strict=True):
                similarity = F.cosine_similarity(torch.from_numpy(found).flatten(), y.flatten(), 0)
                assert similarity > 0.95


@pytest.mark.slow
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
def comparison() -> suites.Comparison:
    ours = suites.Row('LaViT-S', [0.5, 0.4, 0.6], 'same', 'NHWC', 100.0, 22_000_000, 3.0, 0.25)
    peers = [
        suites.Row('Swin-T', [1.0, 1.0, 1.5], 'own', 'NCHW'),
        suites.Row('Swin-T', [0.8, 0.7, 0.75], 'ours', 'NHWC'),
    ]
    conditions, absent = 'fp32, eager, 2 threads', {'Hiera-T': 'ValueError: too odd'}
    return suites.Comparison('inference', '2 x 3 x 8 x 8', 2, conditions, [ours, *peers], absent)


class TestReport:
    MACHINE = {'date': '2026-01-01', 'processor': 'Abacus', 'cores': 2}

    def test_markdown(self, comparison):
        text = report.markdown(self.MACHINE, [comparison])
        assert 'processor Abacus, cores 2' in text
        assert 'fp32, eager, 2 threads' in text
        assert re.search('Hiera-T.* ValueError: too odd', text)
        assert 'Abacus' in text.splitlines()[0], 'named by the machine'
        on_gpu = report.markdown({**self.MACHINE, 'device': 'Big GPU'}, [comparison])
        assert 'Big GPU' in on_gpu.splitlines()[0]
        head, *lines = [line for line in text.splitlines() if line.startswith('|')]
        cells = [[c.strip() for c in line.split('|')[1:-1]] for line in lines[1:]]
        names = [c.strip() for c in head.split('|')[1:-1]]
        ours, swin = (dict(zip(names, row, strict=True)) for row in cells)
        assert (ours['model'], swin['model']) == ('LaViT-S', 'Swin-T')
        assert re.fullmatch(r'0\.5 \(0\.4 - 0\.6\)', ours['seconds'])
        assert float(ours['images/s']) == 4 and float(swin['images/s']) == 2
        assert (ours['time ratio'], swin['time ratio']) == ('**1.00**', '**2.00**')
        routed = 'time ratio, our linear layers'
        assert (ours[routed], swin[routed]) == ('**1.00**', '**1.50**')
        assert (ours['peak MiB'], ours['params M'], ours['GFLOPs']) == ('100', '22.0', '3.0')
        assert ours['time / floor'] == '2.00' and swin['time / floor'] == ''
        assert (ours['format'], swin['format']) == ('NHWC', 'NCHW / NHWC')

    @pytest.mark.parametrize('linear', ['own', 'ours'])
    def test_one_route_has_one_ratio(self, comparison, linear):
        comparison.rows = [r for r in comparison.rows if r.linear in ('same', linear)]
        text = report.markdown(self.MACHINE, [comparison])
        assert text.count('time ratio') == 1
        assert ('our linear layers' in text) == (linear == 'ours')

    def test_files(self, comparison, tmp_path):
        out = tmp_path / 'a' / 'b'
        files = report.write(out, self.MACHINE, [comparison, comparison])
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in files)
        saved = json.loads((out / 'results.json').read_text())
        assert saved['machine'] == self.MACHINE
        for found in saved['comparisons']:
            assert [row['seconds'] for row in found['rows']] == [r.seconds for r in comparison.rows]
            assert found['absent'] == comparison.absent
        assert cv2.imread(str(out / 'speed.png')) is not None

    def test_plot_shows_relative_speed(self, comparison, tmp_path, monkeypatch):
        import matplotlib.pyplot as plt

        figures = []
        monkeypatch.setattr(plt, 'close', figures.append)
        report.draw(self.MACHINE, [comparison], tmp_path / 's.png')
        (panel,) = figures[0].axes
        assert [bar.get_width() for bar in panel.patches] == [1.0, 0.5, pytest.approx(2 / 3)]

    def test_nothing_measured(self, comparison, tmp_path):
        comparison.rows = []
        report.write(tmp_path, self.MACHINE, [comparison])
        assert 'too odd' in (tmp_path / 'README.md').read_text()


@pytest.mark.parametrize(
    'precisions',
    [pytest.param(p, marks=pytest.mark.slow) for p in (['fp32'], ['fp32', 'bf16-amp', 'bf16'])],
)
def test_the_command(tmp_path, precisions):
    command = [sys.executable, REPOSITORY / 'tools' / 'benchmark.py', '--rounds', '1']
    command += ['--suites', 'backbones', '--models', 'LaViT-T', 'ConvNeXt-T', '--no-memory']
    command += ['--inference', '1x64x64', '--training', '--out', 'out', '--linear', 'both']
    command += ['--precision', *precisions, '--threads', '1', '2']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '| LaViT-T |' in done.stdout and '| ConvNeXt-T |' in done.stdout
    found = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert found['machine']['rounds'] == 1
    threads = ['1 thread'] * len(precisions) + ['2 threads'] * len(precisions)
    expected = [[p, 'eager', t] for p, t in zip(precisions * 2, threads, strict=True)]
    assert [c['conditions'].split(', ')[:3] for c in found['comparisons']] == expected
    # Where all take one route, the peer has one row.
    differ = {p: routes.routes_differ(Settings(precision=p)) for p in precisions}
    rows = [2 + differ[precision] for precision in precisions * 2]
    assert [len(c['rows']) for c in found['comparisons']] == rows
