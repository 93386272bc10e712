"""VanillaAttention, LessAttention and AttentionResidual against the equations."""

import pytest
import reference
import torch
from small import images, seeded, spread
from torch import Tensor, nn

from mmlavit.models.attention import LessAttention, VanillaAttention
from mmlavit.models.attention_residual import AttentionResidual
from mmlavit.models.block import Block
from mmlavit.models.windows import WindowGrid
from mmlavit.ops import inference, two_sided_linear

DIMS, HEADS = 12, 3
GRIDS = [(8, 8, 4), (5, 7, 4), (3, 3, 8), (9, 4, 4)]


@pytest.fixture(autouse=True)
def _first_weights():
    print('seed 0')
    torch.manual_seed(0)


def noisy(module: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The module in float64, its weights moved away from their start."""
    generator = seeded(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def as_dict(scores: Tensor, grid: WindowGrid) -> reference.Scores:
    """Scores of one image in the reference's form."""
    return {
        ((i // grid.cols, i % grid.cols), h): scores[i, h]
        for i in range(scores.shape[0])
        for h in range(scores.shape[1])
    }


def random_scores(grid: WindowGrid, heads: int, seed: int = 9) -> Tensor:
    """Scores of one image, 0 at padded pairs as the layers keep them."""
    n = grid.window**2
    scores = images(grid.rows * grid.cols, heads, n, n, seed=seed)
    valid = grid.valid()
    return scores * (valid[:, None, :, None] & valid[:, None, None, :])


def assert_scores(ours: Tensor, theirs: reference.Scores, grid: WindowGrid, tol: float) -> None:
    mine = as_dict(ours, grid)
    assert mine.keys() == theirs.keys()
    for key, expected in theirs.items():
        torch.testing.assert_close(mine[key], expected, rtol=0, atol=tol)


@torch.no_grad()
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('with_residual', [False, True])
@pytest.mark.parametrize('height, width, window', GRIDS)
def test_vanilla_attention_is_equation_4(height, width, window, with_residual, dtype, tol):
    grid = WindowGrid(height, width, window)
    attn = noisy(VanillaAttention(DIMS, HEADS)).to(dtype)
    x = images(1, height, width, DIMS).to(dtype)
    residual = random_scores(grid, HEADS).to(dtype) if with_residual else None
    out, scores = attn(x, grid, residual)
    assert 1 < spread(scores[None], grid) < 3
    given = as_dict(residual, grid) if with_residual else None
    expected, expected_scores = reference.vanilla_attention(
        x[0], attn.state_dict(), HEADS, window, given
    )
    torch.testing.assert_close(out[0], expected, rtol=0, atol=tol)
    assert_scores(scores, expected_scores, grid, tol)


@torch.no_grad()
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize('height, width, window', GRIDS)
def test_less_attention_is_equation_5(height, width, window, dtype, tol):
    grid = WindowGrid(height, width, window)
    attn = noisy(LessAttention(DIMS, HEADS, window)).to(dtype)
    x, prev = images(1, height, width, DIMS).to(dtype), random_scores(grid, HEADS).to(dtype)
    out, scores = attn(x, grid, prev)
    assert 1 < spread(scores[None], grid) < 3
    expected, expected_scores = reference.less_attention(
        x[0], as_dict(prev, grid), attn.state_dict(), HEADS, window
    )
    torch.testing.assert_close(out[0], expected, rtol=0, atol=tol)
    assert_scores(scores, expected_scores, grid, tol)


@torch.no_grad()
@pytest.mark.parametrize(
    'height, width, prev_window, window',
    [(16, 16, 8, 8), (8, 8, 8, 4), (11, 21, 8, 8), (9, 9, 4, 8), (7, 5, 4, 6), (15, 9, 6, 3)],
)
def test_attention_residual_is_equations_6_and_7(height, width, prev_window, window):
    prev = WindowGrid(height, width, prev_window)
    grid = WindowGrid(-(-height // 2), -(-width // 2), window)
    residual = noisy(AttentionResidual(3, 4, prev_window, window))
    scores = random_scores(prev, 3)
    expected = reference.attention_residual(
        as_dict(scores, prev), residual.state_dict(), prev_window, window, (grid.height, grid.width)
    )
    assert any(m.any() for m in expected.values())
    assert_scores(residual(scores, prev, grid), expected, grid, 1e-10)


@torch.no_grad()
def test_the_residual_is_the_same_whichever_way_the_scores_lie_in_memory():
    prev, grid = WindowGrid(8, 8, 4), WindowGrid(4, 4, 4)
    residual, scores = noisy(AttentionResidual(3, 4, 4, 4)), random_scores(prev, 3)
    lying = scores.mT.contiguous().mT
    torch.testing.assert_close(residual(lying, prev, grid), residual(scores, prev, grid))


@pytest.mark.parametrize('lying', [False, True])
def test_two_sided_linear(lying):
    generator = seeded(3)
    psi, theta = (torch.randn(9, 9, generator=generator).double() for _ in range(2))
    scores = torch.randn(2, 3, 9, 9, generator=generator).double()
    given = scores.mT.contiguous().mT if lying else scores
    assert given.is_contiguous() is not lying
    expected = torch.einsum('ij,whjk,lk->whil', psi, scores, theta)
    torch.testing.assert_close(two_sided_linear(given, psi, theta), expected)


@torch.no_grad()
def test_with_identity_psi_and_theta_a_layer_attends_exactly_as_the_one_before():
    """As it starts: same scores, so with the same V and projection the same output, bit for bit."""
    grid = WindowGrid(7, 9, 4)
    vanilla = noisy(VanillaAttention(DIMS, HEADS))
    less = LessAttention(DIMS, HEADS, 4).double().eval()
    less.v.weight.copy_(vanilla.qkv.weight[2 * DIMS :])
    less.v.bias.copy_(vanilla.qkv.bias[2 * DIMS :])
    less.proj.load_state_dict(vanilla.proj.state_dict())
    x = images(1, 7, 9, DIMS)
    expected, scores = vanilla(x, grid, None)
    out, kept = less(x, grid, scores)
    assert torch.equal(kept, scores)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_psi_and_theta_start_as_the_identity_and_layer_scale_small():
    less, residual = LessAttention(DIMS, HEADS, 4), AttentionResidual(2, 3, 4, 4)
    assert torch.equal(less.psi, torch.eye(16)) and torch.equal(less.theta, torch.eye(16))
    assert 0 < residual.layer_scale.max() <= 1e-2


def test_less_attention_projects_only_v():
    shapes = {name: tuple(p.shape) for name, p in LessAttention(DIMS, HEADS, 4).named_parameters()}
    assert shapes == {
        'psi': (16, 16),
        'theta': (16, 16),
        'v.weight': (DIMS, DIMS),
        'v.bias': (DIMS,),
        'proj.weight': (DIMS, DIMS),
        'proj.bias': (DIMS,),
    }
    assert LessAttention(DIMS, HEADS, 4, qkv_bias=False).v.bias is None
    assert VanillaAttention(DIMS, HEADS, qkv_bias=False).qkv.bias is None


@torch.no_grad()
@pytest.mark.parametrize('kind', ['vanilla', 'less'])
def test_block_is_the_reference_block(kind):
    grid = WindowGrid(6, 5, 4)
    attn = VanillaAttention(DIMS, HEADS) if kind == 'vanilla' else LessAttention(DIMS, HEADS, 4)
    block = noisy(Block(DIMS, attn, 2))
    x, given = images(1, 6, 5, DIMS), random_scores(grid, HEADS)
    out, scores = block(x, grid, given)
    residual, prev = (
        (as_dict(given, grid), None) if kind == 'vanilla' else (None, as_dict(given, grid))
    )
    expected, expected_scores = reference.block(x[0], prev, block.state_dict(), HEADS, 4, residual)
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-10)
    assert_scores(scores, expected_scores, grid, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['vanilla', 'less'])
@pytest.mark.parametrize('tokens', [1, 200, 700, 1300, 10_000])
def test_layers_come_to_the_same_in_pieces(kind, tokens, monkeypatch):
    """In place, slab by slab."""
    grid = WindowGrid(30, 21, 4)
    made = [VanillaAttention(DIMS, HEADS) for _ in range(2)]
    if kind == 'less':
        made[1] = LessAttention(DIMS, HEADS, 4)
    blocks = noisy(nn.ModuleList(Block(DIMS, attn, 2) for attn in made))
    x, residual = images(3, 30, 21, DIMS), random_scores(grid, HEADS).repeat(3, 1, 1, 1)
    kept = x.clone(), residual.clone()
    expected, scores = blocks[0](x, grid, residual)
    expected, scores = blocks[1](expected, grid, scores if kind == 'less' else None)
    monkeypatch.setattr(inference, 'SLAB_TOKENS', tokens)
    for lying in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        assert inference.serves(blocks, lying)
        out, found = inference.layers(blocks, lying, grid, residual)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-12)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1]), 'what it was given changed'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_does_not_narrow_the_stream_between_layers(dtype):
    """Branches are computed in low precision; what they are added to keeps its own."""
    grid = WindowGrid(6, 5, 4)
    block = noisy(Block(DIMS, VanillaAttention(DIMS, HEADS), 2)).float()
    x = images(1, 6, 5, DIMS).to(dtype)
    with torch.no_grad():
        expected = block(x.float(), grid, None)[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = block(x, grid, None)[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_gradcheck():
    """Numerical gradients of a vanilla layer, a residual and a less-attention layer, padded."""
    prev, grid = WindowGrid(5, 3, 2), WindowGrid(3, 2, 2)
    first = noisy(VanillaAttention(4, 2)).requires_grad_(False)
    residual = noisy(AttentionResidual(2, 2, 2, 2))
    vanilla, less = noisy(VanillaAttention(4, 2)), noisy(LessAttention(4, 2, 2))
    parameters = [less.psi, less.theta, residual.dwconv.weight, residual.pwconv.weight]
    parameters += [residual.layer_scale, vanilla.qkv.weight]

    def run(x: Tensor, y: Tensor, *_: Tensor) -> Tensor:  # gradcheck moves the parameters in place
        _, scores = first(x, prev, None)
        _, scores = vanilla(y, grid, residual(scores, prev, grid))
        return less(y, grid, scores)[0]

    x = images(1, 5, 3, 4, seed=2).requires_grad_()
    y = images(1, 3, 2, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, y, *parameters))
