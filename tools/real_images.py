"""Trains LaViT-nano and peers of its size on real images, alike, and writes tables and curves.

Results are kept in docs/real_images/results.jsonl, one line a training; what is there is not
trained again, and what was stopped goes on from its last checkpoint. Tables go into
docs/real_images/README.md, curves beside it, and the first measures into README.md and
docs/model_zoo.md too. Start it at the top of the repository; the data are those of
docs/datasets.md.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# One core; threads that wait must not spin. Both are read when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from repository.real_images import cost, pictures, report, study
from repository.real_images.backbones import BACKBONES
from repository.real_images.tasks import TASKS
from repository.real_images.training import WORK_DIR

OUT = Path('docs/real_images')
# They have the first measures of all tasks.
OTHERS = Path('README.md'), Path('docs/model_zoo.md')
STEPS = {
    'run': 'try learning rates, train, test, and write tables and curves',
    'rates': 'try learning rates, and train nothing with the better ones',
    'report': 'write tables and curves of what is there',
    'plan': 'what is still to be trained, and the hours it takes',
    'time': 'measure what an image costs in each backbone; the machine must do nothing else',
    'draw': 'draw what a checkpoint predicts on test images, beside their labels',
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='step', required=True, metavar='STEP')
    for name, about in STEPS.items():
        command = commands.add_parser(
            name, help=about, description=f'{about[0].upper()}{about[1:]}.'
        )
        if name == 'draw':
            command.add_argument('task', choices=list(TASKS))
            command.add_argument(
                'checkpoint',
                type=Path,
                help='its config is the config.py beside it, if there is one',
            )
            command.add_argument('--images', type=int, default=3, help='the best to the worst (3)')
            command.add_argument(
                '--out', type=Path, help='picture to write (beside the checkpoint)'
            )
            continue
        command.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS))
        if name in ('run', 'rates', 'plan'):
            command.add_argument('--backbones', nargs='+', choices=list(BACKBONES))
        if name in ('run', 'plan'):
            command.add_argument(
                '--seeds',
                nargs='+',
                type=int,
                help='default 0 1 2 for LaViT and its twin, else 0 1',
            )
        if name in ('run', 'rates'):
            command.add_argument('--jobs', type=int, default=2, help='trainings at a time (2)')
        if name in ('run', 'rates', 'report'):
            command.add_argument(
                '--budget',
                type=float,
                default=1.0,
                help='share of the schedules, for a quick look; results stay in work_dirs (1)',
            )
        if name == 'plan':
            command.add_argument(
                '--measure', action='store_true', help='measure the steps again, some minutes'
            )
    args = parser.parse_args()
    # As on ctrl-c: trainings are ended, not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _step(args)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f'{parser.prog}: {error}\n')


def _step(args: argparse.Namespace) -> None:
    page = OUT / 'README.md'
    if not page.is_file():
        raise FileNotFoundError(f'{page} is not here; start at the top of the repository')
    if args.step == 'draw':
        beside = args.checkpoint.with_name(f'{args.checkpoint.stem}_predictions.png')
        print(pictures.draw(args.task, args.checkpoint, args.out or beside, args.images))
        return
    budget = getattr(args, 'budget', 1.0)
    out = OUT if budget == 1 else WORK_DIR / f'budget-{budget:g}'
    results = study.Results(out / 'results.jsonl')
    if args.step == 'plan':
        if args.measure:
            _write(OUT / 'steps.json', (_read(OUT / 'steps.json')) | cost.steps(args.tasks))
        wanted = study.jobs(args.tasks, args.backbones, args.seeds)
        print(cost.plan(study.missing(wanted, results), _read(OUT / 'steps.json')))
        return
    if args.step == 'time':
        _write(OUT / 'costs.json', _read(OUT / 'costs.json') | cost.images(args.tasks))
    if args.step in ('run', 'rates'):
        seeds = getattr(args, 'seeds', None)
        wanted = study.jobs(args.tasks, args.backbones, seeds, args.step == 'rates')
        try:
            study.run(wanted, results, args.jobs, budget)
        finally:
            _report(page, out, results.lines)
        return
    _report(page, out, results.lines)


def _report(page: Path, out: Path, results: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    costs = _read(OUT / 'costs.json')
    written = {page: out / 'README.md'}
    if out == OUT:
        written |= {other: other for other in OTHERS}
    for read, write in written.items():
        text = report.fill_in(read.read_text(encoding='utf-8'), results, costs)
        write.write_text(text, encoding='utf-8')
    for task in TASKS:
        report.draw(task, results, out / f'{task}.png')
    print(out / 'README.md')


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


if __name__ == '__main__':
    main()
