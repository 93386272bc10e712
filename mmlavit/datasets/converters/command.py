"""The command line that the converters share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .conversion import MANIFEST, Conversion, ConversionError, write


def run(
    name: str,
    plan: Callable[..., Conversion],
    source: str,
    licence: str,
    argv: Sequence[str] | None = None,
    **options: dict[str, Any],
) -> int:
    """Convert a download and say what is where.

    Args:
        name: The data set's, as in ``data/NAME``.
        plan: The converter's function of that name.
        source: What the help says of the argument of that name.
        licence: Of the data set.
        argv: Arguments without the program's name; None means those of the process.
        options: What ``plan`` takes beside the download: how ``argparse`` is to read each.

    Returns:
        The exit code: 0, or 2 after an error, which is one line on stderr.
    """
    parser = argparse.ArgumentParser(
        description=(sys.modules[plan.__module__].__doc__ or '').replace('::\n', ':\n'),
        epilog=f'Licence of the data: {licence}. docs/datasets.md says where to get them.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('source', help=source)
    default = f'data/{name}'
    parser.add_argument('--out', default=default, help=f'output directory (default: {default})')
    for option, how in options.items():
        parser.add_argument(f'--{option}', **how)
    args = parser.parse_args(argv)
    try:
        chosen = {option: getattr(args, option) for option in options}
        written = write(plan(args.source, **chosen), args.out)
    except (ConversionError, OSError, ValueError) as error:
        print(f'{name}: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{name}: interrupted; the same command again goes on', file=sys.stderr)
        return 130
    print(f'{args.out}: {"written" if written else "already complete, nothing to do"}')
    manifest = json.loads(Path(args.out, MANIFEST).read_text(encoding='utf-8'))
    for split, counts in manifest['counts'].items():
        print(f'  {split:9}' + ', '.join(f'{number} {what}' for what, number in counts.items()))
    print(f'  licence: {licence}')
    return 0
