"""The comparisons: backbones, one attention layer against the other, whole detectors."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmlavit.compat import repair_config_bases, repair_torchvision
from mmlavit.models.arch import Arch
from mmlavit.models.attention import LessAttention, VanillaAttention
from mmlavit.models.lavit import LaViT
from mmlavit.models.windows import WindowGrid

from .memory import peak_memory
from .models import BACKBONES, DETECTORS, TRAINED_IN_NCHW, build
from .routes import ROUTES, has_linear_layers
from .timing import interleave
from .workload import BackboneWorkload, Settings, Task

FORMATS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}


@dataclass
class Row:
    """What was measured of one model.

    Args:
        model: Name of the model.
        seconds: Of every round.
        linear: The route of its linear layers: its ``'own'``, LaViT's, which is ``'ours'``, or
            ``'same'`` where the two are one.
        format: Memory format of model and images, or how it was quantized: the faster of two, or
            the only one that there is.
        memory: MiB that a step adds, or None where that was not measured.
        params: Parameters, or None where they do not matter.
        gflops: 1e9 multiplications with their additions in a step, or None.
        floor: Seconds that these take at the machine's rate of products, or None.
    """

    model: str
    seconds: list[float] = field(repr=False)
    linear: str = 'same'
    format: str = 'NCHW'
    memory: float | None = None
    params: int | None = None
    gflops: float | None = None
    floor: float | None = None

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


@dataclass
class Comparison:
    """Models that took turns.

    Args:
        task: What a step does.
        input: Its input, in words.
        images: Images of a step.
        conditions: How it was computed, in words.
        rows: What was measured; the first row is what the others are held against.
        absent: Name of a model that could not be measured, and why.
    """

    task: str
    input: str
    images: int
    conditions: str
    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)


def backbones(
    names: Sequence[str],
    tasks: Sequence[Task],
    settings: Settings,
    rounds: int,
    rate: float,
    memory: bool = True,
    routes: Sequence[str] = ('own',),
) -> Iterator[Comparison]:
    """Compare backbones.

    Args:
        names: Of :data:`~repository.benchmark.models.BACKBONES`.
        tasks: What to time.
        settings: How it is computed.
        rounds: Rounds of each task.
        rate: Floating-point operations a second, for the floor.
        memory: Whether to measure memory too; with ``torch.compile`` on a CPU it is not.
        routes: Of :data:`~repository.benchmark.routes.ROUTES`, for the linear layers of peers.

    Yields:
        The comparison of each task, as soon as it is there.
    """
    # What compiling takes would be counted, too.
    memory = memory and not (settings.compile and settings.device == 'cpu')
    for task in tasks:
        shape = ' x '.join(map(str, task.shape))
        flops, absent = _count_all(names, task, settings)
        with fresh_compiler(settings):
            works = _build(flops, task, settings, routes, absent)
            formats = _choose_formats(works, f'{task.name} {shape}: formats')
            steps = {key: work.step for key, work in works.items()}
            seconds = interleave(steps, rounds, settings.device, f'{task.name} {shape}')
        params = {key: sum(p.numel() for p in w.model.parameters()) for key, w in works.items()}
        works.clear()
        steps.clear()
        gc.collect()
        rows: list[Row] = []
        for key, times in seconds.items():
            name, linear = key
            row = Row(name, times, linear, formats[key], None, params[key])
            row.gflops, row.floor = flops[name] / 2e9, flops[name] / rate
            if memory and not any(other.model == name for other in rows):
                row.memory = peak_memory(
                    partial(build, name), task, settings, FORMATS[formats[key]], linear
                )
            rows.append(row)
        conditions = f'{settings}, products at {rate / 1e9:.0f} GFLOP/s'
        yield Comparison(task.name, shape, task.shape[0], conditions, rows, absent)


def _count_all(
    names: Sequence[str], task: Task, settings: Settings
) -> tuple[dict[str, int], dict[str, str]]:
    """Operations of the models that can do a task, and why the others cannot."""
    flops, absent = {}, {}
    for name in names:
        try:
            flops[name] = count_flops(BACKBONES[name], task, settings.weights)
        except Exception as error:  # of whatever kind somebody else's model raises
            absent[name] = in_one_line(error)
    return flops, absent


def _build(
    names: Iterable[str],
    task: Task,
    settings: Settings,
    routes: Sequence[str],
    absent: dict[str, str],
) -> dict[tuple[str, str], BackboneWorkload]:
    """What takes turns, by model and route; whoever fails at a first step is noted as absent."""
    # Inductor puts whatever convolves into NHWC on a CPU, and compiling takes minutes.
    memory_format = FORMATS['NHWC' if _is_always_nhwc(settings) else 'NCHW']
    works = {}
    for name in names:
        model = BACKBONES[name](task)
        one_way = isinstance(model, LaViT) or not has_linear_layers(model)
        for linear in ('same',) if one_way else routes:
            work = BackboneWorkload(BACKBONES[name], task, settings, memory_format, ROUTES[linear])
            try:
                work.step()
            except Exception as error:  # of whatever kind somebody else's model raises
                absent[name] = in_one_line(error)
                break
            works[name, linear] = work
    return works


def _takes(label: str, name: str, work: BackboneWorkload) -> bool:
    crashes = name in TRAINED_IN_NCHW and work.settings.device == 'cpu'
    return label == 'NCHW' or work.task.name != 'training' or not crashes


def _is_always_nhwc(settings: Settings) -> bool:
    return settings.compile and settings.device == 'cpu'


def in_one_line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters, by its first words."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'[:200]


def fresh_compiler(settings: Settings) -> AbstractContextManager:
    """The compiler as it is in a new process, and one that never gives up without a word.

    Models of one class share compiled code. After eight variants of it torch.compile runs the next
    uncompiled, and compiled code is for as many threads as there were.
    """
    if not settings.compile:
        return nullcontext()
    torch.compiler.reset()
    return torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)


def _choose_formats(
    works: Mapping[tuple[str, str], BackboneWorkload], description: str
) -> dict[tuple[str, str], str]:
    """Put every model in the memory format in which it is faster, and tell which that is."""
    if not works:
        return {}
    settings = next(iter(works.values())).settings
    if _is_always_nhwc(settings):
        return dict.fromkeys(works, 'NHWC')
    found: dict[tuple[str, str], dict[str, float]] = {key: {} for key in works}
    for label, memory_format in FORMATS.items():
        able = {key: work for key, work in works.items() if _takes(label, key[0], work)}
        for work in able.values():
            work.use(memory_format)
        steps = {key: work.step for key, work in able.items()}
        seconds = interleave(steps, 2, settings.device, f'{description} {label}')
        for key in able:
            found[key][label] = min(seconds[key])
    best = {key: min(times, key=times.__getitem__) for key, times in found.items()}
    for key, work in works.items():
        work.use(FORMATS[best[key]])
    return best


def count_flops(
    build: Callable[[Task], nn.Module], task: Task, dtype: torch.dtype = torch.float32
) -> int:
    """Floating-point operations of a step in products and convolutions, as PyTorch counts them.

    Args:
        build: Makes the backbone.
        task: What a step does.
        dtype: Of weights and images.

    Returns:
        Operations; a multiplication and an addition count as two. A backward pass counts as two
        forward passes: PyTorch's own count of it is far too high for depthwise convolutions.
    """
    model = build(task).to('meta', dtype)
    model.eval()
    trains = task.name == 'training'
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        model(torch.empty(task.shape, dtype=dtype, device='meta'))
    return counter.get_total_flops() * (3 if trains else 1)


def attention(settings: Settings, rounds: int) -> Iterator[Comparison]:
    """Compare one less-attention layer's attention with a vanilla one's, as LaViT-S has them.

    Args:
        settings: How it is computed, but never compiled.
        rounds: Rounds of each stage.

    Yields:
        The comparison of each stage, at the size it has on an image of 800 x 1280.
    """
    settings = replace(settings, compile=False)
    arch, window = Arch.of('small'), 8
    options = dict(device=settings.device, dtype=settings.weights)
    for m in range(4):
        dims, heads = arch.embed_dims[m], arch.num_heads[m]
        grid = WindowGrid(800 >> (m + 2), 1280 >> (m + 2), window)
        torch.manual_seed(0)
        x = torch.randn(1, grid.height, grid.width, dims, **options)
        scores = torch.randn(grid.rows * grid.cols, heads, window**2, window**2, **options)
        vanilla = VanillaAttention(dims, heads).to(**options).eval()
        less = LessAttention(dims, heads, window).to(**options).eval()
        nn.init.normal_(less.psi, std=0.1)
        nn.init.normal_(less.theta, std=0.1)
        steps = {
            'LA layer': _inference(settings, less, x, grid, scores),
            'VA layer': _inference(settings, vanilla, x, grid, None),
        }
        if settings.device == 'cuda':
            unfused = LessAttention(dims, heads, window, fused=False).to(**options).eval()
            unfused.load_state_dict(less.state_dict())
            steps['LA layer, unfused'] = _inference(settings, unfused, x, grid, scores)
        name = f'stage {m + 1} of 800 x 1280'
        seconds = interleave(steps, rounds, settings.device, f'attention, {name}')
        rows = [Row(model, times, format='NHWC') for model, times in seconds.items()]
        yield Comparison('attention', name, 1, str(settings), rows)


def _inference(
    settings: Settings, module: Callable, *args: object, linear: str = 'own'
) -> Callable[[], None]:
    def step() -> None:
        with ROUTES[linear](), torch.no_grad(), settings.autocast():
            module(*args)

    return step


def detectors(
    names: Sequence[str],
    settings: Settings,
    rounds: int,
    routes: Sequence[str] = ('own',),
    size: tuple[int, int] = (800, 1280),
) -> Iterator[Comparison]:
    """Compare whole detectors through mmdet: images in, detections out.

    Fresh weights find next to nothing (4 instances at most when tried), so the mask heads, which
    are alike in all of them, have next to nothing to do.

    Args:
        names: Of :data:`~repository.benchmark.models.DETECTORS`.
        settings: How it is computed, but never compiled.
        rounds: Rounds.
        routes: Of :data:`~repository.benchmark.routes.ROUTES`, for the linear layers of all, since
            all have some in their heads, which are mmdet's.
        size: Height and width of the image, in pixels.

    Yields:
        The comparison, once.
    """
    repair_torchvision()
    repair_config_bases()
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    settings = replace(settings, compile=False)
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    sample = DetDataSample(metainfo=dict.fromkeys(shapes, size) | dict(scale_factor=(1.0, 1.0)))
    torch.manual_seed(0)
    options = dict(device=settings.device, dtype=settings.weights)
    image = torch.randn(1, 3, *size, **options)
    steps, params, absent = {}, {}, {}
    for name in names:
        cfg = Config.fromstring(f"_base_ = '{DETECTORS[name]}'", '.py')
        cfg.model.backbone.init_cfg = None
        model = MODELS.build(cfg.model).to(**options).eval()
        params[name] = sum(p.numel() for p in model.parameters())
        try:
            _inference(settings, model.predict, image, [sample])()
        except (NotImplementedError, RuntimeError) as error:  # types that an operator lacks
            absent[name] = in_one_line(error)
            continue
        for linear in routes:
            steps[name, linear] = _inference(
                settings, model.predict, image, [sample], linear=linear
            )
    seconds = interleave(steps, rounds, settings.device, 'detectors')
    rows = [Row(n, t, linear, params=params[n]) for (n, linear), t in seconds.items()]
    shape = ' x '.join(map(str, image.shape))
    yield Comparison('detection', shape, 1, str(settings), rows, absent)
