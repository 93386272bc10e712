"""The comparisons: backbones, one attention layer against the other, whole detectors."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmlavit.compat import repair_config_bases, repair_torchvision
from mmlavit.models.arch import Arch
from mmlavit.models.attention import LessAttention, VanillaAttention
from mmlavit.models.windows import WindowGrid

from .memory import peak_memory
from .models import BACKBONES, DETECTORS, build
from .timing import interleave
from .workload import BackboneWorkload, Settings, Task

FORMATS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}


@dataclass
class Row:
    """What was measured of one model at one task.

    Args:
        task: What a step does.
        input: Its input, in words.
        images: Images of a step.
        model: Name of the model.
        seconds: Of every round.
        memory_format: Of model and images: the faster of two, or the only one that there is.
        memory: MiB that a step adds, or None where that was not measured.
        params: Parameters, or None where they do not matter.
        gflops: 1e9 multiplications with their additions in a step, or None.
        floor: Seconds that these take at the machine's rate of products, or None.
    """

    task: str
    input: str
    images: int
    model: str
    seconds: list[float] = field(repr=False)
    memory_format: str = 'NCHW'
    memory: float | None = None
    params: int | None = None
    gflops: float | None = None
    floor: float | None = None

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def backbones(
    names: Sequence[str],
    tasks: Sequence[Task],
    settings: Settings,
    rounds: int,
    rate: float,
    memory: bool = True,
) -> Iterator[list[Row]]:
    """Compare backbones.

    Args:
        names: Of :data:`~repository.benchmark.models.BACKBONES`.
        tasks: What to time.
        settings: How it is computed.
        rounds: Rounds of each task.
        rate: Floating-point operations a second, for the floor.
        memory: Whether to measure memory too.

    Yields:
        The rows of each task, as soon as they are there.
    """
    for task in tasks:
        shape = ' x '.join(map(str, task.shape))
        works = {name: BackboneWorkload(BACKBONES[name], task, settings) for name in names}
        formats = _choose_formats(works, f'{task.name} {shape}: formats')
        steps = {name: work.step for name, work in works.items()}
        seconds = interleave(steps, rounds, settings.device, f'{task.name} {shape}')
        params = {name: sum(p.numel() for p in w.model.parameters()) for name, w in works.items()}
        del works, steps
        gc.collect()
        rows = []
        for name in names:
            flops = count_flops(BACKBONES[name], task)
            row = Row(task.name, shape, task.shape[0], name, seconds[name], formats[name])
            row.params, row.gflops, row.floor = params[name], flops / 2e9, flops / rate
            if memory:
                row.memory = peak_memory(
                    partial(build, name), task, settings, FORMATS[formats[name]]
                )
            rows.append(row)
        yield rows


def _choose_formats(works: dict[str, BackboneWorkload], description: str) -> dict[str, str]:
    """Put every model in the memory format in which it is faster, and tell which that is."""
    found: dict[str, dict[str, float]] = {name: {} for name in works}
    for label, memory_format in FORMATS.items():
        for work in works.values():
            work.use(memory_format)
        device = next(iter(works.values())).settings.device
        steps = {name: work.step for name, work in works.items()}
        seconds = interleave(steps, 2, device, f'{description} {label}')
        for name in works:
            found[name][label] = min(seconds[name])
    best = {name: min(times, key=times.get) for name, times in found.items()}
    for name, work in works.items():
        work.use(FORMATS[best[name]])
    return best


def count_flops(build: Callable[[], nn.Module], task: Task) -> int:
    """Floating-point operations of a step in products and convolutions, as PyTorch counts them.

    Args:
        build: Makes the backbone.
        task: What a step does.

    Returns:
        Operations; a multiplication and an addition count as two. A backward pass counts as two
        forward passes: PyTorch's own count of it is far too high for depthwise convolutions.
    """
    model = build().to('meta')
    model.eval()
    trains = task.name == 'training'
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        model(torch.empty(task.shape, device='meta'))
    return counter.get_total_flops() * (3 if trains else 1)


def attention(settings: Settings, rounds: int) -> Iterator[list[Row]]:
    """Compare one less-attention layer's attention with a vanilla one's, as LaViT-S has them.

    Args:
        settings: How it is computed.
        rounds: Rounds of each stage.

    Yields:
        The rows of each stage, at the size it has on an image of 800 x 1280.
    """
    arch, window = Arch.of('small'), 8
    for m in range(4):
        dims, heads = arch.embed_dims[m], arch.num_heads[m]
        grid = WindowGrid(800 >> (m + 2), 1280 >> (m + 2), window)
        torch.manual_seed(0)
        x = torch.randn(1, grid.height, grid.width, dims, device=settings.device)
        scores = torch.randn(grid.rows * grid.cols, heads, window**2, window**2)
        scores = scores.to(settings.device)
        vanilla = VanillaAttention(dims, heads).to(settings.device).eval()
        less = LessAttention(dims, heads, window).to(settings.device).eval()
        nn.init.normal_(less.psi, std=0.1)
        nn.init.normal_(less.theta, std=0.1)
        steps = {
            'LA layer': _inference(settings, less, x, grid, scores),
            'VA layer': _inference(settings, vanilla, x, grid, None),
        }
        if settings.device == 'cuda':
            unfused = LessAttention(dims, heads, window, fused=False).to(settings.device).eval()
            unfused.load_state_dict(less.state_dict())
            steps['LA layer, unfused'] = _inference(settings, unfused, x, grid, scores)
        name = f'stage {m + 1} of 800 x 1280'
        seconds = interleave(steps, rounds, settings.device, f'attention, {name}')
        yield [Row('attention', name, 1, n, s, 'NHWC') for n, s in seconds.items()]


def _inference(settings: Settings, module: nn.Module, *args: object) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad(), settings.autocast():
            module(*args)

    return step


def detectors(names: Sequence[str], settings: Settings, rounds: int) -> Iterator[list[Row]]:
    """Compare whole detectors through mmdet: images in, detections out.

    Fresh weights find next to nothing (4 instances at most when tried), so the mask heads, which
    are alike in all of them, have next to nothing to do.

    Args:
        names: Of :data:`~repository.benchmark.models.DETECTORS`.
        settings: How it is computed.
        rounds: Rounds.

    Yields:
        The rows, once.
    """
    repair_torchvision()
    repair_config_bases()
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    height, width = 800, 1280
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(height, width),
            ori_shape=(height, width),
            pad_shape=(height, width),
            batch_input_shape=(height, width),
            scale_factor=(1.0, 1.0),
        )
    )
    torch.manual_seed(0)
    image = torch.randn(1, 3, height, width, device=settings.device)
    steps, params = {}, {}
    for name in names:
        cfg = Config.fromstring(f"_base_ = '{DETECTORS[name]}'", '.py')
        cfg.model.backbone.init_cfg = None
        model = MODELS.build(cfg.model).to(settings.device).eval()
        steps[name] = _inference(settings, model.predict, image, [sample])
        params[name] = sum(p.numel() for p in model.parameters())
    seconds = interleave(steps, rounds, settings.device, 'detectors')
    yield [
        Row('detection', f'1 x 3 x {height} x {width}', 1, n, seconds[n], params=params[n])
        for n in names
    ]
