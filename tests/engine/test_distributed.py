"""DDP and FSDP on two gloo processes against one process that sees the whole batch."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import FlexibleRunner
from processes import in_two_processes
from small import ARCH, images, small_lavit
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, LocalStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from mmlavit import DiagonalityLossHook, wrap_lavit_blocks
from mmlavit.engine.hooks import StepSeedHook

WORLD = 2
LOCAL_BATCH = 2
# Every stage pads, at an odd place.
HEIGHT, WIDTH = 72, 40
LEARNING_RATE = 0.1
STEPS = 2
FULL, LOCAL = StateDictType.FULL_STATE_DICT, StateDictType.LOCAL_STATE_DICT

needs_fsdp = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4),
    reason='FSDP of torch before 2.4 wants a GPU',
)


class Toy(BaseModel):
    """A LaViT and a linear head over the means of all its maps."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.backbone = small_lavit(**options).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            channels = sum(ARCH['embed_dims'][m] for m in self.backbone.out_indices)
            self.head = nn.Linear(channels, 3).double()

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> object:
        maps = self.backbone(inputs)
        logits = self.head(torch.cat([m.mean(dim=(2, 3)) for m in maps], dim=1))
        return dict(loss_cls=F.cross_entropy(logits, labels)) if mode == 'loss' else logits


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The whole batch of a step."""
    count = WORLD * LOCAL_BATCH
    x = images(count, 3, HEIGHT, WIDTH, seed=10 + step).to(dtype)
    return x, (torch.arange(count) + step) % 3


def gradients_of(
    model: nn.Module, whole: tuple[Tensor, Tensor], rank: int | None = None
) -> dict[str, Tensor | None]:
    """One backward pass with the hook on; ``rank`` takes its share of the batch, None all."""
    share = slice(None) if rank is None else slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
    hook = DiagonalityLossHook()
    inner = model.module if isinstance(model, MMDistributedDataParallel) else model
    has_dp = any(p.requires_grad for n, p in inner.named_parameters() if n.endswith('.psi'))
    if has_dp:
        hook.before_train(SimpleNamespace(model=model))
    losses = model(inputs=whole[0][share], labels=whole[1][share], mode='loss')
    assert ('loss_dp' in losses) == has_dp
    sum(losses.values()).backward()
    hook.after_train(None)
    return {n: p.grad for n, p in inner.named_parameters() if p.requires_grad}


# -- What runs in the two processes ----------------------------------------------------------------


def ddp_gradients(rank: int, dtype: torch.dtype = torch.float64, **options: object) -> dict:
    """Of the second of two passes: DDP says at its start if a parameter of the first was unused."""
    model = MMDistributedDataParallel(Toy(**options).to(dtype))
    for step in range(2):
        model.zero_grad()
        found = gradients_of(model, batch(step, dtype), rank)
    return found


def samples() -> list[dict]:
    """The batches one after the other, each in the order in which the sampler deals it out."""
    order = [i + r * LOCAL_BATCH for i in range(LOCAL_BATCH) for r in range(WORLD)]
    out = []
    for step in range(STEPS):
        x, labels = batch(step)
        out += [dict(inputs=x[i], labels=labels[i]) for i in order]
    return out


def fsdp_training(
    rank: int, folder: Path, steps: int = STEPS, resume: bool = False, **options: object
) -> dict:
    """MMEngine's runner and strategy; returns what each process kept of the weights."""
    runner = FlexibleRunner(
        Toy(**options),
        work_dir=str(folder),
        experiment_name=f'fsdp_{steps}',
        strategy=dict(
            type='ResumableFSDPStrategy',
            model_wrapper=dict(
                type='MMFullyShardedDataParallel',
                auto_wrap_policy='wrap_lavit_blocks',
                device_id=torch.device('cpu'),
            ),
            # The short form, 'full', moves weights to the CPU, which crashes where they are.
            state_dict_cfg=dict(
                state_dict_type='FULL_STATE_DICT',
                state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
                optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True),
            ),
        ),
        launcher='pytorch',
        train_dataloader=dict(
            batch_size=LOCAL_BATCH,
            num_workers=0,
            dataset=samples(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=steps),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=LEARNING_RATE, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False),
            logger=dict(type='LoggerHook', interval=1),
        ),
        custom_hooks=[
            dict(type='DiagonalityLossHook'),
            dict(type='AttentionHealthHook', interval=1),
        ],
        resume=resume,
    )
    runner.train()
    return dict(numel=sum(p.numel() for p in runner.model.parameters()))


def weights_for_other_windows() -> dict[str, Tensor]:
    return Toy(seed=1, window_sizes=(4, 4, 4, 4)).state_dict()


def fsdp_model(kind: StateDictType, seed: int = 0, **options: object) -> FSDP:
    device = torch.device('cpu')
    model = FSDP(Toy(seed=seed), auto_wrap_policy=wrap_lavit_blocks, device_id=device, **options)
    # Only the first process sees whole state dicts, as in the trainings above.
    config = FullStateDictConfig(rank0_only=True) if kind == FULL else LocalStateDictConfig()
    FSDP.set_state_dict_type(model, kind, config)
    return model


def fsdp_loading(rank: int) -> dict[str, Tensor]:
    """What a model holds after loading weights whose Psi and Theta must be resized."""
    model = fsdp_model(FULL)
    model.load_state_dict(weights_for_other_windows())
    return model.state_dict()


def fsdp_loading_shares(rank: int, use_orig_params: bool) -> dict[str, Tensor]:
    """What a model holds after loading what another saved, each process its share."""
    model, source = (fsdp_model(LOCAL, seed, use_orig_params=use_orig_params) for seed in (0, 1))
    # As MMEngine, not strictly: with use_orig_params PyTorch saves its flat tensors, too.
    model.load_state_dict(source.state_dict(), strict=False)
    FSDP.set_state_dict_type(model, FULL, FullStateDictConfig(rank0_only=True))
    return model.state_dict()


DDP_CASES = {
    f'out_indices={out}, frozen_stages={frozen}': dict(out_indices=out, frozen_stages=frozen)
    for out in [(0,), (0, 2), (0, 1, 2, 3)]
    for frozen in (-1, 2)
} | {
    'patch embedding frozen': dict(frozen_stages=0),
    'the whole backbone frozen': dict(frozen_stages=4),
    'with_cp': dict(with_cp=True),
    'with_cp, frozen_stages=1': dict(with_cp=True, frozen_stages=1),
    'float32': dict(dtype=torch.float32),
}
FSDP_CASES = {
    'plain': {},
    'with_cp': dict(with_cp=True),
    'frozen_stages=2': dict(frozen_stages=2),
}


def draws() -> list[Tensor]:
    """What iterations 3, 4 and again 3 draw under StepSeedHook."""
    hook, found = StepSeedHook(), []
    for iteration in (3, 4, 3):
        hook.before_train_iter(SimpleNamespace(seed=1, iter=iteration), 0)
        found.append(torch.rand(8))
    return found


def run_cases(rank: int, folder: Path) -> None:
    """One of the two processes: all cases in one process group."""
    cases: dict[str, Callable[[], dict]] = {
        f'DDP {name}': partial(ddp_gradients, rank, **options)
        for name, options in DDP_CASES.items()
    }
    cases['draws'] = draws
    if not needs_fsdp.args[0]:
        for name, options in FSDP_CASES.items():
            work_dir = folder / f'fsdp {name}'
            cases[f'FSDP {name}'] = partial(fsdp_training, rank, work_dir, **options)
        cases['FSDP other windows'] = partial(fsdp_loading, rank)
        cases['FSDP flat shares'] = partial(fsdp_loading_shares, rank, use_orig_params=False)
        cases['FSDP shares of each weight'] = partial(
            fsdp_loading_shares, rank, use_orig_params=True
        )
        cases['FSDP first'] = partial(fsdp_training, rank, folder / 'resumed', steps=1)
        cases['FSDP resumed'] = partial(fsdp_training, rank, folder / 'resumed', resume=True)
    found: dict[str, object] = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception:
            # The other process may now wait for this one: no case after this.
            found[name] = traceback.format_exc()
            break
    torch.save(found, folder / f'{rank}.pth')


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """What each of the two processes found, case by case."""
    folder = tmp_path_factory.mktemp('distributed')
    in_two_processes(run_cases, folder)
    return folder, [torch.load(folder / f'{r}.pth', weights_only=False) for r in range(WORLD)]


def result_of(found: tuple[Path, list[dict]], name: str) -> list[dict]:
    results = [of_rank.get(name, 'an earlier case failed') for of_rank in found[1]]
    assert not any(isinstance(result, str) for result in results), '\n'.join(map(str, results))
    return results


# -- What must hold --------------------------------------------------------------------------------


@pytest.mark.parametrize('name', DDP_CASES)
def test_ddp_takes_the_step_of_one_process(found, name):
    options = dict(DDP_CASES[name])
    dtype = options.pop('dtype', torch.float64)
    expected = gradients_of(Toy(**options).to(dtype), batch(1, dtype))
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    for result in result_of(found, f'DDP {name}'):
        assert result.keys() == expected.keys()
        for key, grad in expected.items():
            error = (result[key] - grad).abs().max() / grad.abs().max().clamp(min=1)
            assert error < tol, (key, error.item())


def test_processes_drop_other_paths_and_again_the_same(found):
    first, second = result_of(found, 'draws')
    for of_rank in (first, second):
        assert torch.equal(of_rank[0], of_rank[2]) and not torch.equal(of_rank[0], of_rank[1])
    assert not any(torch.equal(a, b) for a, b in itertools.product(first, second))


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_no_parameter_is_unused(frozen_stages):
    """Of any model: find_unused_parameters has nothing to find."""
    subsets = [s for k in range(1, 5) for s in itertools.combinations(range(4), k)]
    assert len(subsets) == 15
    whole = tuple(t[:1] for t in batch(0))
    for out_indices in subsets:
        model = Toy(out_indices=out_indices, frozen_stages=frozen_stages)
        grads = gradients_of(model, whole)
        unused = [name for name, grad in grads.items() if grad is None]
        assert not unused, (out_indices, unused)


def train_alone(**options: object) -> Toy:
    """The same training in one process."""
    model = Toy(**options)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=LEARNING_RATE, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        gradients_of(model, batch(step))
        optimizer.step()
    return model


def assert_same_weights(checkpoint: Path, expected: nn.Module, start: nn.Module) -> None:
    """A checkpoint of several processes loads into one, and holds the expected weights."""
    saved = torch.load(checkpoint, weights_only=False)['state_dict']
    start.load_state_dict(saved, strict=True)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(
            start.state_dict()[name], weight, rtol=1e-9, atol=1e-12, msg=name
        )


@needs_fsdp
@pytest.mark.parametrize('name', FSDP_CASES)
def test_fsdp_takes_the_steps_of_one_process(found, name):
    options = FSDP_CASES[name]
    kept = [result['numel'] for result in result_of(found, f'FSDP {name}')]
    expected, start = train_alone(**options), Toy(**options)
    whole = sum(p.numel() for p in start.parameters())
    assert whole <= sum(kept) and max(kept) < 0.6 * whole, 'each process keeps its half'
    checkpoint = found[0] / f'fsdp {name}' / f'iter_{STEPS}.pth'
    assert_same_weights(checkpoint, expected, start)


@needs_fsdp
def test_fsdp_resumes(found):
    result_of(found, 'FSDP first')
    result_of(found, 'FSDP resumed')
    assert_same_weights(found[0] / 'resumed' / f'iter_{STEPS}.pth', train_alone(), Toy())


@needs_fsdp
def test_fsdp_resizes_psi_and_theta_in_every_process(found):
    """A process that kept them as they were could not load its share."""
    expected = Toy()
    expected.load_state_dict(weights_for_other_windows())
    assert_first_holds(expected, result_of(found, 'FSDP other windows'))


@needs_fsdp
@pytest.mark.parametrize('name', ['flat shares', 'shares of each weight'])
def test_fsdp_loads_what_each_process_saved(found, name):
    """MMEngine's ``state_dict_cfg='local'``: flat weights, which show nothing of their arch."""
    assert_first_holds(Toy(seed=1), result_of(found, f'FSDP {name}'))


def assert_first_holds(expected: nn.Module, states: list[dict[str, Tensor]]) -> None:
    """The first process got the whole state dict, as asked for, and the other none."""
    first, second = (dict(state) for state in states)
    torch.testing.assert_close(first, dict(expected.state_dict()), rtol=0, atol=0)
    assert not second
