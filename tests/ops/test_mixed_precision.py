"""Half precision: what float16 cannot hold, extreme inputs, and a training beside float32."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import reference
import torch
import torch.nn.functional as F
from small import (
    ARCH,
    HALVES,
    STD,
    STEEP,
    allowed,
    images,
    largest_difference,
    needs_cpu_float16,
    seeded,
    sharpen,
    small_lavit,
)
from torch import Tensor, nn

from mmlavit import DiagonalityLossHook, LaViT
from mmlavit.models.attention import WindowAttention
from mmlavit.ops import halve_pairs, scaled_product, two_sided_linear
from mmlavit.ops.halve_pairs import by_block
from mmlavit.ops.saturate import saturate

LARGEST = 65504.0
DEVICES = [
    'cpu',
    pytest.param(
        'cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
    ),
]


# -- What float16 cannot hold ----------------------------------------------------------------------


def assert_saturated(found: Tensor, exact: Tensor) -> None:
    """``found`` is the exact result, cut off at the ends of float16; the case has some to cut."""
    assert found.dtype == torch.float16
    assert (exact > 2 * LARGEST).any() and (exact < -2 * LARGEST).any()
    assert (exact.abs() < LARGEST / 2).any()
    torch.testing.assert_close(
        found.double(), exact.clamp(-LARGEST, LARGEST), rtol=5e-3, atol=5e-3 * LARGEST
    )


@needs_cpu_float16
def test_scores_of_tokens():
    q, k = 300 * images(2, 2, 2, 16, 64).half()
    residual = 1e4 * images(2, 2, 16, 16, seed=2).half()
    for given in (None, residual):
        exact = q.double() @ k.double().mT / 8 + (0 if given is None else given.double())
        assert_saturated(scaled_product(q, k, 1 / 8, given), exact)


@needs_cpu_float16
@pytest.mark.parametrize('lying', [False, True])
def test_transformed_scores(lying):
    """In either memory order; the product that comes first saturates before the other takes it."""
    scores, psi, theta = (images(2, 2, 16, 16, seed=i).half() for i in (1, 2, 3))
    scores, psi, theta = 5e3 * scores, 5 * psi[0, 0], 5 * theta[0, 0]
    given = scores.mT.contiguous().mT if lying else scores
    scores, psi, theta = scores.double(), psi.double(), theta.double()
    if lying:
        exact = (psi @ scores).clamp(-LARGEST, LARGEST) @ theta.T
    else:
        exact = psi @ (scores @ theta.T).clamp(-LARGEST, LARGEST)
    assert_saturated(two_sided_linear(given, psi.half(), theta.half()), exact)


@needs_cpu_float16
def test_scores_brought_down_a_stage():
    scores = 1e4 * images(2, 2, 16, 16).half()
    dwconv = nn.Conv2d(2, 2, 4, 4, groups=2, bias=False).half()
    pwconv = nn.Conv2d(2, 3, 1, bias=False).half()
    with torch.no_grad():
        # Large enough for the second to leave the range, and too small for the first.
        dwconv.weight.copy_(0.1 * images(*dwconv.weight.shape))
        pwconv.weight.copy_(30 * images(*pwconv.weight.shape))
        found = halve_pairs(scores, dwconv, pwconv)
        exact = pwconv.double()(dwconv.double()(by_block(scores.double())))
    assert_saturated(found, exact)


def test_the_gradient_is_that_of_a_clamp():
    given = [-math.inf, -LARGEST, -5.0, 0.0, 2.0, LARGEST, math.inf]
    x = torch.tensor(given, dtype=torch.float16, requires_grad=True)
    saturated = saturate(x * 1)
    assert saturated.tolist() == [-LARGEST, -LARGEST, -5.0, 0.0, 2.0, LARGEST, LARGEST]
    saturated.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_other_types_pass_untouched(dtype):
    x = torch.tensor([math.inf, 1e6], dtype=dtype, requires_grad=True)
    assert saturate(x) is x and x[0] == math.inf


# -- Ordinary inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('std', [STD, STEEP])
def test_autocast_is_as_good_as_the_reference_in_half_precision(device, dtype, training, std):
    """All weights, tokens and scores of that reference are in half precision."""
    x = images(2, 3, 37, 50)
    model = sharpen(small_lavit(window_sizes=(4, 4, 4, 4)), x, std)
    exact, rough = (
        reference.lavit(
            x.to(d),
            {name: w.to(d) for name, w in model.state_dict().items()},
            ARCH['num_heads'],
            model.window_sizes,
        )
        for d in (torch.float64, dtype)
    )
    model = model.float().to(device).train(training)
    with torch.set_grad_enabled(training), torch.autocast(device, dtype=dtype):
        found = [m.detach().cpu() for m in model(x.float().to(device))]
    assert largest_difference(found, exact) < allowed(exact, rough, dtype)


# -- Extreme inputs --------------------------------------------------------------------------------


def usual_lavit() -> LaViT:
    """A LaViT whose scores are far from even and far from the ends of float16."""
    return sharpen(small_lavit(), images(2, 3, 64, 64)).float()


def steep_lavit(scale: float = 400.0) -> LaViT:
    """A LaViT whose scores leave float16: large Q and K, Psi and Theta of eigenvalues beyond 1."""
    model = small_lavit(window_sizes=(4, 4, 4, 4)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('qkv.weight'):
                p *= scale
            elif name.endswith(('psi', 'theta')):
                p *= 3
    return model


def scores_of(model: LaViT, x: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Maps, and the scores of every layer, of one pass."""
    heard: list[Tensor] = []
    hooks = [
        # A copy, as inference goes on to use the memory.
        m.register_forward_hook(lambda _, __, output: heard.append(output[1].detach().clone()))
        for m in model.modules()
        if isinstance(m, WindowAttention)
    ]
    half = dtype != torch.float32
    with torch.autocast(x.device.type, dtype=dtype) if half else nullcontext():
        maps = model(x)
    for hook in hooks:
        hook.remove()
    assert len(heard) == sum(model.depths)
    return list(maps), heard


def all_finite(tensors: list[Tensor]) -> bool:
    return all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(64, 64), (37, 50)], ids=['whole', 'padded'])
@pytest.mark.parametrize('make', [usual_lavit, steep_lavit], ids=['usual', 'steep'])
def test_images_a_thousand_times_too_bright(device, dtype, training, size, make):
    model = make().to(device).train(training)
    x = 1e3 * images(2, 3, *size).float().to(device)
    with torch.set_grad_enabled(training):
        maps, scores = scores_of(model, x, dtype)
    assert all_finite(scores) and all_finite(maps)
    if make is steep_lavit:
        largest = max(s.abs().max().item() for s in scores)
        assert largest == LARGEST if dtype == torch.float16 else largest > 2 * LARGEST
    if training:
        # Gradients of saturated scores are 0, of the rest ordinary; a small loss keeps them in.
        sum(m.float().mean() for m in maps).backward()
        assert all_finite([p.grad for p in model.parameters()])


@needs_cpu_float16
@pytest.mark.parametrize('training', [True, False])
def test_float16_without_autocast(training):
    model = steep_lavit().half().train(training)
    with torch.set_grad_enabled(training):
        maps, scores = scores_of(model, 10 * images(1, 3, 37, 50).half(), torch.float32)
    assert all_finite(scores) and all_finite(maps)
    assert max(s.abs().max().item() for s in scores) == LARGEST


# -- Training --------------------------------------------------------------------------------------

ITERATIONS, BATCH, CLASSES = 200, 8, 4
# How far the mean loss of ten iterations may be from that in float32.
BAND = 0.1


class Quadrants(nn.Module):
    """Says in which quarter of the image the bright square is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = LaViT(ARCH, window_sizes=(4, 4, 2, 2), out_indices=(1,), drop_path_rate=0.0)
        self.head = nn.Linear(ARCH['embed_dims'][1] * 16, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> dict[str, Tensor]:
        logits = self.head(self.backbone(inputs)[0].flatten(1))
        return dict(loss_cls=F.cross_entropy(logits, labels))


def quadrants(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator)
    for i, label in enumerate(labels):
        top, left = 16 * (label // 2) + 4, 16 * (label % 2) + 4
        x[i, :, top : top + 8, left : left + 8] += 1.5
    return x, labels


def train(device: str, dtype: torch.dtype) -> Tensor:
    """The loss of each iteration, all else being equal."""
    torch.manual_seed(0)
    model = Quadrants().to(device).train()
    hook = DiagonalityLossHook()
    hook.before_train(type('Runner', (), dict(model=model)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16, enabled=dtype == torch.float16)
    generator, losses = seeded(3), []
    for _ in range(ITERATIONS):
        x, labels = (t.to(device) for t in quadrants(generator))
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            found = model(inputs=x, labels=labels, mode='loss')
        assert found['loss_dp'] > 0
        loss = sum(found.values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all_finite(list(model.parameters()))
    assert scaler.get_scale() >= 1
    return torch.tensor(losses)


@needs_cpu_float16
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_two_hundred_iterations(device):
    curves = {d: train(device, d) for d in (torch.float32, torch.bfloat16, torch.float16)}
    means = {d: curve.view(-1, 10).mean(dim=1) for d, curve in curves.items()}
    expected = means[torch.float32]
    assert expected[-3:].mean() < 0.5 * expected[0], 'it learns'
    for dtype, found in means.items():
        assert curves[dtype].isfinite().all()
        apart = (found - expected).abs().max().item()
        print(f'{dtype}: loss {found[0]:.3f} to {found[-1]:.3f}, at most {apart:.4f} from float32')
        assert apart < BAND
    assert not torch.equal(curves[torch.float16], curves[torch.float32]), 'autocast was on'
