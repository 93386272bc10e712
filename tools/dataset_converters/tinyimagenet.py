"""Converts Tiny ImageNet to a folder for each class; docs/datasets.md says more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmlavit.datasets.converters.command import run
from mmlavit.datasets.converters.tinyimagenet import LICENCE, plan

SOURCE = 'tiny-imagenet-200, folder or zip file; or a copy with train, val and class_names.txt'
CLASSES = {
    'type': int,
    'metavar': 'N',
    'help': "how many, the first of the set's own order (default: all)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    return run('tinyimagenet', plan, SOURCE, LICENCE, argv, classes=CLASSES)


if __name__ == '__main__':
    sys.exit(main())
