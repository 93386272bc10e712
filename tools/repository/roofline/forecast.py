"""From what is counted to the times that it implies, and their table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..benchmark.models import BACKBONES
from ..benchmark.workload import Task
from .counter import Launch, OperatorCounter
from .gpu import (
    cuda_rules,
    less_attention_backward_flops,
    less_attention_flops,
    triton_kernel,
    without_values,
)


@dataclass(frozen=True)
class GPU:
    """A GPU, as the data sheet of its maker has it.

    Args:
        name: Which.
        bandwidth: Of its memory, bytes a second.
        flops: Operations a second in matrix products of float16 and bfloat16, nothing sparse.
    """

    name: str
    bandwidth: float
    flops: float

    def seconds(self, launch: Launch) -> float:
        """The least an operator takes: its bytes or its products, whichever take longer."""
        if launch.flops and launch.dtype not in HALVES.values():
            raise ValueError(f'{launch.name} is a product of {launch.dtype}, not of a half type')
        bytes_ = launch.read + launch.written
        return max(bytes_ / self.bandwidth, launch.flops / self.flops)


#: SXM, 80 GB each. NVIDIA's data sheets: "A100 Tensor Core GPU" (2,039 GB/s, 312 TFLOPS) and "H100
#: Tensor Core GPU" (3.35 TB/s, 1,979 TFLOPS with sparsity, which is half without).
GPUS = (GPU('A100', 2.039e12, 312e12), GPU('H100', 3.35e12, 989e12))
#: Seconds from one kernel to the next when PyTorch launches them one by one: assumed, not measured.
LAUNCH = 5e-6

#: What autocast computes in.
HALVES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
#: Name in the table and what it is: a backbone, and whether its less attention is one kernel.
MODELS: dict[str, tuple[str, bool]] = {
    'LaViT-S': ('LaViT-S', True),
    'LaViT-S without the kernel': ('LaViT-S', False),
    **{name: (name, False) for name in ('Swin-T', 'PVTv2-B2', 'ResNet-50', 'ConvNeXt-T')},
}
TASKS = tuple(
    Task(name, shape)
    for name, shapes in {
        'inference': ((1, 3, 800, 1280), (1, 3, 224, 224), (64, 3, 224, 224)),
        'training': ((2, 3, 800, 1280), (64, 3, 224, 224)),
    }.items()
    for shape in shapes
)
_MARKS = '<!-- forecast -->', '<!-- end of forecast -->'


@dataclass(frozen=True)
class Row:
    """What a step takes, for each of its images.

    Args:
        read: Bytes.
        written: Bytes.
        flops: Operations in products and convolutions.
        kernels: Operators that are no views.
        seconds: At least, on each of :data:`GPUS`.
    """

    read: float
    written: float
    flops: float
    kernels: float
    seconds: tuple[float, ...]

    @property
    def launches(self) -> float:
        """Seconds in which kernels are launched one by one."""
        return self.kernels * LAUNCH


def count(
    build: Callable[[Task], nn.Module], task: Task, dtype: torch.dtype, kernel: bool = False
) -> list[Launch]:
    """Count the operators of a step under autocast.

    Args:
        build: Makes the backbone for a task; it returns a sequence of maps.
        task: What a step does.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        kernel: Whether a LaViT's less attention is one operator.

    Returns:
        All that is launched, in order.
    """
    model = build(task)
    trains = task.name == 'training'
    model.train(trains)
    counter = OperatorCounter(
        {
            'mmlavit.less_attention': less_attention_flops,
            'mmlavit.less_attention_backward': less_attention_backward_flops,
        }
    )
    one_kernel = triton_kernel() if kernel else nullcontext()
    with cuda_rules(), one_kernel, without_values(model), torch.set_grad_enabled(trains):
        images = torch.empty(task.shape)
        with counter:
            with torch.autocast('cpu', dtype):
                maps = model(images)
            if trains:
                sum(map(_mean, maps)).backward()
    return counter.launches


def _mean(x: Tensor) -> Tensor:
    return x.float().mean()


def row(launches: Sequence[Launch], images: int) -> Row:
    """Add operators up.

    Args:
        launches: Of a step.
        images: How many it has.
    """
    return Row(
        sum(launch.read for launch in launches) / images,
        sum(launch.written for launch in launches) / images,
        sum(launch.flops for launch in launches) / images,
        len(launches) / images,
        tuple(sum(map(gpu.seconds, launches)) / images for gpu in GPUS),
    )


def tables(tasks: Sequence[Task] = TASKS, names: Sequence[str] = tuple(MODELS)) -> Iterator[str]:
    """Markdown, line by line: a table for each task.

    Args:
        tasks: What to count.
        names: Of :data:`MODELS`.
    """
    for task in tasks:
        batch, _, height, width = task.shape
        yield f'**{task.name.capitalize()}, {batch} x {height} x {width}, for each image**'
        yield ''
        times = ' | '.join(f'{gpu.name}, ms' for gpu in GPUS)
        yield f'| | type | MB read | MB written | GFLOPs | {times} | kernels | launches, ms |'
        yield '|---' * (7 + len(GPUS)) + '|'
        for name in names:
            found: dict[Row, list[str]] = {}
            for label, dtype in sorted(HALVES.items(), reverse=True):
                build, kernel = BACKBONES[MODELS[name][0]], MODELS[name][1]
                key = row(count(build, task, dtype, kernel), batch)
                found.setdefault(key, []).append(label)
            for r, labels in found.items():
                cells = [name, ', '.join(labels), f'{r.read / 1e6:.1f}', f'{r.written / 1e6:.1f}']
                cells += [f'{r.flops / 2e9:.2f}', *(f'{1e3 * s:.3f}' for s in r.seconds)]
                cells += [f'{r.kernels:.4g}', f'{1e3 * r.launches:.3g}']
                yield f'| {" | ".join(cells)} |'
        yield ''


def fill_in(page: str, text: str) -> str:
    """Put the tables into a page.

    Args:
        page: Markdown with a line ``<!-- forecast -->`` and later ``<!-- end of forecast -->``.
        text: What comes between them.

    Raises:
        ValueError: If the lines are not there.
    """
    start, end = _MARKS
    if not re.search(f'{start}\n(.*?){end}', page, re.DOTALL):
        raise ValueError(f'the page must have a line {start} and, after it, a line {end}')
    before, rest = page.split(start, 1)
    return f'{before}{start}\n\n{text.strip()}\n\n{end}{rest.split(end, 1)[1]}'
