"""Trains LaViT with parts changed or taken out, and peers, on made-up data, and says what it buys.

Results are kept in docs/experiments/results.jsonl, one line a training; what is there is not
trained again, so a study that was stopped goes on where it was. Plots go beside it, tables into
docs/experiments/README.md. Start it at the top of the repository.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

# One core a training; threads that wait must not spin. Both are read when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from repository.experiments import replacing, report, resizing, study
from repository.experiments.cost import step_ratios
from repository.experiments.photographs import VARIABLE, archive
from repository.experiments.tasks import TASKS
from repository.experiments.variants import EXPERIMENTS

OUT = Path('docs/experiments')


def main() -> None:
    """Run what the command line asks for."""
    listing = '\n'.join(f'  {name:<12} {e.question}' for name, e in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f'experiments:\n{listing}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'experiments', nargs='*', metavar='EXPERIMENT', help='names from below; default all'
    )
    parser.add_argument(
        '--tasks',
        nargs='+',
        choices=list(TASKS),
        help=f'default all; photo needs the folder of real images, named by {VARIABLE}',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2, help='trainings at a time, a core each')
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='plots and tables of what is there',
    )
    parser.add_argument('--time', action='store_true', help='also time a step of each variant')
    parser.add_argument(
        '--resize',
        action='store_true',
        help='also try the trained classifiers of photographs at other window sizes',
    )
    parser.add_argument(
        '--replace',
        action='store_true',
        help='also see what they lose with something simple in the place of their attention',
    )
    args = parser.parse_args()
    results_file = OUT / 'results.jsonl'
    chosen, experiments = args.tasks or list(TASKS), args.experiments or list(EXPERIMENTS)
    if archive() is None:
        if not args.tasks:
            chosen.remove('photo')
            print(f'{VARIABLE} is not set: all tasks but that on photographs')
        if not args.experiments:
            left_out = [e for e in experiments if EXPERIMENTS[e].starts_from_photographs]
            experiments = [e for e in experiments if e not in left_out]
            print(f'{VARIABLE} is not set: all experiments but {", ".join(left_out)}')
    try:
        wanted = study.trainings(experiments, chosen, args.seeds)
        page = OUT / 'README.md'
        if not page.is_file():
            raise FileNotFoundError(f'{page} is not here; start at the top of the repository')
        if not args.report_only:
            study.run(wanted, results_file, args.jobs)
        for asked, module in ((args.resize, resizing), (args.replace, replacing)):
            if asked:
                _write(module.__name__.rpartition('.')[2], module.measure(args.seeds))
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    results = study.read_results(results_file)
    if args.time:
        _write('times', step_ratios())
    times = _read('times') or {}
    for name, experiment in EXPERIMENTS.items():
        if any(r['variant'] in experiment.variants for r in results):
            if report.is_whole(experiment, results):
                print(report.draw(experiment, results, OUT / f'{name}.png'))
            print(f'{experiment.question}\n\n{report.table(experiment, results, times)}\n')
    others = [_read(name) or [] for name in ('resizing', 'replacing')]
    page.write_text(report.fill_in(page.read_text(), results, times, *others))


def _write(name: str, content: Any) -> None:
    (OUT / f'{name}.json').write_text(json.dumps(content, indent=2) + '\n')


def _read(name: str) -> Any:
    file = OUT / f'{name}.json'
    return json.loads(file.read_text()) if file.exists() else None


if __name__ == '__main__':
    main()
