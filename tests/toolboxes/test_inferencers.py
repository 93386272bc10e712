"""The toolboxes' inferencers on what a training leaves behind: a config and a checkpoint.

The few lines that README.md and docs/command_line.md print for each run in a process of their own,
far from the repository.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmcv
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain import ImageClassificationInferencer
from mmseg.apis import MMSegInferencer
from torch import Tensor

from mmlavit import LaViT
from mmlavit.datasets.shapes import CLASSES, ShapesRecipe, make_shapes
from mmlavit.export.privacy import Privacy
from mmlavit.export.publish import prepare, write

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
INFERENCERS = {
    'mmpretrain': ImageClassificationInferencer,
    'mmdet': DetInferencer,
    'mmseg': MMSegInferencer,
}
NAMES = {
    'mmpretrain': 'lavit_n_shapes',
    'mmdet': 'maskrcnn_lavit_n_shapes',
    'mmseg': 'upernet_lavit_n_shapes',
}
SIZES = [(64, 64), (50, 80), (97, 33)]  # height, width

# What README.md and docs/command_line.md print. The folder holds config.py, checkpoint.pth and
# image.jpg.
README = {
    'mmdet': """
from mmlavit.compat import repair_torchvision

repair_torchvision()

from mmdet.apis import DetInferencer

inferencer = DetInferencer('config.py', 'checkpoint.pth')
found = inferencer('image.jpg', out_dir='drawn')['predictions'][0]
classes = inferencer.model.dataset_meta['classes']
for label, score, box in zip(found['labels'], found['scores'], found['bboxes']):
    print(classes[label], score, box)
""",
    'mmseg': """
from mmlavit.compat import repair_torchvision

repair_torchvision()

from mmseg.apis import MMSegInferencer

inferencer = MMSegInferencer('config.py', 'checkpoint.pth')
labels = inferencer('image.jpg', out_dir='drawn')['predictions']  # (height, width)
classes = inferencer.model.dataset_meta['classes']
for label in range(len(classes)):
    print(classes[label], (labels == label).mean())
""",
    'mmpretrain': """
from mmlavit.compat import repair_torchvision

repair_torchvision()

from mmpretrain import ImageClassificationInferencer

inferencer = ImageClassificationInferencer('config.py', 'checkpoint.pth')
found = inferencer('image.jpg', show_dir='drawn')[0]
print(found['pred_class'], found['pred_score'])
""",
}


@pytest.fixture(scope='module', autouse=True)
def scopes() -> Iterator[None]:
    """Runners and inferencers set the process's default scope; afterwards it is as before."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A few shapes; unpadded, as mmseg 1.2 fails on padded labels under a class_weight."""
    path = tmp_path_factory.mktemp('inferencers')
    make_shapes(path / 'shapes', ShapesRecipe(num_train=6, num_val=1), progress=False)
    return path


def train(scope: str, folder: Path, pretrained: Path | None = None) -> Path:
    """One iteration of a config, by a Runner; the checkpoint that its CheckpointHook writes."""
    cfg = Config.fromfile(CONFIGS / f'{NAMES[scope]}.py')
    cfg.work_dir = str(folder / scope)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.data_root = loader.dataset.data_root.replace('data', str(folder), 1)
        loader.update(num_workers=0, persistent_workers=False)
    for split in ('val', 'test'):
        evaluator = cfg[f'{split}_evaluator']
        if 'ann_file' in evaluator:
            evaluator.ann_file = evaluator.ann_file.replace('data', str(folder), 1)
    cfg.train_dataloader.batch_size = 6
    length = 'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs'
    cfg.train_cfg.update({length: 1, 'val_interval': 9})
    cfg.default_hooks.checkpoint.update(interval=1, save_best=None)
    if pretrained:
        cfg.merge_from_dict({'model.backbone.init_cfg.checkpoint': str(pretrained)})
    Runner.from_cfg(cfg).train()
    (checkpoint,) = (folder / scope).glob('*_1.pth')
    return checkpoint


@pytest.fixture(scope='module')
def checkpoints(folder):
    """A function that gives a toolbox's checkpoint; the tasks start from the classifier's.

    That file is gone afterwards, as it is where a trained model is taken to.
    """

    @functools.cache
    def make(scope: str) -> Path:
        if scope == 'mmpretrain':
            return train(scope, folder)
        pretrained = Path(shutil.copy(make('mmpretrain'), folder / 'pretrained.pth'))
        checkpoint = train(scope, folder, pretrained)
        pretrained.unlink()
        return checkpoint

    return make


@pytest.fixture(scope='module', params=NAMES)
def user(request, checkpoints) -> SimpleNamespace:
    """An inferencer over a config of ours and a checkpoint of it."""
    scope = request.param
    config = CONFIGS / f'{NAMES[scope]}.py'
    inferencer = INFERENCERS[scope](str(config), str(checkpoints(scope)), device='cpu')
    return SimpleNamespace(scope=scope, config=config, inferencer=inferencer)


@pytest.fixture(scope='module')
def pictures(folder) -> list[str]:
    """Photographs of nothing, in three sizes."""
    print('seed 0')
    generator = np.random.default_rng(0)
    paths = []
    for i, (height, width) in enumerate(SIZES):
        coarse = generator.integers(256, size=(5, 5, 3), dtype=np.uint8)
        paths.append(str(folder / f'{i}.png'))
        cv2.imwrite(paths[-1], cv2.resize(coarse, (width, height)))
    return paths


def predict(user: SimpleNamespace, image: str | np.ndarray | list) -> list[dict[str, Tensor]]:
    """What the inferencer finds in each image, as tensors."""
    if user.scope == 'mmdet':
        found = user.inferencer(image, return_datasamples=True)['predictions']
        return [dict(sample.pred_instances.items()) for sample in found]
    if user.scope == 'mmseg':
        found = user.inferencer(image)['predictions']
        found = found if isinstance(image, list) else [found]
        return [dict(labels=torch.from_numpy(labels)) for labels in found]
    return [dict(scores=torch.from_numpy(f['pred_scores'])) for f in user.inferencer(image)]


def assert_same(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name])


def load(cfg: Config, checkpoint: Path) -> BaseModel:
    """The model of a config with the weights of a checkpoint, by PyTorch alone."""
    registry = importlib.import_module(f'{cfg.default_scope}.registry')
    model = registry.MODELS.build(copy.deepcopy(cfg.model)).eval()
    saved = torch.load(checkpoint, map_location='cpu', weights_only=False)
    model.load_state_dict(saved['state_dict'])
    return model


def direct(cfg: Config, model: BaseModel, image: np.ndarray) -> dict[str, Tensor]:
    """What the model finds in an image that is prepared by hand."""
    height, width = image.shape[:2]
    with torch.no_grad():
        if cfg.default_scope == 'mmdet':
            resized = mmcv.imrescale(image, (96, 96))
            factor = (resized.shape[1] / width, resized.shape[0] / height)
            sample = DetDataSample(
                metainfo=dict(
                    img_shape=resized.shape[:2], ori_shape=(height, width), scale_factor=factor
                )
            )
            inputs = torch.from_numpy(resized.transpose(2, 0, 1).copy())
            (result,) = model.test_step(dict(inputs=[inputs], data_samples=[sample]))
            return dict(result.pred_instances.items())
        mean, std = (torch.tensor(cfg.data_preprocessor[key]) for key in ('mean', 'std'))
        rgb = (torch.from_numpy(image[..., ::-1].copy()) - mean) / std
        x = rgb.permute(2, 0, 1)[None]
        if cfg.default_scope == 'mmseg':
            logits = model(x, mode='tensor')
            logits = F.interpolate(logits, (height, width), mode='bilinear', align_corners=False)
            return dict(labels=logits[0].argmax(0))
        return dict(scores=model.head.fc(model.backbone(x)[-1].mean((2, 3)))[0].softmax(0))


def names(user: SimpleNamespace) -> list[str]:
    if user.scope == 'mmpretrain':
        return list(user.inferencer.classes)
    return list(user.inferencer.model.dataset_meta['classes'])


# ---- In this process -----------------------------------------------------------------------------


def test_knows_the_model_and_its_classes(user):
    assert isinstance(user.inferencer.model.backbone, LaViT)
    background = ['background'] if user.scope == 'mmseg' else []
    assert names(user) == [*background, *CLASSES] == [*background, 'circle', 'square', 'triangle']


def test_every_size_and_the_whole_of_each_class(user, pictures):
    """In the images' own frames, and with as many classes as there are names."""
    for path, (height, width) in zip(pictures, SIZES, strict=True):
        (found,) = predict(user, path)
        if user.scope == 'mmpretrain':
            assert found['scores'].shape == (3,)
            assert found['scores'].sum().item() == pytest.approx(1)
            continue
        assert found['labels'].min() >= 0 and found['labels'].max() < len(names(user))
        if user.scope == 'mmseg':
            assert found['labels'].shape == (height, width)
            continue
        assert 0 < len(found['labels']) == len(found['scores']) == len(found['bboxes'])
        assert found['masks'].shape == (len(found['labels']), height, width)
        limits = torch.tensor([width, height, width, height]) + 1e-3
        assert (found['bboxes'] >= 0).all() and (found['bboxes'] <= limits).all()


def test_the_model_itself_says_the_same(user, checkpoints, pictures):
    cfg = Config.fromfile(user.config)
    model = load(cfg, checkpoints(user.scope))
    for path in pictures:
        assert_same(predict(user, path), [direct(cfg, model, cv2.imread(path))])


def test_a_path_and_an_array_are_the_same_image(user, pictures):
    for path in pictures:
        assert_same(predict(user, path), predict(user, cv2.imread(path)))


def test_many_images_are_each_as_if_alone(user, pictures):
    arrays = [cv2.imread(path) for path in pictures]
    alone = [predict(user, path)[0] for path in pictures]
    assert_same(predict(user, pictures), alone)
    assert_same(predict(user, arrays), alone)


def test_results_in_the_words_of_the_toolbox(user, pictures):
    """The plain form, which is what README.md reads, says what the samples say."""
    (found,) = predict(user, pictures[0])
    if user.scope == 'mmdet':
        (plain,) = user.inferencer(pictures[0])['predictions']
        assert plain['labels'] == found['labels'].tolist()
        assert plain['scores'] == found['scores'].tolist()
        assert plain['bboxes'] == found['bboxes'].tolist()
        assert len(plain['masks']) == len(found['masks'])
    elif user.scope == 'mmseg':
        (sample,) = [user.inferencer(pictures[0], return_datasamples=True)]
        assert torch.equal(sample.pred_sem_seg.data[0], found['labels'])
        assert sample.seg_logits.data.shape == (4, *SIZES[0])
    else:
        (plain,) = user.inferencer(pictures[0])
        assert plain['pred_label'] == found['scores'].argmax()
        assert plain['pred_class'] == CLASSES[plain['pred_label']]
        assert plain['pred_score'] == found['scores'].max()


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_the_checkpoint_alone_is_enough(scope, checkpoints, folder, pictures):
    """It holds the config, which names the pretrained weights that are not there any more."""
    saved = torch.load(checkpoints(scope), map_location='cpu', weights_only=False)
    assert str(folder / 'pretrained.pth') in saved['meta']['cfg']
    assert not (folder / 'pretrained.pth').exists()
    config = str(CONFIGS / f'{NAMES[scope]}.py')
    users = [
        SimpleNamespace(
            scope=scope,
            inferencer=INFERENCERS[scope](model, str(checkpoints(scope)), device='cpu'),
        )
        for model in (None, config)
    ]
    assert names(users[0]) == names(users[1])
    assert_same(*(predict(user, pictures[1]) for user in users))


# ---- What is published ---------------------------------------------------------------------------


@pytest.fixture(scope='module')
def published(checkpoints, folder):
    """A function that gives a toolbox's checkpoint as it is published: by suffix, its files."""

    @functools.cache
    def make(scope: str, half: bool = False) -> dict[str, Path]:
        release = prepare(checkpoints(scope), half=half, privacy=Privacy())
        paths = write(folder / 'published' / scope, release.files())
        return {path.suffix: path for path in paths}

    return make


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_published_weights_say_the_same(user, published, pictures, suffix):
    """With a config beside them; for mmdet and mmseg they are enough alone, as a checkpoint is."""
    file = str(published(user.scope)[suffix])
    configs = [str(user.config)] + [None] * (user.scope != 'mmpretrain')
    for config in configs:
        inferencer = INFERENCERS[user.scope](config, file, device='cpu')
        other = SimpleNamespace(scope=user.scope, inferencer=inferencer)
        assert names(other) == names(user)
        assert_same(predict(other, pictures), predict(user, pictures))
    if user.scope != 'mmpretrain':
        assert user.inferencer.model.dataset_meta == inferencer.model.dataset_meta


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_published_weights_of_half_precision(user, published, checkpoints, pictures, suffix):
    """They say what the model says with its weights rounded by hand."""
    cfg = Config.fromfile(user.config)
    model = load(cfg, checkpoints(user.scope))
    rounded = {
        name: weight.half().to(weight) if weight.is_floating_point() else weight
        for name, weight in model.state_dict().items()
    }
    assert any(not torch.equal(rounded[name], w) for name, w in model.state_dict().items())
    model.load_state_dict(rounded)
    file = str(published(user.scope, half=True)[suffix])
    inferencer = INFERENCERS[user.scope](str(user.config), file, device='cpu')
    assert {p.dtype for p in inferencer.model.parameters()} == {torch.float32}
    other = SimpleNamespace(scope=user.scope, inferencer=inferencer)
    path = pictures[0]
    assert_same(predict(other, path), [direct(cfg, model, cv2.imread(path))])


# ---- In a process of its own ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'scope',
    [
        'mmdet',
        pytest.param('mmseg', marks=pytest.mark.slow),
        pytest.param('mmpretrain', marks=pytest.mark.slow),
    ],
)
def test_the_lines_of_the_readme(scope, checkpoints, pictures, tmp_path):
    """From another folder, with no word of LaViT but the config's ``custom_imports``."""
    config = str(CONFIGS / f'{NAMES[scope]}.py')
    (tmp_path / 'config.py').write_text(f'_base_ = {config!r}\n')
    shutil.copy(checkpoints(scope), tmp_path / 'checkpoint.pth')
    cv2.imwrite(str(tmp_path / 'image.jpg'), cv2.imread(pictures[1]))
    ran = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', README[scope]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    # mmpretrain's progress bar leaves the line open.
    words = '|'.join(['background', *CLASSES])
    said = [(name, float(x)) for name, x in re.findall(rf'({words}) ([\d.e-]+)', ran.stdout)]
    if scope == 'mmseg':
        assert [name for name, _ in said] == ['background', *CLASSES]
        assert sum(share for _, share in said) == pytest.approx(1)
    else:
        assert said
        assert all(0 < score <= 1 for _, score in said)
    (drawn,) = (tmp_path / 'drawn').rglob('*.jpg' if scope != 'mmpretrain' else '*.png')
    assert cv2.imread(str(drawn)).shape[:2] == SIZES[1]
