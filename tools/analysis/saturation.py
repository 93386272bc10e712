r"""Measures how alike the attention of a model's layers is, and what it looks like, over images.

    mmlavit saturation lavit_n_shapes work_dirs/demo-cls/epoch_20.pth
    mmlavit saturation maskrcnn_lavit_s_coco \
        --model Swin-T mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py

Takes configs of mmdet, mmseg and mmpretrain whose backbone is a LaViT, a Swin or a PVT, and runs
the backbones over images of the first config's validation data, as its data_preprocessor makes
them. Without a checkpoint weights are random, and the figure says so: there, less attention is the
attention of the layer before by construction (Psi and Theta start as the identity).

Writes saturation.png, saturation.csv (a line for each layer) and saturation.json (all numbers):

  cosine       of two layers' attention in a window, head by head; 1 is the same, but two maps that
               are nearly even have nearly 1 whatever they tell
  CKA          whether tokens that attend alike in one layer do so in the other; 1 is the same up to
               scale and rotation, 0 unrelated; heads need not correspond
  diagonality  how much more a token attends to itself than evenly; 0 is even, 1 nothing else
  symmetry     1 if all attention is mutual, 0 if all goes one way
  entropy      1 if a token attends to all keys alike, 0 if to one of them

Swin's windows are shifted in every second layer: the cosine of layers with different windows is
that of pairs of tokens which share a window in both. PVT's maps are of all tokens and few merged
keys: they have no diagonality and no symmetry, but in the last stage. Heads of different layers
correspond in LaViT alone; in the others the cosine of head h and head h is a low estimate.
"""

import argparse
import sys
from pathlib import Path

from mmlavit.compat import repair_torchvision


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='config of the model: a file, the name of one of ours, or PACKAGE::NAME')
    add('checkpoint', nargs='?', help='its weights; without, random ones')
    add('--name', help='what to call the model (default: the name of its config)')
    add(
        '--model',
        nargs='+',
        action='append',
        default=[],
        metavar=('NAME CONFIG', 'CHECKPOINT'),
        help='another model, run on the same images; may be given several times',
    )
    add('--images', type=int, default=64, help='how many images (default: 64)')
    add('--out', type=Path, default=Path('saturation'), help='folder (default: saturation)')
    add('--seed', type=int, default=0, help='of random weights (default: 0)')
    add('--device', default='cpu', help='where the backbones run (default: cpu)')
    add('--force', action='store_true', help='replace files that are there')
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'argument --images: must be at least 1, got {args.images}')
    for model in args.model:
        if len(model) not in (2, 3):
            parser.error(f'argument --model: takes NAME CONFIG [CHECKPOINT], got {model}')
    return args


def main() -> None:
    """Measure, write and report."""
    args = parse_args()
    repair_torchvision()
    from mmengine.logging import MMLogger

    from mmlavit.analysis.loading import AnalysisError
    from mmlavit.analysis.saturation_run import Model, compare, output_files, write
    from mmlavit.engine.launch import LaunchError

    # Hundreds of lines say how each weight was initialized.
    MMLogger.get_instance('mmengine', log_level='ERROR')
    models = [Model(args.name or Path(args.config).stem, args.config, args.checkpoint)]
    models += [Model(*model) for model in args.model]
    try:
        files = output_files(args.out, args.force)
        measured = compare(models, args.images, seed=args.seed, device=args.device)
        write(measured, files)
    except (AnalysisError, LaunchError, OSError, ValueError) as error:
        print(f'mmlavit: {error}', file=sys.stderr)
        sys.exit(2)
    print('written:', ', '.join(map(str, files)))


if __name__ == '__main__':
    main()
