"""Attention of Swin and PVT through their own modules, and what the meter makes of any model's."""

import math
from itertools import product

import pytest
import reference
import torch
from small import images, move_weights, seeded, sharpen, small_lavit
from test_measures import pairs_of
from torch import Tensor, nn

from mmlavit.analysis.measures import (
    alignment,
    centred_gram,
    cosine_similarity,
    diagonality,
    entropy,
    hsic,
    symmetry,
)
from mmlavit.analysis.peers import recording_any
from mmlavit.analysis.record import LayerAttention, recording
from mmlavit.analysis.saturation import SaturationMeter

WINDOW = 4


def swin(toolbox: str) -> nn.Module:
    """Two stages of two and three layers; maps of 24 x 40 pixels are padded in the second."""
    if toolbox == 'mmpretrain':
        from mmpretrain.models.backbones import SwinTransformer

        arch = dict(embed_dims=12, depths=[2, 3], num_heads=[2, 3])
        options = dict(arch=arch, pad_small_map=True, window_size=WINDOW, out_indices=(0, 1))
    else:
        if toolbox == 'mmdet':
            from mmdet.models.backbones.swin import SwinTransformer
        else:
            from mmseg.models.backbones.swin import SwinTransformer
        options = dict(embed_dims=12, depths=(2, 3), num_heads=(2, 3), window_size=WINDOW)
        options |= dict(strides=(4, 2), out_indices=(0, 1))
    return _moved(SwinTransformer(**options))


def pvt() -> nn.Module:
    """Four stages, of two, two, one and one layers; the first merges 2 x 2 keys."""
    from mmdet.models.backbones.pvt import PyramidVisionTransformerV2

    options = dict(num_layers=[2, 2, 1, 1], num_heads=[1, 2, 2, 2], sr_ratios=[2, 1, 1, 1])
    return _moved(PyramidVisionTransformerV2(embed_dims=8, mlp_ratios=[2] * 4, **options))


def _moved(model: nn.Module) -> nn.Module:
    """Weights far from their start, so that attention is far from even."""
    move_weights(model, seeded(0), scale=0.3)
    model.eval()
    return model


def record(model: nn.Module, x: Tensor) -> list[LayerAttention]:
    with recording_any(model) as layers, torch.no_grad():
        model(x)
    return layers


# ---- Recording -----------------------------------------------------------------------------------


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpretrain'])
def test_attention_of_swin_is_the_softmax_of_its_own_scores(toolbox):
    """For visible pairs of tokens, from the input of each layer: ``q k + bias``, up to a row."""
    model, x = swin(toolbox), images(2, 3, 24, 40).float()
    inputs = {}
    for name, module in model.named_modules():
        if type(module).__name__ == 'ShiftWindowMSA':
            module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: (module, *args)})
            )
    layers = record(model, x)
    assert [(found.stage, found.layer) for found in layers] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    kinds = ['window', 'shifted', 'window', 'shifted', 'window']
    assert [found.kind for found in layers] == kinds
    for found in layers:
        module, tokens, (height, width) = inputs[found.name]
        assert found.grid.shift == (WINDOW // 2 if found.kind == 'shifted' else 0)
        assert (height, width) == ((6, 10) if found.stage == 0 else (3, 5))
        msa = module.w_msa
        qkv = msa.qkv(tokens).unflatten(-1, (3, msa.num_heads, -1))
        q, k = qkv[:, :, 0] * msa.scale, qkv[:, :, 1]
        scores = torch.einsum('bihd,bjhd->bhij', q, k)
        attn, there = whole_maps(found)
        torch.testing.assert_close(attn.sum(-1) <= 1 + 1e-5, torch.ones_like(attn[..., 0]) > 0)
        side = 2 * WINDOW - 1
        for (ay, ax), (by, bx) in pairs_of(found.grid):
            i, j = ay * width + ax, by * width + bx
            assert there[i, j]
            place = (ay - by + WINDOW - 1) * side + ax - bx + WINDOW - 1
            scores[:, :, i, j] += msa.relative_position_bias_table[place]
        assert int(there.sum()) == len(pairs_of(found.grid))
        difference = (attn.log() - scores).masked_fill(~there, math.nan)
        spread = difference - difference.nanmean(dim=-1, keepdim=True)
        assert spread[..., there].abs().max() < 1e-4
        # Not for want of differences between the pairs.
        assert scores[..., there].std() > 0.1


def whole_maps(layer: LayerAttention) -> tuple[Tensor, Tensor]:
    """Attention of all pairs of tokens (B, heads, HW, HW), and which a window holds."""
    grid = layer.grid
    batch, _, heads = layer.attn.shape[:3]
    count = grid.height * grid.width
    whole = torch.zeros(batch, heads, count, count)
    there = torch.zeros(count, count, dtype=torch.bool)
    shift = getattr(grid, 'shift', 0)
    # Windows of the rolled map, counted as the toolboxes count them.
    cols = math.ceil(grid.width / grid.window)
    rows = math.ceil(grid.height / grid.window)

    def home(y: int, x: int) -> tuple[int, int]:
        y, x = (y - shift) % (rows * grid.window), (x - shift) % (cols * grid.window)
        window = y // grid.window * cols + x // grid.window
        return window, y % grid.window * grid.window + x % grid.window

    for a, b in pairs_of(grid):
        (window, i), (other, j) = home(*a), home(*b)
        assert window == other
        p, q = a[0] * grid.width + a[1], b[0] * grid.width + b[1]
        whole[:, :, p, q] = layer.attn[:, window, :, i, j]
        there[p, q] = True
    return whole, there


def test_attention_of_pvt_is_the_softmax_of_its_own_scores():
    model, x = pvt(), images(2, 3, 32, 48).float()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: inputs.update({name: (module, kwargs)}),
                with_kwargs=True,
            )
    layers = record(model, x)
    places = [(found.stage, found.layer) for found in layers]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)]
    shapes = [(2, 1, 1, 96, 24)] * 2 + [(2, 1, 2, 24, 24)] * 2 + [(2, 1, 2, 6, 6), (2, 1, 2, 2, 2)]
    assert [tuple(found.attn.shape) for found in layers] == shapes
    for found in layers:
        module, given = inputs[f'{found.name}.attn']
        weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        q, k = (
            (given[name] @ weights[i].mT + biases[i]).unflatten(-1, (module.num_heads, -1))
            for i, name in enumerate(('query', 'key'))
        )
        scores = torch.einsum('ibhd,jbhd->bhij', q, k) / math.sqrt(q.shape[-1])
        torch.testing.assert_close(found.attn[:, 0], scores.softmax(dim=-1), rtol=1e-4, atol=1e-6)
        assert scores.std() > 0.1


@pytest.mark.parametrize('build', [lambda: swin('mmdet'), lambda: swin('mmpretrain'), pvt])
@pytest.mark.parametrize('training', [False, True])
def test_outputs_are_the_same_bit_by_bit_and_the_model_is_left_as_it_was(build, training):
    model, x = build(), images(1, 3, 24, 40).float()
    model.train(training)
    outputs = []
    for recorded in (False, True, False):
        torch.manual_seed(0)  # of stochastic depth
        if recorded:
            with recording_any(model) as layers:
                outputs.append(model(x))
            assert layers
        else:
            outputs.append(model(x))
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            assert torch.equal(a, b)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_refuses_a_model_without_attention_that_it_knows():
    with pytest.raises(ValueError, match='LaViT, or a Swin or PVT.*Sequential holds none'):
        recording_any(nn.Sequential(nn.Conv2d(3, 4, 3)))


# ---- Measuring over images -----------------------------------------------------------------------


def numbers(model: nn.Module, *batches: Tensor, **options: int) -> list:
    meter = SaturationMeter(**options)
    for batch in batches:
        with recording_any(model, meter.see), torch.no_grad():
            model(batch)
        meter.end_batch()
    return meter.numbers()


def cut_out(layer: LayerAttention, image: int) -> list[Tensor]:
    """The maps (1, heads, k, k) of the windows of an image, their k real tokens alone."""
    grid = layer.grid
    found = []
    windows = reference.windows_of(grid.height, grid.width, grid.window)
    for index, window in enumerate(windows):
        tokens = reference.real_tokens(window, grid.height, grid.width, grid.window)
        places = [reference.place(token, grid.window) for token in tokens]
        found.append(layer.attn[image, index][:, places][:, :, places][None])
    return found


def test_numbers_of_a_lavit_are_means_over_images_of_what_real_tokens_attend_to():
    """20 x 12 tokens in windows of 8 and their halves: every stage pads, the last has 6 tokens."""
    x = images(3, 3, 80, 48)
    model = sharpen(small_lavit(), x)
    with recording(model) as layers, torch.no_grad():
        model(x)
    found = numbers(model, x)
    by_place = {(layer.stage, layer.layer): layer for layer in layers}
    assert [(n.stage, n.layer) for n in found] == list(by_place)
    assert [n.kind for n in found][:4] == ['vanilla', 'less', 'vanilla', 'less']
    for layer, value in zip(layers, found, strict=True):
        for name, measure in dict(
            diagonality=diagonality, symmetry=symmetry, entropy=entropy
        ).items():
            expected = []
            for image in range(3):
                maps = [measure(m).double() for m in cut_out(layer, image)]
                expected.append(torch.stack(maps).nanmean())
            expected = float(torch.stack(expected).mean())
            # They are float32, of values up to 1, and diagonality may come close to 0.
            rounding = torch.finfo(torch.float32).eps
            assert getattr(value, name) == pytest.approx(expected, rel=1e-5, abs=rounding)
        for other in range(len(value.cosine)):
            pair = by_place[layer.stage, other]
            maps = [
                torch.stack([cosine_similarity(a, b) for a, b in zip(*cuts, strict=True)]).mean()
                for cuts in ((cut_out(layer, i), cut_out(pair, i)) for i in range(3))
            ]
            assert value.cosine[other] == pytest.approx(float(sum(maps) / 3), rel=1e-5)
            grams = [
                [centred_gram(rows_of(one, image)) for one in (layer, pair)] for image in range(3)
            ]
            sums = [sum(hsic(g[i], g[j]) for g in grams) for i, j in ((0, 1), (0, 0), (1, 1))]
            assert value.cka[other] == pytest.approx(float(alignment(*sums)), rel=1e-5)


def rows_of(layer: LayerAttention, image: int) -> Tensor:
    """What each real token attends to, above even attention, (tokens, heads * n)."""
    grid = layer.grid
    rows = {}
    windows = reference.windows_of(grid.height, grid.width, grid.window)
    for index, window in enumerate(windows):
        tokens = reference.real_tokens(window, grid.height, grid.width, grid.window)
        places = [reference.place(token, grid.window) for token in tokens]
        for token, place in zip(tokens, places, strict=True):
            row = torch.zeros(layer.attn.shape[2], grid.window**2)
            row[:, places] = layer.attn[image, index, :, place][:, places] - 1 / len(places)
            rows[token] = row.flatten()
    return torch.stack([rows[token] for token in sorted(rows)])


def test_numbers_do_not_depend_on_how_images_are_batched():
    model, x = small_lavit(), images(3, 3, 40, 48)
    for a, b in zip(numbers(model, x), numbers(model, *x.split(1)), strict=True):
        assert (a.stage, a.layer, a.kind) == (b.stage, b.layer, b.kind)
        for name in ('diagonality', 'symmetry', 'entropy', 'cosine', 'cka'):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6)


def test_attention_that_is_reused_as_it_is_is_the_same_and_other_is_not():
    model = small_lavit()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(('psi', 'theta')):
                weight.copy_(torch.eye(len(weight)))
    reused = numbers(model, images(2, 3, 96, 96))
    less = [n for n in reused if n.kind == 'less']
    assert len(less) == 4
    for layer in less:
        assert layer.to_previous('cosine') == pytest.approx(1, abs=1e-5)
        assert layer.to_previous('cka') == pytest.approx(1, abs=1e-5)
    # The third stage has a second vanilla layer, which computes its own.
    (own,) = [n for n in reused if n.kind == 'vanilla' and n.layer == 1]
    assert own.to_previous('cka') < 0.9
    assert all(n.to_previous('cosine') is None for n in reused if n.layer == 0)


def test_fewer_queries_estimate_the_same():
    model, x = small_lavit(), images(6, 3, 96, 96)
    every, some = (numbers(model, x, queries=queries) for queries in (576, 200))
    for a, b in zip(every, some, strict=True):
        assert a.cosine == b.cosine
        assert b.cka == pytest.approx(a.cka, abs=0.1)
    assert any(a.cka != b.cka for a, b in zip(every, some, strict=True))


def test_swins_shifted_layers_are_compared_on_the_pairs_that_both_see():
    model, x = swin('mmdet'), images(2, 3, 24, 40).float()
    layers = {(layer.stage, layer.layer): layer for layer in record(model, x)}
    found = {(n.stage, n.layer): n for n in numbers(model, x)}
    for stage, i, j in [(0, 0, 1), (1, 0, 1), (1, 1, 2), (1, 0, 2)]:
        a, b = layers[stage, i], layers[stage, j]
        (maps_a, there_a), (maps_b, there_b) = whole_maps(a), whole_maps(b)
        shared = there_a & there_b
        # Tokens that see the same others in both layers are a cell.
        cells = {tuple(row.nonzero()[:, 0].tolist()) for row in shared}
        assert sum(map(len, cells)) == len(shared)
        per_image = []
        for image, _ in enumerate(x):
            cosines = []
            for cell, head in product(cells, range(maps_a.shape[1])):
                u, v = (m[image, head][list(cell)][:, list(cell)] for m in (maps_a, maps_b))
                u, v = (m / m.sum(-1, keepdim=True) for m in (u, v))
                cosines.append(torch.cosine_similarity(u.flatten(), v.flatten(), dim=0))
            per_image.append(sum(cosines) / len(cosines))
        expected = float(sum(per_image) / len(per_image))
        assert found[stage, i].cosine[j] == pytest.approx(expected, rel=1e-5)
        assert found[stage, j].cosine[i] == pytest.approx(expected, rel=1e-5)


def test_maps_of_pvt_that_are_not_square_have_no_diagonal():
    found = numbers(pvt(), images(1, 3, 32, 48).float())
    assert [n.diagonality is None for n in found] == 2 * [True] + 4 * [False]
    assert [n.symmetry is None for n in found] == 2 * [True] + 4 * [False]
    assert all(0 < n.entropy < 1 for n in found)
    assert all(0 < n.cosine[1 - n.layer] < 1 for n in found[:4])


def test_a_map_of_fewer_tokens_than_cka_needs_has_none():
    found = numbers(small_lavit(), images(2, 3, 32, 32))
    last = [n for n in found if n.stage == 3]
    assert {n.cka for n in last} == {(None, None)}
    assert {(n.diagonality, n.symmetry, n.entropy) for n in last} == {(None, None, None)}
    assert all(n.cosine == (pytest.approx(1), pytest.approx(1)) for n in last)
    assert all(None not in n.cka for n in found if n.stage < 3)


def test_the_meter_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match='queries must be at least 4, got 3'):
        SaturationMeter(queries=3)
    with pytest.raises(ValueError, match='no attention has been recorded'):
        SaturationMeter().numbers()
