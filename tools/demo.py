"""Trains, tests and draws Mask R-CNN with a LaViT backbone on the shapes data; ``make demo``."""

import subprocess
import sys

from mmlavit.demo import MASK_RCNN, run

if __name__ == '__main__':
    try:
        run(MASK_RCNN)
    except subprocess.CalledProcessError as error:
        print(f'demo: {" ".join(error.cmd)} failed; its output is above', file=sys.stderr)
        sys.exit(error.returncode)
