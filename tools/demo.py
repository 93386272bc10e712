"""Trains, tests and draws a model with a LaViT backbone on the shapes data; ``make demo``."""

import argparse
import subprocess
import sys

from repository.demo import DEMOS, run

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'task',
        nargs='?',
        choices=DEMOS,
        default='det',
        help='Mask R-CNN, UPerNet or a classifier (default: det)',
    )
    try:
        run(DEMOS[parser.parse_args().task])
    except subprocess.CalledProcessError as error:
        print(f'demo: {" ".join(error.cmd)} failed; its output is above', file=sys.stderr)
        sys.exit(error.returncode)
