"""Exports a model to ONNX, for any number of images of any size, and compares it with PyTorch.

Takes any config of mmdet, mmseg and mmpretrain, and exports its backbone; with --head the whole
classifier (scores), segmentor (logits at the size of the image) or one-stage detector (boxes and
scores, before non-maximum suppression). Images come to the file normalized as the config's
data_preprocessor says; with --preprocess the file does that itself, to uint8 images. A file that is
reported as written has agreed with PyTorch at sizes that the exporter had not seen: values to 1e-4
of the largest, boxes to 0.01 pixels, labels on 99.9 % of the pixels.
"""

import argparse
import sys
import warnings
from pathlib import Path

from mmlavit.compat import repair_torchvision
from mmlavit.shipped import config_path


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', type=config_path, help='config of the model, or the name of one of ours')
    add('checkpoint', nargs='?', help='its weights; without, as a training starts')
    add('--out', type=Path, required=True, metavar='FILE.onnx', help='the file to write')
    add(
        '--size',
        type=int,
        nargs=2,
        default=(224, 320),
        metavar=('H', 'W'),
        help='height and width of the example to record (default: 224 320)',
    )
    add('--opset', type=int, help="version of ONNX's operators (default: torch's choice)")
    add('--fixed', action='store_true', help='one image of that size alone; faster to export')
    add('--head', action='store_true', help='the whole model instead of its backbone')
    add('--labels', action='store_true', help='segmentors: the class of each pixel, not logits')
    add('--preprocess', action='store_true', help='the file takes uint8 images, not normalized')
    add('--force', action='store_true', help='replace a file that is there')
    return parser.parse_args()


def main() -> None:
    """Export and report."""
    args = parse_args()
    repair_torchvision()
    from mmengine.logging import MMLogger

    from mmlavit.engine.launch import LaunchError
    from mmlavit.export.exportable import ExportError, build_model
    from mmlavit.export.onnx import check_free, export_onnx, require_exporter

    # The toolboxes warn of their own defaults.
    warnings.filterwarnings('ignore', module=r'mm(det|seg|pretrain)\.')
    # Hundreds of lines say how each weight was initialized.
    MMLogger.get_instance('mmengine', log_level='WARNING')
    try:
        check_free(args.out, args.force)
        require_exporter()
        model = build_model(
            args.config,
            args.checkpoint,
            args.head,
            preprocess=args.preprocess,
            labels=args.labels,
        )
        differences = export_onnx(
            model,
            args.out,
            tuple(args.size),
            opset=args.opset,
            dynamic=not args.fixed,
            force=args.force,
        )
    except (ExportError, LaunchError, OSError, ValueError) as error:
        print(f'mmlavit: {error}', file=sys.stderr)
        sys.exit(2)
    for shape, found in differences.items():
        shown = ', '.join(f'{difference:.1e} {unit}' for unit, difference in found.items())
        print(f'{" x ".join(map(str, shape))}: differs from PyTorch by {shown}')
    print('written:', args.out)


if __name__ == '__main__':
    main()
