r"""Makes the files that are released out of a checkpoint of a training.

    python tools/publish_model.py work_dirs/demo-cls/epoch_20.pth released \
        --log work_dirs/demo-cls/*/vis_data/2*.json --data 'made-up shapes' --data-licence CC0

Writes weights as NAME_DATE-HASH.pth and as .safetensors, a model card NAME_DATE-HASH.md, and, if
--log names it, the training's log NAME_DATE-HASH.log.json into the folder; none of them replaces
another file. Optimizer, paths, users and names of machines stay behind; what was changed in the
config is printed. Both files of weights load through init_cfg, load_from and the toolboxes'
inferencers. The entry for a model index is printed last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmlavit.compat import repair_torchvision


def metric(text: str) -> tuple[str, float]:
    """Read ``NAME=VALUE``."""
    name, separator, value = text.rpartition('=')
    try:
        if not (separator and name.strip()):
            raise ValueError
        return name.strip(), float(value)
    except ValueError:
        message = f'must be NAME=NUMBER, such as accuracy/top1=58.0, got {text!r}'
        raise argparse.ArgumentTypeError(message) from None


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('checkpoint', type=Path, help='checkpoint of a training')
    add('folder', type=Path, help='where the files go')
    add('--backbone', action='store_true', help='the backbone alone, for init_cfg')
    add('--half', action='store_true', help='numbers in half precision: files of half the size')
    add(
        '--ema',
        action=argparse.BooleanOptionalAction,
        help='where EMAHook averaged weights: the averages, or those of the last step',
    )
    add('--name', help='name of the model (default: of its config)')
    add(
        '--drop',
        nargs='+',
        default=[],
        metavar='SETTING',
        help='settings to leave out of the config, such as visualizer',
    )
    add(
        '--public',
        nargs='+',
        default=[],
        metavar='WORD',
        help='words that may be known, although a user or a machine here is called so',
    )
    card = parser.add_argument_group('for the model card').add_argument
    card('--data', default='', help='what it was trained on, and where that is found')
    card('--data-licence', default='', help='on what terms the data may be used')
    card('--command', default='', help='the command that trained it')
    card('--hardware', default='', help='what that ran on')
    card(
        '--metric',
        type=metric,
        action='append',
        default=[],
        metavar='NAME=NUMBER',
        help="a figure on the test set, by the toolbox's name; may be given several times",
    )
    card('--test-log', metavar='FILE', help='figures on the test set: TIME/TIME.json of a test')
    card(
        '--log',
        nargs='+',
        default=[],
        metavar='FILE',
        help='TIME/vis_data/TIME.json of the training, all of them in their order if it was '
        'resumed: the log is published beside the weights, and the card says the figures of the '
        'validation at this checkpoint and the time that the training took',
    )
    args = parser.parse_args()
    if args.test_log and args.metric:
        parser.error('argument --metric: not allowed with argument --test-log, which has them all')
    return args


def main() -> None:
    """Publish and report."""
    args = parse_args()
    repair_torchvision()
    import yaml

    from mmlavit.errors import MMLaViTError
    from mmlavit.export.model_card import (
        Facts,
        metafile_entry,
        model_card,
        read_test_log,
        read_training_log,
        training_log,
    )
    from mmlavit.export.privacy import Privacy
    from mmlavit.export.publish import prepare, write

    try:
        privacy = Privacy.of_this_machine(args.drop, args.public)
        release = prepare(
            args.checkpoint,
            backbone=args.backbone,
            half=args.half,
            ema=args.ema,
            name=args.name,
            privacy=privacy,
        )
        validation, point, seconds = (
            read_training_log(args.log, release.meta) if args.log else ({}, '', None)
        )
        files = release.files()
        stem = next(name for name in files).removesuffix('.pth')
        beside = {f'{stem}.log.json': training_log(args.log)} if args.log else {}
        facts = Facts(
            data=args.data,
            data_licence=args.data_licence,
            command=args.command,
            hardware=args.hardware,
            metrics=read_test_log(args.test_log) if args.test_log else dict(args.metric),
            validation=validation,
            validated_at=point,
            seconds=seconds,
            log=next(iter(beside), ''),
        )
        facts.check(privacy)
        entry = metafile_entry(release, files, facts)
        beside[f'{stem}.md'] = model_card(release, files, facts).encode()
        # The weights last: where they are, all is there.
        paths = write(args.folder, {**beside, **dict(reversed(files.items()))})
    except (MMLaViTError, ImportError, OSError) as error:
        print(f'mmlavit: {error}', file=sys.stderr)
        sys.exit(2)
    for change in dict.fromkeys(release.changes):
        now = 'left out' if change.after is None else f'now {change.after!r}'
        print(f'config: {change.setting}, was {change.before!r}: {now}')
    for path in paths:
        print(f'written: {path}')
    print('entry for checkpoints/metafile.yml:')
    print(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=100), end='')


if __name__ == '__main__':
    main()
