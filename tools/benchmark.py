"""Times LaViT beside its peers on this machine: seconds, memory, FLOPs, and ratios of them.

All models of a comparison run in one process and take turns, each in its own best memory format.
Figures of one run compare with each other; those of two runs or two machines do not.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mmlavit.export.onnx import ExportError, require_exporter
from repository.benchmark import exported, models, report, suites, timing
from repository.benchmark.routes import routes_differ
from repository.benchmark.workload import PRECISIONS, Settings, Task

SUITES = ('backbones', 'attention', 'detectors', 'onnxruntime')
INFERENCE = ('1x224x224', '4x224x224', '8x224x224', '1x512x512', '1x800x1280', '1x1600x2560')
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


def parse_args() -> tuple[argparse.Namespace, list[Settings]]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add('--suites', nargs='+', choices=SUITES, default=SUITES[:3], help='what to compare')
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
    add(
        '--precision',
        nargs='+',
        choices=PRECISIONS,
        default=['fp32'],
        metavar='PRECISION',
        help='one after the other, of fp32; bf16-amp and fp16-amp, by autocast; bf16 and fp16, '
        'weights too',
    )
    add('--compile', action='store_true', help='run backbones through torch.compile')
    add(
        '--threads',
        nargs='+',
        type=positive,
        default=[torch.get_num_threads()],
        help='threads of PyTorch, one number after the other',
    )
    add(
        '--linear',
        choices=('own', 'ours', 'both'),
        default='own',
        help="linear layers of peers: PyTorch's own route, LaViT's (oneDNN), or both beside each "
        'other; they differ in eager fp32 and bf16 on a CPU, and elsewhere all take one',
    )
    add('--rounds', type=positive, default=7, help='rounds of each comparison')
    add('--no-memory', action='store_true', help='do not measure memory')
    add('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder for the results')
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'argument --out: {args.out} is not a folder')
    try:
        settings = [
            Settings(args.device, precision, args.compile, threads)
            for threads in args.threads
            for precision in args.precision
        ]
        if {'backbones', 'onnxruntime'} & set(args.suites):
            models.require_packages(args.models)
        if 'onnxruntime' in args.suites:
            require_exporter()
    except (ExportError, ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.device == 'cuda' and 'onnxruntime' in args.suites:
        parser.error('argument --suites: onnxruntime is measured on a CPU alone')
    if args.linear != 'own' and not any(map(routes_differ, settings)):
        parser.error(
            f'argument --linear: {args.linear} makes no difference here; it does in eager fp32 '
            'and bf16 on a CPU, where PyTorch has oneDNN'
        )
    return args, settings


def main() -> None:
    """Run the comparisons, and keep what there is after each."""
    args, all_settings = parse_args()
    machine = report.describe_machine(args.device, args.rounds)
    tasks = [Task('inference', shape(text)) for text in args.inference]
    tasks += [Task('training', shape(text)) for text in args.training]
    comparisons, files = [], []
    for settings in all_settings:
        torch.set_num_threads(settings.threads)
        for comparison in compare(args, tasks, settings):
            comparisons.append(comparison)
            files = report.write(args.out, machine, comparisons)
    if 'onnxruntime' in args.suites:
        for comparison in exported.exported(args.models, tasks, args.threads, args.rounds):
            comparisons.append(comparison)
            files = report.write(args.out, machine, comparisons)
    print(report.markdown(machine, comparisons))
    print('written:', *files)


def compare(
    args: argparse.Namespace, tasks: Sequence[Task], settings: Settings
) -> Iterator[suites.Comparison]:
    """Run the suites in PyTorch that were asked for."""
    routes = ('own', 'ours') if args.linear == 'both' else (args.linear,)
    if not routes_differ(settings):
        routes = ('own',)
    if 'backbones' in args.suites:
        rate = timing.product_rate(settings)
        memory = not args.no_memory
        yield from suites.backbones(args.models, tasks, settings, args.rounds, rate, memory, routes)
    if 'attention' in args.suites:
        yield from suites.attention(settings, args.rounds)
    if 'detectors' in args.suites:
        yield from suites.detectors(tuple(models.DETECTORS), settings, args.rounds, routes)


if __name__ == '__main__':
    main()
