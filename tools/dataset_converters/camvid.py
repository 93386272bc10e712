"""Converts CamVid to mmseg's layout; docs/datasets.md says more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmlavit.datasets.converters.camvid import LICENCE, plan
from mmlavit.datasets.converters.command import run

SOURCE = "SegNet's tutorial, or its folder CamVid; or a copy with img_dir and ann_dir"


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    return run('camvid', plan, SOURCE, LICENCE, argv)


if __name__ == '__main__':
    sys.exit(main())
