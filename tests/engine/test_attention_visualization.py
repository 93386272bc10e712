"""AttentionVisualizationHook in real trainings: what it logs, and that it changes nothing."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import HOOKS, MODEL_WRAPPERS, DefaultScope
from mmengine.runner import Runner
from processes import in_two_processes
from small import ARCH, images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmlavit import AttentionVisualizationHook, LaViT
from mmlavit.analysis.measures import symmetry
from mmlavit.analysis.record import recording

SIZE = 64
STEPS = 6

pytestmark = pytest.mark.usefixtures('own_scope')


class Toy(BaseModel):
    """A backbone that drops at random, batch norm, and a linear head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.BatchNorm2d(ARCH['embed_dims'][3])
        self.head = nn.Linear(ARCH['embed_dims'][3], 3)
        self.runs = True

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
        if not self.runs:
            return dict(loss_cls=self.head.weight.sum())
        logits = self.head(self.norm(self.backbone(inputs)[-1]).mean(dim=(2, 3)))
        return dict(loss_cls=F.cross_entropy(logits, labels)) if mode == 'loss' else logits


def toy(**options: object) -> Toy:
    torch.manual_seed(0)
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3)
    return Toy(LaViT(ARCH, **{**rates, 'frozen_stages': 1, 'out_indices': (3,), **options}))


def samples(count: int = 8) -> list[dict]:
    return [
        dict(inputs=x, labels=torch.tensor(i % 3))
        for i, x in enumerate(images(count, 3, SIZE, SIZE).float())
    ]


def train(folder: Path, model: Toy, *hooks: dict, **options: object) -> Runner:
    backends = [dict(type='TensorboardVisBackend'), dict(type='LocalVisBackend')]
    settings = dict(
        train_dataloader=DataLoader(samples(), batch_size=4),
        train_cfg=dict(by_epoch=False, max_iters=STEPS),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-1)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=None),
        custom_hooks=list(hooks),
        visualizer=dict(type='Visualizer', vis_backends=backends),
        randomness=dict(seed=3),
        log_level='WARNING',
        experiment_name=folder.name,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Which looks for compilers and imports torchvision, for the log, and takes longest of all.
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        runner = Runner(model=model, work_dir=str(folder), **{**settings, **options})
    runner.train()
    return runner


def events(folder: Path) -> SimpleNamespace:
    """What TensorBoard shows: by name, the scalars and the images by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob('events.out.tfevents.*')
    found = EventAccumulator(str(file), size_guidance=dict(images=0, scalars=0)).Reload()
    tags = found.Tags()
    return SimpleNamespace(
        scalars={t: {e.step: e.value for e in found.Scalars(t)} for t in tags['scalars']},
        images={t: {e.step: e for e in found.Images(t)} for t in tags['images']},
    )


HOOK = dict(type='AttentionVisualizationHook', interval=3)
LOSS = dict(type='DiagonalityLossHook')


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A training with the hook on, beside the other hook that listens to the layers."""
    folder = tmp_path_factory.mktemp('with_hook')
    with DefaultScope.overwrite_default_scope('mmengine'):
        runner = train(folder, toy(), LOSS, HOOK)
    return SimpleNamespace(folder=folder, model=runner.model, random=random_states())


def random_states() -> list:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def test_logs_figures_and_numbers_at_its_interval(trained):
    folder = trained.folder
    found = events(folder)
    assert set(found.images) == {'attention_curves', 'attention_heat_maps'}
    for by_step in found.images.values():
        assert list(by_step) == [3, 6]
        for event in by_step.values():
            assert event.encoded_image_string.startswith(b'\x89PNG')
            assert event.width > 600 and event.height > 150
    ours = {name: values for name, values in found.scalars.items() if name.startswith('attention')}
    names = ('diagonality', 'symmetry', 'entropy', 'cosine', 'cka')
    assert {name.split('/')[0] for name in ours} == {f'attention_{name}' for name in names}
    entropies = {name.split('/')[1] for name in ours if name.startswith('attention_entropy')}
    depths = zip(ARCH['depths'], ARCH['vanilla_depths'], strict=True)
    assert entropies == {
        f'stage{m}_layer{i}_{"VA" if i <= vanilla else "LA"}'
        for m, (depth, vanilla) in enumerate(depths, start=1)
        for i in range(1, depth + 1)
    }
    for name, values in ours.items():
        assert list(values) == [3, 6], name
        assert all(-1 <= value <= 1 + 1e-6 for value in values.values()), name
    # The training's own numbers are there, too, at every step.
    assert list(found.scalars['loss']) == [1, 2, 3, 4, 5, 6]


def test_the_other_backends_get_the_same(trained):
    folder = trained.folder
    pictures = sorted(path.name for path in folder.rglob('vis_image/*.png'))
    expected = [
        f'attention_{name}_{step}.png' for name in ('curves', 'heat_maps') for step in (3, 6)
    ]
    assert pictures == expected
    (log,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = events(folder).scalars['attention_entropy/stage3_layer1_VA']
    ours = {line['step']: line for line in lines if 'attention_entropy/stage3_layer1_VA' in line}
    assert list(ours) == [3, 6]
    for step, value in found.items():
        assert ours[step]['attention_entropy/stage3_layer1_VA'] == pytest.approx(value, rel=1e-6)


def test_the_numbers_are_of_the_batch_and_of_the_weights_after_the_step(trained):
    folder = trained.folder
    model = copy.deepcopy(trained.model).eval()
    # Iteration 6 takes the second of two batches.
    inputs = torch.stack([sample['inputs'] for sample in samples()[4:]])
    with recording(model) as layers, torch.no_grad():
        model.backbone(inputs)
    found = events(folder).scalars
    for layer in layers[:4]:  # whose windows have no padding
        kind = {'vanilla': 'VA', 'less': 'LA'}[layer.kind]
        name = f'attention_symmetry/stage{layer.stage + 1}_layer{layer.layer + 1}_{kind}'
        expected = float(symmetry(layer.attn.flatten(0, 1)).mean())
        assert found[name][6] == pytest.approx(expected, rel=1e-5)


def test_training_is_the_same_bit_by_bit_with_and_without(trained, tmp_path):
    model = train(tmp_path, toy(), LOSS).model
    assert random_states() == trained.random
    start = toy().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name
    moved = [
        name for name, value in model.state_dict().items() if not torch.equal(start[name], value)
    ]
    assert {'norm.running_mean', 'head.weight', 'backbone.stages.3.blocks.1.attn.psi'} <= set(moved)
    modes, others = (
        {name: module.training for name, module in m.named_modules()}
        for m in (trained.model, model)
    )
    assert modes == others
    assert not modes['backbone.stages.0.blocks.0'] and modes['backbone.stages.1.blocks.0']
    losses = events(trained.folder).scalars, events(tmp_path).scalars
    for name in ('loss', 'loss_dp', 'loss_cls'):
        assert losses[0][name] == losses[1][name]
    assert not events(tmp_path).images


def test_leaves_the_model_as_it_was(trained):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.model.modules())


def test_says_when_there_was_nothing_to_see(tmp_path, capfd):
    model = toy()
    model.runs = False
    train(tmp_path, model, dict(HOOK, interval=STEPS))
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert f'the LaViT did not run in iteration {STEPS}' in log
    assert not events(tmp_path).images


def test_is_registered():
    assert HOOKS.get('AttentionVisualizationHook') is AttentionVisualizationHook


@pytest.mark.slow
def test_importing_mmlavit_imports_no_matplotlib():
    code = "import sys, mmlavit; print('matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == 'False'


@pytest.mark.parametrize('name', ['interval', 'images'])
@pytest.mark.parametrize(
    ('value', 'error', 'match'),
    [
        (0, ValueError, 'must be at least 1, got 0'),
        (-3, ValueError, 'must be at least 1, got -3'),
        (2.0, TypeError, 'must be an integer, got 2.0'),
        (True, TypeError, 'must be an integer, got True'),
        ('5', TypeError, "must be an integer, got '5'"),
    ],
)
def test_refuses_arguments_that_are_wrong(name, value, error, match):
    with pytest.raises(error, match=f'{name} {match}'):
        AttentionVisualizationHook(**{name: value})


def test_refuses_a_model_that_it_cannot_look_into(monkeypatch):
    hook = AttentionVisualizationHook()
    with pytest.raises(ValueError, match='needs a model with a LaViT backbone; Toy has none'):
        hook.before_train(SimpleNamespace(model=Toy(nn.Identity())))

    class Spread(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    monkeypatch.setitem(MODEL_WRAPPERS.module_dict, 'Spread', Spread)
    with pytest.raises(ValueError, match='Spread cannot do, as its weights are spread over all'):
        hook.before_train(SimpleNamespace(model=Spread(toy())))


def test_says_what_to_install_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match='pip install matplotlib'):
        AttentionVisualizationHook().before_train(SimpleNamespace(model=toy()))


# ---- Distributed ---------------------------------------------------------------------------------


def train_in_one_of_two(rank: int, folder: Path) -> None:
    """Train with the hook and without; leave both weights in a file."""
    settings = dict(
        launcher='pytorch',
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=samples(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
    )
    found = []
    for name, hooks in (('with', [HOOK]), ('without', [])):
        # MMEngine's runner would wrap it for a GPU.
        runner = train(folder / name, MMDistributedDataParallel(toy()), *hooks, **settings)
        found.append(runner.model.module.state_dict())
    torch.save(found, folder / f'{rank}.pth')


@pytest.mark.slow
def test_the_main_process_alone_looks_in_distributed_training(tmp_path):
    in_two_processes(train_in_one_of_two, tmp_path)
    for rank in range(2):
        with_hook, without = torch.load(tmp_path / f'{rank}.pth')
        for name, value in without.items():
            assert torch.equal(with_hook[name], value), name
    found = events(tmp_path / 'with')
    assert list(found.images['attention_curves']) == [3, 6]
    assert not events(tmp_path / 'without').images
