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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    'base, piece',
    [('upernet_lavit_n_shapes', 'img_dir/train'), ('lavit_n_shapes', 'train'), ('no', 'not found')],
)
def test_new_names_what_is_not_there(call, base, piece):
    """Data of another kind, and no such config."""
    code, _, err = call('new', '--from', base, '--data', make_data(Path('things'), 'images apart'))
    assert code == 2 and piece in the_one_line(err)
    assert not list(Path().glob('*.py'))


def test_new_for_mask2former(call, tmp_path):
    """Whose head counts things and stuff, and weighs the classes and no object one by one."""
    data = make_data(tmp_path / 'things')
    Path('base.py').write_text(
        "_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'\n"
        "model = dict(backbone=dict(init_cfg=None))\ndefault_scope = 'mmdet'\n"
    )
    code, _, err = call('new', '--from', 'base.py', '--data', data, '--out', 'mine.py')
    assert code == 0, err
    model = Config.fromfile('mine.py').model
    assert model.panoptic_head.num_things_classes == 3
    assert model.panoptic_fusion_head.num_things_classes == 3
    assert model.panoptic_head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]


# ---- Masks of pixels, for mmseg ------------------------------------------------------------------

PIXELS = ('nothing', 'bolt', 'nut')


def make_masks(folder: Path, layout: str = '{kind}_dir/{split}', sides=(64, 96)) -> Path:
    """Three images to train on and two to validate, of which each has all classes."""
    print('seed 0')
    generator = np.random.default_rng(0)
    for split, number in (('train', 3), ('val', 2)):
        for index in range(number):
            mask = np.zeros(sides, np.uint8)
            mask[5:30, 5:30], mask[30:60, 40:60], mask[-3:] = 1, 2, 255
            pixels = generator.integers(256, size=(*sides, 3), dtype=np.uint8)
            for kind, picture, suffix in (('img', pixels, 'jpg'), ('ann', mask, 'png')):
                file = folder / layout.format(kind=kind, split=split) / f'{index}.{suffix}'
                file.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(file), picture)
    (folder / 'classes.txt').write_text('\n'.join(PIXELS) + '\n')
    return folder


@pytest.mark.parametrize('base', ['upernet_lavit_n_shapes', 'semfpn_lavit_t_ade20k'])
def test_new_for_masks(call, base):
    data = make_masks(Path('things'))
    code, out, err = call('new', '--from', base, '--data', data)
    assert (code, err) == (0, '') and out.split('images')[1].split()[:2] == ['3', '2']
    cfg, old = Config.fromfile(f'{base}_things.py'), Config.fromfile(configs()[base])
    assert cfg.model.decode_head.num_classes == 3
    assert not cfg.model.decode_head.loss_decode.get('class_weight')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        there = 'val' if split == 'test' else split
        assert Path(dataset.data_root, dataset.data_prefix.img_path) == data / 'img_dir' / there
        prefix = dataset.data_prefix.seg_map_path
        assert Path(dataset.data_root, prefix) == data / 'ann_dir' / there
        assert dataset.metainfo.classes == PIXELS and not dataset.get('reduce_zero_label')
        steps = [step.type for step in dataset.pipeline]
        assert steps == [step.type for step in old[f'{split}_dataloader'].dataset.pipeline]
        assert not any(step.get('reduce_zero_label') for step in dataset.pipeline)
    # Images of several sizes go one by one.
    assert cfg.val_dataloader.batch_size == 1
    assert cfg.optim_wrapper == old.optim_wrapper and cfg.train_cfg == old.train_cfg


def test_new_for_masks_with_everything_named(call, tmp_path):
    data = make_masks(tmp_path / 'elsewhere', '{split}/{kind}s')
    (data / 'classes.txt').unlink()
    named = []
    for split in ('train', 'val'):
        named += [f'--{split}', data / split / 'anns', f'--{split}-images', data / split / 'imgs']
    (tmp_path / 'things').mkdir()
    options = ['--from', 'upernet_lavit_n_camvid', '--data', 'things', '--out', 'a.py']
    assert call('new', *options, *named, '--classes', *PIXELS)[0] == 0
    dataset = Config.fromfile('a.py').train_dataloader.dataset
    found = Path(dataset.data_root, dataset.data_prefix.seg_map_path)
    assert found == data / 'train' / 'anns' and dataset.metainfo.classes == PIXELS


@pytest.mark.parametrize(
    'spoil, options, pieces',
    [
        (lambda data: (data / 'classes.txt').unlink(), [], ['classes.txt', '--classes']),
        (lambda data: (data / 'classes.txt').write_text(''), [], ['classes.txt', 'no class']),
        (lambda data: None, ['--classes', 'a', 'b'], ['label 2', 'num_classes=2']),
        (lambda data: None, ['--classes', 'a', 'b', 'a'], ['several classes', "'a'"]),
        (lambda data: None, ['--train', 'ann_dir'], ['--train', '--train-images']),
        (lambda data: (data / 'ann_dir/val/1.png').unlink(), [], ['1 of 2', '1.jpg', '1.png']),
        (lambda data: shutil.rmtree(data / 'ann_dir/val'), [], ['ann_dir/val', '--val-images']),
        (
            lambda data: (data / 'img_dir/val/1.jpg').rename(data / 'img_dir/val/1.png'),
            [],
            ['img_dir/val', '.jpg, .png'],
        ),
    ],
)
def test_new_refuses_masks(call, spoil, options, pieces):
    spoil(make_masks(Path('things')))
    base = ['--from', 'upernet_lavit_n_shapes', '--data', 'things']
    code, out, err = call('new', *base, *options)
    line = the_one_line(err)
    assert (code, out) == (2, '')
    assert [piece for piece in pieces if piece not in line] == [], line
    assert not list(Path().glob('*.py'))


# ---- A class a folder, for mmpretrain ------------------------------------------------------------


def make_tree(folder: Path, names: tuple[str, ...] = ('bolt', 'nut')) -> Path:
    for split, number in (('train', 2), ('validation', 1)):
        for name in names:
            for index in range(number):
                file = folder / split / name / f'{index}.png'
                file.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(file), np.full((80, 90, 3), 100, np.uint8))
    return folder


@pytest.mark.parametrize('base', ['lavit_n_shapes', 'lavit_t_imagenet'])
def test_new_for_folders(call, base):
    data = make_tree(Path('things'))
    code, out, _ = call('new', '--from', base, '--data', data)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ['bolt', '2', '1'] in rows and ['nut', '2', '1'] in rows
    cfg, old = Config.fromfile(f'{base}_things.py'), Config.fromfile(configs()[base])
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 2
    # There are no five best of two.
    assert set(cfg.val_evaluator.topk) == {1} == set(cfg.test_evaluator.topk)
    for split, folder in (('train', 'train'), ('val', 'validation'), ('test', 'validation')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert Path(dataset.data_root, dataset.data_prefix) == data / folder
        assert dataset.pipeline == old[f'{split}_dataloader'].dataset.pipeline
        assert dataset.metainfo.classes == ('bolt', 'nut')


@pytest.mark.parametrize(
    'spoil, options, pieces',
    [
        (lambda data: shutil.rmtree(data / 'train'), [], ['no folder train', '--train DIR']),
        (lambda data: shutil.rmtree(data / 'train/nut'), [], ['validation', "['bolt']"]),
        (lambda data: (data / 'validation/nut/0.png').unlink(), [], ['nut', 'no image']),
        (lambda data: None, ['--classes', 'a'], ['--classes']),
        (lambda data: None, ['--val-images', 'a'], ['--val-images']),
    ],
)
def test_new_refuses_folders(call, spoil, options, pieces):
    spoil(make_tree(Path('things')))
    code, out, err = call('new', '--from', 'lavit_n_shapes', '--data', 'things', *options)
    line = the_one_line(err)
    assert (code, out) == (2, '')
    assert [piece for piece in pieces if piece not in line] == [], line
    assert not list(Path().glob('*.py'))


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
