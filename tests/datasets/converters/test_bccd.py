"""Blood cells: from a drawn Pascal VOC folder to COCO's format, and what is refused."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from downloads import cut, noise, real, save, the_refusal, tree, write, zipped
from pycocotools.coco import COCO

from mmlavit.datasets.converters.bccd import CLASSES, plan
from mmlavit.datasets.converters.conversion import write as write_out

SIZE = (40, 30)
SPLITS = {'train': [0, 3], 'val': [1], 'test': [2, 4], 'trainval': [0, 1, 3]}
Box = tuple[str, list[int]]


def name_of(number: int) -> str:
    return f'BloodImage_{number:05d}'


def voc(boxes: list[Box]) -> str:
    """An annotation file as the set has them; boxes are left, top, right, bottom."""
    root = ElementTree.Element('annotation')
    size = ElementTree.SubElement(root, 'size')
    for key, value in zip(('width', 'height', 'depth'), (*SIZE, 3), strict=True):
        ElementTree.SubElement(size, key).text = str(value)
    for label, edges in boxes:
        thing = ElementTree.SubElement(root, 'object')
        ElementTree.SubElement(thing, 'name').text = label
        ElementTree.SubElement(thing, 'difficult').text = '0'
        bndbox = ElementTree.SubElement(thing, 'bndbox')
        for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), edges, strict=True):
            ElementTree.SubElement(bndbox, key).text = str(value)
    return ElementTree.tostring(root, encoding='unicode')


def make(root: Path) -> dict[str, list[Box]]:
    """The folder BCCD; by image, its boxes."""
    rng = np.random.default_rng(0)
    made = {}
    for number in range(5):
        name = name_of(number)
        save(root / 'JPEGImages' / f'{name}.jpg', noise(rng, SIZE))
        made[name] = []
        for _ in range(int(rng.integers(0, 5))):
            x, y = rng.integers(0, SIZE[0] - 9), rng.integers(0, SIZE[1] - 9)
            edges = [int(x), int(y), int(x + rng.integers(1, 9)), int(y + rng.integers(1, 9))]
            made[name].append((CLASSES[rng.integers(3)], edges))
        write(root / 'Annotations' / f'{name}.xml', voc(made[name]))
    for split, numbers in SPLITS.items():
        text = ''.join(f'{name_of(number)}\n' for number in numbers)
        write(root / 'ImageSets' / 'Main' / f'{split}.txt', text)
    assert any(made.values())
    return made


def load(out: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(out / 'annotations' / f'{split}.json'))


@pytest.mark.parametrize('layout', ['folder', 'above', 'zip', 'copy'])
def test_boxes_are_those_drawn(tmp_path, layout):
    root = tmp_path / 'BCCD_Dataset-master' / 'BCCD'
    made = make(root)
    source = root
    if layout == 'above':
        source = root.parent
    elif layout == 'zip':
        source = zipped(root.parent)
    elif layout == 'copy':
        source = tmp_path / 'copy'
        write_out(plan(root, progress=False), source, progress=False)
        (source / 'dataset.json').unlink()
    out = tmp_path / 'out'
    conversion = plan(source, progress=False)
    assert write_out(conversion, out, progress=False)
    images = {path.name: path.read_bytes() for path in root.glob('JPEGImages/*')}
    assert tree(out / 'images') == images
    for split, numbers in SPLITS.items():
        coco = load(out, split)
        assert [coco.cats[i]['name'] for i in (1, 2, 3)] == ['RBC', 'WBC', 'Platelets']
        assert [i['file_name'] for i in coco.imgs.values()] == [
            f'{name_of(n)}.jpg' for n in numbers
        ]
        for image_id, image in coco.imgs.items():
            assert (image['width'], image['height']) == SIZE
            found = [
                (coco.cats[a['category_id']]['name'], a['bbox'], a['area'], a['iscrowd'])
                for a in coco.imgToAnns[image_id]
            ]
            assert found == [
                (label, [x, y, right - x, bottom - y], (right - x) * (bottom - y), 0)
                for label, (x, y, right, bottom) in made[Path(image['file_name']).stem]
            ]
        labels = [label for n in numbers for label, _ in made[name_of(n)]]
        each = {label: labels.count(label) for label in CLASSES}
        assert conversion.counts[split] == {'images': len(numbers), **each}


def test_mmdet_loads_them(tmp_path):
    from mmdet.datasets import CocoDataset
    from mmengine.registry import DefaultScope

    made = make(tmp_path / 'BCCD')
    out = tmp_path / 'out'
    write_out(plan(tmp_path, progress=False), out, progress=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CocoDataset(
            data_root=str(out),
            ann_file='annotations/trainval.json',
            data_prefix=dict(img='images/'),
            metainfo=dict(classes=CLASSES),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
            ],
        )
        samples = [dataset[i] for i in range(len(dataset))]
    assert len(samples) == len(SPLITS['trainval'])
    for sample in samples:
        boxes = made[Path(sample['img_path']).stem]
        np.testing.assert_array_equal(
            sample['gt_bboxes'].tensor.numpy(), np.reshape([edges for _, edges in boxes], (-1, 4))
        )
        assert [CLASSES[i] for i in sample['gt_bboxes_labels']] == [label for label, _ in boxes]


def test_boxes_end_at_the_edges_and_empty_ones_are_counted(tmp_path):
    make(tmp_path)
    boxes = [
        ('RBC', [-3, 5, 12, 33]),
        ('WBC', [5, 5, 5, 9]),
        ('WBC', [9, 9, 5, 5]),
        ('RBC', [50, 5, 60, 9]),
    ]
    write(tmp_path / 'Annotations' / f'{name_of(1)}.xml', voc(boxes))
    conversion = plan(tmp_path, progress=False)
    write_out(conversion, tmp_path / 'out', progress=False)
    (annotation,) = load(tmp_path / 'out', 'val').anns.values()
    assert annotation['bbox'] == [0, 5, 12, 25]
    assert conversion.counts['val'] == {
        'images': 1,
        'RBC': 1,
        'WBC': 0,
        'Platelets': 0,
        'empty, left out': 3,
    }


def edited(before: str, after: str) -> Callable[[Path], Path]:
    """Changes the annotations of an image that has some."""

    def edit(root: Path) -> Path:
        path = root / 'Annotations' / f'{name_of(1)}.xml'
        text = voc([('RBC', [3, 4, 9, 11])]).replace(before, after)
        return write(path, text)

    return edit


def damaged(file: str, how: Callable[[Path], object]) -> Callable[[Path], Path]:
    def damage(root: Path) -> Path:
        how(root / file)
        return root / file

    return damage


@pytest.mark.parametrize(
    'damage, told',
    [
        (damaged(f'JPEGImages/{name_of(1)}.jpg', Path.unlink), 'is missing'),
        (damaged(f'JPEGImages/{name_of(1)}.jpg', cut), 'no whole image'),
        (damaged(f'Annotations/{name_of(1)}.xml', Path.unlink), 'is missing'),
        (damaged('ImageSets/Main/val.txt', Path.unlink), 'is missing'),
        (edited('</annotation>', ''), 'no annotation of Pascal VOC'),
        (edited('<xmax>9</xmax>', ''), 'it has no bndbox/xmax'),
        (edited('<xmax>9</xmax>', '<xmax>nine</xmax>'), 'nine'),
        (edited('<xmax>9</xmax>', '<xmax>nan</xmax>'), 'nan'),
        (edited('<width>40</width>', '<width>41</width>'), '(41.0, 30.0), not (40, 30)'),
        (edited('<name>RBC</name>', '<name>rbc</name>'), "unknown class 'rbc'"),
        (edited('<name>RBC</name>', ''), "unknown class ''"),
    ],
)
def test_refuses_what_is_broken_and_names_the_file(tmp_path, damage, told):
    make(tmp_path)
    name = damage(tmp_path)
    before = tree(tmp_path)
    message = the_refusal(plan, tmp_path)
    assert str(name) in message and told in message
    assert tree(tmp_path) == before


def test_refuses_an_empty_list(tmp_path):
    make(tmp_path)
    write(tmp_path / 'ImageSets' / 'Main' / 'test.txt', '\n')
    assert 'no image of test' in the_refusal(plan, tmp_path)


def test_refuses_what_is_no_such_download(tmp_path):
    write(tmp_path / 'readme.txt', 'another data set')
    assert str(tmp_path) in the_refusal(plan, tmp_path)


def test_the_real_one(tmp_path):
    conversion = plan(real('bccd'), progress=False)
    assert {split: counts['images'] for split, counts in conversion.counts.items()} == {
        'train': 205,
        'val': 87,
        'test': 72,
        'trainval': 292,
    }
    write_out(conversion, tmp_path / 'out', progress=False)
    for split in SPLITS:
        ours, theirs = load(tmp_path / 'out', split), load(real('bccd'), split)
        assert len(ours.anns) > 900
        names = {image['file_name']: i for i, image in theirs.imgs.items()}
        for i, image in ours.imgs.items():
            expected = theirs.imgToAnns[names[image['file_name']]]
            for key in ('category_id', 'bbox', 'area'):
                assert [a[key] for a in ours.imgToAnns[i]] == [a[key] for a in expected]
