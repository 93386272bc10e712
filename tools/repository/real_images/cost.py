"""What backbones cost: an image, a training step, and the whole study."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn

from ..benchmark.memory import peak_memory
from ..benchmark.suites import count_flops
from ..benchmark.timing import interleave
from ..benchmark.workload import BackboneWorkload, Settings
from ..benchmark.workload import Task as Work
from .study import Job
from .tasks import TASKS
from .training import TRIAL, Training, build_backbone, parameters_of, resolved, unit_of


def images(tasks: Iterable[str], rounds: int = 15) -> dict[str, dict[str, dict[str, float]]]:
    """What one test image costs in each backbone, without neck and head, by turns on one core.

    The machine must do nothing else.

    Args:
        tasks: Names in :data:`~repository.real_images.tasks.TASKS`.
        rounds: How often each.

    Returns:
        By task and backbone: ``parameters``, ``gflops`` (1e9 multiplications with their additions),
        ``milliseconds`` (median) and ``mib``, by which the peak of a process grows.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task in tasks:
            work = Work('inference', (1, 3, *TASKS[task].image))
            # Where it starts from makes no difference to what it costs.
            names = [name for name in TASKS[task].backbones if name != 'pretrained']
            builds = {name: partial(_build, task, name) for name in names}
            settings = Settings(threads=1)
            steps = {n: BackboneWorkload(b, work, settings).step for n, b in builds.items()}
            seconds = interleave(steps, rounds, description=task)
            found[task] = {
                name: dict(
                    parameters=parameters_of(task, name),
                    gflops=count_flops(build, work) / 2e9,
                    milliseconds=1000 * statistics.median(seconds[name]),
                    mib=peak_memory(build, work, settings),
                )
                for name, build in builds.items()
            }
    finally:
        torch.set_num_threads(threads)
    return found


def _build(task: str, backbone: str, work: Work) -> nn.Module:
    """A backbone of a task, whatever is to be done with it; another process can be handed this."""
    return build_backbone(task, backbone)


def steps(tasks: Iterable[str], rounds: int = 6) -> dict[str, dict[str, dict[str, float]]]:
    """What a training step and an image in validation take of a core, the data's part among it.

    Processor time, so that it holds on a busy machine as well, if not to the percent.

    Args:
        tasks: Names in :data:`~repository.real_images.tasks.TASKS`, whose data must be there.
        rounds: Steps, and images, after one that does not count.

    Returns:
        By task and backbone: ``step`` and ``image``, median seconds; ``steps``, of an epoch, and
        ``images``, of a validation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            task: {
                name: _step(task, name, rounds)
                for name in TASKS[task].backbones
                if name != 'pretrained'
            }
            for task in tasks
        }
    finally:
        torch.set_num_threads(threads)


def _step(task: str, backbone: str, rounds: int) -> dict[str, float]:
    cfg = resolved(Training(task, backbone, 0, TASKS[task].rates[0])).copy()
    with (
        tempfile.TemporaryDirectory() as folder,
        DefaultScope.overwrite_default_scope(cfg.default_scope),
    ):
        cfg.work_dir = folder
        cfg.log_level = 'ERROR'
        # One with a name is kept for the whole process, and this folder is not.
        cfg.visualizer = None
        runner = Runner.from_cfg(cfg)
        runner.model.init_weights()
        optimizer = runner.build_optim_wrapper(cfg.optim_wrapper)
        batches = runner.build_dataloader(cfg.train_dataloader)
        loader = cfg.val_dataloader.copy()
        loader.batch_size = 1
        validation = runner.build_dataloader(loader)
        runner.model.train()
        training = _processor_seconds(
            iter(batches), lambda data: runner.model.train_step(data, optimizer), rounds
        )
        runner.model.eval()
        with torch.no_grad():
            image = _processor_seconds(iter(validation), runner.model.val_step, rounds)
        samples, size = len(batches.dataset), cfg.train_dataloader.batch_size
        return dict(step=training, image=image, steps=-(-samples // size), images=len(validation))


def _processor_seconds(data: Any, step: Any, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        step(next(data))
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def hours(job: Job, measured: dict[str, dict[str, dict[str, float]]]) -> float:
    """What a training will take of a core, without its start and its test.

    Args:
        job: Which.
        measured: As :func:`steps` returns it.

    Returns:
        Hours.
    """
    task = TASKS[job.task]
    own = measured[job.task]['lavit' if job.backbone == 'pretrained' else job.backbone]
    share = 1.0 if job.rate is None else TRIAL
    cfg = resolved(Training(job.task, 'lavit', 0, task.rates[0], share))
    unit = unit_of(cfg)
    length = cfg.train_cfg[unit]
    count = length if unit == 'max_iters' else length * own['steps']
    validations = -(-length // cfg.train_cfg.val_interval)
    return (count * own['step'] + validations * own['images'] * own['image']) / 3600


def plan(jobs: Iterable[Job], measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """What trainings will take.

    Args:
        jobs: Which.
        measured: As :func:`steps` returns it.

    Returns:
        A table in Markdown: for each task and backbone a step, a whole training, and all of them.

    Raises:
        ValueError: If the steps of a task have not been measured.
    """
    jobs = list(jobs)
    if unknown := {job.task for job in jobs} - set(measured):
        raise ValueError(f'the steps of {", ".join(sorted(unknown))} are not measured: --measure')
    lines = [
        '| task | backbone | step s | training h | trainings | trials | all h |',
        '|---' * 7 + '|',
    ]
    total = 0.0
    for task, backbone in dict.fromkeys((job.task, job.backbone) for job in jobs):
        own = [job for job in jobs if (job.task, job.backbone) == (task, backbone)]
        of_all = sum(hours(job, measured) for job in own)
        total += of_all
        whole = [job for job in own if job.rate is None]
        step = measured[task]['lavit' if backbone == 'pretrained' else backbone]['step']
        one = hours(Job(task, backbone, 0), measured)
        cells = task, backbone, f'{step:.2f}', f'{one:.2f}'
        counts = len(whole), len(own) - len(whole), f'{of_all:.1f}'
        lines.append(f'| {" | ".join(map(str, (*cells, *counts)))} |')
    lines.append(f'| all | | | | | | {total:.1f} |')
    return '\n'.join(lines)
