"""What a step takes beyond the model: resident memory on a CPU, the allocator's on a GPU."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

import torch
from torch import nn

from .routes import ROUTES
from .workload import BackboneWorkload, Settings, Task

MIB = 2**20


def peak_memory(
    build: Callable[[Task], nn.Module],
    task: Task,
    settings: Settings,
    memory_format: torch.memory_format = torch.contiguous_format,
    linear: str = 'own',
) -> float:
    """What three steps add to the memory of a process that holds model and images already.

    Args:
        build: Makes the backbone; another process has to be able to import it.
        task: What a step does.
        settings: How it is computed.
        memory_format: Of model and images.
        linear: The route of linear layers.

    Returns:
        Growth of the peak, in MiB.
    """
    if settings.device == 'cuda':
        return _on_gpu(build, task, settings, memory_format)
    # Linux hands the peak of a process on to what it starts with exec, as 'spawn' does; the child
    # of a server begins anew.
    with multiprocessing.get_context('forkserver').Pool(1) as pool:
        return pool.apply(_on_cpu, (build, task, settings, memory_format, linear))


def _on_cpu(
    build: Callable[[Task], nn.Module],
    task: Task,
    settings: Settings,
    memory_format: torch.memory_format,
    linear: str,
) -> float:
    torch.set_num_threads(settings.threads)
    work = BackboneWorkload(build, task, settings, memory_format, ROUTES[linear])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        work.step()
    # Linux counts in KiB.
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _on_gpu(
    build: Callable[[Task], nn.Module],
    task: Task,
    settings: Settings,
    memory_format: torch.memory_format,
) -> float:
    work = BackboneWorkload(build, task, settings, memory_format)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        work.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB
