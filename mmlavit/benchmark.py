"""Side-by-side timing of backbones: one process, interleaved, medians, ratios."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .backbone import LaViT
from .compat import repair_torchvision


def _swin_tiny() -> nn.Module:
    repair_torchvision()
    from mmdet.models.backbones.swin import SwinTransformer

    return SwinTransformer(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1)


# Name of a model and how to build it; the first is the one that the others are compared with.
MODELS: dict[str, Callable[[], nn.Module]] = {
    'LaViT-S': lambda: LaViT('small'),
    'Swin-T': _swin_tiny,
}


@dataclass(frozen=True)
class Task:
    """What to time.

    Args:
        name: ``'inference'`` or ``'training'`` (forward and backward).
        shape: Shape (B, 3, H, W) of the images.
    """

    name: str
    shape: tuple[int, int, int, int]


TASKS = (Task('inference', (1, 3, 800, 1280)), Task('training', (2, 3, 512, 512)))


def step(model: nn.Module, x: Tensor, task: Task) -> None:
    """Run a task once."""
    # On its own line: mmdet's Swin returns nothing from train().
    model.train(task.name == 'training')
    if task.name == 'inference':
        with torch.no_grad():
            model(x)
        return
    sum(m.mean() for m in model(x)).backward()
    model.zero_grad()


def times(task: Task, rounds: int) -> dict[str, list[float]]:
    """Time every model on a task, taking turns so that a busy machine hurts all alike.

    Args:
        task: What to time.
        rounds: How often, after one warm-up.

    Returns:
        Seconds of each round, by model.
    """
    torch.manual_seed(0)
    x = torch.randn(task.shape)
    models = {name: build() for name, build in MODELS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in tqdm(range(rounds + 1), desc=task.name):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x, task)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(name: str, task: Task) -> float:
    """What a task adds to the memory of a fresh process that holds the model already.

    Args:
        name: Name of the model.
        task: What to run, three times.

    Returns:
        Growth of the peak resident set size, in MiB.
    """
    # Linux hands the peak of a process on to what it starts with exec, as 'spawn' does; the child
    # of a server begins anew.
    with multiprocessing.get_context('forkserver').Pool(1) as pool:
        return pool.apply(_peak_memory, (name, task))


def _peak_memory(name: str, task: Task) -> float:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(task.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step(model, x, task)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def report(rounds: int) -> str:
    """Run everything.

    Args:
        rounds: Rounds of each task.

    Returns:
        A Markdown table. Ratios are Swin-T's (or another peer's) figure over LaViT-S's: over 1 is
        in favour of LaViT-S.
    """
    rows = [
        f'{torch.get_num_threads()} threads, torch {torch.__version__}, float32, eager; medians of '
        f'{rounds} interleaved rounds',
        '',
        '| task | images | model | seconds (least - most) | ratio | MiB | ratio |',
        '|---|---|---|---|---|---|---|',
    ]
    for task in TASKS:
        seconds = times(task, rounds)
        memory = {name: peak_memory(name, task) for name in MODELS}
        first = next(iter(MODELS))
        median = {name: statistics.median(s) for name, s in seconds.items()}
        for name, s in seconds.items():
            rows.append(
                f'| {task.name} | {"x".join(map(str, task.shape))} | {name} '
                f'| {median[name]:.3f} ({min(s):.3f} - {max(s):.3f}) '
                f'| {median[name] / median[first]:.2f} '
                f'| {memory[name]:.0f} | {memory[name] / memory[first]:.2f} |'
            )
    return '\n'.join(rows)
