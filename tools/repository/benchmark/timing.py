"""Interleaved timing, and the rate of matrix products against which times are held."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mmlavit.ops.linear import linear

from .workload import Settings


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = 'cpu',
    description: str | None = None,
) -> dict[str, list[float]]:
    """Time several things by turns, so that a busy machine hurts all alike.

    Args:
        steps: What to run, by name.
        rounds: How often each, after one round of warm-up.
        device: Device on which they run; a GPU is waited for.
        description: Of the progress bar; None shows none.

    Returns:
        Seconds of each round, by name.
    """
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    total = (rounds + 1) * len(steps)
    with tqdm(total=total, desc=description, disable=description is None) as bar:
        for i in range(rounds + 1):
            for name, step in steps.items():
                wait()
                start = time.perf_counter()
                step()
                wait()
                if i:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def product_rate(settings: Settings) -> float:
    """The rate at which this machine multiplies matrices of the sizes that LaViT-S has.

    The fastest of PyTorch's own linear layer and of :func:`mmlavit.ops.linear.linear`, whatever the
    models use: a floor is what nobody gets under.

    Args:
        settings: Device and type of the products.

    Returns:
        Floating-point operations a second; a multiplication and an addition count as two.
    """
    best = 0.0
    for tokens, dims, hidden in ((16384, 128, 512), (4096, 320, 1280), (1024, 640, 2560)):
        options = dict(device=settings.device, dtype=settings.dtype)
        x, weight = torch.randn(tokens, dims, **options), torch.randn(hidden, dims, **options)
        with torch.no_grad():
            seconds = interleave(
                {
                    'by torch': lambda x=x, w=weight: F.linear(x, w),
                    'by mmlavit': lambda x=x, w=weight: linear(x, w),
                },
                rounds=15,
                device=settings.device,
            )
        fastest = min(map(statistics.median, seconds.values()))
        best = max(best, 2 * tokens * dims * hidden / fastest)
    return best
