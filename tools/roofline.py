"""Forecasts what LaViT-S and its peers take on a GPU, from operators counted without one.

Each operator takes as long as its bytes need at the bandwidth of the GPU's memory, or its products
at the GPU's peak, whichever is longer. docs/gpu_forecast.md has the tables and what they leave out.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from repository.roofline import forecast

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'gpu_forecast.md'


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--write', action='store_true', help='put the tables into docs/gpu_forecast.md'
    )
    args = parser.parse_args()
    # What the surrounding packages say while they build their models.
    warnings.simplefilter('ignore')
    text = '\n'.join(forecast.tables())
    if args.write:
        page = PAGE.read_text(encoding='utf-8')
        PAGE.write_text(forecast.fill_in(page, text), encoding='utf-8')
        print('written:', PAGE)
    else:
        print(text)


if __name__ == '__main__':
    main()
