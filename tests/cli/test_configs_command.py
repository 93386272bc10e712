"""``mmlavit configs``: what it lists, copies and writes for one's own data, and that it trains."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, assert_ran, read_log, run_command, the_one_line
from mmengine.config import Config

from mmlavit.__main__ import main
from mmlavit.shipped import configs

NAMES = ('bolt', 'nut', 'ring "o"')
# By layout: annotations and images of both splits, in the folder of the data.
LAYOUTS = {
    'coco': {
        'train': ('annotations/instances_train2017.json', 'train2017'),
        'val': ('annotations/instances_val2017.json', 'val2017'),
    },
    'roboflow': {
        'train': ('train/_annotations.coco.json', 'train'),
        'val': ('valid/_annotations.coco.json', 'valid'),
    },
    'images apart': {
        'train': ('train.json', 'images/train'),
        'val': ('test.json', 'images/test'),
    },
    'images together': {'train': ('labels/train.json', 'all'), 'val': ('labels/val.json', 'all')},
}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """``mmlavit configs ARGS`` in ``tmp_path``: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', sys.argv)

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(['configs', *map(str, args)])
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return run


def make_data(folder: Path, layout: str = 'coco', names: tuple[str, ...] = NAMES) -> Path:
    """Two images to train on and one to validate, each with a rectangle of each class."""
    print('seed 0')
    generator = np.random.default_rng(0)
    for split, (file, images) in LAYOUTS[layout].items():
        listed, boxes = [], []
        for index in range(2 if split == 'train' else 1):
            name = f'{split}{index}.jpg'
            (folder / images).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(256, size=(64, 96, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / images / name), pixels)
            listed.append(dict(id=index, file_name=name, height=64, width=96))
            for number in range(len(names)):
                x, y = (int(v) for v in generator.integers(0, 40, size=2))
                boxes.append(
                    dict(
                        id=len(boxes) + 1,
                        image_id=index,
                        category_id=7 + number,
                        bbox=[x, y, 20, 20],
                        area=400,
                        iscrowd=0,
                        segmentation=[[x, y, x + 20, y, x + 20, y + 20, x, y + 20]],
                    )
                )
        categories = [dict(id=7 + n, name=name) for n, name in enumerate(names)]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        content = dict(images=listed, annotations=boxes, categories=categories)
        (folder / file).write_text(json.dumps(content))
    return folder


def change(file: Path, how: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


# ---- Lists and copies ----------------------------------------------------------------------------


def test_list_is_of_all(call):
    code, listed, _ = call()
    assert code == 0
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
    # Each says what it is, also those that only change another's size.
    assert all(len(line.split(maxsplit=1)[1]) > 15 for line in listed.splitlines())
    assert call('list') == (0, listed, '')


def test_list_of_some(call):
    _, listed, _ = call('list', 'semfpn_*', 'lavit_t_imagenet.py')
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == ['semfpn_lavit_s_ade20k', 'semfpn_lavit_t_ade20k', 'lavit_t_imagenet']
    code, out, err = call('list', 'swin')
    assert (code, out) == (2, '') and "'swin'" in the_one_line(err)


def test_path(call):
    files = [ROOT / 'configs' / f'lavit_{size}_imagenet.py' for size in 'ts']
    assert call('path', 'lavit_t_imagenet') == (0, f'{files[0]}\n', '')
    assert call('path', 'mmlavit::lavit_[ts]_imagenet.py')[1].split() == sorted(map(str, files))


def test_a_copy_is_the_same_config(call):
    code, out, _ = call('copy', '*', '--out', 'mine')
    assert code == 0
    for name, path in configs().items():
        assert f'mine/{name}.py' in out
        copied = Path('mine', f'{name}.py')
        # Nothing is left beside it that it could inherit from.
        alone = Path(shutil.copy(copied, Path('alone.py')))
        assert Config.fromfile(alone).to_dict() == Config.fromfile(path).to_dict()


def test_a_copy_replaces_nothing(call):
    name = 'lavit_t_imagenet'
    Path(f'{name}.py').write_text('mine')
    code, out, err = call('copy', 'lavit_*_imagenet')
    assert (code, out) == (2, '') and f'{name}.py' in the_one_line(err) and '--force' in err
    assert [path.name for path in Path().iterdir()] == [f'{name}.py']
    assert Path(f'{name}.py').read_text() == 'mine'
    assert call('copy', name, '--force')[0] == 0
    assert 'LaViT' in Path(f'{name}.py').read_text() or '_base_' in Path(f'{name}.py').read_text()
    assert call('copy', 'lavit_b_imagenet', '--out', f'{name}.py')[0] == 2


# ---- For one's own data --------------------------------------------------------------------------


@pytest.mark.parametrize('layout', LAYOUTS)
def test_new_finds_what_it_needs(call, layout):
    data = make_data(Path('things'), layout)
    code, out, err = call('new', '--from', 'maskrcnn_lavit_s_coco', '--data', data)
    assert (code, err) == (0, '')
    _, _, table = out.partition('validate on\n')
    rows = [line.rsplit(maxsplit=2) for line in table.splitlines()[:-1]]
    assert rows == [[name, '2', '1'] for name in NAMES]
    cfg = Config.fromfile('maskrcnn_lavit_s_coco_things.py')
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    assert cfg.model.roi_head.mask_head.num_classes == 3
    assert 'num_classes' not in cfg.model.rpn_head
    for split, number in (('train', 2), ('val', 1), ('test', 1)):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.metainfo.classes == NAMES
        file, images = LAYOUTS[layout]['val' if split == 'test' else split]
        assert Path(dataset.data_root, dataset.ann_file) == data / file
        found = Path(dataset.data_root, dataset.data_prefix.img)
        assert found == data / images
        if split != 'train':
            assert Path(cfg[f'{split}_evaluator'].ann_file) == data / file
        assert len(list(found.glob(f'{"val" if split == "test" else split}*.jpg'))) == number
    # All else is the base's.
    base = Config.fromfile(configs()['maskrcnn_lavit_s_coco'])
    for key in ('optim_wrapper', 'train_cfg', 'param_scheduler', 'custom_hooks', 'default_hooks'):
        assert cfg[key] == base[key]
    assert cfg.train_dataloader.dataset.pipeline == base.train_dataloader.dataset.pipeline


def test_new_from_wrapped_data_and_from_ones_own_config(call, tmp_path):
    """RetinaNet's 3x schedule repeats its data set; a cascade has its heads in a list."""
    data = make_data(tmp_path / 'things')
    assert call('new', '--from', 'retinanet_lavit_t_3x_coco', '--data', data)[0] == 0
    cfg = Config.fromfile('retinanet_lavit_t_3x_coco_things.py')
    assert cfg.model.bbox_head.num_classes == 3
    repeated = cfg.train_dataloader.dataset
    assert repeated.type == 'RepeatDataset' and 'ann_file' not in repeated
    assert repeated.dataset.metainfo.classes == NAMES
    Path('cascade.py').write_text(
        "_base_ = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'\n"
        "model = dict(backbone=dict(init_cfg=None))\ndefault_scope = 'mmdet'\n"
    )
    options = ['--data', data, '--out', 'sub/cascade_things.py']
    code, _, err = call('new', '--from', 'cascade.py', *options)
    assert code == 0, err
    head = Config.fromfile('sub/cascade_things.py').model.roi_head
    assert [h.num_classes for h in head.bbox_head] == [3, 3, 3]
    assert [h.bbox_coder.target_stds[0] for h in head.bbox_head] == [0.1, 0.05, 0.033]
    assert head.mask_head.num_classes == 3


def test_new_with_everything_named(call, tmp_path):
    """Where nothing is in its usual place, and one file serves for both splits."""
    data = make_data(tmp_path / 'elsewhere', 'images together')
    (tmp_path / 'things').mkdir()
    named = ['--train', data / 'labels/train.json', '--train-images', data / 'all']
    named += ['--val', data / 'labels/train.json', '--val-images', data / 'all']
    options = ['--from', 'maskrcnn_lavit_n_shapes', '--data', 'things', *named]
    assert call('new', *options, '--out', 'a.py')[0] == 0
    cfg = Config.fromfile('a.py')
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert Path(dataset.data_root, dataset.ann_file) == data / 'labels/train.json'
        assert Path(dataset.data_root, dataset.data_prefix.img) == data / 'all'
    code, _, err = call('new', *options, '--out', 'a.py')
    assert code == 2 and '--force' in the_one_line(err)


TRAIN, VAL = (LAYOUTS['coco'][split][0] for split in ('train', 'val'))


def changed(file: str, how: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda data: change(data / file, how)


def two_files_to_train_on(data: Path) -> None:
    shutil.copy(data / TRAIN, data / 'train_2.json')
    (data / TRAIN).rename(data / 'train.json')


@pytest.mark.parametrize(
    'spoil, pieces',
    [
        (shutil.rmtree, ['no folder', 'things']),
        (lambda data: (data / VAL).unlink(), ['things', "'val' or 'test'", '--val FILE']),
        (two_files_to_train_on, ['several annotation files for train', 'train_2.json', '--train']),
        (lambda data: (data / TRAIN).write_text('[]'), ['no annotation file', "'train'"]),
        (changed(TRAIN, lambda c: c.update(images=[])), ['instances_train2017', 'no image']),
        (changed(TRAIN, lambda c: c.update(categories=[])), ['no category']),
        (
            changed(TRAIN, lambda c: c['categories'][0].update(name='nut')),
            ['several categories', "'nut'"],
        ),
        (changed(VAL, lambda c: c['categories'].reverse()), ['val2017.json', 'same order']),
        (changed(VAL, lambda c: c['categories'].pop()), ['instances_val2017.json', 'nut']),
        (
            changed(TRAIN, lambda c: c['annotations'][1].pop('segmentation')),
            ['instances_train2017.json', 'segmentation', 'retinanet'],
        ),
        (lambda data: (data / 'train2017/train1.jpg').unlink(), ['1 of 2 images', 'train1.jpg']),
        (lambda data: shutil.rmtree(data / 'val2017'), ['val0.jpg', '--val-images DIR']),
    ],
)
def test_new_refuses(call, spoil, pieces):
    spoil(make_data(Path('things')))
    code, out, err = call('new', '--from', 'maskrcnn_lavit_n_shapes', '--data', 'things')
    line = the_one_line(err)
    assert (code, out) == (2, '') and line.startswith('mmlavit: ')
    assert [piece for piece in pieces if piece not in line] == [], line
    assert not list(Path().glob('*.py'))


@pytest.mark.parametrize('base, piece', [('upernet_lavit_n_shapes', 'mmseg'), ('no', 'not found')])
def test_new_is_for_detectors(call, base, piece):
    code, _, err = call('new', '--from', base, '--data', make_data(Path('things')))
    assert code == 2 and piece in the_one_line(err)


@pytest.mark.slow
def test_what_is_new_trains(tmp_path):
    """In a process of its own: written, trained for a step, tested, and used."""
    make_data(tmp_path / 'things')
    new = ['configs', 'new', '--from', 'maskrcnn_lavit_s_coco', '--data', 'things']
    assert_ran(run_command(*new, '--out', 'mine.py', cwd=tmp_path))
    # In minutes, on a CPU.
    (tmp_path / 'small.py').write_text(
        "_base_ = './mine.py'\n"
        "model = dict(backbone=dict(arch='nano'), neck=dict(in_channels=[32, 64, 160, 320]))\n"
        'default_hooks = dict(logger=dict(interval=1))\n'
        'train_cfg = dict(max_epochs=1)\n'
    )
    options = ['--cfg-options', 'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0']
    options += ['train_dataloader.persistent_workers=False']
    options += ['val_dataloader.persistent_workers=False']
    for step, split in ((2, 'train'), (1, 'val')):
        options.append(f'{split}_dataloader.dataset.pipeline.{step}.scale=(96,64)')
    assert_ran(run_command('train', 'small.py', '--work-dir', 'run', *options, cwd=tmp_path))
    (losses,) = [line for line in read_log(tmp_path / 'run') if 'loss_mask' in line]
    assert all(math.isfinite(v) for k, v in losses.items() if k.startswith('loss'))
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    images = tmp_path / 'things' / 'val2017'
    assert_ran(run_command('infer', 'small.py', checkpoint, images, cwd=tmp_path))
    found = json.loads((tmp_path / 'predictions' / 'predictions.json').read_text())
    assert [c['name'] for c in found['categories']] == list(NAMES)
