"""All trainings that experiments ask for, side by side, going on where an earlier call stopped."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..results import add_line, read_lines
from .tasks import TASKS
from .training import CLASSIFIER, train_variant, work_dir_of
from .variants import EXPERIMENTS, VARIANTS, register_backbones


class Training(NamedTuple):
    """What is trained, and how; the names are those of results."""

    task: str
    variant: str
    seed: int
    rate: float

    def __str__(self) -> str:
        return f'{self.task} {self.variant} seed {self.seed} learning rate {self.rate:g}'


def trainings(
    experiments: Iterable[str], tasks: Iterable[str], seeds: Iterable[int]
) -> list[Training]:
    """What experiments ask for, each training once.

    Args:
        experiments: Names in :data:`~repository.experiments.variants.EXPERIMENTS`.
        tasks: Names in :data:`~repository.experiments.tasks.TASKS`.
        seeds: Seeds.

    Returns:
        The trainings, seed by seed, so that a study that is stopped has whole seeds. What starts
        from a classifier of photographs comes after all else, the classifier among it.

    Raises:
        ValueError: If a name is unknown; the message lists the known ones.
    """
    experiments, tasks = list(experiments), list(tasks)
    for kind, names, known in (('experiment', experiments, EXPERIMENTS), ('task', tasks, TASKS)):
        for name in names:
            if name not in known:
                raise ValueError(f'unknown {kind} {name!r}; there are {", ".join(known)}')
    seeds, chosen = list(seeds), [EXPERIMENTS[name] for name in experiments]
    wanted = [
        Training(task, name, seed, rate)
        for seed in seeds
        for task in tasks
        for experiment in chosen
        if experiment.asks(task)
        for name in experiment.variants
        for rate in experiment.rates or [VARIANTS[name].rate(task)]
        if seed == seeds[0] or not experiment.rates
    ]
    task, name = CLASSIFIER
    classifiers = [
        Training(task, name, training.seed, VARIANTS[name].rate(task))
        for training in wanted
        if _is_pretrained(training)
    ]
    return sorted(dict.fromkeys([*wanted, *classifiers]), key=_is_pretrained)


def _is_pretrained(training: Training) -> bool:
    return VARIANTS[training.variant].pretrained


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read what :func:`run` has written.

    Args:
        path: File of results.

    Returns:
        One for each training; none where there is no file. Those with another budget or of other
        data than the tasks' now are not among them.
    """
    return [
        r
        for r in read_lines(path)
        if (task := TASKS.get(r['task']))
        and (r['iterations'], r.get('data')) == (task.iterations, task.data)
    ]


def run(wanted: list[Training], results: Path, jobs: int = 2) -> list[dict[str, Any]]:
    """Train what is not among the results yet.

    Each training has a process and a core of its own, so its numbers do not depend on what runs
    beside it.

    Args:
        wanted: Trainings as from :func:`trainings`.
        results: File of results, a JSON object a line. A result is added as soon as it is there;
            those with another budget or of other data than the task's now are left alone, and
            trained again.
        jobs: Trainings at a time.

    Returns:
        All results of what is wanted.

    Raises:
        ValueError: If ``jobs`` is not at least 1.
        RuntimeError: If trainings failed; what the others came to is in the file.
    """
    if jobs < 1:
        raise ValueError(f'jobs must be at least 1, got {jobs}')
    for task in dict.fromkeys(w.task for w in wanted):
        TASKS[task].make_data()
    done = {_key(r): r for r in read_results(results)}
    missing = [w for w in wanted if w not in done]
    print(f'{len(wanted)} trainings, {len(wanted) - len(missing)} of them done before', flush=True)
    failed = []
    if missing:
        _import_toolboxes()
        # What starts from others waits for all of them.
        by_start = [[m for m in missing if _is_pretrained(m) == later] for later in (False, True)]
        trained = (found for part in by_start for found in _train_all(part, jobs))
        for i, (training, result) in enumerate(trained, 1):
            if isinstance(result, str):
                failed.append(str(training))
                print(f'{i}/{len(missing)} {training}: FAILED, {result}', flush=True)
                continue
            add_line(results, result)
            done[_key(result)] = result
            print(f'{i}/{len(missing)} {training}: {result["metric"]:.1f}', flush=True)
    if failed:
        raise RuntimeError(f'{len(failed)} trainings failed: {", ".join(failed)}')
    return [done[w] for w in wanted]


def _key(result: dict[str, Any]) -> Training:
    return Training(*(result[name] for name in Training._fields))


def _import_toolboxes() -> None:
    register_backbones()
    import mmpretrain.models  # noqa: F401
    import mmseg.models  # noqa: F401


def _train_all(
    wanted: Iterable[Training], jobs: int
) -> Iterator[tuple[Training, dict[str, Any] | str]]:
    """Train each in a new process, and give what comes of it as soon as it is there.

    A pool of processes would wait forever for a training that the system has killed, and forks from
    a thread, while others hold locks.
    """
    # Forked processes have all imports done; a new one for each training shares nothing.
    context = multiprocessing.get_context('fork')
    waiting = list(reversed(list(wanted)))
    running: dict[Connection, tuple[Training, multiprocessing.process.BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                training = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_send_trained, args=(training, sender), daemon=True
                )
                process.start()
                sender.close()
                running[receiver] = training, process
            for receiver in wait(list(running)):
                training, process = running[receiver]
                try:
                    result = receiver.recv()
                except EOFError:
                    result = None
                process.join()
                del running[receiver]
                yield training, result or f'ended with status {process.exitcode}'
    finally:
        for _, process in running.values():
            process.kill()


def _send_trained(training: Training, sender: Connection) -> None:
    sender.send(_train(training))


def _train(training: Training) -> dict[str, Any] | str:
    """Train in a process of its own, its output in a file; an error comes back as a line."""
    torch.set_num_threads(1)
    work_dir = work_dir_of(*training)
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / 'output.log').open('w') as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            return train_variant(*training, work_dir)
        except Exception as error:
            traceback.print_exc()
            return f'{type(error).__name__}: {error} (see {log.name})'
