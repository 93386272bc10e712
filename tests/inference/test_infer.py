"""``mmlavit infer`` in all three toolboxes: what it writes is what their own inferencers find."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from helpers import assert_ran, run_command, the_one_line
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain import ImageClassificationInferencer
from mmseg.apis import MMSegInferencer
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmlavit.__main__ import main
from mmlavit.datasets.shapes import CLASSES
from mmlavit.shipped import config_path

CONFIGS = {
    'mmdet': 'maskrcnn_lavit_n_shapes',
    'mmseg': 'upernet_lavit_n_shapes',
    'mmpretrain': 'lavit_n_shapes',
}
SIZES = {'a.png': (64, 64), 'b.jpg': (50, 80), 'c.bmp': (97, 133)}  # height, width
FRAMES, FPS = 5, 10.0
# Other than what the configs say: names come from the checkpoint.
NAMES = ('disc', 'box', 'wedge')
LABELS = {'mmdet': NAMES, 'mmseg': ('ground', *NAMES), 'mmpretrain': NAMES}
NEVER = 2  # no score is over this


class Outcome(NamedTuple):
    """How a call in this process ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope='module', autouse=True)
def surroundings() -> Iterator[None]:
    """The command sets a scope and filters warnings, which are the process's."""
    with DefaultScope.overwrite_default_scope('mmengine'), warnings.catch_warnings():
        yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Images of three kinds and sizes, a file that is none, and a video beside them."""
    print('seed 0')
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp('infer')
    (path / 'images').mkdir()

    def picture(height: int, width: int) -> np.ndarray:
        return cv2.resize(generator.integers(256, size=(5, 5, 3), dtype=np.uint8), (width, height))

    for name, size in SIZES.items():
        cv2.imwrite(str(path / 'images' / name), picture(*size))
    (path / 'images' / 'notes.txt').write_text('no image')
    code = cv2.VideoWriter.fourcc(*'mp4v')
    film = cv2.VideoWriter(str(path / 'clip.mp4'), code, FPS, (96, 64))
    for _ in range(FRAMES):
        film.write(picture(64, 96))
    film.release()
    return path


@pytest.fixture(scope='module')
def checkpoints(folder) -> dict[str, Path]:
    """Checkpoints as MMEngine writes them: random weights with the names of their classes."""
    made = {}
    for scope, name in CONFIGS.items():
        cfg = Config.fromfile(config_path(name))
        registry = importlib.import_module(f'{scope}.registry')
        if 'data_preprocessor' in cfg:
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        with DefaultScope.overwrite_default_scope(scope), torch.random.fork_rng():
            torch.manual_seed(1)
            model = registry.MODELS.build(cfg.model)
            model.init_weights()
        made[scope] = folder / f'{scope}.pth'
        meta = dict(dataset_meta=dict(classes=LABELS[scope]))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), made[scope])
    return made


@pytest.fixture
def call(monkeypatch, tmp_path, capsys) -> Callable[..., Outcome]:
    """``mmlavit infer ARGS`` in ``tmp_path``, without the cost of another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', sys.argv)

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main(['infer', *map(str, args)])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code or 0, *capsys.readouterr())

    return run


def found_by_the_toolbox(scope: str, checkpoint: Path, image: str | np.ndarray) -> object:
    """What the toolbox's own inferencer says of an image."""
    config = str(config_path(CONFIGS[scope]))
    if scope == 'mmdet':
        return DetInferencer(config, str(checkpoint), device='cpu')(image)['predictions'][0]
    if scope == 'mmseg':
        return MMSegInferencer(config, str(checkpoint), device='cpu')(image)['predictions']
    return ImageClassificationInferencer(config, str(checkpoint), device='cpu')(image)[0]


def assert_found(scope: str, out: Path, number: int, found: object) -> None:
    """The files say of the image with this number what the toolbox does."""
    content = json.loads((out / 'predictions.json').read_text())
    image = content['images'][number]
    if scope == 'mmdet':
        mine = [a for a in content['annotations'] if a['image_id'] == image['id']]
        assert [a['category_id'] - 1 for a in mine] == found['labels'] != []
        assert [a['score'] for a in mine] == found['scores']
        assert [a['segmentation'] for a in mine] == found['masks']
        for a, (left, top, right, bottom) in zip(mine, found['bboxes'], strict=True):
            assert a['bbox'] == pytest.approx([left, top, right - left, bottom - top])
    elif scope == 'mmseg':
        labels = cv2.imread(str(out / image['labels']), cv2.IMREAD_UNCHANGED)
        assert labels.dtype == np.uint8 and (labels == found).all() and len(np.unique(found)) > 1
    else:
        mine = {p['label']: p['score'] for p in image['predictions']}
        assert list(mine) == list(np.argsort(-found['pred_scores'], kind='stable'))
        assert mine == pytest.approx(dict(enumerate(found['pred_scores'])))


def assert_a_data_set(file: Path, sizes: list[tuple[int, int]]) -> None:
    """pycocotools takes the file for annotations and for results, and finds it right."""
    truth = COCO(str(file))
    assert [(i['height'], i['width']) for i in truth.dataset['images']] == sizes
    assert [c['name'] for c in truth.loadCats(truth.getCatIds())] == list(NAMES)
    annotations = truth.dataset['annotations']
    for annotation in annotations:
        image = truth.imgs[annotation['image_id']]
        area = truth.annToMask(annotation)
        assert area.shape == (image['height'], image['width'])
        assert area.sum() == annotation['area'] == mask.area(annotation['segmentation'])
        left, top, width, height = annotation['bbox']
        assert min(left, top) >= 0 and 0 < annotation['score'] <= 1
        assert left + width <= image['width'] + 1e-3 and top + height <= image['height'] + 1e-3
    # An untrained mask may be empty, and overlaps with nothing then, not even with itself.
    truth.dataset['annotations'] = [a for a in annotations if a['area'] > 0]
    truth.createIndex()
    content = json.loads(file.read_text())['annotations']
    results = truth.loadRes([a for a in content if a['area'] > 0])
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] > 0.99


@pytest.mark.parametrize('scope', CONFIGS)
def test_a_folder(call, scope, checkpoints, folder, tmp_path):
    options = ['--out', 'found', '--threshold', 0.2]
    outcome = call(CONFIGS[scope], checkpoints[scope], folder / 'images', *options)
    assert outcome.code == 0, outcome
    for name in SIZES:
        assert re.search(rf'^{re.escape(name)}: .*({"|".join(LABELS[scope])})', outcome.out, re.M)
    assert 'left out: 1 file ' in outcome.err
    out = tmp_path / 'found'
    content = json.loads((out / 'predictions.json').read_text())
    assert [i['file_name'] for i in content['images']] == sorted(SIZES)
    for number, (name, size) in enumerate(SIZES.items()):
        path = str(folder / 'images' / name)
        assert_found(scope, out, number, found_by_the_toolbox(scope, checkpoints[scope], path))
        drawn = cv2.imread(str(out / 'pictures' / f'{Path(name).stem}.jpg'))
        assert drawn.shape[:2] == size
        assert np.abs(drawn.astype(int) - cv2.imread(path)).max() > 60
    assert (out / 'labels').exists() == (scope == 'mmseg')
    if scope == 'mmdet':
        assert_a_data_set(out / 'predictions.json', list(SIZES.values()))
    else:
        assert content['classes'] == list(LABELS[scope])


@pytest.mark.parametrize('scope', CONFIGS)
def test_a_video(call, scope, checkpoints, folder, tmp_path):
    """Each frame as an image of its own, and the drawing as a video as long and as fast."""
    reader = cv2.VideoCapture(str(folder / 'clip.mp4'))
    frames = [reader.read()[1] for _ in range(FRAMES)]
    # Options may stand between the checkpoint and the input.
    outcome = call(CONFIGS[scope], checkpoints[scope], '--out', 'found', folder / 'clip.mp4')
    assert outcome.code == 0, outcome
    out = tmp_path / 'found'
    images = json.loads((out / 'predictions.json').read_text())['images']
    assert [(i['video'], i['frame']) for i in images] == [('clip.mp4', n) for n in range(FRAMES)]
    for number in (0, FRAMES - 1):
        found = found_by_the_toolbox(scope, checkpoints[scope], frames[number])
        assert_found(scope, out, number, found)
    (file,) = (out / 'pictures').iterdir()
    drawn = cv2.VideoCapture(str(file))
    assert drawn.get(cv2.CAP_PROP_FPS) == FPS
    pictures = []
    while (read := drawn.read())[0]:
        pictures.append(read[1])
    assert [p.shape for p in pictures] == [f.shape for f in frames]


def test_colours_stay_where_nothing_is_drawn(call, checkpoints, folder, tmp_path):
    """Of images and of videos, but for compression."""
    for source in ('images', 'clip.mp4'):
        options = ['--threshold', NEVER, '--out', source]
        outcome = call(CONFIGS['mmdet'], checkpoints['mmdet'], folder / source, *options)
        assert outcome.code == 0 and 'nothing' in outcome.out
    pairs = [
        (tmp_path / 'images' / 'pictures' / 'a.jpg', folder / 'images' / 'a.png'),
        (tmp_path / 'clip.mp4' / 'pictures' / 'clip.mp4', folder / 'clip.mp4'),
    ]
    for drawn, original in pairs:
        drawn, original = (cv2.VideoCapture(str(f)).read()[1] for f in (drawn, original))
        assert np.abs(drawn.astype(int) - original).mean() < 6
        assert np.abs(drawn[..., ::-1].astype(int) - original).mean() > 30


@pytest.mark.parametrize('scope', CONFIGS)
def test_batches_and_no_pictures(call, scope, checkpoints, folder, tmp_path):
    """Of images of one size; others are padded in a batch, or refused, by the toolboxes."""
    for out, options in {'one': [], 'more': ['--batch-size', 2, '--no-pictures']}.items():
        options = [*options, '--out', out]
        assert call(CONFIGS[scope], checkpoints[scope], folder / 'clip.mp4', *options).code == 0
    one, more = (json.loads(Path(o, 'predictions.json').read_text()) for o in ('one', 'more'))
    assert Path('one/pictures').exists() and not Path('more/pictures').exists()
    assert len(one['images']) == len(more['images']) == FRAMES
    if scope == 'mmdet':
        assert len(one['annotations']) == len(more['annotations'])
        for a, b in zip(one['annotations'], more['annotations'], strict=True):
            assert a['bbox'] == pytest.approx(b['bbox'], abs=0.01)
    for a, b in zip(one['images'], more['images'], strict=True):
        if scope == 'mmseg':
            labels = [cv2.imread(str(Path(o, a['labels']))) for o in ('one', 'more')]
            assert (labels[0] == labels[1]).mean() > 0.999
        elif scope == 'mmpretrain':
            assert a['predictions'][0]['label'] == b['predictions'][0]['label']


def test_options_of_the_config(call, checkpoints, folder):
    options = ['--cfg-options', 'model.test_cfg.rcnn.max_per_img=1', '--out', 'found']
    assert call(CONFIGS['mmdet'], checkpoints['mmdet'], folder / 'images', *options).code == 0
    content = json.loads(Path('found/predictions.json').read_text())
    assert [a['image_id'] for a in content['annotations']] == [1, 2, 3]


def test_untrained(call, folder):
    """As a training starts: the same each time, and the classes are those of the config."""
    image = folder / 'images' / 'a.png'
    for out in ('1', '2'):
        assert call('maskrcnn_lavit_n_shapes', 'none', image, '--out', out).code == 0
    texts = [Path(out, 'predictions.json').read_text() for out in ('1', '2')]
    assert texts[0] == texts[1]
    assert [c['name'] for c in json.loads(texts[0])['categories']] == list(CLASSES)


def test_a_broken_image_costs_no_other(call, checkpoints, folder, tmp_path):
    images = shutil.copytree(folder / 'images', tmp_path / 'images')
    (images / 'broken.png').write_bytes((images / 'a.png').read_bytes()[:40])
    outcome = call(CONFIGS['mmpretrain'], checkpoints['mmpretrain'], images)
    assert outcome.code == 2
    assert 'mmlavit: cannot read broken.png' in outcome.err
    content = json.loads(Path('predictions/predictions.json').read_text())
    assert [i['file_name'] for i in content['images']] == sorted(SIZES)


def test_images_that_differ_in_their_endings_alone(call, checkpoints, folder, tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    for name in ('a.png', 'a.bmp', 'b.png'):
        cv2.imwrite(str(images / name), cv2.imread(str(folder / 'images' / 'a.png')))
    assert call(CONFIGS['mmseg'], checkpoints['mmseg'], images).code == 0
    names = {path.name for path in Path('predictions/labels').iterdir()}
    assert names == {'a.png.png', 'a.bmp.png', 'b.png'}


def test_nothing_is_lost(call, checkpoints, folder):
    args = [CONFIGS['mmpretrain'], checkpoints['mmpretrain'], folder / 'images' / 'a.png']
    Path('predictions').mkdir()
    Path('predictions/mine.txt').write_text('kept')
    refused = call(*args)
    assert refused.code == 2 and '--force' in the_one_line(refused.err)
    assert [p.name for p in Path('predictions').iterdir()] == ['mine.txt']
    assert call(*args, '--force').code == 0
    assert Path('predictions/mine.txt').read_text() == 'kept'
    assert call(*args, '--out', 'predictions/mine.txt').code == 2


@pytest.mark.parametrize(
    'args, pieces',
    [
        (['lavit_n_shapes', '{folder}/images'], ['lavit_n_shapes', 'without weights', "'none'"]),
        (['lavit_n_shapes', 'none', 'gone'], ['no image, folder or video', 'gone']),
        (['lavit_n_shapes', 'none', '{folder}/images/notes.txt'], ['notes.txt', 'neither']),
        (['lavit_n_shapes', 'none', '.'], ['folder .', 'no image']),
        (['lavit_n_shapes', 'gone.pth', '{folder}/clip.mp4'], ['gone.pth']),
        (['gone', 'none', '{folder}/clip.mp4'], ['config file not found', 'gone']),
        # A classifier's weights in a detector would leave its heads untrained.
        (['maskrcnn_lavit_n_shapes', '{folder}/mmpretrain.pth', '{folder}/clip.mp4'],
         ['does not fit', 'lacks', 'mmpretrain.pth']),
        (['lavit_t_imagenet', '{folder}/mmpretrain.pth', '{folder}/clip.mp4'], ['does not fit']),
        (['lavit_n_shapes', 'none', '{folder}/clip.mp4', '--device', 'abacus'], ["'abacus'"]),
        (['lavit_n_shapes', 'none', '{folder}/images', '--batch-size', '3'],
         ['a.png', '--batch-size 1']),
        (['upernet_lavit_n_shapes', 'none', '{folder}/images', '--batch-size', '3'],
         ['a.png', 'The image size in a batch should be the same', '--batch-size 1']),
        (['lavit_n_shapes', 'none', '{folder}/clip.mp4', '--cfg-options', 'model.type=Nobody'],
         ['Nobody']),
    ],
)  # fmt: skip
def test_refusals(call, args, pieces, checkpoints, folder, tmp_path):
    outcome = call(*[arg.format(folder=folder) for arg in args])
    assert outcome.code == 2
    line = the_one_line(outcome.err)
    assert line.startswith('mmlavit: ')
    assert [piece for piece in pieces if piece not in line] == [], line
    assert not list(tmp_path.rglob('predictions.json'))


def test_batch_size_zero(call, folder):
    outcome = call('lavit_n_shapes', 'none', folder / 'images', '--batch-size', 0)
    assert outcome.code == 2 and '--batch-size' in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize('scope', CONFIGS)
def test_a_real_process(scope, checkpoints, folder, tmp_path):
    """From an empty folder, with a config of the user's own, which names no toolbox."""
    (tmp_path / 'mine.py').write_text(f"_base_ = 'mmlavit::{CONFIGS[scope]}.py'\n")
    for source in ('images/b.jpg', 'images', 'clip.mp4'):
        args = ['mine.py', checkpoints[scope], folder / source, '--out', Path(source).stem]
        result = run_command('infer', *args, cwd=tmp_path)
        assert_ran(result)
        assert 'Warning' not in result.stderr
        assert (tmp_path / Path(source).stem / 'predictions.json').stat().st_size > 50
