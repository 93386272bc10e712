"""The process of one commit: builds a LaViT and takes steps when it is told to.

It reads a request a line and answers each with a line, both JSON, until its input ends. Of the
commit it asks for no more than ``mmlavit.LaViT``, so that old commits can be measured.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mmlavit
from repository.benchmark.workload import BackboneWorkload, Settings, Task


class Worker:
    """One backbone at a time, and its steps."""

    def build(self, arch: str, task: str, shape: list[int], precision: str) -> float:
        """Build a LaViT and its images; returns the seconds of a step after some for warm-up."""
        self.work = None  # the one before goes first
        gc.collect()
        self.work = BackboneWorkload(
            lambda task: mmlavit.LaViT(arch),
            Task(task, tuple(shape)),
            Settings(precision=precision),
        )
        return min(self.run(1) for _ in range(3))

    def run(self, steps: int) -> float:
        """Take steps; returns the seconds of one."""
        start = time.perf_counter()
        for _ in range(steps):
            self.work.step()
        return (time.perf_counter() - start) / steps


def main(threads: int) -> None:
    """Serve requests."""
    # What anybody prints goes elsewhere.
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    worker = Worker()
    print(json.dumps(str(Path(mmlavit.__file__).parent)), file=answers)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer = getattr(worker, request.pop('do'))(**request)
        print(json.dumps(answer), file=answers)


if __name__ == '__main__':
    main(int(sys.argv[1]))
