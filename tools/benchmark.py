"""Times LaViT beside its peers on this machine: seconds, memory, FLOPs, and ratios of them.

All models of a comparison run in one process and take turns, each in its own best memory format.
Figures of one run compare with each other; those of two runs or two machines do not.
"""

import argparse
from pathlib import Path

import torch

from repository.benchmark import models, report, suites, timing
from repository.benchmark.workload import AMP, Settings, Task

SUITES = ('backbones', 'attention', 'detectors')
INFERENCE = ('4x224x224', '1x512x512', '1x800x1280', '1x1600x2560')
TRAINING = ('4x224x224', '2x512x512', '1x800x1280')


def shape(text: str) -> tuple[int, int, int, int]:
    """Read ``BxHxW``."""
    batch, height, width = map(int, text.split('x'))
    return batch, 3, height, width


def size(text: str) -> str:
    """Check ``BxHxW``."""
    try:
        Task('inference', shape(text))
        return text
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'must be images x height x width, such as 2x512x512, got {text!r}'
        ) from None


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add('--suites', nargs='+', choices=SUITES, default=SUITES, help='what to compare')
    add(
        '--models',
        nargs='+',
        choices=models.BACKBONES,
        default=models.DEFAULT_BACKBONES,
        metavar='MODEL',
        help=f'backbones, of {list(models.BACKBONES)}; the first is what ratios are over',
    )
    for name, default in (('inference', INFERENCE), ('training', TRAINING)):
        add(
            f'--{name}',
            nargs='*',
            type=size,
            default=default,
            metavar='BxHxW',
            help=f'images of the {name} comparisons; none skips them',
        )
    add('--device', choices=('cpu', 'cuda'), default='cpu', help='where to compute')
    add('--amp', choices=AMP, help='autocast to this type; else float32')
    add('--compile', action='store_true', help='run backbones through torch.compile')
    add('--threads', type=positive, default=torch.get_num_threads(), help='threads of PyTorch')
    add('--rounds', type=positive, default=7, help='rounds of each comparison')
    add('--no-memory', action='store_true', help='do not measure memory')
    add('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder for the results')
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'argument --out: {args.out} is not a folder')
    try:
        Settings(args.device, args.amp, args.compile)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    """Run the comparisons, and keep what there is after each."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(args.device, args.amp, args.compile)
    rate = timing.product_rate(settings)
    machine = report.describe_machine(settings, rate, args.rounds)
    tasks = [Task('inference', shape(text)) for text in args.inference]
    tasks += [Task('training', shape(text)) for text in args.training]
    runs = {
        'backbones': lambda: suites.backbones(
            args.models, tasks, settings, args.rounds, rate, not args.no_memory
        ),
        'attention': lambda: suites.attention(settings, args.rounds),
        'detectors': lambda: suites.detectors(tuple(models.DETECTORS), settings, args.rounds),
    }
    comparisons, files = [], []
    for suite in args.suites:
        for rows in runs[suite]():
            comparisons.append(rows)
            files = report.write(args.out, machine, comparisons)
    print(report.markdown(machine, comparisons))
    print('written:', *files)


if __name__ == '__main__':
    main()
