"""What a training says before its first step: from scratch or not, and how it is optimized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import short_training
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DefaultScope
from mmengine.runner import FlexibleRunner, Runner
from small import ARCH
from torch import nn

from mmlavit import LaViT
from mmlavit.datasets.shapes import ShapesRecipe, make_shapes

DETECTOR, SEGMENTOR, CLASSIFIER = (
    *('retinanet_lavit_n_shapes', 'upernet_lavit_n_shapes'),
    'lavit_n_shapes',
)
ADAMW = dict(type='AdamW', lr=1e-4, weight_decay=0.05)
SGD = dict(type='SGD', lr=1e-4, momentum=0.9)
SCRATCH, BY_SGD, DECAY = 'from scratch', 'SGD', 'weight decay'


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('checks')
    make_shapes(folder, ShapesRecipe(4, 2, size=64), progress=False)
    return folder


def said(cfg: Config, model: nn.Module | None = None) -> list[str]:
    """Train, and return the lines of the log about a LaViT."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        runner = Runner.from_cfg(cfg)
        if model is not None:
            runner.model.load_state_dict(model.state_dict())
        runner.train()
        assert runner.iter == cfg.train_cfg.max_iters
    return lines_of(runner)


def lines_of(runner: Runner) -> list[str]:
    (log,) = Path(runner.log_dir).glob('*.log')
    return [line for line in log.read_text().splitlines() if 'The LaViT at ' in line]


def kinds(lines: list[str]) -> list[str]:
    """What each line is about; every line once."""
    return [kind for line in lines for kind in (SCRATCH, BY_SGD, DECAY) if kind in line]


# ---- From scratch --------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER])
def test_from_scratch(name, shapes, tmp_path):
    """Said of a detector and a segmentor, with the option that takes a checkpoint."""
    lines = said(short_training(name, shapes, tmp_path))
    if name == CLASSIFIER:
        assert lines == []
        return
    (line,) = lines
    assert SCRATCH in line and 'INFO' in line
    assert 'model.backbone.init_cfg.checkpoint=' in line


@pytest.fixture(scope='module')
def checkpoint(shapes, tmp_path_factory) -> Path:
    """Of a detector that was trained for a step."""
    folder = tmp_path_factory.mktemp('before')
    assert kinds(said(short_training(DETECTOR, shapes, folder))) == [SCRATCH]
    return folder / 'iter_1.pth'


PRETRAINED = {
    'load_from': lambda path: dict(load_from=path),
    'the backbone': lambda path: dict(model__backbone__init_cfg=dict(checkpoint=path)),
    'the model': lambda path: dict(model__init_cfg=dict(type='Pretrained', checkpoint=path)),
    'a list': lambda path: dict(
        model__backbone__init_cfg=[dict(type='Pretrained', checkpoint=path, prefix='backbone.')]
    ),
}


@pytest.mark.parametrize('how', PRETRAINED)
def test_with_a_checkpoint(how, checkpoint, shapes, tmp_path):
    options = PRETRAINED[how](str(checkpoint))
    assert said(short_training(DETECTOR, shapes, tmp_path, **options)) == []


def test_resumed(checkpoint, shapes, tmp_path):
    options = dict(resume=True, train_cfg__max_iters=2)
    named = options | dict(load_from=str(checkpoint))
    assert said(short_training(DETECTOR, shapes, tmp_path, **named)) == []
    assert said(short_training(DETECTOR, shapes, checkpoint.parent, **options)) == []
    # There is nothing to resume from: it does start from scratch.
    assert kinds(said(short_training(DETECTOR, shapes, tmp_path / 'new', **options))) == [SCRATCH]


def test_weights_loaded_by_hand(checkpoint, shapes, tmp_path):
    with DefaultScope.overwrite_default_scope('mmengine'):
        cfg = short_training(DETECTOR, shapes, tmp_path, load_from=str(checkpoint))
        runner = Runner.from_cfg(cfg)
        runner.load_or_resume()
    assert said(short_training(DETECTOR, shapes, tmp_path / 'again'), runner.model) == []


def test_another_backbone(shapes, tmp_path):
    """It is no matter of ours, also when mmlavit is imported."""
    cfg = short_training(DETECTOR, shapes, tmp_path, SGD | dict(weight_decay=0.1))
    cfg.model.backbone = dict(type='ResNet', depth=18, out_indices=(1, 2, 3))
    cfg.model.neck.in_channels = [128, 256, 512]
    assert said(cfg) == []


# ---- The optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER])
@pytest.mark.parametrize(
    'optimizer, options, expected',
    [
        (ADAMW, {}, [DECAY]),
        (SGD, {}, [BY_SGD]),
        (SGD | dict(weight_decay=1e-4), {}, [BY_SGD, DECAY]),
        (ADAMW, dict(optim_wrapper__constructor='LaViTOptimWrapperConstructor'), []),
    ],
    ids=['AdamW', 'SGD', 'SGD with decay', 'our constructor'],
)
def test_how_it_is_optimized(name, optimizer, options, expected, shapes, tmp_path):
    """One warning, whatever it is about."""
    lines = said(short_training(name, shapes, tmp_path, optimizer, **options))
    warnings = [line for line in lines if SCRATCH not in line]
    assert len(warnings) == bool(expected)
    assert all('WARNING' in line and 'The LaViT at backbone' in line for line in warnings)
    assert kinds(warnings) == expected
    if DECAY in expected:
        assert f' {optimizer["weight_decay"]:g} ' in warnings[0]


def test_by_keys_of_mmengine(shapes, tmp_path):
    """The groups count, not what the config says."""
    for without in (('psi', 'theta'), ('psi',)):
        keys = dict.fromkeys(without, dict(decay_mult=0.0))
        cfg = short_training(
            *(DETECTOR, shapes, tmp_path / str(len(without)), ADAMW),
            optim_wrapper__paramwise_cfg=dict(custom_keys=keys),
        )
        assert (DECAY in kinds(said(cfg))) == (len(without) < 2)


@pytest.mark.parametrize('how', ['frozen', 'rate of 0'])
def test_a_lavit_that_is_not_trained(how, shapes, tmp_path):
    """It is from scratch all the same; MMEngine puts frozen parameters into groups as well."""
    keys = {'backbone': dict(lr_mult=0.0 if how == 'rate of 0' else 1.0)}
    cfg = short_training(
        *(DETECTOR, shapes, tmp_path, SGD | dict(weight_decay=0.1)),
        optim_wrapper__paramwise_cfg=dict(custom_keys=keys),
        model__backbone__frozen_stages=4 if how == 'frozen' else -1,
    )
    assert kinds(said(cfg)) == [SCRATCH]


class Two(BaseModel):
    """A LaViT and a head, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = LaViT(ARCH, out_indices=(3,))
        self.head = nn.Linear(ARCH['embed_dims'][-1], 3)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str) -> dict:
        logits = self.head(self.encoder(inputs)[0].mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, labels))

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict:
        if not isinstance(optim_wrapper, OptimWrapperDict):
            return super().train_step(data, optim_wrapper)
        loss = self(**self.data_preprocessor(data, True), mode='loss')['loss']
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
            wrapper.zero_grad()
        return dict(loss=loss.detach())


def parts(folder: Path) -> dict:
    data = [dict(inputs=torch.zeros(3, 32, 32), labels=0) for _ in range(2)]
    return dict(
        model=Two(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=data,
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        experiment_name=f'checks_{folder.name}',
    )


@pytest.mark.parametrize('of_lavit, expected', [('AdamW', [DECAY]), ('SGD', [BY_SGD, DECAY])])
def test_several_optimizers(of_lavit, expected, tmp_path):
    """Only that of the LaViT counts. No detector, so nothing of checkpoints."""
    options = parts(tmp_path)
    model = options['model']
    kind = dict(AdamW=torch.optim.AdamW, SGD=torch.optim.SGD)[of_lavit]
    wrappers = dict(
        encoder=OptimWrapper(kind(model.encoder.parameters(), lr=1e-3, weight_decay=0.3)),
        head=OptimWrapper(torch.optim.SGD(model.head.parameters(), lr=0.1, weight_decay=0.7)),
    )
    runner = Runner(**options, optim_wrapper=OptimWrapperDict(**wrappers))
    runner.train()
    lines = lines_of(runner)
    assert kinds(lines) == expected and len(lines) == 1
    assert 'The LaViT at encoder' in lines[0] and '0.3' in lines[0] and '0.7' not in lines[0]


def test_mmengines_other_runner(tmp_path):
    """Which builds the model when training starts."""
    optim_wrapper = dict(type='OptimWrapper', optimizer=ADAMW)
    runner = FlexibleRunner(**parts(tmp_path), optim_wrapper=optim_wrapper)
    runner.train()
    assert kinds(lines_of(runner)) == [DECAY]
