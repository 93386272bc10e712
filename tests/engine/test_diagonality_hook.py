"""DiagonalityLossHook in real models, real runs, and everything that may surround them."""

import copy
import gc
import json
import pickle
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from mmengine import Config
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from mmengine.model import (
    BaseModel,
    MMDistributedDataParallel,
    MMSeparateDistributedDataParallel,
)
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from processes import in_two_processes
from small import ARCH as SMALL
from small import images, small_lavit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmlavit import DiagonalityLossHook, diagonality_preserving_loss
from mmlavit.models.attention import LessAttention

# Less-attention layers per stage: 1, 2, 1, 1.
ARCH = {**SMALL, 'depths': (2, 3, 2, 2), 'vanilla_depths': (1, 1, 1, 1)}
WINDOWS = (4, 4, 2, 2)
HEIGHT, WIDTH = 20, 12  # Grids 5 x 3, 3 x 2, 2 x 1: padded in every stage.
ALL_VANILLA = {**ARCH, 'vanilla_depths': ARCH['depths']}

pytestmark = pytest.mark.usefixtures('own_scope')


class Toy(BaseModel):
    """A backbone, mean pooling and a linear head, with a place to go wrong in."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(ARCH['embed_dims'][2], 3)
        self.broken = False

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
        logits = self.head(self.backbone(inputs)[-1].mean(dim=(2, 3)))
        if self.broken:
            raise ZeroDivisionError
        if mode == 'loss':
            return dict(loss_cls=F.cross_entropy(logits, labels))
        return dict(logits=logits) if mode == 'tensor' else list(logits)


class Correct(BaseMetric):
    """Needs no labels: how many predictions there were."""

    def process(self, data_batch: object, data_samples: list) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list) -> dict:
        return dict(count=len(results))


def toy(**options: object) -> Toy:
    backbone = small_lavit(
        **{'arch': ARCH, 'window_sizes': WINDOWS, 'out_indices': (2,), **options}
    )
    torch.manual_seed(0)
    return Toy(backbone).double().train()


def batch_of(count: int = 2, seed: int = 1) -> dict:
    return dict(inputs=images(count, 3, HEIGHT, WIDTH, seed=seed), labels=torch.arange(count) % 3)


def samples(count: int) -> list[dict]:
    batch = batch_of(count)
    return [dict(inputs=x, labels=y) for x, y in zip(*batch.values(), strict=True)]


@contextmanager
def watched(model: nn.Module, **options: float) -> Iterator[nn.Module]:
    """Between the hook's two ends of training."""
    hook = DiagonalityLossHook(**options)
    runner = SimpleNamespace(model=model)
    hook.before_train(runner)
    yield model
    hook.after_train(runner)


def losses_of(model: nn.Module, batch: dict, **options: float) -> dict:
    with watched(model, **options):
        return model(**batch, mode='loss')


def gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(weights[name]) if gradient is None else gradient
        for name, gradient in zip(weights, found, strict=True)
    }


def real_pairs(scores: Tensor, win: tuple, height: int, width: int, window: int) -> Tensor:
    """A window's maps (heads, n, n), real tokens only, as a whole window."""
    tokens = reference.real_tokens(win, height, width, window)
    places = [reference.place(token, window) for token in tokens]
    return scores[:, places][:, :, places][None]


def naive_loss_dp(model: Toy, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loss of each less-attention layer by the naive model, which shares no code with ours.

    Returns the losses by the name of the layer, and the weights (leaves) that they hang on.
    """
    weights = {
        name: tensor.clone().requires_grad_()
        for name, tensor in model.backbone.state_dict().items()
    }
    names = {id(weight): name.removesuffix('.psi') for name, weight in weights.items()}
    losses = defaultdict(list)
    less_attention = reference.less_attention

    def recorded(x: Tensor, prev: dict, own: dict, num_heads: int, window: int) -> tuple:
        z, scores = less_attention(x, prev, own, num_heads, window)
        for win in reference.windows_of(*x.shape[:2], window):
            heads = torch.stack([scores[win, head] for head in range(num_heads)])
            cut_out = real_pairs(heads, win, *x.shape[:2], window)
            losses[names[id(own['psi'])]].append(diagonality_preserving_loss(cut_out))
        return z, scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, 'less_attention', recorded)
        reference.lavit(inputs, weights, ARCH['num_heads'], model.backbone.window_sizes)
    return {name: torch.stack(parts).mean() for name, parts in losses.items()}, weights


def naive_gradients(model: Toy, inputs: Tensor) -> dict[str, Tensor]:
    """Of the naive model's ``loss_dp``; 0 for the head."""
    losses, weights = naive_loss_dp(model, inputs)
    found = gradients(sum(losses.values()) / len(losses), weights)
    return {
        name: found.get(name.removeprefix('backbone.'), torch.zeros_like(weight))
        for name, weight in model.named_parameters()
    }


def expected_gradients(model: Toy, batch: dict, loss_weight: float) -> dict[str, Tensor]:
    """Of the task loss without the hook, plus ``loss_weight`` times the naive model's."""
    loss = model(**batch, mode='loss')['loss_cls']
    task = gradients(loss, dict(model.named_parameters()))
    naive = naive_gradients(model, batch['inputs'])
    return {name: task[name] + loss_weight * naive[name] for name in task}


class Scores:
    """Our own ear at the layers: what the hook should have heard."""

    def __init__(self, model: nn.Module) -> None:
        self.heard = []
        for module in model.modules():
            if isinstance(module, LessAttention):
                module.register_forward_hook(self)

    def __call__(self, layer: nn.Module, args: tuple, output: tuple) -> None:
        self.heard.append((output[1].detach(), args[1]))

    def loss_dp(self) -> Tensor:
        losses = []
        for scores, grid in self.heard:
            size = (grid.height, grid.width, grid.window)
            windows = list(reference.windows_of(*size))
            windows *= len(scores) // len(windows)
            cut_out = [
                real_pairs(one, win, *size) for one, win in zip(scores, windows, strict=True)
            ]
            losses.append(torch.stack([diagonality_preserving_loss(one) for one in cut_out]).mean())
        return torch.stack(losses).mean()


def hooks_on(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def stray_tensors(model: nn.Module) -> list[str]:
    """Tensors in attributes of modules, beside their registered parameters and buffers."""

    def holds(value: object) -> bool:
        if isinstance(value, Mapping):
            return any(map(holds, value.values()))
        if isinstance(value, (list, tuple, set)):
            return any(map(holds, value))
        return isinstance(value, Tensor)

    registered = {'_parameters', '_buffers', '_modules'}
    return [
        f'{name}.{attribute}'
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in registered and holds(value)
    ]


def make_runner(folder: Path, model: nn.Module, **options: object) -> Runner:
    """A quiet runner that logs every iteration to scalars.json."""
    settings = dict(
        train_dataloader=DataLoader(samples(4), batch_size=2),
        train_cfg=dict(by_epoch=False, max_iters=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-2)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=None),
        custom_hooks=[dict(type='DiagonalityLossHook')],
        log_processor=dict(window_size=1, by_epoch=False),
        log_level='WARNING',
        experiment_name=folder.name,
    )
    return Runner(model=model, work_dir=str(folder), **{**settings, **options})


def scalars(folder: Path) -> list[dict]:
    (file,) = folder.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- What it adds --------------------------------------------------------------------------------


def test_is_the_mean_over_the_layers_of_the_naive_model():
    model, batch = toy(), batch_of()
    losses = losses_of(model, batch)
    by_layer, _ = naive_loss_dp(model, batch['inputs'])
    assert len(by_layer) == 1 + 2 + 1
    expected = sum(by_layer.values()) / len(by_layer)
    assert losses['loss_dp'].shape == ()
    torch.testing.assert_close(losses['loss_dp'], expected, rtol=1e-9, atol=0)
    assert list(losses) == ['loss_cls', 'loss_dp']
    assert losses['loss_cls'] == model(**batch, mode='loss')['loss_cls']


def test_weight_is_the_factor_of_its_gradients():
    model, batch = toy(), batch_of()
    names = dict(model.named_parameters())
    task = gradients(model(**batch, mode='loss')['loss_cls'], names)
    naive = naive_gradients(model, batch['inputs'])
    for loss_weight in (0.5, 3.0):
        loss, log_vars = model.parse_losses(losses_of(model, batch, loss_weight=loss_weight))
        torch.testing.assert_close(log_vars['loss'], log_vars['loss_cls'] + log_vars['loss_dp'])
        for name, got in gradients(loss, names).items():
            expected = task[name] + loss_weight * naive[name]
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12, msg=name)


def test_a_weight_of_0_switches_it_off(tmp_path):
    model = toy(arch={**ARCH, 'vanilla_depths': ARCH['depths']})
    hook = dict(type='DiagonalityLossHook', loss_weight=0.0)
    # A model without a less-attention layer is none of its business then.
    make_runner(tmp_path / 'off', model, custom_hooks=[hook]).train()
    assert not any('loss_dp' in line for line in scalars(tmp_path / 'off'))
    assert hooks_on(model) == 0


def test_defaults_to_the_weight_of_the_paper():
    model, batch = toy(), batch_of()
    assert losses_of(model, batch)['loss_dp'] == losses_of(model, batch, loss_weight=1)['loss_dp']


@pytest.mark.parametrize('frozen_stages', [0, 1, 2])
def test_frozen_stages_do_not_count(frozen_stages):
    model, batch = toy(frozen_stages=frozen_stages), batch_of()
    losses = losses_of(model, batch)
    by_layer, _ = naive_loss_dp(model, batch['inputs'])
    counted = [v for k, v in by_layer.items() if int(k.split('.')[1]) >= frozen_stages]
    expected = sum(counted) / len(counted)
    torch.testing.assert_close(losses['loss_dp'], expected, rtol=1e-9, atol=0)
    losses['loss_dp'].backward()
    for name, weight in model.backbone.named_parameters():
        assert weight.requires_grad or weight.grad is None, name


def test_a_frozen_teacher_does_not_count():
    """The same architecture in the same model, as mmdet's semi-supervised detectors hold it."""

    class Distilled(Toy):
        def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
            self.teacher(inputs)
            return super().forward(inputs, labels, mode)

    model, batch = toy(), batch_of()
    expected = losses_of(model, batch)['loss_dp']
    model.__class__ = Distilled
    model.teacher = small_lavit(window_sizes=WINDOWS, seed=5).train().requires_grad_(False)
    assert losses_of(model, batch)['loss_dp'] == expected


def test_a_pass_without_gradients_does_not_count():
    class LabelsItself(Toy):
        def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
            with torch.no_grad():
                super().forward(inputs.flip(-1), labels)
            return super().forward(inputs, labels, mode)

    model, batch = toy(), batch_of()
    expected = losses_of(model, batch)['loss_dp']
    model.__class__ = LabelsItself
    assert losses_of(model, batch)['loss_dp'] == expected


def test_a_model_may_call_itself():
    class CallsItself(Toy):
        def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
            if mode != 'loss':
                return super().forward(inputs, labels, mode)
            logits = self(inputs, labels, mode='tensor')['logits']
            return dict(loss_cls=F.cross_entropy(logits, labels))

    model, batch = toy(), batch_of()
    expected = losses_of(model, batch)
    model.__class__ = CallsItself
    assert losses_of(model, batch) == expected


def test_two_runs_of_the_backbone_in_one_step_are_averaged():
    class TwoViews(Toy):
        def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
            super().forward(inputs.flip(-1), labels, mode)
            return super().forward(inputs, labels, mode)

    model, batch = toy(), batch_of()
    once = losses_of(model, batch)['loss_dp']
    flipped = losses_of(model, {**batch, 'inputs': batch['inputs'].flip(-1)})['loss_dp']
    model.__class__ = TwoViews
    torch.testing.assert_close(losses_of(model, batch)['loss_dp'], (once + flipped) / 2)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('mode', ['loss', 'predict', 'tensor'])
def test_only_in_the_loss_of_training(training, mode):
    model, batch = toy().train(training), batch_of()
    plain = model(**batch, mode=mode)
    with watched(model):
        output = model(**batch, mode=mode)
    assert type(output) is type(plain)
    if mode == 'predict':
        assert all(map(torch.equal, output, plain))
    else:
        added = {'loss_dp'} if training and mode == 'loss' else set()
        assert set(output) - set(plain) == added
        assert all(torch.equal(output[name], plain[name]) for name in plain)


# ---- A real run ----------------------------------------------------------------------------------


def test_logged_by_a_real_run(tmp_path):
    """With validation between the iterations, on a moving average of the model."""
    model = toy()
    by_layer, _ = naive_loss_dp(model, batch_of(4)['inputs'][:2])
    make_runner(
        tmp_path,
        model,
        train_cfg=dict(by_epoch=False, max_iters=2, val_interval=1),
        val_cfg=dict(),
        val_dataloader=DataLoader(samples(3), batch_size=2),
        val_evaluator=[Correct()],
        custom_hooks=[dict(type='DiagonalityLossHook', loss_weight=0.5), dict(type='EMAHook')],
    ).train()
    logged = scalars(tmp_path)
    trained = [line for line in logged if 'loss' in line]
    validated = [line for line in logged if 'count' in line]
    assert len(trained) == 2 and [line['count'] for line in validated] == [3, 3]
    for line in trained:
        assert line['loss_dp'] > 0
        assert line['loss'] == pytest.approx(line['loss_cls'] + line['loss_dp'])
    assert trained[0]['loss_dp'] == pytest.approx(
        0.5 * (sum(by_layer.values()) / len(by_layer)).item()
    )
    assert not any('loss_dp' in line for line in validated)
    assert hooks_on(model) == 0
    assert stray_tensors(model) == []


def test_gradient_accumulation(tmp_path):
    model = toy()
    before = copy.deepcopy(dict(model.named_parameters()))
    data = batch_of(4)
    steps = [
        expected_gradients(model, {k: v[part] for k, v in data.items()}, 2.0)
        for part in (slice(0, 2), slice(2, 4))
    ]
    make_runner(
        tmp_path,
        model,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0), accumulative_counts=2),
        custom_hooks=[dict(type='DiagonalityLossHook', loss_weight=2.0)],
    ).train()
    for name, weight in model.named_parameters():
        expected = before[name] - (steps[0][name] + steps[1][name]) / 2
        torch.testing.assert_close(weight, expected, rtol=1e-7, atol=1e-12, msg=name)


def test_mixed_precision(monkeypatch):
    """AmpOptimWrapper wants a GPU; its autocast works without."""
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True
    )
    model = toy().float().to(get_device())
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_of().items()}
    scores = Scores(model)
    optim_wrapper = AmpOptimWrapper(
        dtype='bfloat16', optimizer=torch.optim.SGD(model.parameters(), lr=1e-3)
    )
    in_float32 = losses_of(model, model.data_preprocessor(batch))['loss_dp']
    scores.heard.clear()
    with watched(model):
        log_vars = model.train_step(batch, optim_wrapper)
    assert {heard.dtype for heard, _ in scores.heard} == {torch.bfloat16}
    assert log_vars['loss_dp'].dtype == torch.float32
    torch.testing.assert_close(log_vars['loss_dp'], scores.loss_dp())
    torch.testing.assert_close(log_vars['loss_dp'], in_float32, rtol=0.05, atol=0)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_with_checkpointed_layers():
    batch = batch_of()
    plain, recomputed = toy(), toy(with_cp=True)
    results = []
    for model in (plain, recomputed):
        with watched(model):
            # The backward pass runs the layers again.
            loss, log_vars = model.parse_losses(model(**batch, mode='loss'))
            loss.backward()
        results.append((log_vars, {k: v.grad for k, v in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-14)


def train_one_of_two(rank: int, folder: Path) -> None:
    """One process of test_through_ddp."""
    runner = make_runner(
        folder,
        toy(),
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
        train_dataloader=dict(
            batch_size=2,
            dataset=samples(4),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
        custom_hooks=[dict(type='DiagonalityLossHook', loss_weight=2.0)],
    )
    runner.train()
    assert isinstance(runner.model, MMDistributedDataParallel)
    torch.save(runner.model.module.state_dict(), folder / f'{rank}.pth')


def test_through_ddp(tmp_path):
    """Two processes with two images each take the mean of their gradients."""
    in_two_processes(train_one_of_two, tmp_path)
    trained = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)

    model, data = toy(), batch_of(4)
    steps = [
        expected_gradients(model, {k: v[rank::2] for k, v in data.items()}, 2.0) for rank in (0, 1)
    ]
    for name, weight in model.named_parameters():
        expected = weight - (steps[0][name] + steps[1][name]) / 2
        torch.testing.assert_close(trained[0][name], expected, rtol=1e-7, atol=1e-12, msg=name)
    assert 'loss_dp' in scalars(tmp_path)[0]


def test_through_a_wrapper_of_parts(tmp_path):
    """One that trains the bare model, whose backbone is wrapped by itself."""
    model, batch = toy(), batch_of()
    expected = losses_of(model, batch)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        wrapped = MMSeparateDistributedDataParallel(model)
        optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
        with watched(wrapped):
            log_vars = wrapped.train_step(batch, optim_wrapper)
    finally:
        torch.distributed.destroy_process_group()
    for name, loss in expected.items():
        torch.testing.assert_close(log_vars[name], loss)


# ---- What it leaves behind -----------------------------------------------------------------------


def test_keeps_nothing_after_the_step():
    model = toy()
    alive = []
    for module in model.modules():
        if isinstance(module, LessAttention):
            module.register_forward_hook(lambda _, args, out: alive.append(weakref.ref(out[1])))
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    before = set(model.state_dict())
    with watched(model):
        model.train_step(batch_of(), optim_wrapper)
        gc.collect()
        assert len(alive) == 4 and not any(score() is not None for score in alive)
        assert stray_tensors(model) == []
        assert set(model.state_dict()) == before


def test_leaves_the_model_as_it_was():
    model = toy()
    hook, runner = DiagonalityLossHook(), SimpleNamespace(model=model)
    for _ in range(2):
        hook.before_train(runner)
        once = hooks_on(model)
    hook.before_train(runner)
    assert hooks_on(model) == once > 0, 'a second training must not watch twice'
    hook.after_train(runner)
    assert hooks_on(model) == 0
    assert 'loss_dp' not in model(**batch_of(), mode='loss')


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_made_during_training_stands_alone(duplicate):
    model, batch = toy(), batch_of()
    with watched(model):
        twin = duplicate(model)
        with torch.no_grad():
            for weight in twin.parameters():
                weight *= 1.5
        expected = model(**batch, mode='loss')
    losses = twin(**batch, mode='loss')
    assert losses['loss_dp'] != expected['loss_dp']
    assert losses_of(copy.deepcopy(model), batch) == expected
    by_layer, _ = naive_loss_dp(twin, batch['inputs'])
    torch.testing.assert_close(losses['loss_dp'], sum(by_layer.values()) / len(by_layer))


def test_an_exception_does_not_spoil_the_next_step():
    model, batch = toy(), batch_of()
    expected = losses_of(model, batch)
    with watched(model):
        model.broken = True
        with pytest.raises(ZeroDivisionError):
            model(**batch_of(seed=9), mode='loss')
        model.broken = False
        assert model(**batch, mode='loss') == expected


# ---- Errors --------------------------------------------------------------------------------------


class NoBackbone(Toy):
    """Computes its loss from the head alone."""

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
        return dict(loss=self.head.weight.sum())


@pytest.mark.parametrize(
    'model, message',
    [
        (lambda: Toy(nn.Conv2d(3, 64, 3)), 'LaViT backbone; Toy has none'),
        (lambda: toy(arch=ALL_VANILLA), 'no less-attention layer.*vanilla_depths'),
        (lambda: toy(frozen_stages=3), 'less-attention layer.*frozen.*frozen_stages'),
    ],
)
def test_refuses_a_model_that_it_cannot_help(tmp_path, model, message):
    model = model()
    with pytest.raises(ValueError, match=f'DiagonalityLossHook.*{message}'):
        make_runner(tmp_path, model).train()
    assert hooks_on(model) == 0


def test_says_when_the_backbone_took_no_part():
    model = toy()
    model.__class__ = NoBackbone
    with pytest.raises(RuntimeError, match='NoBackbone .* without running a less-attention layer'):
        losses_of(model, batch_of())


@pytest.mark.parametrize(
    'began, said',
    [('now', False), ('now, switched off', False), ('before', True), ('without the loss', False)],
)
@pytest.mark.parametrize('resume', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_training_that_began_under_the_earlier_loss_goes_on(tmp_path, began, said, resume):
    options = dict(default_hooks=dict(logger=None, checkpoint=dict(type='CheckpointHook')))
    config = "custom_hooks = [dict(type='DiagonalityLossHook')]"
    weight = 0.0 if began == 'now, switched off' else 1.0
    hook = dict(type='DiagonalityLossHook', loss_weight=weight)
    make_runner(tmp_path / 'first', toy(), custom_hooks=[hook], **options).train()
    (path,) = (tmp_path / 'first').glob('*.pth')
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta']['cfg'] = '' if began == 'without the loss' else config
    if not began.startswith('now'):
        # The loss of before left no mark.
        checkpoint['meta'] = {k: v for k, v in checkpoint['meta'].items() if 'diagonality' not in k}
    torch.save(checkpoint, path)
    options['train_cfg'] = dict(by_epoch=False, max_iters=4)
    runner = make_runner(tmp_path / 'second', toy(), load_from=str(path), resume=resume, **options)
    lines = []
    runner.logger.addFilter(lambda record: lines.append(record.getMessage()) or True)
    runner.train()
    assert runner.iter == 4
    about = [line for line in lines if 'DiagonalityLossHook' in line]
    assert len(about) == (said and resume), lines
    assert all('\n' not in line for line in about)


@pytest.mark.filterwarnings('ignore:.*use_reentrant', 'ignore:None of the inputs')
@pytest.mark.parametrize('modules', [['backbone.stages.1'], ['backbone']])
def test_refuses_what_hides_layers_from_it(tmp_path, modules):
    """MMEngine's activation checkpointing runs modules without gradients; with_cp does not."""
    cfg = dict(activation_checkpointing=modules)
    with pytest.raises(RuntimeError, match='DiagonalityLossHook.*with_cp'):
        make_runner(tmp_path, toy(), cfg=cfg).train()


# ---- The toolboxes -------------------------------------------------------------------------------

MODELS = {
    'mmdet': (
        'mask-rcnn_r50_fpn.py',
        dict(
            neck=dict(in_channels=list(ARCH['embed_dims']), out_channels=16),
            rpn_head=dict(in_channels=16, feat_channels=16),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=16),
                bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=3),
                mask_roi_extractor=dict(out_channels=16),
                mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=3),
            ),
        ),
    ),
    'mmseg': (
        'fpn_r50.py',
        dict(
            pretrained=None,
            data_preprocessor=dict(size=(64, 64)),
            neck=dict(in_channels=list(ARCH['embed_dims']), out_channels=16),
            decode_head=dict(
                in_channels=[16] * 4, channels=16, num_classes=3, norm_cfg=dict(type='BN')
            ),
        ),
    ),
    'mmpretrain': (
        'resnet18.py',
        dict(head=dict(in_channels=ARCH['embed_dims'][3], num_classes=3, topk=(1,))),
    ),
}


def build(toolbox: str) -> nn.Module:
    base, changes = MODELS[toolbox]
    # Not by 'mmseg::...', which MMEngine looks up under a name that onedl-mmsegmentation lacks.
    folder = Path(import_module(f'{toolbox}.models').__path__[0]).parent
    cfg = Config.fromfile(folder / '.mim/configs/_base_/models' / base)
    backbone = dict(_delete_=True, type='LaViT', arch=ARCH, window_sizes=(4, 4, 4, 4))
    cfg.merge_from_dict(dict(model=dict(backbone=backbone, **changes)))
    with DefaultScope.overwrite_default_scope(toolbox):
        return import_module(f'{toolbox}.registry').MODELS.build(cfg.model)


def toolbox_batch(toolbox: str) -> dict:
    if toolbox == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        shapes = [(3, 60, 50), (3, 40, 64)]
        return demo_mm_inputs(2, shapes, num_items=[2, 1], num_classes=3, with_mask=True)
    inputs = [torch.full((3, 50, 60), 100, dtype=torch.uint8) for _ in range(2)]
    inputs[0][:, 10:30, 20:40] = 200
    if toolbox == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return dict(
            inputs=torch.stack(inputs), data_samples=[DataSample().set_gt_label(k) for k in (0, 2)]
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = (torch.stack(inputs)[:, :1] > 150).long()
    meta = dict(img_shape=(50, 60), ori_shape=(50, 60))
    data_samples = [
        SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta) for label in labels
    ]
    return dict(inputs=inputs, data_samples=data_samples)


@pytest.mark.parametrize('toolbox', MODELS)
def test_one_step_of_a_real_model(toolbox):
    model = build(toolbox).train()
    scores = Scores(model)
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    psi = model.backbone.stages[0].blocks[1].attn.psi.detach().clone()
    returned = []
    parse_losses = model.parse_losses
    model.parse_losses = lambda losses: returned.append(parse_losses(losses)) or returned[0]
    with watched(model, loss_weight=3.0):
        log_vars = model.train_step(toolbox_batch(toolbox), optim_wrapper)
        expected = 3 * scores.loss_dp()
        assert model.eval().test_step(toolbox_batch(toolbox))
    torch.testing.assert_close(log_vars['loss_dp'], expected)
    assert returned[0][0] > log_vars['loss_dp'] > 0
    assert not torch.equal(model.backbone.stages[0].blocks[1].attn.psi, psi)
