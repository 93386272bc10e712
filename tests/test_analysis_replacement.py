"""What a model computes with its attention replaced, and the tool that measures what that costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from small import ARCH, images, small_lavit
from torch import Tensor, nn

from mmlavit import LaViT, attention, backbone
from mmlavit.analysis.record import recording
from mmlavit.analysis.replacement import MAPS, MeanAttention, replaceable, replaced

WINDOWS = (4, 4, 4, 2)
STAGE_OF = [m for m in range(4) for _ in range(ARCH['depths'][m])]
SIZES = [(64, 96), (52, 74)]  # which the windows divide, and do not

Attend = Callable[[dict, Tensor, int, int], Tensor]


# ---- Against the naive reference ----------------------------------------------------------------


def naive_even(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
    """Every token becomes the average of the real tokens of its window."""
    height, width, _ = v.shape
    z = torch.zeros_like(v)
    for win in reference.windows_of(height, width, window):
        tokens = reference.real_tokens(win, height, width, window)
        average = torch.stack([v[token] for token in tokens]).mean(dim=0)
        for token in tokens:
            z[token] = average
    return z


def naive_identity(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
    """Every token stays what it is."""
    return v


def softmaxes(scores: dict, v: Tensor, window: int) -> dict:
    """The attention of a layer (window, head) over real tokens alone, in their order."""
    maps = {}
    for (win, head), a in scores.items():
        tokens = reference.real_tokens(win, *v.shape[:2], window)
        places = [reference.place(token, window) for token in tokens]
        maps[win, head] = a[places][:, places].softmax(dim=-1)
    return maps


def naive(
    batch: Tensor, model: LaViT, attend_of: Callable[[int], Attend], patch: pytest.MonkeyPatch
) -> list[Tensor]:
    """The naive reference with ``attend_of(layer)`` in the place of its softmax and product."""
    layers = []

    def attend(*args: object) -> Tensor:
        layers.append(None)
        return attend_of((len(layers) - 1) % len(STAGE_OF))(*args)

    with patch.context() as context:
        context.setattr(reference, 'attend', attend)
        return reference.lavit(batch, model.state_dict(), ARCH['num_heads'], WINDOWS)


def naive_mean(batch: Tensor, model: LaViT, patch: pytest.MonkeyPatch) -> Callable[[int], Attend]:
    """By layer, what applies the mean of the attention that the images have there."""
    attend = reference.attend
    seen = [[] for _ in STAGE_OF]

    def spy_of(layer: int) -> Attend:
        def spy(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
            seen[layer].append(softmaxes(scores, v, window))
            return attend(scores, v, num_heads, window)

        return spy

    naive(batch, model, spy_of, patch)
    assert all(len(found) == len(batch) for found in seen)

    def mean_of(layer: int) -> Attend:
        def apply(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
            z = torch.zeros_like(v)
            for win, head in scores:
                mean = sum(maps[win, head] for maps in seen[layer]) / len(batch)
                tokens = reference.real_tokens(win, *v.shape[:2], window)
                d = v.shape[-1] // num_heads
                channels = slice(head * d, (head + 1) * d)
                values = torch.stack([v[token][channels] for token in tokens])
                for token, row in zip(tokens, mean @ values, strict=True):
                    z[token][channels] = row
            return z

        return apply

    return mean_of


def mean_over(model: nn.Module, *batches: Tensor) -> MeanAttention:
    mean = MeanAttention()
    with recording(model, mean.see, device=None), torch.no_grad():
        for batch in batches:
            model(batch)
    return mean


@pytest.mark.parametrize('how', MAPS)
@pytest.mark.parametrize('grad', [False, True], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('size, stages', [*((s, None) for s in SIZES), (SIZES[1], [0, 2])], ids=str)
def test_maps_are_replaced_as_in_the_reference(how, grad, size, stages, monkeypatch):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(3, 3, *size)
    expected_of = {'even': lambda _: naive_even, 'identity': lambda _: naive_identity}
    if how == 'mean':
        expected_of['mean'] = naive_mean(batch, model, monkeypatch)
    # In inference the first stages then run by rows of windows, the last by groups of images.
    monkeypatch.setattr(backbone, 'SLAB_TOKENS', 100)
    mean = mean_over(model, batch[:1], batch[1:]) if how == 'mean' else None
    with torch.set_grad_enabled(grad), replaced(model, how, stages=stages, mean=mean):
        found = model(batch)

    plain = reference.attend

    def attend_of(layer: int) -> Attend:
        return expected_of[how](layer) if STAGE_OF[layer] in (stages or range(4)) else plain

    expected = naive(batch, model, attend_of, monkeypatch)
    # The recorded attention that a mean is of is float32.
    tolerance = 1e-4 if how == 'mean' else 1e-9
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_the_mean_over_one_image_is_the_model_as_it_is(size):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    image, other = images(2, 3, *size).split(1)
    with replaced(model, 'mean', mean=mean_over(model, image)):
        found = model(image)
        foreign = model(other)
    for a, b in zip(found, model(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (foreign[-1] - model(other)[-1]).abs().max() > 0.01


@torch.no_grad()
def test_scores_that_are_handed_on_stay():
    """Of the first stage, whose first scores come from what nothing has replaced yet."""
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    with recording(model) as plain:
        model(batch)
    mean = mean_over(model, batch)
    for how in MAPS:
        with replaced(model, how, mean=mean if how == 'mean' else None), recording(model) as found:
            model(batch)
        # The vanilla layer and the less-attention layer made of it alone.
        assert torch.equal(found[0].scores, plain[0].scores)
        assert torch.equal(found[1].scores, plain[1].scores)
        assert torch.equal(found[2].residual, plain[2].residual)
        assert not torch.equal(found[2].scores, plain[2].scores)


# ---- Parts --------------------------------------------------------------------------------------


def images_and_two_models(size: tuple[int, int]) -> tuple[Tensor, LaViT, LaViT]:
    first, second = (small_lavit(scale=0.3, window_sizes=WINDOWS) for _ in range(2))
    return images(2, 3, *size), first, second


@pytest.mark.parametrize('grad', [False, True], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('stages', [None, [2]])
@pytest.mark.parametrize('how', ['ar', 'psi_theta'])
def test_a_part_that_is_off_is_one_of_weights_that_do_nothing(how, stages, grad):
    batch, model, changed = images_and_two_models((52, 74))
    with torch.no_grad():
        for m in range(4) if stages is None else stages:
            for name, weight in changed.stages[m].named_parameters():
                if how == 'ar' and name.endswith('layer_scale'):
                    weight.zero_()
                if how == 'psi_theta' and name.endswith(('psi', 'theta')):
                    weight.copy_(torch.eye(len(weight)))
    with torch.set_grad_enabled(grad):
        plain, expected = model(batch), changed(batch)
        with replaced(model, how, stages=stages):
            found = model(batch)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (found[-1] - plain[-1]).abs().max() > 0.01


def test_only_stages_that_have_a_part_can_lose_it():
    arch = {**ARCH, 'vanilla_depths': (2, 1, 3, 1)}
    model = nn.Sequential(small_lavit(arch=arch, window_sizes=WINDOWS, out_indices=(0, 2)))
    assert replaceable(model, 'even') == [0, 1, 2]
    assert replaceable(model, 'ar') == [1, 2]
    assert replaceable(model, 'psi_theta') == [1]


# ---- The model afterwards -----------------------------------------------------------------------


def state_of(model: nn.Module) -> list:
    """All that belongs to a model, by identity."""
    found = []
    for name, module in model.named_modules():
        found += [(name, key, id(value)) for key, value in vars(module).items()]
        for kind in (module._parameters, module._modules, module._forward_pre_hooks):
            found += [(name, key, id(value)) for key, value in kind.items()]
    return found


@pytest.mark.parametrize('fails', [False, True], ids=['', 'after an error'])
@pytest.mark.parametrize('how', [*MAPS, 'ar', 'psi_theta'])
def test_the_model_is_as_it_was_afterwards(how, fails):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    mean = mean_over(model, batch) if how == 'mean' else None
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(batch)
        if fails:
            with (
                pytest.raises(ValueError, match='x must have shape'),
                replaced(model, how, mean=mean),
            ):
                model(batch)
                model(batch[0])
        else:
            with replaced(model, how, mean=mean):
                inside = model(batch)
            assert not torch.equal(inside[-1], plain[-1])
        again = model(batch)
    assert state_of(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@torch.no_grad()
def test_one_replacement_inside_another():
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    before = state_of(model)
    with replaced(model, 'even'):
        even = model(batch)
        with replaced(model, 'identity'):
            inner = model(batch)
        again = model(batch)
    with replaced(model, 'identity'):
        identity = model(batch)
    assert torch.equal(even[-1], again[-1])
    assert torch.equal(inner[-1], identity[-1])
    assert state_of(model) == before


@pytest.mark.parametrize('how', MAPS)
def test_gradients_come_through_all_that_is_left(how):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS).train()
    batch = images(2, 3, 52, 74)
    mean = mean_over(model, batch) if how == 'mean' else None
    with replaced(model, how, mean=mean):
        sum(out.square().mean() for out in model(batch)).backward()
    for name, weight in model.named_parameters():
        if name.endswith(('.proj.weight', '.v.weight', '.fc1.weight')):
            assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name
        if name.endswith(('psi', 'theta')):
            assert weight.grad is None


@torch.no_grad()
def test_the_fused_kernel_is_not_used(monkeypatch):
    """It has a softmax of its own, which would go on with the scores as they are."""
    model = small_lavit(window_sizes=WINDOWS)
    batch = images(1, 3, 32, 32)
    with replaced(model, 'even'):
        expected = model(batch)
    monkeypatch.setattr(attention, 'can_fuse', lambda *_: True)
    monkeypatch.setattr(attention, 'fused_less_attention', lambda v, scores, *_: (v, scores))
    with replaced(model, 'even'):
        found = model(batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with replaced(model, 'psi_theta'):
        assert not torch.equal(model(batch)[-1], expected[-1])


# ---- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'model, how, options, error, message',
    [
        (small_lavit, 'odd', {}, ValueError, "how must be one of .*'psi_theta'.*, got 'odd'"),
        (lambda: nn.Linear(2, 2), 'even', {}, ValueError, 'must hold a LaViT, Linear holds none'),
        (small_lavit, 'even', {'stages': [4]}, ValueError, r'some of 0\.\.3, got \[4\]'),
        (small_lavit, 'even', {'stages': 1}, TypeError, 'sequence of integers, got 1'),
        (small_lavit, 'ar', {'stages': [0, 1]}, ValueError, r"how='ar' replaces, \[0\] have not"),
        (lambda: small_lavit(out_indices=(0,)), 'ar', {}, ValueError, 'all of the LaViT have not'),
        (small_lavit, 'mean', {}, ValueError, "mean must be a MeanAttention .* None for 'mean'"),
        (small_lavit, 'even', {'mean': MeanAttention()}, ValueError, 'None for any other'),
        (small_lavit, 'mean', {'mean': MeanAttention()}, ValueError, r'not seen stages\.0\.blocks'),
    ],
)
def test_says_what_cannot_be_replaced(model, how, options, error, message):
    model = model()
    before = state_of(model)
    with pytest.raises(error, match=message), replaced(model, how, **options):
        pass
    assert state_of(model) == before


@torch.no_grad()
def test_a_mean_is_of_images_of_one_size():
    model = small_lavit(window_sizes=WINDOWS)
    mean = mean_over(model, images(1, 3, 52, 74))
    sizes = '13 x 19 .* 13 x 20'
    with pytest.raises(ValueError, match=sizes), replaced(model, 'mean', mean=mean):
        model(images(1, 3, 52, 80))
    assert mean.refusal is None
    with recording(model, mean.see):
        model(images(1, 3, 52, 80))
    assert mean.refusal is not None
    with pytest.raises(ValueError, match=sizes), replaced(model, 'mean', mean=mean):
        pass
