"""AttentionHealthHook in real trainings: what it says, when, and that it changes nothing."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from processes import in_two_processes
from small import images, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmlavit import AttentionHealthHook, LaViT
from mmlavit.engine.hooks.attention_health import figures
from mmlavit.models.attention import VanillaAttention, WindowAttention
from mmlavit.models.windows import WindowGrid
from mmlavit.ops.scores import zero_padded_pairs

ARCH = dict(
    embed_dims=(16, 16, 16, 16),
    num_heads=(1, 2, 2, 1),
    depths=(2, 3, 2, 2),
    vanilla_depths=(1, 2, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
)
WINDOWS = (4, 4, 4, 2)
HEIGHT, WIDTH = 40, 24  # Grids 10 x 6, 5 x 3, 3 x 2, 2 x 1: padded in every stage.
STEPS = 12
BATCH = 2
FIRST_LOOK = 2  # As a tenth of the training is 1.2 iterations.
HOOK = dict(type='AttentionHealthHook', interval=1)

pytestmark = pytest.mark.usefixtures('own_scope')


# ---- Models whose attention is as one wants it ---------------------------------------------------


@torch.no_grad()
def make(backbone: LaViT, stage: int, state: str) -> None:
    """Give a stage, from 1, attention that is ``'even'``, to each token ``'itself'``, or alive.

    Less attention then hands on what the vanilla layers compute, as at the start.
    """
    generator = torch.Generator().manual_seed(stage)
    stage = backbone.stages[stage - 1]
    if stage.attention_residual is not None:
        stage.attention_residual.layer_scale.zero_()
    for attn in stage.modules():
        if isinstance(attn, VanillaAttention):
            attn.qkv.bias.zero_()
            dims = attn.qkv.in_features
            q, k = attn.qkv.weight[:dims], attn.qkv.weight[dims : 2 * dims]
            if state == 'even':
                attn.qkv.weight[: 2 * dims].zero_()
            elif state == 'itself':
                # With a single head: normalized tokens are all of one length, so each is most like
                # itself.
                for weight in (q, k):
                    weight.copy_(30 * torch.eye(dims))
            else:
                assert state == 'alive'
                for weight in (q, k):
                    weight.copy_(0.7 * torch.randn(weight.shape, generator=generator))


def lavit(*states: str, **options: object) -> LaViT:
    torch.manual_seed(0)
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1)
    backbone = LaViT(ARCH, window_sizes=WINDOWS, **{**rates, 'out_indices': (3,), **options})
    for stage, state in enumerate(states, start=1):
        make(backbone, stage, state)
    return backbone


def pass_alive(backbone: LaViT, inputs: Tensor) -> Tensor:
    """The last map of the backbone with weights whose attention is alive."""
    weights = lavit(*['alive'] * 4).state_dict()
    return torch.func.functional_call(backbone, weights, (inputs,))[-1]


class Toy(BaseModel):
    """A backbone and a linear head, or anything else that ``forward`` is changed to."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
        logits = self.head(self.maps(inputs).float().mean(dim=(2, 3)))
        return dict(loss_cls=F.cross_entropy(logits, labels)) if mode == 'loss' else logits

    def maps(self, inputs: Tensor) -> Tensor:
        return self.backbone(inputs)[-1]


class Autocast(Toy):
    """As MMEngine's AmpOptimWrapper does it, which wants a GPU."""

    def maps(self, inputs: Tensor) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):
            return super().maps(inputs)


class Twice(Toy):
    """A second pass, with other weights, in which attention is alive."""

    def maps(self, inputs: Tensor) -> Tensor:
        return super().maps(inputs) + pass_alive(self.backbone, inputs)


class WithTeacher(Toy):
    """A second LaViT, in evaluation or not."""

    def __init__(self, backbone: nn.Module, teacher: nn.Module, trains: bool) -> None:
        super().__init__(backbone)
        self.teacher, self.trains = teacher, trains

    def maps(self, inputs: Tensor) -> Tensor:
        return self.teacher.train(self.trains)(inputs)[-1] + super().maps(inputs)


class Absent(Toy):
    """Its backbone takes no part."""

    def maps(self, inputs: Tensor) -> Tensor:
        return inputs.new_ones(len(inputs), 16, 1, 1)


# ---- Trainings -----------------------------------------------------------------------------------


class Heard(logging.Handler):
    """What a logger is given by the hook, with the iteration (from 0)."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner, self.lines = runner, {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if 'AttentionHealthHook' in text:
            assert record.levelno == logging.WARNING and '\n' not in text
            self.lines.setdefault(self.runner.iter, []).append(text)


class Steer(Hook):
    """Does something before chosen iterations, after the hook has begun to listen."""

    priority = 'LOWEST'

    def __init__(self, steps: Mapping[int, Callable[[nn.Module], None]]) -> None:
        self.steps = steps
        self.rates: list[float] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        self.rates += runner.optim_wrapper.get_lr()['lr']
        self.steps.get(runner.iter, lambda model: None)(runner.model)


def samples(count: int = 2 * BATCH) -> list[dict]:
    return [
        dict(inputs=x, labels=torch.tensor(i % 3))
        for i, x in enumerate(images(count, 3, HEIGHT, WIDTH).float())
    ]


def train(folder: Path, model: nn.Module, *hooks: Hook | dict, **options: object) -> Heard:
    """A training with the hook; what it said, by iteration."""
    settings = dict(
        # Enough for the longest: MMEngine waits two seconds before it starts data again.
        train_dataloader=DataLoader(20 * samples(), batch_size=BATCH),
        train_cfg=dict(by_epoch=False, max_iters=STEPS),
        # So little that attention stays as it was made.
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-5)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=list(hooks or [HOOK]),
        randomness=dict(seed=3),
        log_level='WARNING',
        experiment_name=folder.name,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Which looks for compilers and imports torchvision, for the log, and takes longest of all.
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        runner = Runner(model=model, work_dir=str(folder), **{**settings, **options})
    heard = Heard(runner)
    runner.logger.addHandler(heard)
    runner.train()
    return heard


def the_line(heard: Heard) -> tuple[int, str]:
    """Of all that was said the only line, and its iteration."""
    ((iteration, lines),) = heard.lines.items()
    (line,) = lines
    return iteration, line


EVEN = ('alive', 'even', 'alive', 'alive')
SAYS_EVEN = r'stage 2 of backbone has gone even\b.*\b(0\.999\d|1\.0000)\b'
ITSELF = ('alive', 'alive', 'alive', 'itself')
SAYS_ITSELF = r'stage 4 of backbone has gone onto the token itself alone\b.*\b(0\.999\d|1\.0000)\b'
DEAD = [(EVEN, SAYS_EVEN), (ITSELF, SAYS_ITSELF)]


@pytest.mark.parametrize('states, says', DEAD, ids=['even', 'itself'])
def test_says_once_which_stage_has_died(tmp_path, states, says):
    iteration, line = the_line(train(tmp_path, Toy(lavit(*states))))
    assert re.search(says, line)
    assert iteration == FIRST_LOOK + 2, 'the third look'


def test_says_it_of_each_stage_and_of_each_way_to_die(tmp_path):
    model = Toy(lavit('even', 'even', 'alive', 'itself'))
    steer = Steer({7: lambda model: make(model.backbone, 1, 'itself')})
    heard = train(tmp_path, model, HOOK, steer)
    found = {
        iteration: [
            re.search(r'stage (\d) of backbone has gone (\w+)', line).groups() for line in lines
        ]
        for iteration, lines in heard.lines.items()
    }
    assert found == {
        4: [('1', 'even'), ('2', 'even'), ('4', 'onto')],
        9: [('1', 'onto')],
    }


def test_is_silent_in_a_healthy_training(tmp_path):
    model = Toy(lavit(*['alive'] * 4))
    spreads = []
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.register_forward_hook(lambda m, args, out: spreads.append(out[1].std().item()))
    assert not train(tmp_path, model).lines
    assert len(spreads) == STEPS * sum(ARCH['depths']) and min(spreads) > 0.5


def test_is_silent_where_attention_wakes_or_dies_for_a_moment(tmp_path):
    """Two looks find it even, then it is alive, and so on."""
    states = {0: 'even', 4: 'alive', 5: 'even', 7: 'alive', 8: 'even', 10: 'alive', 11: 'even'}
    steer = Steer({i: lambda m, s=state: make(m.backbone, 2, s) for i, state in states.items()})
    assert not train(tmp_path, Toy(lavit(*EVEN)), HOOK, steer).lines


def test_does_not_say_again_what_it_has_said(tmp_path):
    steer = Steer({
        5: lambda model: make(model.backbone, 2, 'alive'),
        6: lambda model: make(model.backbone, 2, 'even'),
    })  # fmt: skip
    iteration, _ = the_line(train(tmp_path, Toy(lavit(*EVEN)), HOOK, steer))
    assert iteration == 4


def test_says_it_again_in_another_training(tmp_path):
    hook = AttentionHealthHook(interval=1)
    for name in ('first', 'second'):
        the_line(train(tmp_path / name, Toy(lavit(*EVEN)), hook))


def test_looks_at_its_interval(tmp_path):
    """In the iterations 3, 6, 9, ... counted from 1: the first of them only notes the rate."""
    hook = dict(HOOK, interval=3)
    cfg = dict(by_epoch=False, max_iters=20)
    iteration, _ = the_line(train(tmp_path, Toy(lavit(*EVEN)), hook, train_cfg=cfg))
    assert iteration + 1 == 3 * 4


def test_waits_for_a_tenth_of_the_training(tmp_path):
    cfg = dict(by_epoch=False, max_iters=40)
    iteration, _ = the_line(train(tmp_path, Toy(lavit(*EVEN)), train_cfg=cfg))
    assert iteration == 40 // 10 + 2


def test_waits_for_the_learning_rate_to_stop_rising(tmp_path):
    steer = Steer({})
    scheduler = dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=7)
    heard = train(tmp_path, Toy(lavit(*EVEN)), HOOK, steer, param_scheduler=scheduler)
    iteration, _ = the_line(heard)
    steady = [i for i in range(2, STEPS) if steer.rates[i] <= steer.rates[i - 1]]
    assert iteration == steady[2] > 7


def test_a_falling_learning_rate_does_not_keep_it(tmp_path):
    scheduler = dict(type='CosineAnnealingLR', by_epoch=False, T_max=STEPS)
    iteration, _ = the_line(train(tmp_path, Toy(lavit(*EVEN)), param_scheduler=scheduler))
    assert iteration == FIRST_LOOK + 2


# ---- The figure ----------------------------------------------------------------------------------


def naive_figures(scores: Tensor, grid: WindowGrid) -> tuple[float, float]:
    """Entropy and diagonality, row by row: of real queries that see more than one key."""
    evenness, itself = [], []
    for window, maps in enumerate(scores.tolist()):
        row, col = divmod(window % (grid.rows * grid.cols), grid.cols)
        tokens = [
            y * grid.window + x
            for y in range(grid.window)
            for x in range(grid.window)
            if row * grid.window + y < grid.height and col * grid.window + x < grid.width
        ]
        k = len(tokens)
        if k == 1:
            continue
        for head in maps:
            rows = []
            for i in tokens:
                weights = [math.exp(head[i][j]) for j in tokens]
                rows.append({j: w / sum(weights) for j, w in zip(tokens, weights, strict=True)})
            bits = [-sum(p * math.log(p) for p in row.values() if p) for row in rows]
            own = [row[i] for i, row in zip(tokens, rows, strict=True)]
            evenness.append(sum(bits) / k / math.log(k))
            itself.append(sum((p - 1 / k) / (1 - 1 / k) for p in own) / k)
    return sum(evenness) / len(evenness), sum(itself) / len(itself)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('size', [(4, 4), (5, 7), (3, 2), (1, 2), (9, 8)])
def test_the_figures_are_those_of_a_loop_over_rows(size, dtype):
    grid = WindowGrid(*size, 4)
    shape = 2 * grid.rows * grid.cols, 2, 16, 16
    scores = 2 * torch.randn(shape, generator=seeded(4), dtype=torch.float64)
    scores = scores.to(dtype)
    expected = torch.tensor(naive_figures(scores, grid))
    torch.testing.assert_close(figures(scores, grid), expected, rtol=1e-5, atol=1e-6)
    # Padded pairs hold 0 in a model, which is much to scores that are far below it.
    low = figures(zero_padded_pairs(scores.float() - 200, grid), grid)
    torch.testing.assert_close(low, expected, rtol=1e-4, atol=1e-4)


def test_windows_of_a_single_token_have_no_figure():
    scores = torch.randn(3, 2, 16, 16, generator=seeded(5))
    assert figures(scores, WindowGrid(1, 1, 4)).isnan().all()
    # Nor do they count beside others.
    grid = WindowGrid(5, 5, 4)
    scores = torch.randn(4, 2, 16, 16, generator=seeded(6))
    expected = torch.tensor(naive_figures(scores, grid))
    torch.testing.assert_close(figures(scores, grid), expected, rtol=1e-5, atol=1e-6)


def test_of_many_windows_it_takes_some_from_everywhere():
    """A third of them is alive, wherever it lies."""
    for start in (0, 200, 400):
        scores = torch.zeros(600, 1, 16, 16)
        scores[start : start + 200] = 50 * torch.eye(16)
        entropy, diagonality = figures(scores, WindowGrid(4, 4, 4)).tolist()
        assert entropy == pytest.approx(2 / 3, abs=0.05)
        assert diagonality == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize('scale', [0.075, 0.12])
def test_the_figure_in_the_log_is_the_mean_over_the_layers_of_that_pass(tmp_path, scale):
    """One is even, the others are nearly so; the second time a little less than is said."""
    model = Toy(lavit(*['alive'] * 4))
    stage, layers = model.backbone.stages[1], []
    for block, factor in zip(stage.blocks[:2], (0, scale), strict=True):
        block.attn.qkv.weight.data[:32] *= factor
    for block in stage.blocks:
        block.attn.register_forward_hook(
            lambda layer, args, output: layers.append((output[1].detach(), args[1]))
        )
    heard = train(tmp_path, model)
    look = FIRST_LOOK + 2
    expected = sum(naive_figures(*layer)[0] for layer in layers[3 * look : 3 * look + 3]) / 3
    if scale == 0.12:
        assert 0.995 < expected < 0.999
        assert not heard.lines
        return
    assert 0.999 < expected < 0.9999
    iteration, line = the_line(heard)
    (figure,) = re.findall(r'\d\.\d{4}', line)
    assert iteration == look and float(figure) == pytest.approx(expected, abs=6e-5)


# ---- Whatever surrounds it -----------------------------------------------------------------------


def run_in_evaluation(model: Toy) -> None:
    """As a hook of somebody else may, before the training's own pass."""
    model.eval()
    with torch.no_grad():
        pass_alive(model.backbone, torch.ones(2, 3, HEIGHT, WIDTH))
    model.train()


CASES = {
    'with_cp': (Toy, dict(with_cp=True), {}),
    'bfloat16': (Autocast, {}, {}),
    'bfloat16, with_cp': (Autocast, dict(with_cp=True), {}),
    'accumulation': (
        Toy,
        {},
        dict(
            optim_wrapper=dict(
                type='OptimWrapper', accumulative_counts=2, optimizer=dict(type='SGD', lr=1e-5)
            )
        ),
    ),
    'frozen': (Toy, dict(frozen_stages=4), {}),
    'a second pass': (Twice, {}, {}),
    'checkpointing by MMEngine': (Toy, {}, dict(cfg=dict(activation_checkpointing=['backbone']))),
}


ignore_torch = pytest.mark.filterwarnings('ignore:.*use_reentrant', 'ignore:None of the inputs')


@ignore_torch
@pytest.mark.parametrize('states, says', DEAD, ids=['even', 'itself'])
@pytest.mark.parametrize('case', CASES)
def test_says_the_same_however_it_is_trained(tmp_path, case, states, says):
    kind, backbone, options = CASES[case]
    heard = train(tmp_path, kind(lavit(*states, **backbone)), **options)
    iteration, line = the_line(heard)
    assert iteration == FIRST_LOOK + 2
    assert re.search(says, line)


@ignore_torch
def test_is_silent_however_a_healthy_model_is_trained(tmp_path):
    for case, (kind, backbone, options) in CASES.items():
        heard = train(tmp_path / case, kind(lavit(*['alive'] * 4, **backbone)), **options)
        assert not heard.lines, case


def test_looks_at_the_pass_in_training_mode(tmp_path):
    steer = Steer(dict.fromkeys(range(STEPS), run_in_evaluation))
    _, line = the_line(train(tmp_path, Toy(lavit(*EVEN)), HOOK, steer))
    assert re.search(SAYS_EVEN, line)


@pytest.mark.parametrize('trains', [True, False])
def test_names_the_one_of_two_models_and_leaves_out_one_that_does_not_train(tmp_path, trains):
    model = WithTeacher(lavit(*EVEN), lavit('even', 'alive', 'alive', 'alive'), trains)
    heard = train(tmp_path, model)
    places = [
        re.search(r'stage \d of \w+', line)[0] for lines in heard.lines.values() for line in lines
    ]
    assert sorted(places) == ['stage 1 of teacher'] * trains + ['stage 2 of backbone']


def test_says_once_that_there_was_nothing_to_hear(tmp_path):
    iteration, line = the_line(train(tmp_path, Absent(lavit(*EVEN))))
    assert f'no attention in iteration {FIRST_LOOK + 1}' in line
    assert iteration == FIRST_LOOK


def random_states() -> list:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


@pytest.mark.parametrize('options', [{}, dict(with_cp=True)], ids=str)
def test_training_is_the_same_bit_by_bit_with_and_without(tmp_path, options):
    found = []
    for name, hooks in (('with', [HOOK]), ('without', [Steer({})])):
        model = Toy(lavit(*EVEN, **options))
        sgd = dict(optimizer=dict(type='SGD', lr=1e-2))
        heard = train(tmp_path / name, model, *hooks, optim_wrapper=sgd)
        assert bool(heard.lines) == (name == 'with')
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        found.append((model.state_dict(), random_states()))
    (weights, states), (others, other_states) = found
    assert states == other_states
    start = Toy(lavit(*EVEN)).state_dict()
    assert any(not torch.equal(start[name], value) for name, value in weights.items())
    for name, value in weights.items():
        assert torch.equal(others[name], value), name


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
def test_refuses_an_interval_that_is_none(value, error, match):
    with pytest.raises(error, match=f'interval {match}'):
        AttentionHealthHook(interval=value)


def test_refuses_a_model_without_a_lavit():
    with pytest.raises(ValueError, match='needs a model with a LaViT backbone; Toy has none'):
        AttentionHealthHook().before_train(SimpleNamespace(model=Toy(nn.Identity())))


# ---- Distributed ---------------------------------------------------------------------------------


def train_in_one_of_two(rank: int, folder: Path) -> None:
    """Train with the hook and without; leave what it said and both weights in a file."""
    settings = dict(
        launcher='pytorch',
        train_dataloader=dict(
            batch_size=BATCH,
            num_workers=0,
            dataset=2 * STEPS * samples(BATCH),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
    )
    found = []
    for name, hook in (('with', HOOK), ('without', Steer({}))):
        # MMEngine's runner would wrap it for a GPU.
        model = MMDistributedDataParallel(Toy(lavit(*EVEN)))
        heard = train(folder / name, model, hook, **settings)
        found.append((heard.lines, model.module.state_dict()))
    torch.save(found, folder / f'{rank}.pth')


@pytest.mark.slow
def test_the_main_process_alone_speaks_in_distributed_training(tmp_path):
    in_two_processes(train_in_one_of_two, tmp_path)
    for rank in range(2):
        (lines, weights), (_, others) = torch.load(tmp_path / f'{rank}.pth')
        if rank == 0:
            ((iteration, (line,)),) = lines.items()
            assert iteration == FIRST_LOOK + 2
            assert re.search(SAYS_EVEN, line)
        else:
            assert not lines
        for name, value in others.items():
            assert torch.equal(weights[name], value), name
