"""``mmlavit configs``: lists the configs of the package, copies them, writes new ones."""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..engine.launch import read_scope, require_package
from ..errors import MMLaViTError
from ..shipped import config_path, configs


def make_parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    parser = argparse.ArgumentParser(
        prog='mmlavit configs',
        description='Lists the configs that come with mmlavit, copies them, and writes new ones. '
        'Wherever mmlavit takes a config, it takes the name of one of these; a config of yours may '
        "inherit from 'mmlavit::NAME.py'.",
    )
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    add = commands.add_parser('list', help='list them (also without a command)').add_argument
    add('pattern', nargs='*', default=['*'], metavar='NAME', help="such as 'maskrcnn_*'")
    add = commands.add_parser('path', help='say where one is').add_argument
    add('pattern', nargs='+', metavar='NAME', help='its name')
    add = commands.add_parser(
        'copy',
        help='copy some of them to edit',
        description="Copies configs, whose bases stay in the package ('mmlavit::...').",
    ).add_argument
    add('pattern', nargs='+', metavar='NAME', help="a name, or several as in 'maskrcnn_*'")
    add('--out', type=Path, default=Path(), metavar='DIR', help='where to (default: here)')
    add('--force', action='store_true', help='replace files that are there')
    add = commands.add_parser(
        'new',
        help='write one for your own data',
        description="Writes a config for data of your own: annotations in COCO's format for a "
        'detector, img_dir/ and ann_dir/ with PNG masks for a segmentor, a folder for each class '
        'for a classifier. Names of classes and their number are put wherever the model and the '
        'data need them.',
    ).add_argument
    add('--from', dest='base', required=True, metavar='CONFIG', help='the config to start from')
    add('--data', type=Path, required=True, metavar='DIR', help='folder of the data')
    for split in ('train', 'val'):
        add(
            f'--{split}',
            type=Path,
            metavar='PATH',
            help=f'its {split} annotations (a file, or the folder of masks or classes), if not '
            'found',
        )
        add(f'--{split}-images', type=Path, metavar='DIR', help='folder of their images, likewise')
    add(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='for a segmentor: the classes of the masks, from 0 (default: the lines of '
        'classes.txt in the folder of the data)',
    )
    add('--out', type=Path, metavar='FILE', help='the file to write (default: named after both)')
    add('--force', action='store_true', help='replace a file that is there')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Raises:
        MMLaViTError: If no config has such a name, or a file cannot be written.
    """
    args = make_parser().parse_args(argv)
    if args.command == 'copy':
        for file in copy_configs(args.pattern, args.out, args.force):
            print('written:', file)
        return
    if args.command == 'new':
        new_config(args)
        return
    found = select(args.pattern if args.command else ['*'])
    if args.command == 'path':
        print(*found.values(), sep='\n')
        return
    width = max(map(len, found))
    for name, path in found.items():
        print(f'{name:{width}}  {describe(path)}')


def select(patterns: Sequence[str]) -> dict[str, Path]:
    """Configs that come with the package, by name.

    Args:
        patterns: Names, also with ``*``, ``?`` and ``[...]`` as in a shell.

    Returns:
        Name and file of each.

    Raises:
        MMLaViTError: If a pattern fits none.
    """
    found = {}
    for pattern in patterns:
        names = fnmatch.filter(configs(), pattern.removeprefix('mmlavit::').removesuffix('.py'))
        if not names:
            raise MMLaViTError(f"no config is called {pattern!r}; 'mmlavit configs' lists all")
        found.update({name: configs()[name] for name in names})
    return found


def describe(config: Path) -> str:
    """What a config is, by the first sentence of its comment or, without one, of its base's."""
    text = config.read_text(encoding='utf-8')
    if heir := re.match(r"_base_ = '\./(\w+\.py)'", text):
        return describe(config.parent / heir[1])
    lines = itertools.takewhile(lambda line: line.startswith('#'), text.splitlines())
    comment = ' '.join(line[1:].strip() for line in lines)
    return re.split(r'[.;:] |\.$', comment)[0]


def copy_configs(patterns: Sequence[str], out: Path, force: bool = False) -> list[Path]:
    """Copy configs, with the package's own files as their bases.

    Args:
        patterns: Names, see :func:`select`.
        out: A folder, made where it is missing.
        force: Whether files that are there may be replaced.

    Returns:
        The files written.

    Raises:
        MMLaViTError: If no config has such a name, or a file cannot be written; then none is.
    """
    found = {out / path.name: path for path in select(patterns).values()}
    for file in found:
        check_free(file, force)
    for file, config in found.items():
        text = re.sub(r"(?<=')\./(?=[\w/]+\.py')", 'mmlavit::', config.read_text(encoding='utf-8'))
        write(file, text)
    return list(found)


def new_config(args: argparse.Namespace) -> None:
    """Write a config for data of one's own.

    Args:
        args: What the command line says.

    Raises:
        MMLaViTError: If the data or the config do not serve, or the file cannot be written.
    """
    base, ours = config_path(args.base), configs()
    out = args.out or Path(f'{base.stem}_{args.data.resolve().name}.py')
    check_free(out, args.force)
    scope = read_scope(base)
    require_package(scope)
    name = f'mmlavit::{base.name}' if ours.get(base.stem) == base else str(base.resolve())
    text, table = _KINDS[scope](args, base, name)
    write(out, text)
    width = max(map(len, table))
    print(f'{"":{width}}  train on  validate on')
    for what, (train, val) in table.items():
        print(f'{what:{width}}  {train:8}  {val:11}')
    print('written:', out)


# The text of a config, and how many of what there are to train and to validate on.
Written = tuple[str, dict[str, tuple[int, int]]]


def _for_boxes(args: argparse.Namespace, base: Path, name: str) -> Written:
    from ..datasets.own_coco import (
        Split,
        find_annotations,
        find_images,
        make_config,
        read_annotations,
    )

    _refuse(args, 'classes')
    splits = []
    for split in ('train', 'val'):
        file, images = getattr(args, split), getattr(args, f'{split}_images')
        annotations = read_annotations(file) if file else find_annotations(args.data, split)
        splits.append(Split(annotations, images or find_images(args.data, annotations, split)))
    text = make_config(base, name, args.data, *splits)
    train, val = (split.annotations.counts for split in splits)
    return text, {name: (number, val[name]) for name, number in train.items()}


def _for_masks(args: argparse.Namespace, base: Path, name: str) -> Written:
    from ..datasets.own_folders import (
        CLASSES_FILE,
        Masks,
        find_masks,
        make_masks_config,
        read_classes,
    )

    splits = []
    for split in ('train', 'val'):
        masks, images = getattr(args, split), getattr(args, f'{split}_images')
        if bool(masks) != bool(images):
            raise MMLaViTError(f'--{split} and --{split}-images go together, for masks')
        splits.append(Masks(images, masks) if masks else find_masks(args.data, split))
    classes = args.classes or read_classes(args.data / CLASSES_FILE)
    text = make_masks_config(base, name, args.data, classes, *splits)
    return text, {'images': (len(splits[0]), len(splits[1]))}


def _for_classes(args: argparse.Namespace, base: Path, name: str) -> Written:
    from ..datasets.own_folders import count_images, find_tree, make_tree_config

    _refuse(args, 'classes', 'train_images', 'val_images')
    trees = [getattr(args, split) or find_tree(args.data, split) for split in ('train', 'val')]
    text = make_tree_config(base, name, args.data, *trees)
    train, val = map(count_images, trees)
    return text, {name: (number, val[name]) for name, number in train.items()}


def _refuse(args: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(args, option):
            raise MMLaViTError(
                f'--{option.replace("_", "-")} is not for this config, whose annotations or '
                'folders name the classes and images'
            )


_KINDS: dict[str, Callable[[argparse.Namespace, Path, str], Written]] = {
    'mmdet': _for_boxes,
    'mmseg': _for_masks,
    'mmpretrain': _for_classes,
}


def check_free(file: Path, force: bool) -> None:
    """Refuse to replace a file that nobody gave up.

    Args:
        file: Where something is to be written.
        force: Whether it may replace what is there.

    Raises:
        MMLaViTError: If it may not.
    """
    if file.is_dir() or (file.exists() and not force):
        raise MMLaViTError(f'{file} is there already; write elsewhere, or use --force')


def write(file: Path, text: str) -> None:
    """Write a file, and its folder where that is missing.

    Args:
        file: Where to.
        text: What.

    Raises:
        MMLaViTError: If that is not possible.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')
    except OSError as error:
        raise MMLaViTError(f'cannot write {file}: {error.strerror}') from error
