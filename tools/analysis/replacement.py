r"""Measures what a trained model loses without its attention, and without the parts that make it.

    mmlavit replacement lavit_n_shapes work_dirs/demo-cls/epoch_20.pth

Takes any config of mmdet, mmseg and mmpretrain with a LaViT inside, and a checkpoint of the whole
model. Runs the config's own validation (test, if it has none) once as it is, and once for each of
these in all stages together and in each stage alone:

  even       every token attends to all tokens of its window alike
  identity   every token attends to itself alone
  mean       every image gets the mean attention over all images (of one size) in its place
  ar         no residual from the stage before
  psi_theta  Psi and Theta are the identity

The first three change the attention after the softmax; scores that a layer hands on to the next
stay its own. Prints a table in Markdown of how many points (0 to 100) the metric changes, and says
which parts do nothing that the metric sees. An accuracy has a standard error: of the difference on
the same images.
"""

import argparse
import math
import sys
from pathlib import Path

from mmlavit.compat import repair_torchvision
from mmlavit.shipped import config_path

HOWS = ('even', 'identity', 'mean', 'ar', 'psi_theta')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', type=config_path, help='config of the model, or the name of one of ours')
    add('checkpoint', help='its weights: of the whole model, not of the backbone alone')
    add('--only', nargs='+', choices=HOWS, default=HOWS, metavar='NAME', help='some of the above')
    add('--images', type=int, help='how many images, spread over the data (default: all)')
    add(
        '--metric',
        metavar='NAME',
        help="what counts, by its name in MMEngine's log (default: accuracy/top1, coco/bbox_mAP "
        'and coco/segm_mAP, or mIoU)',
    )
    add(
        '--threshold',
        type=float,
        default=0.5,
        metavar='POINTS',
        help='a smaller change is called nothing (default: 0.5)',
    )
    add('--out', type=Path, metavar='FILE.json', help='file for all numbers')
    add('--force', action='store_true', help='replace a file that is there')
    args = parser.parse_args()
    if args.images is not None and args.images < 1:
        parser.error(f'argument --images: must be at least 1, got {args.images}')
    if not 0 <= args.threshold < math.inf:
        parser.error(f'argument --threshold: must be at least 0, got {args.threshold}')
    return args


def main() -> None:
    """Measure and report."""
    args = parse_args()
    repair_torchvision()
    from mmengine.logging import MMLogger

    from mmlavit.analysis.loading import AnalysisError
    from mmlavit.analysis.replacement_run import draw_table, judge, measure, to_json
    from mmlavit.engine.launch import LaunchError
    from mmlavit.export.onnx import check_free

    # Hundreds of lines say how each weight was initialized.
    MMLogger.get_instance('mmengine', log_level='ERROR')
    try:
        if args.out is not None:
            check_free(args.out, args.force)
        measured = measure(
            args.config,
            args.checkpoint,
            only=list(dict.fromkeys(args.only)),
            images=args.images,
            metric=args.metric,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if args.out is not None:
            args.out.write_text(to_json(measured, args.threshold), encoding='utf-8')
    except (AnalysisError, LaunchError, OSError, ValueError) as error:
        print(f'mmlavit: {error}', file=sys.stderr)
        sys.exit(2)
    print(f'Change in points of {measured.checkpoint}, on {measured.images} images')
    for metric in measured.as_it_is:
        print(f'\n{draw_table(measured, metric)}\n')
        for sentence in judge(measured, metric, args.threshold):
            print('-', sentence)
    for sentence in measured.left_out:
        print('-', sentence)
    if args.out is not None:
        print('written:', args.out)


if __name__ == '__main__':
    main()
