"""Trains UPerNet on the shapes data with and without a pretrained backbone and plots both."""

import argparse
from pathlib import Path

from repository.pretraining_curves import compare

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('docs/pretraining.png'), help='picture')
    print(compare(parser.parse_args().out))
