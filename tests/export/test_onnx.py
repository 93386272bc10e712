"""Exported: ONNX files for images of any size, torch.export, TorchScript, copies and pickles."""

import copy
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, assert_ran, run_tool, the_one_line
from small import ARCH, images, needs_exporter, seeded, sharpen, small_lavit
from torch import Tensor, nn

from mmlavit.models.windows import WindowGrid

# The least that has both attentions and the stair between stages.
TWO_STAGES = dict(
    arch={**ARCH, 'depths': (2, 1, 1, 1), 'vanilla_depths': (1, 1, 1, 1)}, out_indices=(0, 1)
)

OPTIONS = dict(conv_stem=True, overlap_downsample=True, mix_ffn=True)


class Tiny(nn.Module):
    """A backbone of one map that exports fast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.conv(x),)


class Wrong(Tiny):
    """Adds chance that a recording takes for a constant."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.conv(x) + x.new_ones(1).mul_(random.random()),)


def run(file: Path, x: Tensor) -> list[Tensor]:
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(y) for y in session.run(None, {'image': x.numpy()})]


def assert_close(found: object, expected: object, tol: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@needs_exporter
def test_file_is_for_all_sizes_and_replaced_only_by_force(tmp_path: Path) -> None:
    from mmlavit.export.onnx import export_onnx

    model, file = Tiny().train(), tmp_path / 'tiny.onnx'
    differences = export_onnx(model, file, (20, 30))
    assert model.training
    assert len(differences) == 5
    x = torch.randn(5, 4, 41, 17, generator=seeded(0))
    assert_close(run(file, x), model(x), 1e-5)

    before = file.read_bytes()
    other = Tiny()
    with pytest.raises(FileExistsError, match=r'tiny\.onnx is there already'):
        export_onnx(other, file)
    assert file.read_bytes() == before
    export_onnx(other, file, (20, 30), dynamic=False, force=True)
    x = torch.randn(1, 4, 20, 30, generator=seeded(1))
    assert_close(run(file, x), other(x), 1e-5)
    export_onnx(other, file, (20, 30), dynamic=False, batch=3, force=True)
    x = torch.randn(3, 4, 20, 30, generator=seeded(1))
    assert_close(run(file, x), other(x), 1e-5)
    assert list(tmp_path.iterdir()) == [file]


@needs_exporter
def test_wrong_file_is_not_kept(tmp_path: Path) -> None:
    from mmlavit.export.onnx import ExportError, export_onnx

    file = tmp_path / 'wrong.onnx'
    file.write_text('precious')
    with pytest.raises(ExportError, match='onnxruntime and PyTorch differ by .* on images of'):
        export_onnx(Wrong(), file, (20, 30), force=True)
    assert file.read_text() == 'precious'
    assert list(tmp_path.iterdir()) == [file]


class OneSize(Tiny):
    """Refuses other sizes."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if x.shape[2] != 20:
            raise ValueError('20 rows')
        return super().forward(x)


@needs_exporter
def test_what_cannot_be_exported_says_so_in_one_line(tmp_path: Path) -> None:
    from mmlavit.export.onnx import ExportError, export_onnx

    with pytest.raises(ExportError, match='cannot export OneSize for images of any size') as error:
        export_onnx(OneSize(), tmp_path / 'a.onnx', (20, 30))
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


@needs_exporter
@pytest.mark.parametrize(
    ('name', 'options', 'kind', 'message'),
    [
        ('a.onnx', dict(size=(0, 5)), ValueError, 'size must be a height and a width'),
        ('a.onnx', dict(opset=9), ValueError, 'opset must be at least 18, .* got 9'),
        ('a.onnx', dict(batch=0), ValueError, 'batch must be at least 1, got 0'),
        ('missing/a.onnx', dict(), FileNotFoundError, 'missing is no folder'),
        ('.', dict(force=True), FileExistsError, 'is a folder; name a file'),
    ],
)
def test_bad_arguments(
    tmp_path: Path, name: str, options: dict, kind: type[Exception], message: str
) -> None:
    from mmlavit.export.onnx import export_onnx

    with pytest.raises(kind, match=message):
        export_onnx(Tiny(), tmp_path / name, **options)


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlavit.export import onnx as export

    monkeypatch.setattr(torch.export, 'Dim', SimpleNamespace(DYNAMIC=None), raising=False)
    monkeypatch.setattr(export, 'PACKAGES', ('torch', 'no_such_package'))
    with pytest.raises(
        export.ExportError, match=r'^no_such_package not installed.*pip install no_such_package'
    ):
        export.require_exporter()


@pytest.mark.parametrize('dim', [object(), None])
def test_on_a_torch_without_the_exporter(monkeypatch: pytest.MonkeyPatch, dim: object) -> None:
    from mmlavit.export import onnx as export

    monkeypatch.setattr(torch.export, 'Dim', dim, raising=False)
    with pytest.raises(export.ExportError, match='it needs at least torch 2.6'):
        export.require_exporter()


class Nest(nn.Module):
    """The placement of maps in the next stage's windows, for token grids of any size."""

    def forward(self, blocks: Tensor, prev: Tensor, grid: Tensor) -> Tensor:
        # The second and third tensor stand for their sizes.
        return WindowGrid(*grid.shape, 4).nest(blocks, WindowGrid(*prev.shape, 4))


def test_stair_when_recorded_is_the_same() -> None:
    """Without copying into slices, which would tell one window from more."""
    for height, width in ((9, 30), (8, 8), (3, 2)):
        prev, grid = torch.zeros(height, width), torch.zeros((height + 1) // 2, (width + 1) // 2)
        windows = 2 * (-(-height // 4)) * (-(-width // 4))
        blocks = torch.randn(windows, 3, 4, 4, generator=seeded(height))
        expected = Nest()(blocks, prev, grid)
        traced = torch.jit.trace(Nest(), (blocks, prev, grid), check_trace=False)
        torch.testing.assert_close(traced(blocks, prev, grid), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # that sizes become constants
@pytest.mark.parametrize('options', [{}, OPTIONS], ids=' and '.join)
def test_fixed_trace(options: dict[str, bool]) -> None:
    """A size that no window divides."""
    model = sharpen(small_lavit(**TWO_STAGES, **options), images(2, 3, 37, 50))
    x, other = torch.randn(2, 2, 3, 37, 50, generator=seeded(0), dtype=torch.float64)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        assert_close(torch.jit.load(buffer)(other), model(other), 1e-10)


@needs_exporter
@pytest.mark.parametrize('options', [{}, OPTIONS], ids=' and '.join)
def test_fixed_torch_export(options: dict[str, bool]) -> None:
    model = sharpen(small_lavit(**TWO_STAGES, **options), images(2, 3, 37, 50))
    x, other = torch.randn(2, 2, 3, 37, 50, generator=seeded(0), dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert_close(program.module()(other), model(other), 1e-10)


@pytest.mark.slow
@needs_exporter
def test_torch_export_of_many_sizes(tmp_path: Path) -> None:
    """Of more than one window in each stage, which is what PyTorch takes an example to mean."""
    model = small_lavit(**TWO_STAGES, window_sizes=(4, 4, 4, 4))
    sharpen(model, images(2, 3, 70, 100))
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.zeros(2, 3, 70, 100).double(),), dynamic_shapes=(dims,)
        )
        torch.export.save(program, tmp_path / 'model.pt2')
        module = torch.export.load(tmp_path / 'model.pt2').module()
        for shape in ((2, 3, 64, 64), (3, 3, 33, 201), (5, 3, 150, 47)):
            x = torch.randn(shape, generator=seeded(0), dtype=torch.float64)
            assert_close(module(x), model(x), 1e-10)


@pytest.mark.slow
@needs_exporter
def test_the_options_at_other_sizes(tmp_path: Path) -> None:
    from mmlavit.export.onnx import export_onnx

    model = small_lavit(**TWO_STAGES, **OPTIONS, window_sizes=(4, 4, 4, 4))
    model = sharpen(model, images(2, 3, 70, 100)).float()
    file = tmp_path / 'options.onnx'
    export_onnx(model, file, (70, 100))
    for shape in ((1, 3, 1, 1), (2, 3, 32, 64), (3, 3, 33, 203), (1, 3, 150, 46)):
        x = torch.randn(shape, generator=seeded(0))
        with torch.no_grad():
            assert_close(run(file, x), model(x), 1e-4)


@pytest.mark.slow
@needs_exporter
def test_twenty_sizes(tmp_path: Path) -> None:
    """By the command line, with all four stages; sizes that need padding and a single pixel."""
    config = tmp_path / 'config.py'
    arch = {**ARCH, 'depths': (2, 1, 1, 1), 'vanilla_depths': (1, 1, 1, 1)}
    windows = (4, 6, 6, 3)  # which nest 3 times, twice and once
    config.write_text(
        f'_base_ = {str(ROOT / "configs" / "maskrcnn_lavit_n_shapes.py")!r}\n'
        f'model = dict(backbone=dict(arch=dict(_delete_=True, **{arch}), window_sizes={windows}))\n'
    )
    model = sharpen(small_lavit(arch=arch, window_sizes=windows), images(2, 3, 150, 250)).float()
    weights = {f'backbone.{name}': weight for name, weight in model.state_dict().items()}
    torch.save({'state_dict': {**weights, 'neck.other': torch.ones(1)}}, tmp_path / 'model.pth')
    file = tmp_path / 'model.onnx'
    command = ('export.py', config, tmp_path / 'model.pth', '--out', file)
    result = run_tool(*command, cwd=tmp_path, HOME=str(tmp_path))
    assert_ran(result)
    assert result.stdout.count('differs from PyTorch by') == 5
    # Telemetry, which onnxruntime switches on by itself, would leave an identifier here.
    assert not (tmp_path / '.cache' / 'Microsoft').exists()
    again = run_tool(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert 'is there already' in the_one_line(again.stderr)

    seed = random.randrange(2**32)
    generator = seeded(seed)
    sizes = [(1, 1, 1), (2, 32, 256), (1, 257, 31)]
    while len(sizes) < 20:
        batch = torch.randint(1, 4, (1,), generator=generator)
        sizes.append((*batch.tolist(), *torch.randint(1, 600, (2,), generator=generator).tolist()))
    worst = 0.0
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width, generator=generator)
        with torch.no_grad():
            found, expected = run(file, x), model(x)
        assert_close(found, expected, 1e-4)
        worst = max(
            worst, *((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        )
    print(f'largest difference {worst:.1e}')


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_state_dict(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = small_lavit(seed=5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize(
    ('duplicate', 'hooked'),
    [
        (by_deepcopy, False),
        (by_deepcopy, True),
        (by_pickle, False),
        (by_pickle, True),
        (by_state_dict, False),  # which holds no hooks
    ],
)
def test_round_trips_of_a_used_model(
    duplicate: Callable[[nn.Module], nn.Module], hooked: bool
) -> None:
    """A copy computes the same, has the same hooks, and shares nothing."""
    model = small_lavit()
    generator = seeded(3)
    if hooked:
        model.stages[1].blocks[0].norm1.register_forward_hook(double)
        model.stages[0].blocks[1].attn.proj.register_forward_hook(double)
    for size in ((40, 50), (64, 64)):  # used, in training and in inference
        x = torch.randn(1, 3, *size, generator=generator, dtype=torch.float64)
        sum(y.sum() for y in model.train()(x)).backward()
        with torch.no_grad():
            expected = model.eval()(x)
    other = duplicate(model).eval()
    with torch.no_grad():
        assert_close(other(x), expected, 0)
        for parameter in other.parameters():
            parameter.zero_()
        assert_close(model(x), expected, 0)
