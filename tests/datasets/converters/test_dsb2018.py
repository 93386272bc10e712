"""Nuclei: from drawn folders of the contest to COCO's format, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from downloads import cut, noise, real, save, the_refusal, tree, write, zipped
from pycocotools.coco import COCO

from mmlavit.datasets.converters.conversion import write as write_out
from mmlavit.datasets.converters.dsb2018 import plan

SIZES = {'train': [(32, 24), (20, 30)], 'test': [(26, 22), (24, 24), (40, 16)]}


def draw(rng: np.random.Generator, size: tuple[int, int]) -> list[np.ndarray]:
    """Masks of an image, none over another: blots, some in parts, some at the edges."""
    cells = rng.integers(0, 6, (size[1] // 4 + 1, size[0] // 4 + 1))
    labels = np.kron(cells, np.ones((4, 4), int))[: size[1], : size[0]]
    return [labels == i for i in range(1, 6) if (labels == i).any()]


def make(root: Path) -> dict[str, dict[str, list[np.ndarray]]]:
    """The contest's folders, with masks in both; by split and image, the masks."""
    rng = np.random.default_rng(0)
    made = {}
    for split, sizes in SIZES.items():
        made[split] = {}
        for i, size in enumerate(sizes):
            image_id = f'{i:02x}{split}' * 4
            folder = root / f'stage1_{split}' / image_id
            # The contest's images have a channel of transparency, all opaque.
            image = noise(rng, size, 4)
            image[..., 3] = 255
            save(folder / 'images' / f'{image_id}.png', image)
            made[split][image_id] = draw(rng, size)
            for number, mask in enumerate(made[split][image_id]):
                save(folder / 'masks' / f'{number:064x}.png', mask.astype(np.uint8) * 255)
    return made


def encode(mask: np.ndarray) -> str:
    """The contest's code of a mask: starts and lengths of runs, down the columns, from 1."""
    runs, at = [], 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            at += 1
            if mask[y, x]:
                if runs and runs[-1][0] + runs[-1][1] == at:
                    runs[-1][1] += 1
                else:
                    runs.append([at, 1])
    return ' '.join(f'{start} {length}' for start, length in runs)


def move_to_solution(root: Path, made: dict) -> Path:
    """Masks of test images as the contest published them."""
    for path in root.glob('stage1_test/*/masks/*'):
        path.unlink()
    rows = [
        [image_id, encode(mask), *mask.shape, 'Public']
        for image_id, masks in made['test'].items()
        for mask in masks
    ]
    with open(root / 'stage1_solution.csv', 'w', newline='') as file:
        csv.writer(file).writerows(
            [['ImageId', 'EncodedPixels', 'Height', 'Width', 'Usage'], *rows]
        )
    return root / 'stage1_solution.csv'


def load(out: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(out / 'annotations' / f'{split}.json'))


def assert_converted(out: Path, made: dict, images: dict[str, bytes]) -> None:
    assert sorted(p.name for p in out.iterdir()) == ['annotations', 'dataset.json', 'images']
    for split, of_split in made.items():
        coco = load(out, split)
        assert [c['name'] for c in coco.dataset['categories']] == ['nucleus']
        assert list(coco.anns) == [*range(1, len(coco.anns) + 1)]
        assert {Path(i['file_name']).stem for i in coco.imgs.values()} == of_split.keys()
        for image_id, image in coco.imgs.items():
            name = image['file_name']
            assert (out / 'images' / split / name).read_bytes() == images[name]
            masks = of_split[Path(name).stem]
            assert (image['height'], image['width']) == masks[0].shape
            found = coco.imgToAnns[image_id]
            assert len(found) == len(masks)
            for annotation in found:
                mask = coco.annToMask(annotation).astype(bool)
                assert sum(np.array_equal(mask, drawn) for drawn in masks) == 1
                ys, xs = mask.nonzero()
                x, y, width, height = annotation['bbox']
                assert [x, y] == [xs.min(), ys.min()]
                assert [x + width, y + height] == [xs.max() + 1, ys.max() + 1]
                assert annotation['area'] == mask.sum()
                assert annotation['iscrowd'] == 0


@pytest.mark.parametrize('layout', ['masks', 'solution', 'zip', 'copy'])
def test_masks_are_those_drawn(tmp_path, layout):
    root = tmp_path / 'download'
    made = make(root)
    images = {path.name: path.read_bytes() for path in root.rglob('images/*.png')}
    source = root
    if layout == 'solution':
        move_to_solution(root, made)
    elif layout == 'zip':
        source = zipped(root, 'packed')
    elif layout == 'copy':
        source = tmp_path / 'copy'
        write_out(plan(root, progress=False), source, progress=False)
        (source / 'dataset.json').unlink()
    out = tmp_path / 'out'
    conversion = plan(source, progress=False)
    assert write_out(conversion, out, progress=False)
    assert_converted(out, made, images)
    assert conversion.counts == {
        split: {'images': len(masks), 'nucleus': sum(map(len, masks.values()))}
        for split, masks in made.items()
    }


def test_mmdet_loads_them(tmp_path):
    from mmdet.datasets import CocoDataset
    from mmengine.registry import DefaultScope

    made = make(tmp_path / 'download')
    out = tmp_path / 'out'
    write_out(plan(tmp_path / 'download', progress=False), out, progress=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CocoDataset(
            data_root=str(out),
            ann_file='annotations/train.json',
            data_prefix=dict(img='images/train/'),
            metainfo=dict(classes=('nucleus',)),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            ],
        )
        samples = [dataset[i] for i in range(len(dataset))]
    assert len(samples) == len(made['train'])
    for sample in samples:
        masks = made['train'][Path(sample['img_path']).stem]
        assert sample['img'].shape == (*masks[0].shape, 3)
        assert not sample['gt_ignore_flags'].any()
        found = {mask.tobytes() for mask in sample['gt_masks'].masks.astype(bool)}
        assert found == {mask.tobytes() for mask in masks}


def test_polygons_and_uncompressed_masks_of_a_copy_are_taken(tmp_path):
    """As tools that label images write them."""
    root = tmp_path / 'copy'
    masks = [np.zeros((8, 10), bool), np.zeros((8, 10), bool)]
    masks[0][1:4, 2:7] = masks[1][5:, :3] = True
    counts = [5, 3, 5, 3, 5, 3, 56]  # 5 pixels of background, 3 of the mask, and so on
    segmentations = [[[2, 1, 7, 1, 7, 4, 2, 4]], dict(size=[8, 10], counts=counts)]
    for split in SIZES:
        save(root / 'images' / split / 'a.png', np.zeros((8, 10, 3), np.uint8))
        content = dict(
            images=[dict(id=7, file_name='a.png', width=10, height=8)],
            annotations=[
                dict(id=i, image_id=7, category_id=3, segmentation=s, bbox=[0, 0, 1, 1])
                for i, s in enumerate(segmentations)
            ],
            categories=[dict(id=3, name='nucleus')],
        )
        write(root / 'annotations' / f'{split}.json', json.dumps(content))
    out = tmp_path / 'out'
    write_out(plan(root, progress=False), out, progress=False)
    coco = load(out, 'train')
    for annotation, mask in zip(coco.anns.values(), masks, strict=True):
        np.testing.assert_array_equal(coco.annToMask(annotation), mask)


def test_masks_without_a_pixel_are_left_out_and_counted(tmp_path):
    made = make(tmp_path)
    image_id, masks = next(iter(made['train'].items()))
    empty = tmp_path / 'stage1_train' / image_id / 'masks' / 'empty.png'
    save(empty, np.zeros(masks[0].shape, np.uint8))
    counts = plan(tmp_path, progress=False).counts['train']
    assert counts['nucleus'] == sum(map(len, made['train'].values()))
    assert counts['empty, left out'] == 1


def first(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def change_row(column: int, value: str) -> Callable[[Path], str]:
    """Changes a value in the third line of the solution."""

    def change(root: Path) -> str:
        path = root / 'stage1_solution.csv'
        rows = list(csv.reader(path.open()))
        rows[2][column] = value
        with path.open('w', newline='') as file:
            csv.writer(file).writerows(rows)
        return f'{path}, line 3'

    return change


def without(pattern: str) -> Callable[[Path], str]:
    """Loses a file, which is not named itself where nothing else says that it should be there."""

    def remove(root: Path) -> str:
        path = first(root, pattern)
        path.unlink()
        return str(path.parents[1])

    return remove


def other_size(root: Path) -> str:
    path = first(root, 'stage1_train/*/masks/*.png')
    save(path, np.zeros((8, 8), np.uint8))
    return str(path)


def broken(pattern: str) -> Callable[[Path], str]:
    def damage(root: Path) -> str:
        path = first(root, pattern)
        cut(path)
        return str(path)

    return damage


def no_masks(root: Path) -> str:
    folder = first(root, 'stage1_train/*')
    for path in folder.glob('masks/*'):
        path.unlink()
    return str(folder)


def no_solution(root: Path) -> str:
    (root / 'stage1_solution.csv').unlink()
    return str(root / 'stage1_test')


def no_test(root: Path) -> str:
    (root / 'stage1_test').rename(root / 'elsewhere')
    return str(root)


def no_folder(root: Path) -> str:
    folder = first(root, 'stage1_test/*')
    folder.rename(root / folder.name)
    return str(folder)


def unknown_folder(root: Path) -> str:
    save(root / 'stage1_test' / 'abc' / 'images' / 'abc.png', np.zeros((8, 8, 3), np.uint8))
    return str(root / 'stage1_solution.csv')


def other_columns(root: Path) -> str:
    path = root / 'stage1_solution.csv'
    write(path, path.read_text().replace('EncodedPixels', 'Pixels'))
    return str(path)


@pytest.mark.parametrize(
    'damage, told',
    [
        (without('stage1_train/*/images/*.png'), 'one image in images/'),
        (without('stage1_test/*/images/*.png'), 'is missing'),
        (broken('stage1_train/*/images/*.png'), 'no whole image'),
        (broken('stage1_train/*/masks/*.png'), 'no whole image'),
        (other_size, 'another size (width, height) than its image: (8, 8), not (32, 24)'),
        (no_masks, 'no mask in masks/'),
        (no_solution, 'no stage1_solution.csv'),
        (no_test, 'stage1_solution.csv has its masks'),
        (no_folder, 'stage1_solution.csv has its masks'),
        (unknown_folder, 'no masks of abc'),
        (other_columns, 'must have the columns'),
        (change_row(1, '1 5 9'), 'no mask'),
        (change_row(1, '1 five'), 'no mask'),
        (change_row(1, '570 9'), 'pixels 570 to 578 of 572'),
        (change_row(1, '0 9'), 'pixels 0 to 8'),
        (change_row(2, '23'), 'another size'),
        (change_row(3, ''), 'no mask'),
    ],
)
def test_refuses_what_is_broken_and_names_the_file(tmp_path, damage, told):
    made = make(tmp_path)
    move_to_solution(tmp_path, made)
    name = damage(tmp_path)
    before = tree(tmp_path)
    message = the_refusal(plan, tmp_path)
    assert name in message and told in message
    assert tree(tmp_path) == before


def copy_with(change: Callable[[dict], None], tmp_path: Path) -> Path:
    """A copy whose annotations were changed."""
    make(tmp_path / 'download')
    copy = tmp_path / 'copy'
    write_out(plan(tmp_path / 'download', progress=False), copy, progress=False)
    path = copy / 'annotations' / 'test.json'
    content = json.loads(path.read_text())
    change(content)
    write(path, json.dumps(content))
    return copy


@pytest.mark.parametrize(
    'change, told',
    [
        (lambda c: c['images'][0].update(width=5), 'another size'),
        (lambda c: c['images'][1].update(file_name='gone.png'), 'gone.png is missing'),
        (lambda c: c['categories'][0].update(name='cell'), "unknown class 'cell'"),
        (lambda c: c['annotations'][0]['segmentation'].update(size=[4, 4]), 'another size'),
        (lambda c: c['annotations'][0].update(category_id=9), "not in COCO's format"),
        (lambda c: c['annotations'][0].pop('image_id'), "not in COCO's format"),
        (lambda c: c.pop('categories'), "not in COCO's format"),
    ],
)
def test_refuses_a_copy_that_is_broken(tmp_path, change, told):
    message = the_refusal(plan, copy_with(change, tmp_path))
    assert told in message and ('test.json' in message or 'gone.png' in message)


@pytest.mark.parametrize('text', ['{"images": [', '[]', '{}'])
def test_refuses_annotations_that_are_none(tmp_path, text):
    copy = copy_with(lambda content: None, tmp_path)
    path = write(copy / 'annotations' / 'test.json', text)
    assert str(path) in the_refusal(plan, copy)


def test_refuses_what_is_no_such_download(tmp_path):
    write(tmp_path / 'readme.txt', 'another data set')
    assert str(tmp_path) in the_refusal(plan, tmp_path)


@pytest.mark.slow
def test_the_real_one(tmp_path):
    source, out = real('dsb2018'), tmp_path / 'out'
    conversion = plan(source, progress=False)
    assert conversion.counts == {
        'train': {'images': 664, 'nucleus': 28986},
        'test': {'images': 65, 'nucleus': 4152},
    }
    write_out(conversion, out, progress=False)
    for split in SIZES:
        ours, theirs = load(out, split), load(source, split)
        names = {image['file_name']: i for i, image in theirs.imgs.items()}
        for i, image in ours.imgs.items():
            expected = theirs.imgToAnns[names[image['file_name']]]
            for key in ('bbox', 'area', 'segmentation'):
                assert [a[key] for a in ours.imgToAnns[i]] == [a[key] for a in expected]
