"""Two processes of one training, as a launcher would start them on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from mmlavit.compat import leave_process_group, repair_torchvision


def in_two_processes(job: Callable[[int, Path], None], folder: Path) -> None:
    """Run a job in each of two processes of one process group.

    Args:
        job: A function of a module, of the process's rank and of the folder.
        folder: Where the processes meet, and where they leave what they found.

    Raises:
        Exception: What a process raised, as ``torch.multiprocessing`` tells it.
    """
    with mock.patch.dict(os.environ, OMP_NUM_THREADS='1'):
        torch.multiprocessing.spawn(_run, args=(job, folder), nprocs=2)


def _run(rank: int, job: Callable[[int, Path], None], folder: Path) -> None:
    repair_torchvision()  # MMEngine's log of the environment imports it; conftest.py is not here
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    store = f'file://{folder / "store"}'
    dist.init_process_group(
        'gloo', init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    job(rank, folder)
    leave_process_group()
