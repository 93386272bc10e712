"""Tiny ImageNet: from a drawn download to what mmpretrain loads, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from downloads import cut, noise, real, save, the_refusal, tree, write, zipped

from mmlavit.datasets.converters.conversion import write as write_out
from mmlavit.datasets.converters.tinyimagenet import plan

# In the set's own order, which is not that of their numbers.
CLASSES = {
    'n02124075': 'Egyptian cat',
    'n04067472': 'reel',
    'n01641577': 'bullfrog, Rana catesbeiana',
    'n03970156': "plunger, plumber's helper",
}
TRAIN, VAL = 3, 2  # images of each class


def make(root: Path) -> dict[str, dict[str, set[bytes]]]:
    """The folder tiny-imagenet-200; by split and class, the images."""
    rng = np.random.default_rng(0)
    made: dict[str, dict[str, set[bytes]]] = {'train': {}, 'val': {}}
    listed = []
    for number, wnid in enumerate(CLASSES):
        folder = root / 'train' / wnid
        paths = [
            save(folder / 'images' / f'{wnid}_{i}.JPEG', noise(rng, (64, 64))) for i in range(TRAIN)
        ]
        write(folder / f'{wnid}_boxes.txt', ''.join(f'{p.name}\t0\t0\t63\t63\n' for p in paths))
        made['train'][wnid] = {path.read_bytes() for path in paths}
        paths = [
            save(root / 'val' / 'images' / f'val_{i * 10 + number}.JPEG', noise(rng, (64, 64)))
            for i in range(VAL)
        ]
        listed += [f'{path.name}\t{wnid}\t0\t32\t44\t62\n' for path in paths]
        made['val'][wnid] = {path.read_bytes() for path in paths}
    write(root / 'val' / 'val_annotations.txt', ''.join(sorted(listed)))
    save(root / 'test' / 'images' / 'test_0.JPEG', noise(rng, (64, 64)))
    write(root / 'wnids.txt', ''.join(f'{wnid}\n' for wnid in CLASSES))
    others = {'n00001740': 'entity', 'n99999999': 'zyzzyva'}
    words = sorted({**CLASSES, **others}.items())
    write(root / 'words.txt', ''.join(f'{wnid}\t{name}\n' for wnid, name in words))
    return made


def as_copy(root: Path, out: Path, classes: int = 4) -> Path:
    """A copy in folders by class, of the first classes, with the names of all."""
    for wnid in [*CLASSES][:classes]:
        for path in (root / 'train' / wnid / 'images').iterdir():
            save_as = out / 'train' / wnid / path.name
            save_as.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, save_as)
    for line in (root / 'val' / 'val_annotations.txt').read_text().splitlines():
        name, wnid = line.split('\t')[:2]
        if wnid in [*CLASSES][:classes]:
            save_as = out / 'val' / wnid / name
            save_as.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / 'val' / 'images' / name, save_as)
    write(out / 'class_names.txt', ''.join(f'{w}\t{name}\n' for w, name in CLASSES.items()))
    return out


def zipped_copy(root: Path, folder: Path, classes: int = 4) -> Path:
    """A zip file of the images with the names beside it, in a folder of their own."""
    copy = as_copy(root, folder.parent / 'unzipped', classes)
    folder.mkdir()
    (copy / 'class_names.txt').rename(folder / 'class_names.txt')
    return Path(shutil.make_archive(str(folder / 'tin'), 'zip', copy))


def load(out: Path, split: str) -> dict[str, set[bytes]]:
    """What mmpretrain's data set gives of a split: the images by the names of their classes."""
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(
        data_root=str(out), data_prefix=split, classes=str(out / 'classes.txt'), pipeline=[]
    )
    found: dict[str, set[bytes]] = {name: set() for name in dataset.CLASSES}
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        found[dataset.CLASSES[info['gt_label']]].add(Path(info['img_path']).read_bytes())
    return found


def assert_converted(out: Path, made: dict, classes: int) -> None:
    names = sorted(path.name for path in out.iterdir())
    assert names == ['classes.txt', 'dataset.json', 'train', 'val']
    for split, of_split in made.items():
        assert load(out, split) == {CLASSES[w]: of_split[w] for w in [*CLASSES][:classes]}


@pytest.mark.parametrize('classes', [None, 1, 3, 4])
@pytest.mark.parametrize('layout', ['folder', 'zip', 'copy', 'zipped copy', 'folder of zip'])
def test_mmpretrain_loads_what_was_drawn(tmp_path, layout, classes):
    root = tmp_path / 'tiny-imagenet-200'
    made = make(root)
    source = root
    if layout == 'zip':
        source = zipped(root)
    elif layout == 'copy':
        source = as_copy(root, tmp_path / 'copy')
    elif layout == 'zipped copy':
        source = zipped_copy(root, tmp_path / 'copy')
    elif layout == 'folder of zip':
        source = zipped_copy(root, tmp_path / 'copy').parent
    out = tmp_path / 'out'
    conversion = plan(source, progress=False, classes=classes)
    assert write_out(conversion, out, progress=False)
    number = classes or 4
    assert_converted(out, made, number)
    assert conversion.counts == {
        'train': {'images': TRAIN * number, 'classes': number},
        'val': {'images': VAL * number, 'classes': number},
    }


def test_val_may_be_in_folders_by_class(tmp_path):
    """As the scripts leave it that many tutorials come with."""
    made = make(tmp_path / 'tiny-imagenet-200')
    val = tmp_path / 'tiny-imagenet-200' / 'val'
    for line in (val / 'val_annotations.txt').read_text().splitlines():
        name, wnid = line.split('\t')[:2]
        (val / wnid).mkdir(exist_ok=True)
        (val / 'images' / name).rename(val / wnid / name)
    (val / 'images').rmdir()
    out = tmp_path / 'out'
    write_out(plan(tmp_path / 'tiny-imagenet-200', progress=False), out, progress=False)
    assert_converted(out, made, 4)


def test_a_copy_may_hold_some_of_the_classes(tmp_path):
    made = make(tmp_path / 'download')
    source = zipped_copy(tmp_path / 'download', tmp_path / 'copy', classes=2)
    out = tmp_path / 'out'
    write_out(plan(source, progress=False), out, progress=False)
    assert_converted(out, made, 2)
    assert 'has 2 classes, not 3' in the_refusal(plan, source, classes=3)


def test_all_classes_by_number_are_all_classes(tmp_path):
    make(tmp_path / 'download')
    out = tmp_path / 'out'
    assert write_out(plan(tmp_path / 'download', progress=False), out, progress=False)
    assert not write_out(plan(tmp_path / 'download', False, classes=4), out, progress=False)
    with pytest.raises(FileExistsError, match="'classes': 4"):
        write_out(plan(tmp_path / 'download', False, classes=3), out, progress=False)


@pytest.mark.parametrize('classes', [0, -1])
def test_refuses_no_classes(tmp_path, classes):
    with pytest.raises(ValueError, match=f'classes must be at least 1, got {classes}'):
        plan(tmp_path, progress=False, classes=classes)


def damaged(file: str, how: Callable[[Path], object]) -> Callable[[Path], str]:
    def damage(root: Path) -> str:
        how(root / file)
        return str(root / file)

    return damage


def replaced(file: str, before: str, after: str) -> Callable[[Path], str]:
    return damaged(file, lambda path: write(path, path.read_text().replace(before, after)))


def no_class(root: Path) -> str:
    shutil.rmtree(root / 'train' / 'n02124075' / 'images')
    return str(root)


@pytest.mark.parametrize(
    'damage, told',
    [
        (damaged('val/images/val_10.JPEG', Path.unlink), 'is missing'),
        (damaged('val/images/val_10.JPEG', cut), 'no whole image'),
        (damaged('train/n04067472/images/n04067472_1.JPEG', cut), 'no whole image'),
        (damaged('val/val_annotations.txt', Path.unlink), 'is missing'),
        (damaged('words.txt', Path.unlink), 'is missing'),
        (replaced('words.txt', 'n04067472\treel\n', ''), 'has no n04067472'),
        (replaced('words.txt', 'n04067472\treel\n', 'n04067472 reel\n'), 'line 5'),
        (replaced('val/val_annotations.txt', 'n04067472', 'n04067473'), "class 'n04067473'"),
        (replaced('val/val_annotations.txt', '\tn04067472', ' n04067472'), 'unknown class'),
        (no_class, 'no image of n02124075 in train'),
    ],
)
def test_refuses_what_is_broken_and_names_the_file(tmp_path, damage, told):
    make(tmp_path)
    name = damage(tmp_path)
    before = tree(tmp_path)
    message = the_refusal(plan, tmp_path)
    assert name in message and told in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize('share', [0.0, 0.3, 0.99])
def test_refuses_a_zip_file_that_is_cut_off(tmp_path, share):
    make(tmp_path / 'tiny-imagenet-200')
    path = zipped(tmp_path / 'tiny-imagenet-200')
    cut(path, share)
    message = the_refusal(plan, path)
    assert str(path) in message and 'not all of it' in message


def test_refuses_a_zip_file_with_a_damaged_image(tmp_path):
    made = make(tmp_path / 'tiny-imagenet-200')
    path = zipped(tmp_path / 'tiny-imagenet-200')
    # An image is all but incompressible, and so lies in the file as in the download.
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    assert made and '.JPEG' in (message := the_refusal(plan, path)) and str(path) in message


def test_refuses_a_folder_of_an_unknown_class(tmp_path):
    make(tmp_path / 'download')
    copy = as_copy(tmp_path / 'download', tmp_path / 'copy')
    (copy / 'train' / 'n02124075').rename(copy / 'train' / 'n0')
    message = the_refusal(plan, copy)
    assert str(copy / 'train' / 'n0') in message and 'unknown class' in message


@pytest.mark.parametrize('lost', ['class_names.txt', 'train', 'val'])
def test_refuses_a_copy_without(tmp_path, lost):
    make(tmp_path / 'download')
    copy = as_copy(tmp_path / 'download', tmp_path / 'copy')
    (copy / lost).rename(tmp_path / 'gone')
    message = the_refusal(plan, copy)
    assert str(copy) in message and lost in message


@pytest.mark.parametrize('classes', [None, 5])
def test_the_real_one(tmp_path, classes):
    source = real('tinyimagenet20')
    conversion = plan(source / 'tin20.zip', progress=False, classes=classes)
    number = classes or 20
    assert conversion.counts == {
        'train': {'images': 500 * number, 'classes': number},
        'val': {'images': 50 * number, 'classes': number},
    }
    out = tmp_path / 'out'
    write_out(conversion, out, progress=False)
    for split, images in (('train', 500), ('val', 50)):
        found = load(out, split)
        assert {len(of_class) for of_class in found.values()} == {images}
        assert 'Egyptian cat' in found and len(found) == number
