"""Says whether a commit made LaViT slower than another, beyond the noise of this machine.

Each commit runs in a process of its own, and the two take turns, so that whatever else the machine
does hurts both alike. What counts is the median of the ratios of such pairs. A case is slower if
the 99 % interval of that median, by the sign test, lies beyond the tolerance. The exit status is 0
if none is, 1 if one is, 2 if they could not be compared.
"""

import argparse
import os
import signal
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from repository.commits.pairs import (
    MIN_PAIRS,
    Case,
    Commit,
    CommitError,
    Process,
    changed_files,
    compare,
    markdown,
)

CASES = (
    'inference:4x224x224:fp32',
    'inference:4x224x224:bf16-amp',
    'inference:1x800x1280:fp32',
    'inference:1x800x1280:bf16-amp',
    'training:4x224x224:fp32',
    'training:4x224x224:bf16-amp',
)


def case(text: str) -> Case:
    """Read a case."""
    try:
        return Case.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number(kind: type, least: float) -> object:
    """A reader of numbers that are at least so much."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f'must be a number of at least {least}, got {text!r}')
        return value

    return read


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add('before', help='the commit that is held against')
    add('after', nargs='?', default='HEAD', help='the commit that may be slower')
    add(
        '--cases',
        nargs='+',
        type=case,
        default=[Case.of(text) for text in CASES],
        metavar='TASK:BxHxW:PRECISION',
        help='what to time; inference or training, in fp32, bf16-amp (autocast), bf16 (weights, '
        f'too) or their like; default: {" ".join(CASES)}',
    )
    add('--arch', default='small', help='the LaViT, by its name')
    add('--threads', type=number(int, 1), default=torch.get_num_threads(), help='of PyTorch')
    add('--pairs', type=number(int, MIN_PAIRS), default=20, help='turns of each commit, each case')
    add(
        '--tolerance',
        type=number(float, 0),
        default=0.02,
        help='what two processes of one commit may differ by, as a fraction',
    )
    add(
        '--ignore-changes',
        action='store_true',
        help='compare commits although mmlavit/ has changes that are in none',
    )
    return parser.parse_args()


def main() -> None:
    """Compare and report."""
    args = parse_args()
    # So that a run that is stopped cleans up, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    repository = Path(__file__).resolve().parents[1]
    try:
        names = args.before, args.after
        commits = [Commit.of(repository, name) for name in names]
        refuse_changes(repository, commits, args.ignore_changes)
        for commit in commits:
            print(commit)
        print(f'{args.threads} threads, load before {os.getloadavg()[0]:.1f}', flush=True)
        with tempfile.TemporaryDirectory(prefix='commits.') as folder, ExitStack() as stack:
            processes = []
            for label, commit in zip(('before', 'after'), commits, strict=True):
                made = commit.unpack(Path(folder, label))
                processes.append(Process(commit, made, args.threads))
                stack.enter_context(closing(processes[-1]))
            outcomes = compare(*processes, args.cases, args.arch, args.pairs, args.tolerance)
    except (CommitError, OSError) as error:
        print(f'mmlavit: {error}', file=sys.stderr)
        sys.exit(2)
    print(markdown(outcomes))
    slower = [str(outcome.case) for outcome in outcomes if outcome.verdict == 'slower']
    print('slower:', ', '.join(slower) if slower else 'nothing')
    sys.exit(1 if slower else 0)


def refuse_changes(repository: Path, commits: list[Commit], ignored: bool) -> None:
    """Do not time HEAD for somebody who means what is in the working tree."""
    changed = changed_files(repository)
    if not changed or Commit.of(repository, 'HEAD').hash not in {c.hash for c in commits}:
        return
    what = f'{changed[0]} and {len(changed) - 1} more' if len(changed) > 1 else changed[0]
    if not ignored:
        raise CommitError(
            f'{what} in the working tree: changes are in no commit and would not be timed; commit '
            'them, or ask for --ignore-changes'
        )
    print(f'not timed, since they are in no commit: changes of {what}')


if __name__ == '__main__':
    main()
