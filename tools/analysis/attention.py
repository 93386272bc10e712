"""Draws what chosen points of an image attend to, in every layer of a LaViT.

Takes any config of mmdet, mmseg and mmpretrain with a LaViT inside, and writes two files into the
folder of --out: a contact sheet IMAGE.png, and IMAGE.html, a page that needs nothing else, in which
a click on a token shows its attention. The image is read by the config's own test pipeline, and
drawn as the network gets it: resized, cropped and padded (grey).
"""

import argparse
import re
import sys
from pathlib import Path

from mmlavit.compat import repair_torchvision
from mmlavit.shipped import config_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', type=config_path, help='config of the model, or the name of one of ours')
    add(
        'checkpoint',
        help="its weights; 'none' for a model as a training starts (init_cfg, or chance with "
        'seed 0)',
    )
    add('image', type=Path, help='image file')
    add(
        '--out',
        type=Path,
        default=Path('attention'),
        metavar='DIR',
        help='folder to write to, made where it is missing (default: attention)',
    )
    add(
        '--stages',
        type=_stage,
        nargs='+',
        metavar='N',
        help='stages to draw, from 1 (default: all on the sheet; in the page the last ones whose '
        'attention takes at most 30 MB, which are all for images up to about 600 x 800)',
    )
    add(
        '--points',
        type=_point,
        nargs='+',
        metavar='X,Y',
        help='query points in pixels of the image as the network gets it (default: its middle, '
        'and a point up and left of it)',
    )
    add(
        '--heads',
        type=_heads,
        default='mean',
        metavar='HEADS',
        help="on the sheet: 'mean' over heads, 'each', or the number of one, from 0 (default: "
        'mean); the page has all',
    )
    add(
        '--stretch',
        action='store_true',
        help='on the sheet: colours from the least attention of a row instead of from 0, to see '
        'faint patterns',
    )
    add('--device', default='cpu', help='where to run the model (default: cpu)')
    add('--force', action='store_true', help='replace files that are there')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw and report."""
    args = parse_args(argv)
    repair_torchvision()
    from mmengine.logging import MMLogger

    from mmlavit.analysis.draw import draw_attention
    from mmlavit.analysis.loading import AnalysisError
    from mmlavit.engine.checkpoint_file import guard_checkpoints
    from mmlavit.engine.launch import LaunchError

    # Hundreds of lines say how each weight was initialized.
    MMLogger.get_instance('mmengine', log_level='WARNING')
    guard_checkpoints()
    try:
        written = draw_attention(
            args.config,
            None if args.checkpoint == 'none' else args.checkpoint,
            args.image,
            args.out,
            stages=None if args.stages is None else [n - 1 for n in args.stages],
            points=args.points,
            heads=args.heads,
            stretch=args.stretch,
            device=args.device,
            force=args.force,
        )
    except (AnalysisError, LaunchError, OSError, ValueError) as error:
        print(f'mmlavit: {error}', file=sys.stderr)
        sys.exit(2)
    for line in written:
        print(line)


def _stage(text: str) -> int:
    if not re.fullmatch('[1-4]', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no stage; it must be one of 1 to 4')
    return int(text)


def _point(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r'(\d+),(\d+)', text)):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no point; it must be X,Y in whole pixels, such as 120,80'
        )
    return int(found[1]), int(found[2])


def _heads(text: str) -> int | str:
    if text in ('mean', 'each'):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} must be 'mean', 'each' or the number of a head, from 0"
        )
    return int(text)


if __name__ == '__main__':
    main()
