"""``mmlavit infer``: runs the model of a config on images or a video."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..compat import repair_torchvision
from ..errors import MMLaViTError
from ..shipped import config_path, weights_of

_DESCRIPTION = """
Runs a model on an image, the images of a folder, or a video, and writes pictures and what it found:

    mmlavit infer CONFIG CHECKPOINT image.jpg
    mmlavit infer CONFIG CHECKPOINT folder --out found --device cuda
    mmlavit infer maskrcnn_lavit_n_shapes work_dirs/demo/epoch_3.pth video.mp4

It takes any config of mmdet, mmseg and mmpretrain. Into the folder of --out go

    pictures/          what was found, drawn: a picture for each image, or a video
    predictions.json   detectors: a data set in COCO's format, with a score for each box and masks
                       (RLE) where there are some; category ids are the model's classes, from 1
                       segmentors: the classes, and which file in labels/ belongs to which image
                       classifiers: the five best classes of each image
    labels/            segmentors: an image of class numbers (grey values, from 0) for each image
"""


def make_parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(
        prog='mmlavit infer',
        usage='mmlavit infer [OPTIONS] CONFIG [CHECKPOINT] INPUT',
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', type=config_path, metavar='CONFIG', help='config, or the name of one of ours')
    add(
        'checkpoint',
        nargs='?',
        metavar='CHECKPOINT',
        help="its weights; 'none' for a model as a training starts. May be left out for a config "
        'that comes with weights',
    )
    add('input', type=Path, metavar='INPUT', help='an image, a folder of images, or a video')
    add(
        '--out',
        type=Path,
        default=Path('predictions'),
        metavar='DIR',
        help='folder to write to, new or empty (default: predictions)',
    )
    add(
        '--threshold',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='boxes that score more are drawn and counted; the file has all (default: 0.3)',
    )
    add('--no-pictures', action='store_true', help='draw nothing')
    add(
        '--batch-size',
        type=int,
        default=1,
        metavar='N',
        help='images at a time; sensible for images of one size (default: 1)',
    )
    add('--device', help='where the model runs (default: a GPU where there is one)')
    add(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='changes of the config, as in training',
    )
    add('--force', action='store_true', help='write into a folder that is not empty')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Returns:
        The exit status: 0, or 2 if images of a folder could not be read.

    Raises:
        MMLaViTError: If the model cannot be built or run, or nothing can be written.
    """
    # Options may stand between the checkpoint and the input.
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    if args.batch_size < 1:
        parser.error(f'argument --batch-size: must be at least 1, got {args.batch_size}')
    checkpoint = args.checkpoint or weights_of(args.config)
    if checkpoint is None:
        raise MMLaViTError(
            f'{args.config} comes without weights: give a checkpoint before the input, or '
            "'none' for a model that is not trained (those of the model zoo are in the folder "
            'checkpoints of the repository, and in no wheel)'
        )
    if args.out.exists() and not args.out.is_dir():
        raise MMLaViTError(f'--out {args.out} is a file; name a folder')
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise MMLaViTError(f'--out {args.out} is not empty; name another folder, or use --force')
    repair_torchvision()
    from mmengine.logging import MMLogger

    from ..inference.models import load_predictor
    from ..inference.run import infer
    from ..inference.sources import open_source

    # Hundreds of lines say how each weight was initialized.
    MMLogger.get_instance('mmengine', log_level='ERROR')
    toolboxes = r'(mmengine|mmcv|mmdet|mmseg|mmpretrain)(\.|$)'
    warnings.filterwarnings('ignore', category=UserWarning, module=toolboxes)
    source = open_source(args.input)
    try:
        predictor = load_predictor(
            args.config,
            None if checkpoint == 'none' else checkpoint,
            device=args.device,
            threshold=args.threshold,
            options=args.cfg_options,
        )
        written, unreadable = infer(
            predictor,
            source,
            args.out,
            batch_size=args.batch_size,
            pictures=not args.no_pictures,
            report=lambda line: print(line, flush=True),
        )
    except OSError as error:
        raise MMLaViTError(str(error)) from error
    print('written:', ', '.join(map(str, written)))
    if source.left_out:
        files = 'file that is no image' if source.left_out == 1 else 'files that are no images'
        print(f'left out: {source.left_out} {files}', file=sys.stderr)
    if unreadable:
        print(f'mmlavit: cannot read {", ".join(unreadable)}', file=sys.stderr)
    return 2 if unreadable else 0
