"""Converts the 2018 Data Science Bowl to COCO's format; docs/datasets.md says more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmlavit.datasets.converters.command import run
from mmlavit.datasets.converters.dsb2018 import LICENCE, plan

SOURCE = (
    'the folder with stage1_train, stage1_test and stage1_solution.csv; or a copy with images and '
    'annotations'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    return run('dsb2018', plan, SOURCE, LICENCE, argv)


if __name__ == '__main__':
    sys.exit(main())
