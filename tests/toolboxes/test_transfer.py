"""The way from a pretrained classifier to the task: one option, and every weight arrives."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SHAPES_CONFIG, assert_ran, run_tool, shapes_options
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import save_checkpoint
from small import ARCH, images, seeded, small_lavit
from torch import Tensor

from mmlavit import LaViT
from mmlavit.datasets.shapes import ShapesRecipe, make_shapes
from mmlavit.export.privacy import Privacy
from mmlavit.export.publish import prepare, write
from mmlavit.models.state_dict import resize_window_weight

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# On photographs nano has other windows in its classifier than in its tasks, so Psi and Theta are
# resized on the way; test_windows_may_differ is about that.
PHOTOGRAPHS = ('tinyimagenet', 'camvid', 'dsb2018', 'bccd')
FILES = [file for file in CONFIGS.glob('*.py') if not file.stem.endswith(PHOTOGRAPHS)]
CLASSIFIERS = {file.stem.split('_')[1]: file for file in FILES if file.stem.startswith('lavit_')}
TASKS = sorted(file for file in FILES if not file.stem.startswith('lavit_'))


def letter(file: Path) -> str:
    """Which member of the family a config is of."""
    return file.stem.split('_lavit_')[1][0]


# The small ones stand for the others, which differ in numbers alone.
TASKS_QUICK_FIRST = [
    pytest.param(file, id=file.stem, marks=() if letter(file) in 'ns' else pytest.mark.slow)
    for file in TASKS
]
NANO = [file for file in TASKS if letter(file) == 'n']


@pytest.fixture
def log(request) -> Iterator[list[str]]:
    """What MMEngine's current logger says."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_instance(f'{__name__}.{request.node.name}', log_level='INFO')
    logger.handlers = [handler]
    yield lines
    logger.handlers = []


def build(cfg: Config) -> BaseModel:
    """The model of a config, as the Runner builds it, before its weights are initialised."""
    importlib.import_module(f'{cfg.default_scope}.models')
    registry = importlib.import_module(f'{cfg.default_scope}.registry')
    return registry.MODELS.build(copy.deepcopy(cfg.model))


def perturb(model: BaseModel, seed: int) -> None:
    """Move every weight away from where it started, Psi, Theta and LayerScale included."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            start = parameter.clone()
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            assert (parameter != start).float().mean() > 0.99


def save(model: BaseModel, path: Path, **meta: object) -> None:
    """A checkpoint with all that MMEngine's CheckpointHook writes beside the weights."""
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = dict(
        meta=dict(epoch=20, iter=1000, seed=0, mmengine_version='0.10.12', **meta),
        state_dict=model.state_dict(),
        message_hub=dict(log_scalars={}, runtime_info=dict(epoch=19), resumed_keys={}),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(last_step=1000, _global_step=1001)],
    )
    save_checkpoint(checkpoint, str(path))


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory):
    """A function that gives a classifier of the family, its weights perturbed, and its file."""
    folder = tmp_path_factory.mktemp('pretrained')

    @functools.cache
    def make(member: str) -> SimpleNamespace:
        cfg = Config.fromfile(CLASSIFIERS[member])
        torch.manual_seed(0)
        model = build(cfg)
        model.init_weights()
        perturb(model, seed=1)
        path = folder / f'lavit_{member}.pth'
        save(model, path, cfg=cfg.pretty_text, dataset_meta=dict(classes=('a', 'b', 'c')))
        return SimpleNamespace(path=path, model=model.eval())

    return make


def with_options(file: Path, *options: str) -> Config:
    """A config with what ``--cfg-options`` says, read as the tools read it."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg = Config.fromfile(file)
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    return cfg


def checkpoint_option(path: Path) -> str:
    return f'model.backbone.init_cfg.checkpoint={path}'


def missing_keys(log: list[str]) -> set[str]:
    """What MMEngine named as missing in the checkpoint, in a log that complains of nothing else."""
    complaints = [line for line in log if 'do not match' in line]
    if not complaints:
        return set()
    (complaint,) = complaints
    found = re.fullmatch(
        r'The model and loaded state dict do not match exactly\s*'
        r'missing keys in source state_dict: (.+)\s*',
        complaint,
    )
    assert found, complaint
    return set(found[1].split(', '))


def own_norms(backbone: LaViT) -> set[str]:
    """The output norms of all stages but the last, the only one whose map a classifier takes."""
    return {f'norm{m}.{kind}' for m in backbone.out_indices[:-1] for kind in ('weight', 'bias')}


def assert_arrived(backbone: LaViT, start: dict[str, Tensor], source: LaViT) -> None:
    """Every tensor is the source's; only the norms that it lacks are still as they started."""
    theirs, ours = source.state_dict(), backbone.state_dict()
    assert theirs.keys() <= ours.keys()
    assert ours.keys() - theirs.keys() == own_norms(backbone)
    for name, tensor in ours.items():
        if name in theirs:
            assert torch.equal(tensor, theirs[name]), name
            assert not torch.equal(tensor, start[name]), name
        else:
            assert torch.equal(tensor, start[name]), name


def snapshot(backbone: LaViT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


# ---- The option ----------------------------------------------------------------------------------


def test_there_are_classifiers_and_tasks():
    assert set(CLASSIFIERS) == {'n', 't', 's', 'b'}
    assert {letter(file) for file in TASKS} == set(CLASSIFIERS)
    assert {file.stem.split('_')[0] for file in NANO} >= {'maskrcnn', 'retinanet', 'upernet'}


@pytest.mark.parametrize('file', TASKS_QUICK_FIRST)
def test_every_weight_of_the_classifiers_backbone_arrives(file, pretrained, log):
    source = pretrained(letter(file))
    model = build(with_options(file, checkpoint_option(source.path)))
    start = snapshot(model.backbone)
    log.clear()
    model.init_weights()
    assert_arrived(model.backbone, start, source.model.backbone)
    assert missing_keys(log) == own_norms(model.backbone)
    assert f'load backbone. in model from: {source.path}' in log
    assert not any('LaViT: resized' in line for line in log)


@pytest.mark.parametrize('file', NANO, ids=lambda file: file.stem)
def test_the_task_sees_what_the_classifier_saw(file, pretrained):
    """The last map is the same, to the bit, on an image of another size than either trained on."""
    source = pretrained('n')
    model = build(with_options(file, checkpoint_option(source.path))).eval()
    model.init_weights()
    x = images(2, 3, 70, 90).float()
    with torch.no_grad():
        assert torch.equal(model.backbone(x)[-1], source.model.backbone(x)[-1])


@pytest.mark.parametrize('file', NANO, ids=lambda file: file.stem)
def test_without_the_option_nothing_is_loaded(file, pretrained, log):
    """What the checkpoint holds is not what a model starts with anyway."""
    model = build(Config.fromfile(file))
    start = snapshot(model.backbone)
    model.init_weights()
    theirs = pretrained('n').model.backbone.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, start[name]), name
        assert name not in theirs or not torch.equal(tensor, theirs[name]), name
    assert not any(line.startswith('load ') for line in log)


@pytest.mark.parametrize(
    'name, windows',
    [
        ('maskrcnn_lavit_n_shapes', (4, 4, 4, 4)),
        ('retinanet_lavit_n_shapes', (8, 8, 4, 4)),
        ('upernet_lavit_n_shapes', (14, 14, 14, 7)),
    ],
)
def test_windows_may_differ(name, windows, pretrained, log):
    file, source = CONFIGS / f'{name}.py', pretrained('n')
    option = 'model.backbone.window_sizes=' + ','.join(map(str, windows))
    model = build(with_options(file, checkpoint_option(source.path), option))
    assert model.backbone.window_sizes == windows
    start = snapshot(model.backbone)
    log.clear()
    model.init_weights()

    expected = source.model.backbone.state_dict()
    before = source.model.backbone.window_sizes
    stages = [m for m in range(4) if windows[m] != before[m]]
    resized = [
        name
        for name in expected
        if name.endswith(('.psi', '.theta')) and int(name.split('.')[1]) in stages
    ]
    assert len(resized) == 2 * len(stages)  # each stage of nano has one layer of less attention
    for name in resized:
        window = windows[int(name.split('.')[1])]
        expected[name] = resize_window_weight(expected[name], window)
        assert not torch.equal(expected[name], torch.eye(window**2))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, expected.get(name, start[name])), name
    assert missing_keys(log) == own_norms(model.backbone)
    (told,) = (line for line in log if line.startswith('LaViT: '))
    for m in range(4):
        change = f'{before[m]} to {windows[m]} in stage {m + 1}'
        assert (change in told) == (m in stages)
    with torch.no_grad():
        maps = model.eval().backbone(images(1, 3, 40, 50).float())
    assert all(m.isfinite().all() for m in maps)


def test_a_detectors_backbone_serves_a_segmentor(pretrained, tmp_path, log):
    """Norms included: nothing is missing, and the log says nothing of missing keys."""
    source = build(Config.fromfile(CONFIGS / 'maskrcnn_lavit_n_shapes.py'))
    perturb(source, seed=2)
    save(source, tmp_path / 'detector.pth')
    cfg = with_options(
        CONFIGS / 'upernet_lavit_n_shapes.py', checkpoint_option(tmp_path / 'detector.pth')
    )
    model = build(cfg)
    model.init_weights()
    theirs, ours = source.backbone.state_dict(), model.backbone.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert missing_keys(log) == set()


# ---- What is published ---------------------------------------------------------------------------


@pytest.fixture(scope='session')
def published(pretrained, tmp_path_factory):
    """A function that publishes the smallest classifier: by suffix, its files."""

    @functools.cache
    def make(backbone: bool) -> dict[str, Path]:
        release = prepare(
            pretrained('n').path, backbone=backbone, name='lavit_n', privacy=Privacy()
        )
        paths = write(tmp_path_factory.mktemp('published'), release.files())
        return {path.suffix: path for path in paths}

    return make


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('backbone', [True, False], ids=['backbone', 'classifier'])
@pytest.mark.parametrize('file', NANO, ids=lambda file: file.stem)
def test_published_weights_arrive(file, backbone, suffix, published, pretrained, log):
    """With the one option alone, whether the file is of the backbone or of the classifier."""
    path = published(backbone)[suffix]
    model = build(with_options(file, checkpoint_option(path)))
    start = snapshot(model.backbone)
    log.clear()
    model.init_weights()
    assert_arrived(model.backbone, start, pretrained('n').model.backbone)
    assert missing_keys(log) == own_norms(model.backbone)
    told = [line for line in log if 'a backbone alone' in line]
    assert len(told) == backbone and all(str(path) in line for line in told)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize(
    'options',
    [{}, dict(type='Pretrained'), dict(type='Pretrained', prefix=None)]
    + [dict(type='Pretrained', prefix=prefix) for prefix in ('backbone.', 'backbone')]
    + [dict(type=PretrainedInit, prefix='backbone.'), dict(prefix=None)],
)
def test_a_published_backbone_needs_no_prefix_and_takes_one(options, suffix, published, pretrained):
    path = str(published(True)[suffix])
    model = LaViT(
        'nano',
        window_sizes=pretrained('n').model.backbone.window_sizes,
        out_indices=(3,),
        init_cfg=dict(checkpoint=path, **options),
    )
    model.init_weights()
    theirs = pretrained('n').model.backbone.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize('prefix', ['trunk.', 'backbone.0.'])
def test_a_published_backbone_is_under_no_other_prefix(prefix, published):
    init_cfg = dict(checkpoint=str(published(True)['.pth']), prefix=prefix)
    with pytest.raises(ValueError, match='init_cfg.prefix=None'):
        LaViT('nano', init_cfg=init_cfg).init_weights()


# ---- What does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize('file', NANO, ids=lambda file: file.stem)
def test_a_checkpoint_that_does_not_exist(file, tmp_path):
    path = tmp_path / 'nowhere.pth'
    model = build(with_options(file, checkpoint_option(path)))
    with pytest.raises(FileNotFoundError, match=re.escape(f'{path} can not be found')):
        model.init_weights()


@pytest.mark.parametrize(
    'name, theirs, ours',
    [
        ('maskrcnn_lavit_s_coco', 'n', ("'nano'", "'small'")),
        ('upernet_lavit_s_ade20k', 'n', ("'nano'", "'small'")),
        ('retinanet_lavit_n_shapes', 's', ("'small'", "'nano'")),
        # The same widths; only the numbers of layers differ.
        pytest.param('maskrcnn_lavit_b_coco', 's', ("'small'", "'base'"), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_another_arch(name, theirs, ours, pretrained):
    model = build(with_options(CONFIGS / f'{name}.py', checkpoint_option(pretrained(theirs).path)))
    start = snapshot(model.backbone)
    with pytest.raises(ValueError) as error:
        model.init_weights()
    checkpoint, own = ours
    assert f'the checkpoint is a LaViT {checkpoint} (embed_dims=' in str(error.value)
    assert f'the model is a LaViT {own} (embed_dims=' in str(error.value)
    assert all(torch.equal(t, start[name]) for name, t in model.backbone.state_dict().items())


# ---- What init_cfg stands for --------------------------------------------------------------------


def prefixed(prefix: str, path: Path) -> dict[str, Tensor]:
    """Saves a LaViT under ``prefix``, beside weights that are no LaViT's; its own weights."""
    weights = small_lavit(seed=1).state_dict()
    others = {'head.fc.weight': torch.ones(2, 2)} if prefix else {}
    named = {prefix + name: weight for name, weight in weights.items()}
    torch.save(dict(state_dict={**named, **others}), path)
    return weights


@pytest.mark.parametrize(
    'prefix, options',
    [
        ('backbone.', {}),
        ('backbone.', dict(map_location='cpu')),
        ('trunk.', dict(prefix='trunk.')),
        ('backbone.', dict(type='Pretrained', prefix='backbone.')),
        ('trunk.', dict(type='Pretrained', prefix='trunk.')),
        ('backbone.', dict(type=PretrainedInit, prefix='backbone.')),
        ('', dict(prefix=None)),
        ('', dict(type='Pretrained')),
    ],
)
def test_init_cfg_finds_its_prefix(prefix, options, tmp_path):
    weights = prefixed(prefix, tmp_path / 'weights.pth')
    init_cfg = dict(checkpoint=str(tmp_path / 'weights.pth'), **options)
    given = dict(init_cfg)
    model = small_lavit(seed=2, init_cfg=init_cfg)
    assert init_cfg == given, "the caller's dict must stay as it is"
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    'init_cfg',
    [
        None,
        dict(type='Pretrained', checkpoint='some.pth'),
        dict(type='Pretrained', checkpoint='some.pth', prefix='encoder.'),
        dict(type='Constant', layer='LayerNorm', val=0.5),
        [dict(type='Constant', layer='LayerNorm', val=0.5)],
    ],
)
def test_an_init_cfg_with_a_type_stays_as_it_is(init_cfg):
    assert LaViT(ARCH, init_cfg=copy.deepcopy(init_cfg)).init_cfg == init_cfg


def test_another_kind_of_init_cfg_does_what_it_says():
    model = LaViT(ARCH, init_cfg=dict(type='Constant', layer='LayerNorm', val=0.5, bias=0.25))
    before = model.patch_embed.proj.weight.clone()
    model.init_weights()
    assert model.norm3.weight.eq(0.5).all() and model.norm3.bias.eq(0.25).all()
    assert torch.equal(model.patch_embed.proj.weight, before)


@pytest.mark.parametrize('options', [[], ['model.backbone.init_cfg.prefix=trunk.']])
def test_a_configs_own_prefix_survives_the_option(options, tmp_path):
    """Of an init_cfg that is complete, the option replaces the checkpoint alone."""
    weights = prefixed('trunk.', tmp_path / 'weights.pth')
    config = tmp_path / 'config.py'
    config.write_text(
        f'model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="old.pth", '
        f'prefix="{"encoder." if options else "trunk."}")))'
    )
    cfg = with_options(config, checkpoint_option(tmp_path / 'weights.pth'), *options)
    model = small_lavit(seed=2, init_cfg=cfg.model.backbone.init_cfg)
    model.init_weights()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


# ---- The command line ----------------------------------------------------------------------------


def shapes(folder: Path) -> Path:
    """Two images to train on and one to validate on."""
    recipe = ShapesRecipe(num_train=2, num_val=1, size=64)
    make_shapes(folder / 'shapes', recipe, progress=False)
    return folder / 'shapes'


@pytest.mark.slow
def test_the_command_line(tmp_path, pretrained):
    """A real training starts from the classifier's weights, and its log says what was loaded.

    With a learning rate of 0, so that what it saves is what it started from.
    """
    source = pretrained('n')
    data = shapes(tmp_path)
    result = run_tool(
        'train.py',
        SHAPES_CONFIG,
        *('--work-dir', 'run', '--cfg-options'),
        *shapes_options(data),
        checkpoint_option(source.path),
        'train_dataloader.batch_size=2',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=9',
        'optim_wrapper.optimizer.lr=0.0',
        'default_hooks.logger.interval=1',
        cwd=tmp_path,
    )
    assert_ran(result)
    saved = torch.load(tmp_path / 'run' / 'epoch_1.pth', map_location='cpu', weights_only=False)
    theirs = source.model.backbone.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(saved['state_dict'][f'backbone.{name}'], tensor), name
    assert f'load backbone. in model from: {source.path}' in result.stdout
    assert 'unexpected key' not in result.stdout
    (missing,) = re.findall(r'missing keys in source state_dict: (.+)', result.stdout)
    assert set(missing.split(', ')) == {
        f'norm{m}.{kind}' for m in range(3) for kind in ('weight', 'bias')
    }
    assert re.search(r'Epoch\(train\)\s+\[1\]\[1/1\].*loss_mask: ', result.stdout)


@pytest.mark.slow
def test_the_command_line_without_the_checkpoint(tmp_path):
    options = [*shapes_options(shapes(tmp_path)), checkpoint_option(Path('nowhere.pth'))]
    result = run_tool('train.py', SHAPES_CONFIG, '--cfg-options', *options, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith('mmlavit: file not found: nowhere.pth ')
