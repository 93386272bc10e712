"""Released files: made from real trainings, and looked at as who downloads them would."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import assert_ran, run_tool, run_tool_here, the_one_line
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader, Runner, save_checkpoint
from small import images
from torch import nn

from mmlavit.datasets.shapes import CLASSES, ShapesRecipe, make_shapes
from mmlavit.engine.checkpoint_file import CheckpointError
from mmlavit.export.privacy import Privacy
from mmlavit.export.publish import PublishError, prepare, write

ROOT = Path(__file__).resolve().parents[2]
# Of the user, in the folders, in the config.
USER = 'quixote'
TINY = dict(
    embed_dims=(8, 16, 24, 32),
    num_heads=(1, 2, 3, 4),
    depths=(1, 2, 2, 1),
    vanilla_depths=(1, 1, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
)


@pytest.fixture(scope='module', autouse=True)
def scopes() -> Iterator[None]:
    """A Runner sets the process's default scope; afterwards it is as before."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.fixture(scope='module', autouse=True)
def user() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'):
            patch.setenv(name, USER)
        yield


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('export') / USER / 'third-try'


def config(home: Path) -> Path:
    """A tiny classifier whose averaged weights are far from the last, with paths everywhere."""
    file = home / 'tiny_lavit_shapes.py'
    data = home / 'shapes' / 'imagenet'
    loader = 'batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False'
    file.write_text(f"""
_base_ = {str(ROOT / 'configs' / 'lavit_n_shapes.py')!r}
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **{TINY}),
        window_sizes=(4, 4, 4, 2),
        conv_stem=False,
        init_cfg=dict(checkpoint={str(home / 'start.pth')!r}, prefix=None),
    ),
    head=dict(in_channels=32),
)
train_dataloader = dict({loader}, dataset=dict(data_root={str(data)!r}))
val_dataloader = dict({loader}, dataset=dict(data_root={str(data)!r}))
test_dataloader = val_dataloader
custom_hooks = [dict(type='EMAHook', momentum=0.3)]
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = []
train_cfg = dict(max_epochs=2)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(out_dir={str(home)!r}, save_best=None)
)
load_from = None
""")
    return file


@pytest.fixture(scope='module')
def training(home) -> SimpleNamespace:
    """Two epochs of three batches, on files of somebody's own."""
    make_shapes(home / 'shapes', ShapesRecipe(num_train=12, num_val=4, size=64), progress=False)
    cfg = Config.fromfile(config(home))
    cfg.work_dir = str(home / 'run')
    # A LaViT to start from.
    start = build(cfg).backbone
    save_checkpoint(dict(state_dict=start.state_dict()), str(home / 'start.pth'))
    runner = Runner.from_cfg(cfg)
    runner.train()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    return SimpleNamespace(
        cfg=cfg,
        file=home / 'run' / 'epoch_2.pth',
        last=runner.model.state_dict(),
        averages=hook.ema_model.module.state_dict(),
        log=next((home / 'run').glob('*/vis_data/2*.json')),
    )


def build(cfg: Config) -> nn.Module:
    importlib.import_module('mmpretrain.models')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return importlib.import_module('mmpretrain.registry').MODELS.build(cfg.model).eval()


@pytest.fixture(scope='module')
def released(training, tmp_path_factory) -> SimpleNamespace:
    """The whole model, published."""
    release = prepare(training.file, ema=True)
    paths = write(tmp_path_factory.mktemp('released'), release.files())
    return SimpleNamespace(release=release, paths=paths)


def load(path: Path) -> dict:
    return CheckpointLoader.load_checkpoint(str(path), 'cpu')


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(training: SimpleNamespace, path: Path, **parts: object) -> Path:
    """The training's checkpoint with parts replaced."""
    checkpoint = torch.load(training.file, map_location='cpu', weights_only=False)
    checkpoint.pop('ema_state_dict')
    torch.save({**checkpoint, **parts}, path)
    return path


# ---- What is in it -------------------------------------------------------------------------------


def test_weights_and_what_is_known_of_them_and_nothing_else(released, training):
    (path,) = (path for path in released.paths if path.suffix == '.pth')
    # By PyTorch's own means, which run nothing, and know no type of numpy or of MMEngine.
    found = torch.load(path, map_location='cpu', weights_only=True)
    assert found.keys() == {'meta', 'state_dict'}
    assert same(found['state_dict'], training.averages)
    meta = found['meta']
    assert meta['dataset_meta'] == dict(classes=CLASSES)
    assert (meta['epoch'], meta['iter'], meta['seed']) == (2, 6, 0)
    assert (meta['name'], meta['weights']) == ('tiny_lavit_shapes', 'ema')
    assert path.stat().st_size < training.file.stat().st_size / 3


def test_both_files_hold_the_same(released):
    one, other = map(load, released.paths)
    assert same(one['state_dict'], other['state_dict'])
    assert one['state_dict']._metadata == other['state_dict']._metadata
    assert repr(one['meta']) == repr(other['meta'])


def test_the_config_still_makes_the_model(released, training):
    cfg = Config.fromstring(load(released.paths[0])['meta']['cfg'], '.py')
    assert build(cfg).state_dict().keys() == training.averages.keys()
    assert cfg.train_dataloader.dataset.data_root == 'data/imagenet'
    assert cfg.model.backbone.init_cfg.checkpoint == 'start.pth'
    assert 'work_dir' not in cfg


def test_nothing_private_is_in_any_byte(released, training, home):
    secrets = [USER, str(home), *home.parts[2:-1], 'third-try']
    if len(socket.gethostname()) > 4:
        secrets.append(socket.gethostname())
    path = re.compile(rb'["\'=\s](/[\w.-]+){2,}|file://')
    before = training.file.read_bytes()
    assert path.search(before) and all(s.encode() in before for s in (USER, str(home)))
    for file in released.paths:
        content = file.read_bytes()
        assert not [secret for secret in secrets if secret.lower().encode() in content.lower()]
        assert not path.search(content), file


# ---- Its name ------------------------------------------------------------------------------------


def test_names_as_openmmlab_gives_them(released, training):
    day = torch.load(training.file, weights_only=False)['meta']['time'][:8]
    for path in released.paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.name == f'tiny_lavit_shapes_{day}-{digest[:8]}{path.suffix}'
    assert {path.suffix for path in released.paths} == {'.pth', '.safetensors'}


def test_the_same_checkpoint_has_the_same_files(released, training):
    one, other = released.paths
    assert prepare(training.file, ema=True).files().keys() == {one.name, other.name}
    # A published file may be published again; safetensors keep no order.
    assert prepare(one).files().keys() == {one.name, other.name}
    assert other.name in prepare(other).files()


@pytest.mark.parametrize('name', ['', '../x', 'a b', 'a/b', 'ü;'])
def test_names_that_are_none(training, name):
    if not name:
        assert prepare(training.file, ema=True, name=name).name == 'tiny_lavit_shapes'
        return
    with pytest.raises(ValueError, match='name'):
        prepare(training.file, ema=True, name=name)


def test_a_training_whose_config_was_no_file(training, tmp_path):
    meta = torch.load(training.file, weights_only=False)['meta']
    path = changed(training, tmp_path / 'a.pth', meta={**meta, 'experiment_name': 'default_1'})
    assert prepare(path).name == 'default_1'
    path = changed(
        training, path, meta={**meta, 'experiment_name': 'default_20260101_000000', 'time': None}
    )
    with pytest.raises(PublishError, match='--name'):
        prepare(path)
    assert re.fullmatch(r'mine_20\d{6}-\w{8}\.pth', next(iter(prepare(path, name='mine').files())))


# ---- Options -------------------------------------------------------------------------------------


def test_averages_or_the_last_step(training):
    assert not same(training.last, training.averages)
    with pytest.raises(PublishError, match='--ema or --no-ema'):
        prepare(training.file)
    assert same(prepare(training.file, ema=True).weights, training.averages)
    assert same(prepare(training.file, ema=False).weights, training.last)


@pytest.mark.parametrize('ema', [True, False])
def test_no_averages_to_choose_from(training, tmp_path, ema):
    path = changed(training, tmp_path / 'a.pth')
    assert same(prepare(path).weights, training.averages)
    with pytest.raises(PublishError, match='one set of weights'):
        prepare(path, ema=ema)


def test_averages_of_something_else(training, tmp_path):
    averages = {'module.other': torch.ones(1), 'steps': torch.tensor(1)}
    path = changed(training, tmp_path / 'a.pth', ema_state_dict=averages)
    with pytest.raises(PublishError, match='only --ema'):
        prepare(path, ema=False)


def test_half_precision_is_half_the_size_and_as_near_as_it_can_be(training, released, tmp_path):
    """Loaded into a float32 model, which then is the same as if it was rounded by hand."""
    release = prepare(training.file, ema=True, half=True)
    paths = write(tmp_path, release.files())
    named = prepare(training.file, ema=True, half=True, name='tiny_lavit_shapes')
    assert named.name == 'tiny_lavit_shapes'  # a name that is asked for stays as it is
    for path, whole in zip(paths, released.paths, strict=True):
        assert path.name.startswith('tiny_lavit_shapes-half_')
        # What does not shrink is names and config.
        numbers = sum(t.numel() for t in training.averages.values() if t.is_floating_point())
        saved = whole.stat().st_size - path.stat().st_size
        assert abs(saved - 2 * numbers) < 0.1 * numbers
        model, by_hand = build(training.cfg), build(training.cfg)
        by_hand.load_state_dict({k: v.half().to(v) for k, v in training.averages.items()})
        model.load_state_dict(load(path)['state_dict'])
        for name, tensor in model.state_dict().items():
            exact = training.averages[name]
            assert tensor.dtype == exact.dtype
            # 11 bits, and 2^-24 between the smallest numbers.
            assert ((tensor - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all(), name
        x = images(2, 3, 40, 56).float()
        with torch.no_grad():
            assert torch.equal(model(x), by_hand(x))


def test_the_backbone_alone(training):
    release = prepare(training.file, ema=True, backbone=True)
    assert release.name == 'tiny_lavit_shapes-backbone'
    backbone = {
        name.removeprefix('backbone.'): tensor
        for name, tensor in training.averages.items()
        if name.startswith('backbone.')
    }
    assert same(release.weights, backbone)
    versions = build(training.cfg).backbone.state_dict()._metadata
    assert release.weights._metadata == versions
    assert release.meta['dataset_meta'] == dict(classes=CLASSES)


def test_memory_formats_and_shared_memory_do_not_matter(training, tmp_path):
    weights = {name: tensor.clone() for name, tensor in training.averages.items()}
    base = torch.randn(100, 4)
    weights['a'], weights['b'] = base[:2].t(), base[:2]
    weights['c'] = torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last)
    weights['d'] = torch.tensor(3)
    path = changed(training, tmp_path / 'a.pth', state_dict=weights)
    for file in write(tmp_path, prepare(path).files()):
        assert same(load(file)['state_dict'], weights)
        assert file.stat().st_size < training.file.stat().st_size / 3


# ---- What is refused -----------------------------------------------------------------------------


def test_a_file_that_is_damaged(training, tmp_path):
    content = bytearray(training.file.read_bytes())
    path = tmp_path / 'epoch_2.pth'
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r'epoch_2\.pth.*incomplete'):
        prepare(path, ema=True)
    # A flipped bit, which torch.load takes for a weight.
    weight = training.averages['head.fc.weight'].numpy().tobytes()
    content[content.index(weight)] ^= 1
    path.write_bytes(content)
    torch.load(path, map_location='cpu', weights_only=False)
    with pytest.raises(CheckpointError, match=r'epoch_2\.pth.*checksum'):
        prepare(path, ema=True)
    with pytest.raises(FileNotFoundError, match='nowhere.pth can not be found'):
        prepare(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize(
    ('parts', 'options', 'words'),
    [
        (dict(meta={}), {}, 'no config'),
        (dict(meta=3), {}, 'no config'),
        (dict(state_dict={}), {}, 'no weights'),
        (dict(state_dict=None), {}, 'no weights'),
        (dict(state_dict={'a': 1}), {}, "int.*'a'.*tensor"),
        (dict(state_dict={'a': torch.tensor([1.0, torch.nan])}), {}, "NaN, in 'a'.*diverged"),
        (dict(state_dict={'a': torch.tensor(-torch.inf)}), {}, "infinite.*'a'"),
        (dict(state_dict={'a': torch.tensor(-1e5)}), dict(half=True), "1e\\+05.*'a'.*65504"),
        (dict(state_dict={'a': torch.ones(1)}), dict(backbone=True), "'backbone\\.'.*'a'"),
    ],
)
def test_what_cannot_be_published(training, tmp_path, parts, options, words):
    path = changed(training, tmp_path / 'a.pth', **parts)
    with pytest.raises(PublishError, match=words) as caught:
        prepare(path, **options)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_meta_of_other_types(training, tmp_path):
    """What torch reads and others would not, or would read as something else."""
    meta = torch.load(training.file, weights_only=False)['meta']
    given = dict(
        classes=['/m/011k07', USER],
        palette=np.array([[1, 2, 3]]),
        label_map={np.int64(0): np.float32(1)},
        path='/mnt/x/y.json',
        nested=[(True, None, torch.tensor([1.5]))],
        kinds={'b', 'a', 'c'},
    )
    path = changed(training, tmp_path / 'a.pth', meta={**meta, 'dataset_meta': given})
    expected = dict(
        classes=['/m/011k07', USER],
        palette=[[1, 2, 3]],
        label_map={0: 1.0},
        path='y.json',
        nested=[(True, None, [1.5])],
        kinds=['a', 'b', 'c'],
    )
    for file in write(tmp_path / 'out', prepare(path).files()):
        assert repr(load(file)['meta']['dataset_meta']) == repr(expected)
    path = changed(training, path, meta={**meta, 'dataset_meta': dict(a=slice(3))})
    with pytest.raises(PublishError, match=r'dataset_meta\.a is a slice'):
        prepare(path)


# ---- Writing -------------------------------------------------------------------------------------


def test_no_file_is_replaced(tmp_path):
    write(tmp_path / 'new' / 'folder', {'a': b'1'})
    with pytest.raises(FileExistsError, match='a is there already'):
        write(tmp_path / 'new' / 'folder', {'b': b'2', 'a': b'3'})
    assert [p.read_bytes() for p in (tmp_path / 'new' / 'folder').iterdir()] == [b'1']
    # What is there already need not be written again.
    before = (tmp_path / 'new' / 'folder' / 'a').stat()
    write(tmp_path / 'new' / 'folder', {'b': b'2', 'a': b'1'})
    after = (tmp_path / 'new' / 'folder' / 'a').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / 'file').touch()
    for folder in ('file', 'file/below'):
        with pytest.raises(PublishError, match='file'):
            write(tmp_path / folder, {'a': b'1'})
    (tmp_path / 'a').mkdir()
    with pytest.raises(FileExistsError, match='a is there already'):
        write(tmp_path, {'a': b'1'})


# ---- The command ---------------------------------------------------------------------------------


def publish(*args: object, cwd: Path) -> str:
    result = run_tool('publish_model.py', *args, cwd=cwd)
    assert_ran(result)
    return result.stdout


def test_the_command(training, released, tmp_path):
    said = publish(
        *(training.file, 'out', '--ema', '--log', training.log),
        *('--metric', 'accuracy/top1=58.25', '--data', 'made-up shapes | 12 images'),
        *('--data-licence', 'CC0', '--command', 'python tools/train.py configs/x.py'),
        cwd=tmp_path,
    )
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    (card,) = (name for name in names if name.endswith('.md'))
    log = f'{Path(card).stem}.log.json'
    assert names == {card, log, *(path.name for path in released.paths)}
    assert f'{Path(card).stem}.pth' in names
    lines = training.log.read_text().splitlines()
    published = (tmp_path / 'out' / log).read_text().splitlines()
    assert [json.loads(line) for line in published] == [json.loads(line) for line in lines]
    text = (tmp_path / 'out' / card).read_text()
    for path in released.paths:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert f'| `{path.name}` | {len(content):,} | `{digest}` |' in text
    assert USER not in text and '/mnt' not in text
    assert '| accuracy/top1 | 58.25 |' in text
    (validated,) = (
        line['accuracy/top1']
        for line in map(json.loads, training.log.read_text().splitlines())
        if line.get('step') == 2 and 'accuracy/top1' in line
    )
    assert f'at epoch 2:\n\n| metric |  |\n|---|---|\n| accuracy/top1 | {validated} |' in text
    for row in (
        r'| data | made-up shapes \| 12 images |',
        '| licence of the data | CC0 |',
        '| classes | 3: circle, square, triangle |',
        '| length | 2 epochs, 6 iterations |',
        '| seed | 0 |',
        '| command | `python tools/train.py configs/x.py` |',
    ):
        assert row in text, row
    assert "config: data_root, was '" in said
    (entry,) = yaml.safe_load(said.partition('checkpoints/metafile.yml:\n')[2])
    assert entry['Config'] == 'configs/tiny_lavit_shapes.py'
    assert entry['Weights'] == f'checkpoints/{Path(card).stem}.pth'
    (result,) = entry['Results']
    assert result['Task'] == 'Image Classification'
    assert result['Metrics'] == {'accuracy/top1': 58.25}


@pytest.mark.slow
def test_the_command_refuses_in_one_line(training, tmp_path, monkeypatch, capfd):
    def refused(*args: object) -> str:
        with pytest.raises(SystemExit) as end:
            run_tool_here('publish_model.py', monkeypatch, tmp_path, *args)
        assert end.value.code == 2
        return capfd.readouterr().err

    result = run_tool('publish_model.py', training.file, 'out', cwd=tmp_path)
    assert result.returncode == 2 and '--ema' in the_one_line(result.stderr)
    # The rest here: most of a process's time is the import of the toolboxes.
    capfd.readouterr()
    empty = tmp_path / 'empty.pth'
    empty.touch()
    for args, words in (
        ((empty, 'out'), 'empty.pth is empty'),
        ((tmp_path / 'no.pth', 'out'), 'no.pth can not be found'),
        ((training.file, empty, '--ema'), 'empty.pth'),
        ((training.file, 'out', '--ema', '--log', empty), 'empty.pth is no log'),
        ((training.file, 'out', '--ema', '--log', 'no.json'), 'cannot read no.json'),
        ((training.file, 'out', '--ema', '--test-log', training.log), 'no result of a test'),
        ((training.file, 'out', '--ema', '--command', f'cd {tmp_path}'), 'command'),
        ((training.file, 'out', '--ema', '--name', f'by-{USER}'), f'--public {USER}'),
    ):
        line = the_one_line(refused(*args))
        assert line.startswith('mmlavit: ') and words in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty.pth']
    publish(training.file, 'out', '--ema', cwd=tmp_path)
    line = the_one_line(refused(training.file, 'out', '--ema', '--data', 'other'))
    assert '.md is there already' in line
    for text in ('1', 'a=b', '=1'):
        assert 'NAME=NUMBER' in refused('a', 'b', '--metric', text)


@pytest.mark.slow
def test_a_full_disk(training, tmp_path):
    """A limit on the size of files stands in for it: what is there is whole."""
    command = 'import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (100_000,) * 2); '
    command += 'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
    command += f'runpy.run_path({str(ROOT / "tools" / "publish_model.py")!r}, run_name="__main__")'
    import subprocess
    import sys

    ran = subprocess.run(
        [sys.executable, '-c', command, str(training.file), str(tmp_path / 'out'), '--ema'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert ran.returncode == 2
    assert 'cannot write' in the_one_line(ran.stderr)
    assert [path.suffix for path in (tmp_path / 'out').iterdir()] == ['.md']


# ---- What takes it -------------------------------------------------------------------------------


def metrics_of(cfg: Config, work_dir: Path, load_from: Path) -> dict:
    cfg = cfg.copy()
    cfg.work_dir, cfg.load_from = str(work_dir), str(load_from)
    cfg.test_evaluator = [
        dict(type='Accuracy', topk=(1,)),
        dict(type='SingleLabelMetric', average=None),
    ]
    return Runner.from_cfg(cfg).test()


@pytest.mark.slow
def test_load_from(training, released, tmp_path):
    """A Runner with an EMAHook, as trained: it tests the weights that were published."""
    shutil.copy(training.file, tmp_path / 'epoch_2.pth')
    expected = metrics_of(training.cfg, tmp_path / 'a', tmp_path / 'epoch_2.pth')
    for i, path in enumerate(released.paths):
        assert metrics_of(training.cfg, tmp_path / str(i), path) == expected


@pytest.mark.slow
def test_training_and_testing_go_on_from_it(training, released, home, tmp_path):
    """By the tools, from another folder, with a relative path."""
    for path in released.paths:
        shutil.copy(path, tmp_path)
        options = ('--cfg-options', f'load_from={path.name}', 'optim_wrapper.optimizer.lr=0.0')
        work_dir = f'run{path.suffix}'
        assert_ran(
            run_tool(
                *('train.py', config(home), '--work-dir', work_dir, *options),
                'train_cfg.max_epochs=1',
                cwd=tmp_path,
            )
        )
        saved = torch.load(home / work_dir / 'epoch_1.pth', weights_only=False)
        assert same(saved['state_dict'], training.averages)
        result = run_tool('test.py', config(home), path.name, cwd=tmp_path)
        assert_ran(result)
        assert 'accuracy/top1' in result.stdout


@pytest.mark.parametrize('names', [frozenset(), frozenset({'shapes'})])
def test_what_is_private_may_be_said(training, names):
    if names:
        with pytest.raises(ValueError, match='--public shapes'):
            prepare(training.file, ema=True, privacy=Privacy(names))
    public = Privacy(names, public=names)
    assert prepare(training.file, ema=True, privacy=public).name == 'tiny_lavit_shapes'
