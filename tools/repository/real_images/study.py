"""All trainings, side by side, each when what it needs is there, going on where it was stopped."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..results import add_line, read_lines
from . import training
from .backbones import BACKBONES
from .tasks import TASKS
from .training import TRIAL, WORK_DIR, Training, committed, fingerprint, folder_of

#: Of whole trainings, unless others are asked for.
SEEDS = {'lavit': (0, 1, 2), 'vanilla': (0, 1, 2)}
SEEDS.update({name: (0, 1) for name in BACKBONES if name not in SEEDS})
#: The training that a pretrained backbone starts from, but for its learning rate.
PRETRAINING = 'tinyimagenet', 'lavit', 0


class Job(NamedTuple):
    """A training to come.

    Args:
        task: Name of the task.
        backbone: Name of the backbone.
        seed: Seed.
        rate: The learning rate that is tried; None for a whole training at the better one.
    """

    task: str
    backbone: str
    seed: int
    rate: float | None = None


def jobs(
    tasks: Iterable[str],
    backbones: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    rates_alone: bool = False,
) -> list[Job]:
    """What there is to train, and what that needs.

    Args:
        tasks: Names in :data:`~repository.real_images.tasks.TASKS`.
        backbones: Names in :data:`~repository.real_images.backbones.BACKBONES`, of which each task
            takes those that it is for; None for all.
        seeds: Of whole trainings; None for :data:`SEEDS`.
        rates_alone: Whether to try learning rates, and train nothing with the better ones.

    Returns:
        Each once: LaViT's and what starts from it before the others, then seed by seed, so that a
        study that is stopped has something whole.

    Raises:
        ValueError: If none of the backbones is for any of the tasks.
    """
    tasks = list(tasks)
    chosen = list(BACKBONES) if backbones is None else list(backbones)
    seeds = None if seeds is None else list(seeds)
    found = []
    for task in tasks:
        for name in TASKS[task].backbones:
            if name not in chosen:
                continue
            found += _trials(task, name)
            if not rates_alone:
                if BACKBONES[name].pretrained:
                    found += [*_trials(*PRETRAINING[:2]), Job(*PRETRAINING)]
                found += [Job(task, name, seed) for seed in seeds or SEEDS[name]]

    if not found:
        raise ValueError(
            f'backbones {chosen} are not compared on {", ".join(tasks)}; there are '
            + '; '.join(f'{", ".join(TASKS[task].backbones)} on {task}' for task in tasks)
        )

    def turn(job: Job) -> tuple:
        first = job.seed == 0 and job.backbone in ('lavit', 'pretrained')
        return not first, job.seed, job.rate is None

    return sorted(dict.fromkeys(found), key=turn)


def _trials(task: str, backbone: str) -> list[Job]:
    # What starts from a classifier has the learning rate of what does not.
    tried = 'lavit' if BACKBONES[backbone].pretrained else backbone
    return [Job(task, tried, 0, rate) for rate in TASKS[task].rates]


class Results:
    """A file of results, one for each training.

    Args:
        path: A JSON object a line, as :func:`repository.real_images.training.run` returns it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = read_lines(path)

    def of(self, wanted: Training, start: str | None = None) -> dict[str, Any] | None:
        """The result of a training, if it was trained by the settings that it has now."""
        config = fingerprint(wanted, start)
        return next((line for line in self.lines if line['config'] == config), None)

    def retire(self, wanted: Training) -> None:
        """Move what other settings of a training have come to into the work directory."""
        place = _place(wanted._asdict())
        old = [line for line in self.lines if _place(line) == place]
        for line in old:
            add_line(WORK_DIR / 'earlier.jsonl', line)
            self.lines.remove(line)
        if old:
            text = ''.join(json.dumps(line) + '\n' for line in self.lines)
            scratch = self.path.with_suffix('.partial')
            scratch.write_text(text, encoding='utf-8')
            scratch.replace(self.path)

    def add(self, result: dict[str, Any]) -> None:
        """Add a result, here and to the file."""
        # As it will be read: JSON's keys are strings.
        self.lines.append(json.loads(json.dumps(result)))
        add_line(self.path, result)


def _place(result: dict[str, Any]) -> tuple:
    """A result's place in the tables, which has one learning rate but for trials."""
    rate = result['rate'] if result['share'] < 1 else None
    return *(result[name] for name in ('task', 'backbone', 'seed', 'share')), rate


def counts(result: dict[str, Any]) -> float:
    """The first measure of a result's task: of the test, or for a trial of the validation."""
    return float(result['metrics'].get(TASKS[result['task']].measures[0].name, 0.0))


def better_rate(results: Results, task: str, backbone: str, budget: float = 1.0) -> float | None:
    """The better learning rate of a backbone; None as long as not all have been tried."""
    trials = [
        results.of(Training(task, job.backbone, job.seed, job.rate, TRIAL, budget))
        for job in _trials(task, backbone)
    ]
    if not all(trials):
        return None
    return max(trials, key=counts)['rate']


def resolve(job: Job, results: Results, budget: float) -> tuple[Training, str | None] | None:
    """The training that a job is, and the classifier that it starts from.

    Args:
        job: Which.
        results: What there is.
        budget: As of :class:`~repository.real_images.training.Training`.

    Returns:
        Both; None as long as what it needs has no result.
    """
    task, backbone, seed, rate = job
    if rate is not None:
        return Training(task, backbone, seed, rate, TRIAL, budget), None
    rate = better_rate(results, task, backbone, budget)
    if rate is None:
        return None
    start = None
    if BACKBONES[backbone].pretrained:
        classifier = resolve(Job(*PRETRAINING), results, budget)
        result = classifier and results.of(*classifier)
        if not result:
            return None
        start = str(folder_of(*classifier) / result['checkpoint'])
    return Training(task, backbone, seed, rate, 1.0, budget), start


def missing(wanted: list[Job], results: Results, budget: float = 1.0) -> list[Job]:
    """What there is no result of yet; arguments as of :func:`run`."""
    left = []
    for job in wanted:
        found = resolve(job, results, budget)
        if found is None or not results.of(*found):
            left.append(job)
    return left


def run(wanted: list[Job], results: Results, workers: int = 2, budget: float = 1.0) -> None:
    """Train what is not among the results yet.

    Args:
        wanted: As from :func:`jobs`.
        results: Where results are, and are added as soon as they are there.
        workers: Trainings at a time, each with a core.
        budget: As of :class:`~repository.real_images.training.Training`.

    Raises:
        ValueError: If ``workers`` is under 1 or ``budget`` not over 0 and at most 1.
        FileNotFoundError: If the data of a task are not there, or the classifier to start from has
            a result and no file.
        RuntimeError: If trainings failed, or another call is at it.
    """
    if workers < 1:
        raise ValueError(f'jobs must be at least 1, got {workers}')
    if not 0 < budget <= 1:
        raise ValueError(f'budget must be over 0 and at most 1, got {budget:g}')
    for task in dict.fromkeys(job.task for job in wanted):
        root = Path(committed(TASKS[task].config).train_dataloader.dataset.data_root)
        if not root.is_dir():
            raise FileNotFoundError(f'{root} is not there; docs/datasets.md says how to get it')
    failed: list[str] = []
    waiting, done = list(wanted), 0
    running: dict[Future, str] = {}
    with _alone(), ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                for job in list(waiting):
                    if len(running) == workers:
                        break
                    found = resolve(job, results, budget)
                    if found is None:
                        continue
                    waiting.remove(job)
                    if results.of(*found):
                        done += 1
                    else:
                        _require(found[1], results)
                        results.retire(found[0])
                        print(f'{found[0]}: {folder_of(*found)}', flush=True)
                        running[pool.submit(training.run, *found)] = str(found[0])
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    try:
                        result = future.result()
                    except RuntimeError as error:
                        failed.append(f'{name} ({error})')
                        print(f'{name}: FAILED, {error}', flush=True)
                        continue
                    results.add(result)
                    done += 1
                    print(f'{name}: {_said(result)} [{done} of {len(wanted)}]', flush=True)
        except BaseException:
            training.stop()
            raise
    if failed:
        blocked = f', and {len(waiting)} that need them wait' if waiting else ''
        raise RuntimeError(f'{len(failed)} trainings failed{blocked}: {"; ".join(failed)}')
    print(f'{done} of {len(wanted)} trainings are there', flush=True)


def _require(start: str | None, results: Results) -> None:
    if start and not Path(start).is_file():
        raise FileNotFoundError(
            f'{start} is not there: checkpoints are not kept with the results. Without its line in '
            f'{results.path} it is trained again'
        )


def _said(result: dict[str, Any]) -> str:
    measure = TASKS[result['task']].measures[0]
    value = f'{measure.title} {measure.scale * counts(result):.{measure.digits}f}'
    return f'{value} after {result["length"]} {result["unit"]}, {result["seconds"] / 60:.0f} min'


@contextmanager
def _alone() -> Iterator[None]:
    """Keep a second call from training the same."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    with (WORK_DIR / '.lock').open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f'another call trains in {WORK_DIR} already') from error
        yield
