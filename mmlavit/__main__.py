"""The command ``mmlavit``, also as ``python -m mmlavit``: finds the command that is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from .compat import require_mmengine
from .errors import MMLaViTError
from .shipped import folder
from .version import __version__

COMMANDS = {
    'train': 'train a model, by the train.py of its toolbox',
    'test': 'evaluate a checkpoint, by the test.py of its toolbox',
    'infer': 'run a model on images or a video; write pictures and predictions',
    'configs': 'list the configs that come with mmlavit, copy them, write one for your own data',
    'tool': 'start any other script of the toolboxes, such as get_flops or browse_dataset',
    'export': 'export a backbone or a whole model to ONNX, and compare it with PyTorch',
    'attention': 'draw what points of an image attend to',
    'saturation': 'measure how alike the attention of layers is',
    'replacement': 'measure what a model loses without its attention',
    'shapes': 'write the made-up data set of the demos',
    'benchmark': 'time LaViT beside its peers on this machine',
}
#: Commands that are scripts in the folder tools; the others are modules of mmlavit.cli.
SCRIPTS = {
    'export': 'export.py',
    'attention': 'analysis/attention.py',
    'saturation': 'analysis/saturation.py',
    'replacement': 'analysis/replacement.py',
    'shapes': 'make_shapes.py',
    'benchmark': 'benchmark.py',
}
#: What shells say of a program that SIGPIPE has ended: 128 and the number of the signal.
SIGPIPE_STATUS = 141


def make_parser() -> argparse.ArgumentParser:
    """What reads the name of the command, and nothing after it."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {what}' for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog='mmlavit',
        usage='mmlavit [-h] [--version] COMMAND ...',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='LaViT in MMDetection, MMSegmentation and MMPretrain.',
        epilog='\n'.join(
            [
                'commands:',
                *lines,
                '',
                "'mmlavit COMMAND --help' describes a command. Where it takes a config, that is a",
                "file, or the name of one that comes with mmlavit ('mmlavit configs' lists them).",
            ]
        ),
    )
    parser.add_argument('--version', action='version', version=f'mmlavit {__version__}')
    parser.add_argument('command', metavar='COMMAND', choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run a command.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Returns:
        The exit status; None is 0. It is 2 after an error of the user, which is one line, and 141
        if whoever read what it prints went away (``mmlavit configs | head -1``), as of a program
        that SIGPIPE ends.
    """
    try:
        try:
            status = run(argv)
        except SystemExit:
            sys.stdout.flush()
            raise
        # Python would write out what is left only after it could say so.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if has_no_reader(stream)]
        if not gone:
            raise  # another pipe, such as one to a worker
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in gone:
            # Where Python writes what is left when it ends.
            os.dup2(nowhere, stream.fileno())
        return SIGPIPE_STATUS


def has_no_reader(stream: TextIO) -> bool:
    """Whether a stream leads into a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run(argv: Sequence[str] | None) -> int | None:
    """Run a command, with arguments and status of :func:`main`, whoever reads what it prints."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    command = parser.parse_args(argv[:1]).command
    # What scripts read; argparse names them by it.
    sys.argv = [f'mmlavit {command}', *argv[1:]]
    try:
        require_mmengine()
        if command in SCRIPTS:
            run_tool(command)
            return None
        module = 'handover' if command in ('train', 'test', 'tool') else command
        return importlib.import_module(f'.cli.{module}', __package__).main()
    except (MMLaViTError, ImportError) as error:
        if isinstance(error, ImportError) and error.name != 'mmengine':
            raise
        print(f'mmlavit: {error}', file=sys.stderr)
        return 2


def run_tool(command: str) -> None:
    """Run a script of the folder tools with this process's arguments.

    Args:
        command: The command that it is.

    Raises:
        MMLaViTError: If the wheel leaves it out.
    """
    from .engine.launch import run_script

    script = folder('tools') / SCRIPTS[command]
    if not script.is_file():
        raise MMLaViTError(
            f"'mmlavit {command}' works in a clone of the repository alone, as tools/{script.name}:"
            ' what it runs is not installed with the package'
        )
    run_script(script, sys.argv[0])


if __name__ == '__main__':
    sys.exit(main())
