"""Two commits side by side: their files, their processes, their turns, and what follows."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats
from tqdm import tqdm

from ..benchmark.workload import PRECISIONS, Task

TOOLS = Path(__file__).parents[2]
#: Whoever changes nothing is called slower or faster once in a hundred cases for chance alone.
CONFIDENCE = 0.99
# Fewer pairs have no interval of that confidence for their median.
MIN_PAIRS = 8
# A turn has as many steps as fit into it: a step of milliseconds alone is mostly clock and cache.
TURN_SECONDS = 0.2


class CommitError(Exception):
    """Why two commits cannot be compared; its text is one line for the user."""


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        task: ``'inference'`` or ``'training'``.
        shape: Images (B, 3, H, W).
        precision: Of :data:`~repository.benchmark.workload.PRECISIONS`.

    Raises:
        ValueError: If one of them is none of these.
    """

    task: str
    shape: tuple[int, int, int, int]
    precision: str

    def __post_init__(self) -> None:
        Task(self.task, self.shape)
        if self.precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {list(PRECISIONS)}, got {self.precision!r}')

    @classmethod
    def of(cls, text: str) -> Case:
        """Read ``TASK:BxHxW:PRECISION``."""
        found = re.fullmatch(r'(\w+):(\d+)x(\d+)x(\d+):([\w-]+)', text)
        if found is None:
            raise ValueError(
                f'a case is task:BxHxW:precision, such as inference:4x224x224:fp32, got {text!r}'
            )
        batch, height, width = map(int, found.group(2, 3, 4))
        return cls(found[1], (batch, 3, height, width), found[5])

    def __str__(self) -> str:
        batch, _, height, width = self.shape
        return f'{self.task}:{batch}x{height}x{width}:{self.precision}'


@dataclass
class Outcome:
    """What was measured of a case.

    Args:
        case: What was timed.
        before: Seconds of a step of the first commit, in each pair of turns.
        after: The same of the second.
        tolerance: By how much a ratio may differ from 1 and still be noise.
    """

    case: Case
    before: list[float] = field(repr=False)
    after: list[float] = field(repr=False)
    tolerance: float

    @property
    def ratios(self) -> list[float]:
        """Of each pair: over 1 where the second commit was slower."""
        return [after / before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median, by the sign test, which assumes nothing of how ratios are spread."""
        found = stats.quantile_test(self.ratios, q=1, p=0.5).confidence_interval(CONFIDENCE)
        return float(found.low), float(found.high)

    @property
    def verdict(self) -> str:
        """``'slower'``, ``'faster'`` or ``'same'``."""
        low, high = self.interval
        if low > 1 + self.tolerance:
            return 'slower'
        return 'faster' if high < 1 / (1 + self.tolerance) else 'same'


@dataclass(frozen=True)
class Commit:
    """A commit of a repository.

    Args:
        repository: Folder of the repository.
        name: As the user calls it.
        hash: As git does.
    """

    repository: Path
    name: str
    hash: str

    @classmethod
    def of(cls, repository: Path, name: str) -> Commit:
        """Find a commit by whatever git takes for one.

        Raises:
            CommitError: If there is none.
        """
        # A name that begins with a dash would be an option.
        ran = _git(
            repository, 'rev-parse', '--verify', '--quiet', '--end-of-options', f'{name}^{{commit}}'
        )
        if ran.returncode:
            raise CommitError(f'{name!r} is no commit of {repository}')
        return cls(repository, name, ran.stdout.strip())

    def __str__(self) -> str:
        subject = _git(self.repository, 'log', '-1', '--format=%h %s', self.hash).stdout.strip()
        return f'{self.name}: {subject}'

    def unpack(self, folder: Path) -> Path:
        """Write its package into a folder, which leaves nothing in the repository.

        Raises:
            CommitError: If it has no package.
        """
        archive = folder.with_suffix('.zip')
        ran = _git(
            self.repository, 'archive', '--format=zip', f'--output={archive}', self.hash, 'mmlavit'
        )
        if ran.returncode:
            raise CommitError(f'{self.name} has no folder mmlavit')
        shutil.unpack_archive(archive, folder)
        return folder


def changed_files(repository: Path) -> list[str]:
    """Files of the package that are in no commit as they are."""
    ran = _git(repository, 'status', '--porcelain', '--', 'mmlavit')
    return [line[3:] for line in ran.stdout.splitlines()]


def _git(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(['git', '-C', str(repository), *words], capture_output=True, text=True)


class Process:
    """The process of one commit.

    Args:
        commit: The commit.
        folder: Where its package is.
        threads: Threads of PyTorch.

    Raises:
        CommitError: If its package cannot be imported.
    """

    def __init__(self, commit: Commit, folder: Path, threads: int) -> None:
        self.commit = commit
        self.log = folder.with_suffix('.log')
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'repository.commits.worker', str(threads)],
                cwd=folder,
                # Threads that wait must not spin while the other process has its turn.
                env=os.environ
                | {'PYTHONPATH': f'{folder}{os.pathsep}{TOOLS}', 'OMP_WAIT_POLICY': 'PASSIVE'},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            imported = Path(self._answer())
            if imported.parent.resolve() != folder.resolve():
                raise CommitError(f'{commit.name} imports {imported}, not its own mmlavit')
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **request: Any) -> float:
        """Have something done.

        Args:
            do: What, of :class:`~repository.commits.worker.Worker`.
            **request: Its arguments.

        Returns:
            Seconds of a step.

        Raises:
            CommitError: If the process failed.
        """
        with contextlib.suppress(BrokenPipeError):  # what it died of is told below
            print(json.dumps({'do': do} | request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        said = self.log.read_text(errors='replace').strip().splitlines()
        raise CommitError(
            f'{self.commit.name} failed: {said[-1] if said else f"exit status {status}"}'
        )

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def compare(
    before: Process,
    after: Process,
    cases: Sequence[Case],
    arch: str,
    pairs: int,
    tolerance: float,
) -> list[Outcome]:
    """Let two processes take turns, so that a busy machine hurts both alike.

    Args:
        before: The first commit's.
        after: The second commit's.
        cases: What to time.
        arch: The LaViT, by its name.
        pairs: Turns of each; who comes first changes from pair to pair.
        tolerance: As in :class:`Outcome`.

    Returns:
        The outcomes of the cases.

    Raises:
        CommitError: If a process failed.
    """
    outcomes = []
    for case in cases:
        request = dict(arch=arch, task=case.task, shape=case.shape, precision=case.precision)
        slowest = max(one.ask('build', **request) for one in (before, after))
        steps = max(1, math.ceil(TURN_SECONDS / slowest))
        seconds: dict[Process, list[float]] = {before: [], after: []}
        for i in tqdm(range(pairs), desc=str(case)):
            for one in (before, after) if i % 2 else (after, before):
                seconds[one].append(one.ask('run', steps=steps))
        outcomes.append(Outcome(case, seconds[before], seconds[after], tolerance))
    return outcomes


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of the outcomes."""
    lines = [
        '| case | seconds before | seconds after | after / before | 99 % of it | |',
        '|---' * 6 + '|',
    ]
    for outcome in outcomes:
        low, high = outcome.interval
        seconds = (statistics.median(of) for of in (outcome.before, outcome.after))
        cells = [str(outcome.case), *(f'{one:.4g}' for one in seconds)]
        cells += [f'{outcome.ratio:.3f}', f'{low:.3f} - {high:.3f}', outcome.verdict]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)
