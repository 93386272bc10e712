"""Converts BCCD, images of blood cells, to COCO's format; docs/datasets.md says more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmlavit.datasets.converters.bccd import LICENCE, plan
from mmlavit.datasets.converters.command import run

SOURCE = 'the repository, or its folder BCCD; or a copy with images and annotations'


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    return run('bccd', plan, SOURCE, LICENCE, argv)


if __name__ == '__main__':
    sys.exit(main())
