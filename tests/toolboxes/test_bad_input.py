"""Everything that is refused, in one table: what is wrong, how it is made, what it says.

Every row must raise exactly its exception, with one line of text that holds all the pieces: the
argument, the value, and what would be right. A row that gives a checkpoint with a program in it
must not run the program. ``Refused`` is what a command raises here that ends with status 2 and a
single line on stderr.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import ROOT, SHAPES_CONFIG, shapes_options, the_one_line
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_local
from small import ARCH, images, small_lavit
from torch import Tensor, nn

from mmlavit import DiagonalityLossHook, LaViT, diagonality_preserving_loss
from mmlavit.datasets.shapes import ShapesRecipe, make_shapes
from mmlavit.engine.checkpoint_file import CheckpointError, load_from_file, read_checkpoint
from mmlavit.models.state_dict import resize_window_weight
from repository.benchmark.workload import Settings, Task

RETINANET = ROOT / 'configs' / 'retinanet_lavit_n_shapes.py'
UPERNET = ROOT / 'configs' / 'upernet_lavit_n_shapes.py'
CLASSIFIER = ROOT / 'configs' / 'lavit_n_shapes.py'
ANNOTATIONS = 'coco/annotations/instances_train2017.json'
WEIGHTS_ONLY = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
needs_weights_only = pytest.mark.skipif(
    not WEIGHTS_ONLY, reason='before torch 2.6, MMEngine files cannot be loaded weights-only'
)

# ---- How things are made -------------------------------------------------------------------------

Make = Callable[[Path], object]


class Refused(Exception):
    """What a command said that ended with status 2 and one line, and no traceback."""


def lavit(**options: object) -> Make:
    return lambda folder: LaViT(**{'arch': ARCH, **options})


def arch(**fields: object) -> Make:
    return lavit(arch={**ARCH, **fields})


def forward(x: object, **options: object) -> Make:
    return lambda folder: small_lavit(**options).float()(x)


def images_of(*shape: int, dtype: torch.dtype = torch.float32) -> Make:
    return forward(torch.zeros(shape, dtype=dtype))


def load(source: Callable[[], dict], **options: object) -> Make:
    return lambda folder: small_lavit(**options).load_state_dict(source())


def weights(**options: object) -> Callable[[], dict]:
    return lambda: small_lavit(seed=1, **options).state_dict()


def inside(prefix: str) -> dict:
    """A checkpoint of a model that has a LaViT under a prefix, and a head."""
    named = {prefix + name: weight for name, weight in weights()().items()}
    return dict(state_dict={**named, 'head.weight': torch.ones(2, 2)})


def pretrained(content: object, **options: object) -> Make:
    """The backbone starts from a file: bytes as they are, else what torch.save makes of it."""

    def make(folder: Path) -> None:
        path = write(folder / 'weights.pth', content)
        model = small_lavit(init_cfg=dict(type='Pretrained', checkpoint=str(path), **options))
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        try:
            model.init_weights()
        finally:
            after = model.state_dict()
            assert all(torch.equal(before[k], after[k]) for k in after), 'must change nothing'

    return make


def write(path: Path, content: object) -> Path:
    if callable(content):
        content = content(path.parent)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def as_bytes(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Program:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / 'ran')

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def infected(folder: Path) -> dict:
    return dict(**inside('backbone.'), meta=dict(epoch=1, iter=1), extra=Program(folder))


def infected_in_the_old_format(folder: Path) -> bytes:
    return as_bytes(infected(folder), _use_new_zipfile_serialization=False)


def hook(**options: object) -> Make:
    return lambda folder: HOOKS.build(dict(type='DiagonalityLossHook', **options))


def hooked(model: nn.Module, hooks: int = 1) -> Make:
    """One step of a model that some hooks watch."""

    def make(folder: Path) -> None:
        for _ in range(hooks):
            DiagonalityLossHook().before_train(SimpleNamespace(model=model))
        model.train()(images(1, 3, 16, 16).float(), mode='loss')

    return make


class Model(nn.Module):
    """A LaViT and a loss of a given name."""

    def __init__(self, name: str | None = 'loss_task') -> None:
        super().__init__()
        self.backbone, self.name = small_lavit().float(), name

    def forward(self, x: Tensor, mode: str) -> object:
        loss = self.backbone(x)[-1].square().mean()
        return loss if self.name is None else {self.name: loss}


def dp_loss(scores: object, valid: object = None) -> Make:
    return lambda folder: diagonality_preserving_loss(scores, valid)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def command(name: str, *args: object) -> Make:
    """A script of tools/ in this process; what stands in braces is a folder of the test."""

    def make(folder: Path) -> None:
        filled = [str(arg).format(folder=folder) for arg in args]
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.chdir(folder)
            patch.setattr(sys, 'argv', [str(ROOT / 'tools' / name), *filled])
            # What would take most of the time: laying out the config's text, asking compilers.
            patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False))
            patch.setattr('mmengine.runner.runner.collect_env', dict)
            try:
                runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
            except SystemExit as stop:
                if stop.code == 2:
                    raise Refused(the_one_line(without_usage(said.getvalue()))) from None
                assert not stop.code, said.getvalue()

    return make


def without_usage(text: str) -> str:
    """Without argparse's reminder of the options, which stands before its one line."""
    usage, found, line = text.rpartition(f'\n{Path(sys.argv[0]).name}: error: ')
    return found.strip() + ' ' + line if found and usage.startswith('usage: ') else text


def trained(
    change: Callable[[dict], object] | None = None,
    *options: str,
    config: Path = RETINANET,
    lines: str = '',
    file: str = ANNOTATIONS,
) -> Make:
    """tools/train.py on made-up shapes whose COCO annotations were changed."""

    def make(folder: Path) -> None:
        make_shapes(folder / 'shapes', ShapesRecipe(2, 1, size=64), progress=False)
        if change is not None:
            data = json.loads((folder / 'shapes' / file).read_text())
            change(data)
            (folder / 'shapes' / file).write_text(json.dumps(data))
        (folder / 'config.py').write_text(f'_base_ = {str(config)!r}\n{lines}')
        command(
            'train.py',
            *(folder / 'config.py', '--work-dir', folder / 'run', '--cfg-options'),
            *shapes_options(folder / 'shapes'),
            *('train_dataloader.batch_size=2', 'train_cfg.max_epochs=1'),
            *('train_cfg.val_interval=9', 'default_hooks.logger.interval=1'),
            *(option.format(folder=folder) for option in options),
        )(folder)

    return make


def trained_elsewhere(
    config: str, lines: str = '', spoil: Callable[[Path], object] = lambda data: None
) -> Make:
    """tools/train.py with any config, on made-up shapes in data/shapes that were changed."""

    def make(folder: Path) -> None:
        make_shapes(folder / 'data/shapes', ShapesRecipe(2, 1, size=64), progress=False)
        spoil(folder / 'data/shapes')
        path = folder / 'config.py'
        path.write_text(f'_base_ = {str(ROOT / "configs" / config)!r}\n{lines}')
        command('train.py', path, '--work-dir', folder / 'run')(folder)

    return make


def call_shapes_as_coco_does(data: Path) -> None:
    for file in (data / 'coco/annotations').glob('*.json'):
        content = json.loads(file.read_text())
        for category, name in zip(content['categories'], ('cat', 'dog', 'robot'), strict=True):
            category['name'] = name
        file.write_text(json.dumps(content))


def label_a_pixel(data: Path) -> None:
    """With a class more than there are: 5 stands for the fifth, as 0 is none."""
    (file, *_) = sorted((data / 'ade/annotations/training').iterdir())
    labels = np.array(PIL.Image.open(file))
    labels[3, 5] = 5
    PIL.Image.fromarray(labels).save(file)


def list_of_images(data: Path) -> None:
    files = sorted((data / 'imagenet/train').rglob('*.jpg'))
    lines = [f'{file.relative_to(data / "imagenet/train")} {3 * n}' for n, file in enumerate(files)]
    (data / 'imagenet/list.txt').write_text('\n'.join(lines))


def evaluated(content: object) -> Make:
    """tools/test.py with a checkpoint file; None is for a missing one."""

    def make(folder: Path) -> None:
        make_shapes(folder / 'shapes', ShapesRecipe(1, 1, size=64), progress=False)
        path = folder / 'weights.pth'
        if content is not None:
            write(path, content)
        options = shapes_options(folder / 'shapes')
        command('test.py', RETINANET, path, '--work-dir', folder, '--cfg-options', *options)(folder)

    return make


def annotations(**fields: object) -> Callable[[dict], object]:
    return lambda data: [annotation.update(fields) for annotation in data['annotations']]


def without_any(*lists: str) -> Callable[[dict], object]:
    return lambda data: data.update({name: [] for name in lists})


BACKBONE_OF_ANOTHER_KIND = """
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[128, 256, 512]))
"""
# What somebody writes who forgets the classes.
OWN_BOXES = """
data = dict(data_root='data/shapes/coco/')
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
val_evaluator = dict(ann_file='data/shapes/coco/annotations/instances_val2017.json')
"""
OWN_FOLDERS = """
train_dataloader = dict(dataset=dict(
    _delete_=True, type='CustomDataset', data_root='data/shapes/imagenet', data_prefix='train',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
val_dataloader = test_dataloader = val_cfg = test_cfg = val_evaluator = test_evaluator = None
"""
OWN_LIST = OWN_FOLDERS.replace("data_prefix='train'", "data_prefix='train', ann_file='list.txt'")
HOOK_TWICE = "custom_hooks = [dict(type='DiagonalityLossHook')] * 2"
TRUNCATED = as_bytes(inside('backbone.'))[:20000]
FOREIGN = {'patch_embed.proj.weight': ones(16, 3, 4, 4), 'layers.0.qkv.weight': ones(48, 16)}
NAN = float('nan')

# ---- The table -----------------------------------------------------------------------------------
# What is wrong; how it is made; the exact exception; what its message must contain.

TABLE = [
    # Archs
    ('arch: unknown name', lavit(arch='huge'), ValueError, ["arch", "'small'", "'huge'"]),
    ('arch: a number', lavit(arch=3), TypeError, ['arch', 'got 3', 'a dict']),
    ('arch: None', lavit(arch=None), TypeError, ['arch', 'got None', 'a dict']),
    ('arch: a field is missing', lavit(arch=dict(list(ARCH.items())[1:])), ValueError,
     ['arch', "lacks ['embed_dims']"]),
    ('arch: a field too many', arch(depth=3), ValueError, ["unknown keys ['depth']", 'depths']),
    ('depths: three', arch(depths=(2, 2, 2)), ValueError, ['depths', '4 stages', '(2, 2, 2)']),
    ('depths: five', arch(depths=(2,) * 5), ValueError, ['depths', '4 stages', 'got 5']),
    ('depths: a number', arch(depths=2), TypeError, ['depths', 'sequence of integers', 'got 2']),
    ('depths: a fraction', arch(depths=(2, 2, 2, 1.5)), TypeError, ['depths', 'integers', '1.5']),
    ('depths: zero', arch(depths=(2, 0, 3, 2)), ValueError, ['depths', 'at least 1', '0']),
    ('depths: True', arch(depths=(2, True, 3, 2)), TypeError, ['depths', 'integers', 'True']),
    ('vanilla_depths: zero', arch(vanilla_depths=(1, 1, 0, 1)), ValueError,
     ['vanilla_depths', 'at least 1', '(1, 1, 0, 1)']),
    ('vanilla_depths: negative', arch(vanilla_depths=(1, 1, -1, 1)), ValueError,
     ['vanilla_depths', 'at least 1', '-1']),
    ('vanilla_depths: more than depths', arch(vanilla_depths=(3, 1, 1, 1)), ValueError,
     ['vanilla_depths[0] = 3', 'depths[0] = 2']),
    ('num_heads do not divide', arch(num_heads=(1, 2, 5, 4)), ValueError,
     ['embed_dims[2] = 48', 'num_heads[2] = 5']),
    ('num_heads: zero', arch(num_heads=(0, 2, 3, 4)), ValueError, ['num_heads', 'at least 1']),
    ('embed_dims: negative', arch(embed_dims=(-16, 32, 48, 64)), ValueError,
     ['embed_dims', 'at least 1', '-16']),
    ('embed_dims: text', arch(embed_dims='16'), TypeError, ['embed_dims', 'integers', "'16'"]),
    ('mlp_ratios: zero', arch(mlp_ratios=(2, 2, 0, 2)), ValueError, ['mlp_ratios', 'positive']),
    ('mlp_ratios: NaN', arch(mlp_ratios=(2, 2, NAN, 2)), ValueError, ['mlp_ratios', 'nan']),
    ('mlp_ratios: three', arch(mlp_ratios=(2, 2, 2)), ValueError, ['mlp_ratios', '4', '(2, 2, 2)']),
    ('mlp_ratios: no channel left', arch(mlp_ratios=(2, 2, 0.001, 2)), ValueError,
     ['mlp_ratios[2] = 0.001', 'embed_dims[2] = 48']),
    ('arch: conv_stem is text', arch(conv_stem='yes'), TypeError,
     ['conv_stem', 'True or False', "'yes'"]),
    ('arch: overlap_downsample is None', arch(overlap_downsample=None), TypeError,
     ['overlap_downsample', 'True or False', 'None']),
    ('mlp_ratios: text', arch(mlp_ratios='four'), TypeError, ['mlp_ratios', 'numbers', "'four'"]),
    # Windows
    ('window_sizes: three', lavit(window_sizes=(8, 8, 8)), ValueError, ['window_sizes', 'got 3']),
    ('window_sizes: a fraction', lavit(window_sizes=8.0), TypeError, ['window_sizes', 'got 8.0']),
    ('window_sizes: True', lavit(window_sizes=True), TypeError, ['window_sizes', 'got True']),
    ('window_sizes: zero', lavit(window_sizes=(8, 8, 8, 0)), ValueError,
     ['window_sizes', 'at least 1']),
    ('windows do not nest: odd', lavit(window_sizes=(7, 7, 7, 7)), ValueError,
     ['window_sizes', '7 is odd']),
    ('windows do not nest: no multiple', lavit(window_sizes=(8, 8, 6, 6)), ValueError,
     ['window_sizes', '6', 'multiple of 4']),
    ('windows do not nest: too small', lavit(window_sizes=(8, 2, 2, 2)), ValueError,
     ['window_sizes', '2', 'multiple of 4']),
    # Other options of LaViT
    ('out_indices: none', lavit(out_indices=()), ValueError, ['out_indices', '()']),
    ('out_indices: too negative', lavit(out_indices=(-5,)), ValueError, ['out_indices', '(-5,)']),
    ('out_indices: twice, once negative', lavit(out_indices=(3, -1)), ValueError,
     ['out_indices', 'without repeats', '(3, -1)']),
    ('out_indices: beyond', lavit(out_indices=(0, 4)), ValueError, ['out_indices', '(0, 1, 2, 3)']),
    ('out_indices: twice', lavit(out_indices=(1, 1)), ValueError,
     ['out_indices', 'without repeats', '(1, 1)']),
    ('out_indices: descending', lavit(out_indices=(2, 1)), ValueError,
     ['out_indices', 'ascending', '(2, 1)']),
    ('out_indices: a fraction', lavit(out_indices=3.0), TypeError,
     ['out_indices', 'sequence', '3.0']),
    ('out_indices: True', lavit(out_indices=True), TypeError, ['out_indices', 'True']),
    ('out_indices: text', lavit(out_indices='0123'), TypeError, ['out_indices', "'0123'"]),
    ('in_channels: zero', lavit(in_channels=0), ValueError, ['in_channels', 'at least 1', '0']),
    ('in_channels: text', lavit(in_channels='3'), TypeError, ['in_channels', 'integer', "'3'"]),
    ('drop_rate: 1', lavit(drop_rate=1.0), ValueError, ['drop_rate', '[0, 1)', '1.0']),
    ('attn_drop_rate: negative', lavit(attn_drop_rate=-0.1), ValueError,
     ['attn_drop_rate', '[0, 1)', '-0.1']),
    ('drop_path_rate: NaN', lavit(drop_path_rate=NAN), ValueError, ['drop_path_rate', 'nan']),
    ('drop_path_rate: text', lavit(drop_path_rate='a'), TypeError, ['drop_path_rate', "'a'"]),
    ('qkv_bias: 1', lavit(qkv_bias=1), TypeError, ['qkv_bias', 'True or False', '1']),
    ('with_cp: text', lavit(with_cp='yes'), TypeError, ['with_cp', 'True or False', "'yes'"]),
    ('conv_stem: text', lavit(conv_stem='yes'), TypeError,
     ['conv_stem', 'True, False or None', "'yes'"]),
    ('overlap_downsample: 1', lavit(overlap_downsample=1), TypeError,
     ['overlap_downsample', 'True, False or None', '1']),
    ('mix_ffn: zero', lavit(mix_ffn=0), TypeError, ['mix_ffn', 'True, False or None', '0']),
    ('fused_attention: 1', lavit(fused_attention=1), TypeError,
     ['fused_attention', "'auto', True or False", 'got 1']),
    ('fused_attention: text', lavit(fused_attention='yes'), ValueError,
     ['fused_attention', "'auto', True or False", "'yes'"]),
    ('frozen_stages: beyond', lavit(frozen_stages=5), ValueError, ['frozen_stages', '-1..4', '5']),
    ('frozen_stages: 1.0', lavit(frozen_stages=1.0), TypeError, ['frozen_stages', 'integer']),
    ('init_cfg: text', lavit(init_cfg='weights.pth'), TypeError, ['init_cfg', "'weights.pth'"]),
    ('init_cfg: a list of text', lavit(init_cfg=['a.pth']), TypeError, ['init_cfg', "'a.pth'"]),
    ('init_cfg: neither type nor checkpoint', lavit(init_cfg=dict(prefix='a.')), ValueError,
     ['init_cfg', 'a type or a checkpoint', "'a.'"]),
    ('init_cfg: no checkpoint', lavit(init_cfg=dict(type='Pretrained')), TypeError,
     ['checkpoint of init_cfg', 'string', 'None']),
    ('init_cfg: prefix is a number', lavit(init_cfg=dict(checkpoint='a.pth', prefix=1)), TypeError,
     ['prefix of init_cfg', 'string', '1']),
    # Images
    ('image: 3-D', images_of(3, 32, 32), ValueError, ['(B, 3, H, W)', '(3, 32, 32)']),
    ('image: 5-D', images_of(1, 1, 3, 32, 32), ValueError, ['(B, 3, H, W)', '(1, 1, 3, 32, 32)']),
    ('image: four channels', images_of(1, 4, 32, 32), ValueError, ['3, H, W', '(1, 4, 32, 32)']),
    ('image: channels last by axis', images_of(1, 32, 32, 3), ValueError, ['(1, 32, 32, 3)']),
    ('image: three channels of five', forward(torch.zeros(1, 3, 8, 8), in_channels=5), ValueError,
     ['(B, 5, H, W)', '(1, 3, 8, 8)']),
    ('image: no row', images_of(1, 3, 0, 32), ValueError, ['H, W >= 1', '(1, 3, 0, 32)']),
    ('image: no column', images_of(1, 3, 32, 0), ValueError, ['H, W >= 1', '(1, 3, 32, 0)']),
    ('image: empty batch', images_of(0, 3, 32, 32), ValueError, ['B, H, W >= 1', '(0, 3, 32, 32)']),
    ('image: bytes', images_of(1, 3, 8, 8, dtype=torch.uint8), TypeError,
     ['x must be a floating-point tensor', 'torch.uint8']),
    ('image: integers', images_of(1, 3, 8, 8, dtype=torch.int64), TypeError, ['torch.int64']),
    ('image: complex', images_of(1, 3, 8, 8, dtype=torch.complex64), TypeError, ['complex64']),
    ('image: a list', forward([[1.0]]), TypeError, ['floating-point tensor', 'list']),
    ('image: an array', forward(np.zeros((1, 3, 8, 8))), TypeError, ['tensor', 'ndarray']),
    ('image: None', forward(None), TypeError, ['tensor', 'NoneType']),
    # Weights
    ('weights: of another in_channels', load(weights(in_channels=4)), ValueError,
     ['in_channels=4', 'in_channels=3']),
    ('weights: of another arch', load(weights(arch={**ARCH, 'depths': (2, 2, 4, 2)})), ValueError,
     ['depths=(2, 2, 4, 2)', 'depths=(2, 2, 3, 2)', 'set arch']),
    ('weights: with a stem', load(weights(conv_stem=True)), ValueError,
     ['saved with conv_stem=True', 'the model has conv_stem=False', 'give the model']),
    ('weights: of overlapping patches', load(weights(overlap_downsample=True)), ValueError,
     ['saved with overlap_downsample=True', 'has overlap_downsample=False', 'give the model']),
    ('weights: with convolutions in the MLPs', load(weights(mix_ffn=True)), ValueError,
     ['saved with mix_ffn=True', 'the model has mix_ffn=False', 'give the model mix_ffn=True']),
    ('weights: of another in_channels, with a stem', load(
        weights(in_channels=4, conv_stem=True), conv_stem=True), ValueError,
     ['in_channels=4', 'in_channels=3']),
    ('weights: of too few stages', load(weights(out_indices=(0, 1))), ValueError,
     ['2 stage(s)', 'has 4', 'out_indices']),
    ('weights: of another backbone', load(lambda: FOREIGN), ValueError, ['no LaViT weights']),
    ('weights: of a classifier', load(lambda: inside('backbone.')['state_dict']), ValueError,
     ["init_cfg a prefix such as 'backbone.'"]),
    ('weights: Psi not over a square window', load(
        lambda: {**weights()(), 'stages.0.blocks.1.attn.psi': ones(10, 10)}), ValueError,
     ['Psi and Theta', 'square window', '(10, 10)']),
    ('weights: Psi not square', lambda folder: resize_window_weight(ones(16, 9), 4), ValueError,
     ['(n, n)', '(16, 9)']),
    ('weights: Psi a vector', lambda folder: resize_window_weight(ones(16), 4), ValueError,
     ['(n, n)', '(16,)']),
    ('weights: Psi of 3-D', lambda folder: resize_window_weight(ones(4, 4, 4), 4), ValueError,
     ['(n, n)', '(4, 4, 4)']),
    # Checkpoint files
    ('file: missing', lambda folder: LaViT(ARCH, init_cfg=dict(
        checkpoint=f'{folder}/no.pth')).init_weights(), FileNotFoundError,
     ['no.pth can not be found']),
    ('file: a folder', lambda folder: read_checkpoint(folder), FileNotFoundError,
     ['can not be found']),
    ('file: empty', pretrained(b''), CheckpointError, ['weights.pth', 'empty', 'older one']),
    ('file: HTML', pretrained(b'\n<!DOCTYPE html><html>'), CheckpointError,
     ['weights.pth', 'web page', 'download it again']),
    ('file: Git LFS pointer', pretrained(b'version https://git-lfs.github.com/spec/v1\n'),
     CheckpointError, ['weights.pth', 'git lfs pull']),
    ('file: text', pretrained(b'hello'), CheckpointError,
     ['weights.pth', "b'hello'", 'torch.save']),
    ('file: truncated', pretrained(TRUNCATED), CheckpointError,
     ['weights.pth', 'incomplete', 'copy it again', 'older one']),
    ('file: truncated, old format', pretrained(
        lambda folder: as_bytes(inside(''), _use_new_zipfile_serialization=False)[:20000]),
     CheckpointError, ['weights.pth', 'damaged']),
    ('file: a zip of another kind', pretrained(b'PK\x05\x06' + bytes(18)), CheckpointError,
     ['weights.pth', 'damaged']),
    ('file: a list', pretrained([1, 2]), CheckpointError, ['weights.pth', 'dict', 'list']),
    ('file: state_dict is a list', pretrained(dict(state_dict=[1]), prefix='a.'), CheckpointError,
     ['weights.pth', 'state_dict', 'list']),
    ('file: LaViT under another prefix', pretrained(inside('trunk.0.'), prefix='backbone.'),
     CheckpointError, ["prefix='backbone.'", "prefix='trunk.0.'"]),
    ('file: LaViT under no prefix', pretrained(inside(''), prefix='backbone'), CheckpointError,
     ["prefix='backbone'", 'prefix=None']),
    ('file: no LaViT', pretrained({'conv.weight': ones(1)}, prefix='backbone.'), CheckpointError,
     ["prefix='backbone.'", 'conv.weight', 'no LaViT']),
    ('file: prefix forgotten', pretrained(inside('backbone.')), ValueError,
     ["init_cfg a prefix such as 'backbone.'"]),
    pytest.param('file: a program in it', pretrained(infected, prefix='backbone.'),
                 CheckpointError, ['weights.pth', 'mkdir', 'trust'], marks=needs_weights_only),
    pytest.param('file: a program in it, old format', pretrained(
        infected_in_the_old_format, prefix='backbone.'),
                 CheckpointError, ['weights.pth', 'mkdir', 'trust'], marks=needs_weights_only),
    pytest.param('file: an unknown class in it', pretrained(dict(meta=Fraction(1, 2))),
                 CheckpointError, ['weights.pth', 'fractions.Fraction', 'trust',
                                   'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'], marks=needs_weights_only),
    # The hook
    ('loss_weight: text', hook(loss_weight='1'), TypeError, ['loss_weight', 'number', "'1'"]),
    ('loss_weight: None', hook(loss_weight=None), TypeError, ['loss_weight', 'number', 'None']),
    ('loss_weight: True', hook(loss_weight=True), TypeError, ['loss_weight', 'number', 'True']),
    ('loss_weight: a list', hook(loss_weight=[1.0]), TypeError, ['loss_weight', 'number', '[1.0]']),
    ('loss_weight: negative', hook(loss_weight=-0.1), ValueError,
     ['loss_weight', 'least 0', '-0.1']),
    ('loss_weight: infinite', hook(loss_weight=math.inf), ValueError, ['loss_weight', 'finite']),
    ('loss_weight: NaN', hook(loss_weight=NAN), ValueError, ['loss_weight', 'finite', 'nan']),
    ('hook: model without LaViT', hooked(nn.ModuleDict({'backbone': nn.Linear(2, 2)})), ValueError,
     ['DiagonalityLossHook', 'LaViT backbone', 'ModuleDict has none']),
    ('hook: twice', hooked(Model(), hooks=2), RuntimeError,
     ['DiagonalityLossHook', 'loss_dp already', 'custom_hooks']),
    ('hook: the model has a loss_dp', hooked(Model('loss_dp')), RuntimeError, ['Model', 'loss_dp']),
    ('hook: the losses are no dict', hooked(Model(None)), TypeError,
     ['DiagonalityLossHook', 'dict of losses', 'Tensor']),
    # The loss
    ('scores: a list', dp_loss([[1.0]]), TypeError, ['scores', 'floating-point', 'list']),
    ('scores: None', dp_loss(None), TypeError, ['scores', 'floating-point', 'NoneType']),
    ('scores: integers', dp_loss(ones(1, 1, 2, 2, dtype=torch.int64)), TypeError,
     ['scores', 'torch.int64']),
    ('scores: bool', dp_loss(ones(1, 1, 2, 2, dtype=torch.bool)), TypeError,
     ['scores', 'torch.bool']),
    ('scores: complex', dp_loss(ones(1, 1, 2, 2, dtype=torch.complex64)), TypeError,
     ['scores', 'torch.complex64']),
    ('scores: 3-D', dp_loss(ones(1, 2, 2)), ValueError, ['(windows, heads, n, n)', '(1, 2, 2)']),
    ('scores: 5-D', dp_loss(ones(1, 1, 1, 2, 2)), ValueError, ['scores', '(1, 1, 1, 2, 2)']),
    ('scores: not square', dp_loss(ones(1, 1, 2, 3)), ValueError, ['scores', '(1, 1, 2, 3)']),
    ('scores: no window', dp_loss(ones(0, 1, 2, 2)), ValueError, ['scores', '(0, 1, 2, 2)']),
    ('scores: no head', dp_loss(ones(1, 0, 2, 2)), ValueError, ['scores', '(1, 0, 2, 2)']),
    ('scores: no token', dp_loss(ones(1, 1, 0, 0)), ValueError, ['scores', '(1, 1, 0, 0)']),
    ('valid: a list', dp_loss(ones(3, 1, 2, 2), [[True]]), TypeError, ['valid', 'bool', 'list']),
    ('valid: numbers', dp_loss(ones(3, 1, 2, 2), ones(3, 2)), TypeError, ['valid', 'float32']),
    ('valid: bytes', dp_loss(ones(3, 1, 2, 2), ones(3, 2, dtype=torch.uint8)), TypeError,
     ['valid', 'bool', 'torch.uint8']),
    ('valid: 1-D', dp_loss(ones(3, 1, 2, 2), ones(2).bool()), ValueError,
     ['valid', '(3, 2)', 'got (2,)']),
    ('valid: too few windows', dp_loss(ones(3, 1, 2, 2), ones(1, 2).bool()), ValueError,
     ['valid', '(3, 2)', 'got (1, 2)']),
    ('valid: too many tokens', dp_loss(ones(3, 1, 2, 2), ones(3, 4).bool()), ValueError,
     ['valid', '(3, 2)', 'got (3, 4)']),
    ('valid: 3-D', dp_loss(ones(3, 1, 2, 2), ones(3, 1, 2).bool()), ValueError,
     ['valid', '(3, 2)', 'got (3, 1, 2)']),
    # Training data, through tools/train.py
    ('data: no annotation', trained(without_any('annotations')), Refused,
     ['CocoDataset', 'instances_train2017.json', 'no image to use', 'ann_file']),
    slow('data: no image', trained(without_any('images', 'annotations')), Refused,
     ['CocoDataset', 'instances_train2017.json', 'no image to use']),
    slow('data: other classes', trained(lambda data: [
        category.update(name='cat') for category in data['categories']]), Refused,
     ['CocoDataset', 'no image to use', 'classes of its metainfo']),
    slow('data: every image too small', trained(lambda data: [
        image.update(width=8, height=8) for image in data['images']]), Refused,
     ['no image to use', 'filter_cfg']),
    ('data: crowds only', trained(annotations(iscrowd=1)), Refused,
     ['CocoDataset', '2 images', 'no box to train on', 'no crowd']),
    slow('data: every box outside', trained(annotations(bbox=[900, 900, 9, 9])), Refused,
     ['CocoDataset', '2 images', 'no box to train on', 'inside its image']),
    slow('data: every box empty', trained(annotations(bbox=[5, 5, 0, 0])), Refused,
     ['2 images', 'no box to train on']),
    ('data: no area', trained(lambda data: data['annotations'][1].pop('area')), Refused,
     ['instances_train2017.json', "'area'", "'id': 2"]),
    ('data: no iscrowd where it is evaluated', trained(
        lambda data: data['annotations'][0].pop('iscrowd'),
        file=ANNOTATIONS.replace('train', 'val')), Refused,
     ['instances_val2017.json', "'iscrowd'", "'id': 1"]),
    ('data: classes are a text',
     trained(lines="train_dataloader = dict(dataset=dict(metainfo=dict(classes=('circle'))))"),
     Refused,
     ['classes', "'circle'", 'tuple or list']),
    ('data: classes that no head has', trained(None, 'model.bbox_head.num_classes=2'), Refused,
     ['bbox_head', 'num_classes=2', 'CocoDataset', '3 classes', 'circle']),
    slow('data: classes forgotten, boxes', trained_elsewhere(
        'maskrcnn_lavit_s_coco.py', OWN_BOXES, call_shapes_as_coco_does), Refused,
     ['instances_train2017.json', '3 categories (cat, dog, robot)', '80 classes',
      '2 are among them', 'metainfo', 'num_classes']),
    slow('data: a class of the data is not in the file',
     trained(lines="train_dataloader = dict(dataset=dict(metainfo=dict("
                   "classes=('circle', 'square', 'tringle'))))"), Refused,
     ['instances_train2017.json', '3 categories (circle, square, triangle)', 'tringle']),
    slow('data: classes forgotten, folders', trained_elsewhere('lavit_t_imagenet.py', OWN_FOLDERS),
     Refused, ['has num_classes=1000', 'CustomDataset', 'classes (circle', 'set num_classes']),
    slow('data: classes forgotten beside the head', trained_elsewhere(
        'lavit_t_imagenet.py', f'{OWN_FOLDERS}model = dict(head=dict(num_classes=3))'), Refused,
     ['data_preprocessor has num_classes=1000', '3 classes']),
    slow('data: folders that are not ImageNet', trained_elsewhere(
        'lavit_t_imagenet.py', OWN_FOLDERS.replace('Custom', 'ImageNet').replace(
            'ImageNetDataset', 'ImageNet')), Refused,
     ['ImageNet', 'subfolders (3)', '(1000)', "'CustomDataset'", 'num_classes']),
    slow('data: labels of a list', trained_elsewhere(
        'lavit_n_shapes.py', OWN_LIST, list_of_images), Refused,
     ['.jpg has the label 3', 'head has num_classes=3', 'from 0 to 2']),
    slow('data: labels of pixels', trained_elsewhere(
        'upernet_lavit_n_shapes.py', spoil=label_a_pixel), Refused,
     ['annotations/training/', '.png has the label 4', 'head has num_classes=4', '0 to 3']),
    # Commands
    ('train: no such config', command('train.py', 'no.py'), Refused, ['not found', 'no.py']),
    ('test: no such config', command('test.py', 'no.py', 'a.pth'), Refused, ['not found', 'no.py']),
    slow('test: no such checkpoint', evaluated(None), Refused, ['file not found', 'weights.pth']),
    ('train: unknown type', trained(None, 'model.backbone.type=LaVit'), Refused,
     ["'LaVit'", 'registry', 'spelling', 'custom_imports']),
    slow('train: unknown hook', trained(lines="custom_hooks = [dict(type='DiagonalHook')]"),
     Refused, ["'DiagonalHook'", 'registry', 'spelling']),
    slow('train: unknown option', trained(None, 'model.backbone.window=8'), Refused,
     ['LaViT', "unexpected keyword argument 'window'", 'README.md']),
    slow('train: bad option', trained(None, 'model.backbone.window_sizes=[7,7,7,7]'),
     Refused, ['window_sizes', '7 is odd']),
    ('train: hook without LaViT', trained(lines=BACKBONE_OF_ANOTHER_KIND), Refused,
     ['AttentionHealthHook', 'LaViT backbone', 'RetinaNet has none']),
    slow('train: hook on frozen stages',
     trained(None, 'model.backbone.frozen_stages=4', 'custom_hooks.0.loss_weight=1'),
     Refused, ['DiagonalityLossHook', 'frozen', 'remove the hook']),
    slow('train: hook twice', trained(lines=HOOK_TWICE), Refused,
     ['DiagonalityLossHook', 'loss_dp already', 'custom_hooks']),
    ('test: checkpoint is HTML', evaluated(b'<html>'), Refused, ['weights.pth', 'web page']),
    slow('test: checkpoint truncated', evaluated(TRUNCATED), Refused,
     ['weights.pth', 'incomplete']),
    slow('test: checkpoint of another arch', evaluated(inside('backbone.')), Refused,
     ["'custom'", "'nano'", 'set arch']),
    pytest.param('test: a program in the checkpoint', evaluated(infected), Refused,
                 ['weights.pth', 'mkdir', 'trust'], marks=needs_weights_only),
    ('make_shapes: --size 8', command('make_shapes.py', '--size', 8), Refused, ['size', '32', '8']),
    ('make_shapes: no image', command('make_shapes.py', '--num-train', 0), Refused,
     ['num_train', '>= 1', '0']),
    ('make_shapes: --seed -1', command('make_shapes.py', '--seed', -1), Refused, ['seed', '>= 0']),
    ('make_shapes: --size big', command('make_shapes.py', '--size', 'big'), Refused,
     ['--size', "'big'"]),
    ('make_shapes: into a file', command('make_shapes.py', '--out', SHAPES_CONFIG), Refused,
     [SHAPES_CONFIG.name, 'not a directory']),
    ('benchmark: no shape', command('benchmark.py', '--inference', '224'), Refused,
     ['--inference', '2x512x512', "'224'"]),
    ('benchmark: empty images', command('benchmark.py', '--training', '1x0x8'), Refused,
     ['--training', '2x512x512', "'1x0x8'"]),
    ('benchmark: no round', command('benchmark.py', '--rounds', '0'), Refused,
     ['--rounds', 'at least 1', "'0'"]),
    ('benchmark: unknown model', command('benchmark.py', '--models', 'VGG'), Refused,
     ['--models', "'VGG'", 'LaViT-S']),
    ('benchmark: unknown suite', command('benchmark.py', '--suites', 'all'), Refused,
     ['--suites', "'all'", 'backbones']),
    ('benchmark: into a file', command('benchmark.py', '--out', SHAPES_CONFIG), Refused,
     ['--out', SHAPES_CONFIG.name, 'folder']),
    pytest.param('benchmark: no GPU', command('benchmark.py', '--device', 'cuda'), Refused,
                 ["'cuda'", 'no GPU', "'cpu'"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')),
    ('compare_commits: no such commit', command('compare_commits.py', 'no-such-name'), Refused,
     ["'no-such-name'", 'no commit']),
    ('compare_commits: few pairs', command('compare_commits.py', 'HEAD', '--pairs', '3'), Refused,
     ['--pairs', 'at least 8', "'3'"]),
    ('compare_commits: no case', command('compare_commits.py', 'HEAD', '--cases', '224'), Refused,
     ['--cases', 'inference:4x224x224:fp32', "'224'"]),
    ('benchmark settings: device', lambda folder: Settings('tpu'), ValueError, ['device', "'tpu'"]),
    ('benchmark settings: precision', lambda folder: Settings(precision='int8'), ValueError,
     ['precision', "'int8'", 'bf16-amp']),
    ('benchmark settings: threads', lambda folder: Settings(threads=0), ValueError,
     ['threads', 'at least 1', '0']),
    ('benchmark: routes that are one',
     command('benchmark.py', '--linear', 'both', '--precision', 'fp16'), Refused,
     ['--linear', 'both', 'eager fp32']),
    ('benchmark task: name', lambda folder: Task('testing', (1, 3, 4, 4)), ValueError,
     ['task', "'testing'", "'training'"]),
    ('benchmark task: shape', lambda folder: Task('inference', (1, 4, 4)), ValueError,
     ['shape', '(B, 3, H, W)', '(1, 4, 4)']),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_scope() -> Iterator[None]:
    """A runner sets MMEngine's default scope for good, the tools its loader; take both back."""
    loader = CheckpointLoader._schemes['']
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield
    CheckpointLoader.register_scheme('', loader=loader, force=True)


def name_of(row: object) -> str:
    return getattr(row, 'values', row)[0]


@pytest.mark.parametrize('what, make, kind, pieces', TABLE, ids=map(name_of, TABLE))
def test_bad_input(what, make, kind, pieces, tmp_path):
    with pytest.raises(Exception) as caught:
        make(tmp_path)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert '\n' not in message
    assert [piece for piece in pieces if piece not in message] == [], message
    assert not (tmp_path / 'ran').exists(), 'the program in the checkpoint has run'


def test_the_table_has_no_row_twice():
    names = list(map(name_of, TABLE))
    assert len(set(names)) == len(names) >= 60


# ---- What is odd, and works ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize('pixel', [NAN, math.inf, -math.inf])
def test_a_broken_pixel_shows_in_its_own_image_alone(pixel):
    model = small_lavit()
    x = images(2, 3, 40, 40)
    expected = model(x)
    x[1, 0, 3, 5] = pixel
    for found, clean in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found[0], clean[0], rtol=0, atol=1e-10)
        assert found[1].isnan().any(), 'it must not vanish'


def test_odd_boxes_beside_good_ones_are_left_out_and_training_goes_on(tmp_path):
    """A box half outside stays as it is; a crowd is told apart; empty and outside boxes go."""
    odd = [dict(bbox=[900, 900, 9, 9]), dict(bbox=[5, 5, 0, 0]), dict(iscrowd=1)]
    half_outside = [-10.0, 40.0, 30.0, 40.0]

    def change(data: dict) -> None:
        good = data['annotations'][0]
        good.update(image_id=data['images'][0]['id'], bbox=half_outside, area=1200.0)
        data['annotations'] = [{**good, 'id': i, **o} for i, o in enumerate([{}, *odd], 1)]

    trained(change)(tmp_path)
    (log,) = (tmp_path / 'run').glob('*/*.log')
    losses = re.findall(r'\b(loss\w*): (\S+)', log.read_text().partition('Epoch(train)')[2])
    assert {'loss', 'loss_cls', 'loss_bbox'} <= {name for name, _ in losses}
    assert all(0 < float(value) < 100 for _, value in losses)

    from mmdet.registry import DATASETS

    cfg = Config.fromfile(RETINANET).train_dataloader.dataset
    cfg.data_root = f'{tmp_path}/shapes/coco/'
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(cfg)
    (item,) = [dataset.get_data_info(i) for i in range(len(dataset))]
    kept = [(i['bbox'], i['ignore_flag']) for i in item['instances']]
    whole = [-10.0, 40.0, 20.0, 80.0]
    assert kept == [(whole, 0), (whole, 1)]


@pytest.mark.slow
@pytest.mark.parametrize('config, place', [(UPERNET, 'ade/images/training'),
                                           (CLASSIFIER, 'imagenet/train')])  # fmt: skip
def test_an_empty_folder_of_the_other_toolboxes(config, place, tmp_path):
    make_shapes(tmp_path / 'data/shapes', ShapesRecipe(2, 1, size=64), progress=False)
    for path in (tmp_path / 'data/shapes' / place).rglob('*.jpg'):
        path.unlink()
    with pytest.raises(Refused, match='no image to use'):
        command('train.py', config, '--work-dir', 'run')(tmp_path)


def test_the_models_own_loss_does_not_hide_the_sum():
    model = Model('loss')
    DiagonalityLossHook(loss_weight=2.0).before_train(SimpleNamespace(model=model))
    losses = model.train()(images(1, 3, 16, 16).float(), mode='loss')
    total, logged = BaseModel.parse_losses(SimpleNamespace(), losses)
    assert list(logged) == ['loss', 'loss_task', 'loss_dp'] and logged['loss_dp'] > 0
    assert logged['loss'] == total == logged['loss_task'] + logged['loss_dp']


# ---- Checkpoints that may hold a program ---------------------------------------------------------


def test_what_mmengine_saves_in_training_is_loaded(tmp_path):
    """Numbers of the log, metrics of every kind, a dict of the config."""
    buffer = HistoryBuffer()
    buffer.update(0.5, 2)
    kinds = (np.float16, np.float32, np.float64, np.int8, np.uint32, np.int64, np.bool_)
    written = dict(
        state_dict=weights()(),
        message_hub=dict(log_scalars=dict(loss=buffer), runtime_info=[kind(1) for kind in kinds]),
        meta=dict(dataset_meta=ConfigDict(classes=('a', 'b')), array=np.arange(3)),
    )
    torch.save(written, tmp_path / 'epoch_1.pth')
    found = load_from_file(str(tmp_path / 'epoch_1.pth'))
    assert found['message_hub']['log_scalars']['loss'].mean() == buffer.mean()
    assert found['message_hub']['runtime_info'] == [1] * len(kinds)
    assert found['meta']['dataset_meta'] == dict(classes=('a', 'b'))
    assert all(torch.equal(v, found['state_dict'][k]) for k, v in written['state_dict'].items())


@needs_weights_only
@pytest.mark.parametrize('how', ['load_from={path}', 'resume=True load_from={path}'])
def test_training_from_a_checkpoint_with_a_program(how, tmp_path):
    path = write(tmp_path / 'weights.pth', infected)
    with pytest.raises(Refused, match='mkdir'):
        trained(None, *how.format(path=path).split())(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_mmengines_own_loader_runs_programs(tmp_path):
    """What README.md warns of. When this fails, the warning and our loader can go."""
    path = write(tmp_path / 'weights.pth', infected)
    load_from_local(str(path), 'cpu')
    assert (tmp_path / 'ran').exists()


@needs_weights_only
@pytest.mark.filterwarnings('ignore:Environment variable TORCH_FORCE_NO')
def test_a_user_may_trust_a_file(tmp_path, monkeypatch):
    path = write(tmp_path / 'weights.pth', dict(state_dict={}, meta=Fraction(1, 2)))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    assert read_checkpoint(path)['meta'] == Fraction(1, 2)
