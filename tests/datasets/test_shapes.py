"""The made-up data set: what its three forms say of the same images, and that it is safe to run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmlavit.datasets import shapes
from mmlavit.datasets.shapes import CLASSES, ShapesRecipe, draw_image, make_shapes, read_manifest

RECIPE = ShapesRecipe(num_train=8, num_val=3, size=64, seed=7)
TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'
SPLITS = [('train', 'training', 8), ('val', 'validation', 3)]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
    """One complete data set, for tests that only read it."""
    root = tmp_path_factory.mktemp('made') / 'shapes'
    assert make_shapes(root, RECIPE, progress=False)
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def load_coco(root: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / 'coco' / 'annotations' / f'instances_{split}2017.json'))


def load_tool():
    spec = importlib.util.spec_from_file_location('make_shapes_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestImages:
    @pytest.mark.parametrize('size, max_shapes', [(32, 1), (32, 12), (96, 4), (97, 9)])
    def test_instances_are_visible_apart_and_inside(self, size, max_shapes):
        for seed in range(12):
            print('seed', seed)
            image, instances = draw_image(np.random.default_rng(seed), size, max_shapes)
            assert image.shape == (size, size, 3) and image.dtype == np.uint8
            assert 1 <= len(instances) <= max_shapes
            assert sum(instance.mask.astype(int) for instance in instances).max() == 1
            for instance in instances:
                assert instance.mask.shape == (size, size)
                corners = np.concatenate(instance.polygons)
                assert corners.min() >= 0 and corners.max() <= size
                least = shapes.MIN_VISIBLE * np.pi * (shapes.OTHERS[0] * size) ** 2
                assert instance.area > 0.9 * least

    def test_every_shape_keeps_most_of_itself(self):
        shares = []
        for seed in range(30):
            print('seed', seed)
            instances, coverages = shapes._place_shapes(np.random.default_rng(seed), 64, 6)
            for instance, coverage in zip(instances, coverages, strict=True):
                assert not (instance.mask & (coverage < 0.5)).any()
                shares.append(instance.area / (coverage >= 0.5).sum())
        assert shapes.MIN_VISIBLE <= min(shares) < max(shares) == 1

    def test_the_largest_shape_leaves_no_doubt_of_its_class(self):
        several = 0
        for seed in range(60):
            print('seed', seed)
            _, instances = draw_image(np.random.default_rng(seed), 64, 4)
            areas = {}
            for instance in instances:
                areas[instance.label] = max(instance.area, areas.get(instance.label, 0))
            first, *others = sorted(areas.values(), reverse=True)
            assert all(first >= shapes.MIN_LEAD * other for other in others)
            several += bool(others)
        assert several > 20

    def test_every_class_names_images_alike_and_one_shape_dominates(self):
        named, leads = [0] * len(CLASSES), []
        for seed in range(300):
            _, instances = draw_image(np.random.default_rng(seed), 48, 3)
            first, *others = sorted(instances, key=lambda i: i.area, reverse=True)
            named[first.label] += 1
            leads += [first.area / other.area for other in others]
        # A fair draw leaves 74 .. 126 once in 600 times; the seeds are fixed.
        assert min(named) >= 74 and max(named) <= 126
        assert np.median(leads) > 2

    def test_shapes_differ_from_their_background(self):
        for seed in range(200):
            print('seed', seed)
            image, (instance,) = draw_image(np.random.default_rng(seed), 48, 1)
            near = cv2.dilate(instance.mask.astype(np.uint8), np.ones((9, 9))) > 0
            inside, outside = image[instance.mask], image[near & ~instance.mask]
            # Shading, noise and clipping take a little from the contrast of the plain colours.
            contrast = np.linalg.norm(inside.mean(0) - outside.mean(0))
            assert contrast > 0.6 * shapes.MIN_CONTRAST

    def test_a_shape_with_a_hole_or_a_crumb_is_not_well_visible(self):
        square = np.zeros((20, 20), bool)
        square[4:16, 4:16] = True
        assert shapes._well_visible(square, 144)
        assert not shapes._well_visible(square, 300)
        holed, crumb = square.copy(), square.copy()
        holed[9, 9] = False
        crumb[0, :2] = True
        assert not shapes._well_visible(holed, 144)
        assert not shapes._well_visible(crumb, 144)

    def test_neither_colour_nor_area_tells_the_class(self):
        areas, colours = [[] for _ in CLASSES], [[] for _ in CLASSES]
        for seed in range(250):
            image, (instance,) = draw_image(np.random.default_rng(seed), 32, 1)
            areas[instance.label].append(instance.area)
            colours[instance.label].append(image[instance.mask].mean(0))
        for values in (areas, colours):
            means = np.array([np.mean(v, 0) for v in values])
            errors = np.array([np.std(v, 0) / len(v) ** 0.5 for v in values])
            assert (np.ptp(means, axis=0) < 5 * errors.max(0)).all()

    def test_polygons_of_any_mask_without_holes_enclose_its_pixels(self):
        from pycocotools import mask as coco_mask

        checked = 0
        for seed in range(60):
            print('seed', seed)
            rng = np.random.default_rng(seed)
            noise = cv2.GaussianBlur(rng.normal(size=(30, 40)), (0, 0), rng.uniform(0.4, 3))
            mask = noise > np.quantile(noise, 0.9)
            instance = shapes.Instance(0, mask)
            rles = coco_mask.frPyObjects([[float(v) for v in p] for p in instance.polygons], 30, 40)
            drawn = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
            assert not (mask & ~drawn).any()
            if shapes._well_visible(mask, 1):
                checked += 1
                assert (mask == drawn).all()
        assert checked > 5

    @pytest.mark.parametrize('size, max_shapes', [(31, 4), (64, 0)])
    def test_refuses_impossible_images(self, size, max_shapes):
        with pytest.raises(ValueError, match='must be >='):
            draw_image(np.random.default_rng(0), size, max_shapes)


class TestRecipe:
    @pytest.mark.parametrize(
        'name, value, least',
        [
            ('num_train', 0, 1),
            ('num_val', 0, 1),
            ('size', 31, 32),
            ('max_shapes', 0, 1),
            ('seed', -1, 0),
        ],
    )
    def test_too_small(self, name, value, least):
        with pytest.raises(ValueError, match=f'^{name} must be >= {least}, got {value}$'):
            ShapesRecipe(**{name: value})

    @pytest.mark.parametrize('name', ['num_train', 'num_val', 'size', 'max_shapes', 'seed'])
    @pytest.mark.parametrize('value', [48.0, '48', True, None])
    def test_not_an_int(self, name, value):
        with pytest.raises(
            TypeError, match=f'^{name} must be an int >= .*{re.escape(repr(value))}'
        ):
            ShapesRecipe(**{name: value})


class TestForms:
    @pytest.mark.parametrize('split, ade, count', SPLITS)
    def test_coco_masks_agree_with_ade_labels(self, dataset, split, ade, count):
        coco = load_coco(dataset, split)
        assert len(coco.imgs) == count
        assert [coco.cats[i]['name'] for i in (1, 2, 3)] == list(CLASSES)
        for image_id, info in coco.imgs.items():
            path = dataset / 'coco' / f'{split}2017' / info['file_name']
            assert cv2.imread(str(path)).shape == (info['height'], info['width'], 3)
            name = f'{path.stem}.png'
            label = cv2.imread(str(dataset / 'ade' / 'annotations' / ade / name), -1)
            assert label.dtype == np.uint8 and label.shape == (info['height'], info['width'])
            # Every visible pixel belongs to one instance, so the label map can be put together
            # from the polygons alone: an intersection over union of exactly one, per instance.
            drawn = np.ones_like(label)
            annotations = coco.imgToAnns[image_id]
            assert annotations
            for annotation in annotations:
                mask = coco.annToMask(annotation).astype(bool)
                assert (drawn[mask] == 1).all()
                drawn[mask] = annotation['category_id'] + 1
            np.testing.assert_array_equal(drawn, label)

    @pytest.mark.parametrize('split', ['train', 'val'])
    def test_coco_box_and_area_are_those_of_the_mask(self, dataset, split):
        coco = load_coco(dataset, split)
        assert list(coco.anns) == list(range(1, len(coco.anns) + 1))
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            x, y, width, height = annotation['bbox']
            ys, xs = mask.nonzero()
            assert [x, y, x + width, y + height] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert annotation['area'] == mask.sum()
            assert annotation['iscrowd'] == 0

    @pytest.mark.parametrize('split, ade, count', SPLITS)
    def test_imagenet_label_is_the_largest_visible_shape(self, dataset, split, ade, count):
        coco = load_coco(dataset, split)
        folder = dataset / 'imagenet' / split
        assert sorted(path.name for path in folder.iterdir()) == sorted(CLASSES)
        assert len(list(folder.rglob('*.jpg'))) == count
        for image_id, info in coco.imgs.items():
            (path,) = folder.rglob(info['file_name'])
            areas = {a['id']: a['area'] for a in coco.imgToAnns[image_id]}
            largest = coco.anns[max(areas, key=areas.get)]
            assert CLASSES[largest['category_id'] - 1] == path.parent.name

    @pytest.mark.parametrize('split, ade, count', SPLITS)
    def test_all_forms_share_one_file_per_image(self, dataset, split, ade, count):
        originals = sorted((dataset / 'coco' / f'{split}2017').iterdir())
        assert len(originals) == len(list((dataset / 'ade' / 'images' / ade).iterdir())) == count
        for original in originals:
            (labelled,) = (dataset / 'imagenet' / split).rglob(original.name)
            for copy in (dataset / 'ade' / 'images' / ade / original.name, labelled):
                assert copy.samefile(original)

    def test_splits_share_no_image(self, dataset):
        images = [path.read_bytes() for path in (dataset / 'coco').rglob('*.jpg')]
        assert len(set(images)) == RECIPE.num_train + RECIPE.num_val

    def test_manifest_counts(self, dataset):
        manifest = read_manifest(dataset)
        assert manifest['complete']
        for split, _, count in SPLITS:
            coco = load_coco(dataset, split)
            counts = manifest['counts'][split]
            assert sum(counts['images'].values()) == count
            for i, name in enumerate(CLASSES, 1):
                assert counts['instances'][name] == len(coco.getAnnIds(catIds=[i]))
                folder = dataset / 'imagenet' / split / name
                assert counts['images'][name] == len(list(folder.iterdir()))


class TestSeeds:
    def test_same_seed_same_bytes(self, dataset, tmp_path):
        assert make_shapes(tmp_path, RECIPE, progress=False)
        assert tree(tmp_path) == tree(dataset)

    def test_other_seed_other_images(self, dataset, tmp_path):
        make_shapes(tmp_path, ShapesRecipe(8, 3, size=64, seed=8), progress=False)
        ours, theirs = tree(tmp_path), tree(dataset)
        images = [name for name in ours if name.startswith('coco') and name.endswith('.jpg')]
        assert len(images) == 11
        assert not any(ours[name] == theirs[name] for name in images)

    def test_a_smaller_set_is_the_start_of_a_larger_one(self, dataset, tmp_path):
        make_shapes(tmp_path, ShapesRecipe(3, 1, size=64, seed=7), progress=False)
        larger = tree(dataset)
        for name, data in tree(tmp_path).items():
            if not name.endswith('.json'):
                assert larger[name] == data


class TestRunningAgain:
    def test_complete_is_left_alone(self, dataset):
        before = {path: path.stat().st_mtime_ns for path in dataset.rglob('*')}
        assert not make_shapes(dataset, RECIPE, progress=False)
        assert before == {path: path.stat().st_mtime_ns for path in dataset.rglob('*')}

    @pytest.mark.parametrize('writes', [0, 1, 2, 9, 20])
    def test_finishes_what_was_killed(self, dataset, tmp_path, monkeypatch, writes):
        root = tmp_path / 'shapes'
        left = iter(range(writes))

        def replace(source, target):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(source, target)

        real = shapes.os.replace
        with monkeypatch.context() as patch:
            patch.setattr(shapes.os, 'replace', replace)
            with pytest.raises(KeyboardInterrupt):
                make_shapes(root, RECIPE, progress=False)
        manifest = read_manifest(root)
        assert manifest is None if writes == 0 else not manifest['complete']
        if writes:
            with pytest.raises(FileExistsError, match='seed is 7 there and 1 here'):
                make_shapes(root, ShapesRecipe(8, 3, size=64, seed=1), progress=False)
        assert make_shapes(root, RECIPE, progress=False)
        assert tree(root) == tree(dataset)
        assert not make_shapes(root, RECIPE, progress=False)

    @pytest.mark.parametrize(
        'pattern',
        [
            'coco/val2017/*.jpg',
            'coco/annotations/*val*.json',
            'ade/images/training/*.jpg',
            'ade/annotations/training/*.png',
            'imagenet/train/*/*.jpg',
        ],
    )
    def test_writes_lost_files_again(self, dataset, tmp_path, pattern):
        make_shapes(tmp_path, RECIPE, progress=False)
        lost = sorted(tmp_path.glob(pattern))[-1]
        inodes = {path: path.stat().st_ino for path in tmp_path.rglob('*.jpg') if path != lost}
        lost.unlink()
        assert make_shapes(tmp_path, RECIPE, progress=False)
        assert all(path.stat().st_ino == inode for path, inode in inodes.items())
        assert tree(tmp_path) == tree(dataset)

    def test_copies_where_there_are_no_hard_links(self, dataset, tmp_path, monkeypatch):
        def link(source, target):
            raise PermissionError('no hard links here')

        monkeypatch.setattr(shapes.os, 'link', link)
        make_shapes(tmp_path, RECIPE, progress=False)
        assert tree(tmp_path) == tree(dataset)
        assert all(path.stat().st_nlink == 1 for path in tmp_path.rglob('*.jpg'))

    @pytest.mark.parametrize('at', [0, 1, 2, 20])
    def test_another_process_may_finish_first(self, dataset, tmp_path, monkeypatch, at):
        def replace(source, target):
            seen.append(target)
            if len(seen) == at + 1:
                make_shapes(tmp_path, RECIPE, progress=False)
                assert not Path(source).exists()
            real(source, target)

        seen, real = [], shapes.os.replace
        monkeypatch.setattr(shapes.os, 'replace', replace)
        assert make_shapes(tmp_path, RECIPE, progress=False)
        assert tree(tmp_path) == tree(dataset)


class TestOverwriting:
    OTHER = ShapesRecipe(2, 1, size=32, seed=1)

    def test_refuses_another_data_set(self, tmp_path):
        make_shapes(tmp_path, self.OTHER, progress=False)
        before = tree(tmp_path)
        with pytest.raises(FileExistsError) as caught:
            make_shapes(tmp_path, RECIPE, progress=False)
        message = str(caught.value)
        for part in (str(tmp_path), 'num_train is 2 there and 8 here', '--out', '--overwrite'):
            assert part in message
        assert 'max_shapes' not in message
        assert tree(tmp_path) == before

    def test_refuses_another_generator_version(self, tmp_path, monkeypatch):
        make_shapes(tmp_path, self.OTHER, progress=False)
        before = shapes.GENERATOR['version']
        monkeypatch.setitem(shapes.GENERATOR, 'version', 99)
        message = f'generator version is {before} there and 99 here'
        with pytest.raises(FileExistsError, match=message):
            make_shapes(tmp_path, self.OTHER, progress=False)

    @pytest.mark.parametrize('smaller', [True, False])
    def test_overwrites_its_own(self, dataset, tmp_path, smaller):
        make_shapes(
            tmp_path, ShapesRecipe(2, 1) if smaller else ShapesRecipe(12, 4), progress=False
        )
        assert make_shapes(tmp_path, RECIPE, progress=False, overwrite=True)
        assert tree(tmp_path) == tree(dataset)

    def test_overwrites_even_the_same(self, dataset, tmp_path):
        make_shapes(tmp_path, RECIPE, progress=False)
        (tmp_path / 'coco' / 'train2017' / '000000000002.jpg').write_bytes(b'broken')
        assert make_shapes(tmp_path, RECIPE, progress=False, overwrite=True)
        assert tree(tmp_path) == tree(dataset)

    def test_overwriting_spares_what_it_did_not_write(self, tmp_path):
        make_shapes(tmp_path, self.OTHER, progress=False)
        mine = 'coco/train2017/000000000009.jpg'  # named like ours, but the set ends at 2
        notes = [tmp_path / 'notes.txt', tmp_path / mine]
        for path in notes:
            path.write_text('mine')
        make_shapes(tmp_path, ShapesRecipe(3, 1, size=32), progress=False, overwrite=True)
        assert [path.read_text() for path in notes] == ['mine', 'mine']

    @pytest.mark.parametrize('overwrite', [False, True])
    @pytest.mark.parametrize(
        'name, content',
        [
            ('photo.jpg', 'mine'),
            ('dataset.json', 'not json'),
            ('dataset.json', '[]'),
            ('dataset.json', '{"recipe": {}, "complete": true}'),
            (
                'dataset.json',
                '{"generator": {"name": "mmlavit.shapes"}, "recipe": {"a": 1}}',
            ),
            ('dataset.json', '{"generator": {"name": "other"}, "recipe": {}, "complete": true}'),
        ],
    )
    def test_never_touches_what_others_wrote(self, tmp_path, name, content, overwrite):
        (tmp_path / name).write_text(content)
        with pytest.raises(FileExistsError, match=re.escape(f'{tmp_path} holds {name!r}')):
            make_shapes(tmp_path, RECIPE, progress=False, overwrite=overwrite)
        assert tree(tmp_path) == {name: content.encode()}

    @pytest.mark.parametrize('overwrite', [False, True])
    def test_never_follows_a_link_out(self, tmp_path, overwrite):
        root, real = tmp_path / 'shapes', tmp_path / 'real_coco'
        make_shapes(root, self.OTHER, progress=False)
        (root / 'coco').rename(real)
        (root / 'coco').symlink_to(real)
        before = tree(tmp_path)
        with pytest.raises(FileExistsError, match='leads out of'):
            make_shapes(root, self.OTHER, progress=False, overwrite=overwrite)
        assert tree(tmp_path) == before

    def test_refuses_a_file(self, tmp_path):
        path = tmp_path / 'shapes'
        path.write_text('mine')
        with pytest.raises(FileExistsError, match='is not a directory'):
            make_shapes(path, RECIPE, progress=False, overwrite=True)

    def test_writes_into_an_empty_folder(self, tmp_path):
        assert make_shapes(str(tmp_path), self.OTHER, progress=False)


class TestTool:
    ARGS = ['--num-train', '4', '--num-val', '2', '--size', '32', '--seed', '3']

    def test_as_a_program(self, tmp_path):
        out = tmp_path / 'shapes'
        command = [sys.executable, str(TOOL), '--out', str(out)]
        done = subprocess.run([*command, *self.ARGS], capture_output=True, text=True, check=True)
        assert f'{out}: written' in done.stdout
        assert re.search(r'train +4 images', done.stdout)
        assert '6/6' in done.stderr  # the progress bar
        recipe = read_manifest(out)['recipe']
        assert recipe == {'num_train': 4, 'num_val': 2, 'size': 32, 'max_shapes': 3, 'seed': 3}

        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 2
        (line,) = refused.stderr.strip().splitlines()
        assert line.startswith(f'make_shapes: error: {out} holds another data set')

    def test_again_and_overwrite(self, tmp_path, capsys):
        main = load_tool().main
        args = ['--out', str(tmp_path), *self.ARGS]
        assert main(args) == 0
        assert main(args) == 0
        assert 'already complete' in capsys.readouterr().out
        assert main([*args, '--seed', '4']) == 2
        assert main([*args, '--seed', '4', '--overwrite', '--max-shapes', '2']) == 0
        assert read_manifest(tmp_path)['recipe']['max_shapes'] == 2

    def test_interruption_says_what_to_do(self, tmp_path, capsys, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        tool = load_tool()
        monkeypatch.setattr(tool, 'make_shapes', interrupted)
        assert tool.main(['--out', str(tmp_path)]) == 130
        assert 'the same command again' in capsys.readouterr().err

    def test_help_names_defaults(self, capsys):
        with pytest.raises(SystemExit):
            load_tool().main(['--help'])
        text = ' '.join(capsys.readouterr().out.split())
        for default in ('data/shapes', '3000', '200', '96', '3', '0'):
            assert f'(default: {default})' in text


def test_importing_needs_no_openmmlab(tmp_path):
    """The module alone, as the package itself may need torch and MMEngine."""
    code = (
        'import importlib.util, json, sys\n'
        f'spec = importlib.util.spec_from_file_location("shapes", {shapes.__file__!r})\n'
        'module = sys.modules["shapes"] = importlib.util.module_from_spec(spec)\n'
        'spec.loader.exec_module(module)\n'
        'print(json.dumps(sorted(sys.modules)))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmlavit'}
