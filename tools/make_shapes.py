"""Writes the made-up shapes data set as COCO, ADE20K and ImageNet: ``mmlavit.datasets.shapes``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmlavit.datasets.shapes import ShapesRecipe, make_shapes, read_manifest


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    default = ShapesRecipe()
    parser = argparse.ArgumentParser(
        description='Write a small made-up data set of circles, squares and triangles, the same '
        'images as COCO instances, ADE20K segmentation and an ImageNet folder tree.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', default='data/shapes', help='output directory')
    parser.add_argument(
        '--num-train', type=int, default=default.num_train, help='training images, at least 1'
    )
    parser.add_argument(
        '--num-val', type=int, default=default.num_val, help='validation images, at least 1'
    )
    parser.add_argument(
        '--size', type=int, default=default.size, help='side of the images in pixels, at least 32'
    )
    parser.add_argument(
        '--max-shapes', type=int, default=default.max_shapes, help='most shapes in one image'
    )
    parser.add_argument(
        '--seed', type=int, default=default.seed, help='another seed, other images; at least 0'
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace the data set in the output directory if this tool wrote it',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the data set and says what is where.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is one line on stderr.
    """
    args = parse_args(argv)
    try:
        recipe = ShapesRecipe(args.num_train, args.num_val, args.size, args.max_shapes, args.seed)
        written = make_shapes(args.out, recipe, overwrite=args.overwrite)
    except (OSError, ValueError) as error:
        print(f'make_shapes: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('make_shapes: interrupted; the same command again finishes it', file=sys.stderr)
        return 130
    print(f'{args.out}: {"written" if written else "already complete, nothing to do"}')
    print('  coco/      instances; ade/ segmentation; imagenet/ folders by largest shape')
    for split, counts in read_manifest(args.out)['counts'].items():
        for what, by_class in counts.items():
            total = sum(by_class.values())
            each = ', '.join(f'{number} {name}' for name, number in by_class.items())
            print(f'  {split:5} {total:6} {what:9} ({each})')
    return 0


if __name__ == '__main__':
    sys.exit(main())
