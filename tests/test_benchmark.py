"""The benchmark runs, and what it says follows from what it measured."""

import re

import pytest
import torch
from torch import nn

from mmlavit import benchmark
from mmlavit.benchmark import MODELS, Task


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        benchmark,
        'TASKS',
        (Task('inference', (1, 3, 64, 96)), Task('training', (2, 3, 64, 64))),
    )


def test_report(small):
    """Every task, every model, and ratios that are the quotients of what stands beside them."""
    rows = [line.split('|')[1:-1] for line in benchmark.report(2).splitlines() if '|' in line][2:]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in cells] == ['inference'] * 2 + ['training'] * 2
    assert [row[2] for row in cells] == list(MODELS) * 2
    for first, row in zip(cells[::2] * 2, cells[::2] + cells[1::2], strict=True):
        seconds, base = (float(r[3].split()[0]) for r in (row, first))
        low, high = map(float, re.search(r'\((\S+) - (\S+)\)', row[3]).groups())
        assert 0 < low <= seconds <= high
        assert float(row[4]) == pytest.approx(seconds / base, abs=0.06 * seconds / base)
        assert float(row[5]) > 0 and float(row[6]) > 0


def test_a_training_step_computes_gradients_and_drops_them(monkeypatch):
    gradients = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.conv.weight.register_hook(lambda grad: gradients.append(self.training))

        def forward(self, x):
            return (self.conv(x), 2 * self.conv(x))

    model = Model()
    benchmark.step(model, torch.ones(1, 3, 4, 4), Task('training', (1, 3, 4, 4)))
    assert gradients == [True] and model.conv.weight.grad is None
    benchmark.step(model, torch.ones(1, 3, 4, 4), Task('inference', (1, 3, 4, 4)))
    assert gradients == [True] and not model.training


def test_peak_memory_is_of_the_task_alone():
    """A larger image takes more, however much memory this process has used before."""
    ballast = torch.ones(300 * 2**20 // 4)
    little, much = (
        benchmark.peak_memory('LaViT-S', Task('inference', (1, 3, side, side)))
        for side in (128, 512)
    )
    assert ballast.sum() > 0
    assert 0 < little < much < 300
