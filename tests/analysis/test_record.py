"""What is recorded of a running model, against the naive reference."""

import pytest
import reference
import torch
from small import ARCH, images, sharpen, small_lavit
from torch import Tensor, nn

from mmlavit import LaViT
from mmlavit.analysis.record import recording

WINDOWS = (4, 4, 4, 2)
NUM_LAYERS = sum(ARCH['depths'])


def reference_layers(image: Tensor, model: LaViT, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the naive reference computes in each layer: its own scores, the residual, their sum."""
    layers = []
    attend, block = reference.vanilla_attention, reference.block

    def spying_block(x, prev_scores, weights, num_heads, window, residual=None):
        layers.append({'own': None, 'residual': residual})
        x, scores = block(x, prev_scores, weights, num_heads, window, residual)
        layers[-1]['scores'] = scores
        return x, scores

    def spying_attention(x, weights, num_heads, window, residual=None):
        layers[-1]['own'] = attend(x, weights, num_heads, window)[1]
        return attend(x, weights, num_heads, window, residual)

    with monkeypatch.context() as patch:
        patch.setattr(reference, 'block', spying_block)
        patch.setattr(reference, 'vanilla_attention', spying_attention)
        reference.lavit_one_image(
            image, model.state_dict(), model.arch.num_heads, model.window_sizes
        )
    return layers


def softmax_of(scores: Tensor, real: list[int]) -> Tensor:
    """Softmax of one window's map over its real keys, for its real queries, by the formula."""
    out = torch.zeros_like(scores)
    for i in real:
        powers = (scores[i][real] - scores[i][real].max()).exp()
        out[i][real] = powers / powers.sum()
    return out


def assert_unhooked(model: nn.Module) -> None:
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize('size', [(64, 96), (52, 74), (9, 30)], ids=str)
def test_every_layer_is_the_references(size, monkeypatch):
    batch = images(2, 3, *size)
    model = sharpen(small_lavit(window_sizes=WINDOWS), batch)
    with recording(model) as layers:
        model(batch)
    assert [(x.stage, x.layer) for x in layers] == [
        (m, i) for m in range(4) for i in range(ARCH['depths'][m])
    ]
    for b, image in enumerate(batch):
        for found, expected in zip(
            layers, reference_layers(image, model, monkeypatch), strict=True
        ):
            window, grid = WINDOWS[found.stage], found.grid
            assert found.name == f'stages.{found.stage}.blocks.{found.layer}.attn'
            assert found.kind == ('less' if expected['own'] is None else 'vanilla')
            assert (found.residual is None) == (expected['residual'] is None)
            assert (found.residual is None) == (found.layer > 0 or found.stage == 0)
            for (win, head), scores in expected['scores'].items():
                at = b, win[0] * grid.cols + win[1], head
                tokens = reference.real_tokens(win, grid.height, grid.width, window)
                real = [reference.place(token, window) for token in tokens]
                assert real == grid.valid()[at[1]].nonzero().flatten().tolist()
                close(found.scores[at], scores)
                close(found.attn[at], softmax_of(scores, real))
                if found.residual is not None:
                    close(found.residual[at], expected['residual'][win, head])
                    close(found.scores[at] - found.residual[at], expected['own'][win, head])
            windows = {win for win, _ in expected['scores']}
            shape = (2, len(windows), ARCH['num_heads'][found.stage], window**2, window**2)
            assert found.attn.shape == found.scores.shape == shape


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize('grad', [False, True])
def test_the_model_computes_the_same_and_keeps_no_hook(grad):
    model = small_lavit(window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    with torch.set_grad_enabled(grad):
        plain = model(batch)
        with recording(model) as layers:
            watched = model(batch)
        assert_unhooked(model)
        again = model(batch)
    assert len(layers) == NUM_LAYERS
    for a, b, c in zip(plain, watched, again, strict=True):
        # Unwatched, inference on a CPU works in pieces, whose products round otherwise.
        torch.testing.assert_close(a, b, rtol=0, atol=0 if grad else 1e-5)
        assert torch.equal(a, c)
    for layer in layers:
        assert not layer.attn.requires_grad
        assert not layer.scores.requires_grad


@torch.no_grad()
def test_recordings_stay_as_they_were():
    """The model works in place; what was recorded is a copy."""
    model = small_lavit(window_sizes=WINDOWS).float()
    batch = images(1, 3, 52, 74).float()

    def snapshot(layer):
        return layer, layer.attn.clone(), layer.scores.clone()

    with recording(model, snapshot) as layers:
        model(batch)
    assert len(layers) == NUM_LAYERS
    for layer, attn, scores in layers:
        assert torch.equal(layer.attn, attn)
        assert torch.equal(layer.scores, scores)


class Detector(nn.Module):
    """Any model with a LaViT somewhere inside."""

    def __init__(self, lavit: LaViT) -> None:
        super().__init__()
        self.extractor = nn.ModuleDict({'body': lavit})

    def forward(self, x: Tensor) -> Tensor:
        return self.extractor['body'](x)[-1].mean()


@torch.no_grad()
def test_inside_any_model_some_stages_reduced_as_they_come():
    lavit = small_lavit(window_sizes=WINDOWS, out_indices=(0, 2))
    batch = images(1, 3, 52, 74)
    with recording(lavit) as every:
        lavit(batch)
    assert {x.stage for x in every} == {0, 1, 2}
    detector = Detector(lavit)
    with recording(detector, stages=[2]) as layers:
        detector(batch)
    assert [x.name for x in layers] == [
        f'extractor.body.stages.2.blocks.{i}.attn' for i in range(3)
    ]
    for found, expected in zip(layers, every[-3:], strict=True):
        assert torch.equal(found.attn, expected.attn)
    with recording(detector, lambda x: x.attn.mean().item(), stages=(1, 2)) as means:
        detector(batch)
        detector(batch)
    once = [x.attn.mean().item() for x in every if x.stage]
    assert means == once + once


def test_hooks_go_away_with_an_exception():
    model = small_lavit(window_sizes=WINDOWS)

    def fails(layer):
        raise KeyError(layer.name)

    with pytest.raises(KeyError), recording(model, fails):
        model(images(1, 3, 32, 32))
    assert_unhooked(model)


@pytest.mark.parametrize(
    'model, stages, error, message',
    [
        (lambda: nn.Linear(2, 2), None, ValueError, 'must hold a LaViT, Linear holds none'),
        (small_lavit, [4], ValueError, r'stages must be some of 0\.\.3, got \[4\]'),
        (small_lavit, [0, -1], ValueError, r'0\.\.3, got \[0, -1\]'),
        (small_lavit, [], ValueError, r'got \[\]'),
        (lambda: small_lavit(out_indices=(1,)), [2], ValueError, r'0\.\.1, got \[2\]'),
        (small_lavit, 2, TypeError, 'sequence of integers, got 2'),
        (small_lavit, '12', TypeError, "sequence of integers, got '12'"),
        (small_lavit, [True], TypeError, r'got \[True\]'),
    ],
)
def test_bad_arguments(model, stages, error, message):
    model = model()
    with pytest.raises(error, match=message), recording(model, stages=stages):
        pass
    assert_unhooked(model)
