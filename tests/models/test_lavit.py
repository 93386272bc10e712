"""The whole backbone: against both references, its options, its limits."""

import inspect
import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.analysis import get_model_complexity_info
from small import ARCH, images, seeded, sharpen, small_lavit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmlavit import ARCHS, LaViT
from mmlavit.models.attention import LessAttention
from mmlavit.models.block import DropPath
from mmlavit.models.windows import WindowGrid
from mmlavit.ops import inference

STRIDES = (4, 8, 16, 32)
STEM, OVERLAP = dict(conv_stem=True), dict(overlap_downsample=True)
MIX = dict(mix_ffn=True)


def assert_maps(ours, theirs, tol):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol)


# ---- Against the references ----------------------------------------------------------------------


@torch.no_grad()
def assert_is_the_reference(x, window_sizes=(8, 8, 8, 8), **options):
    """A model far from even attention, in float64 and in float32."""
    model = sharpen(small_lavit(window_sizes=window_sizes, **options), x)
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, x = model.to(dtype), x.to(dtype)
        expected = reference.lavit(x, model.state_dict(), ARCH['num_heads'], window_sizes)
        assert_maps(model(x), expected, tol)


@pytest.mark.parametrize(
    'window_sizes, size',
    [
        ((8, 8, 8, 8), (64, 64)),
        ((8, 8, 8, 8), (37, 50)),
        ((8, 8, 8, 8), (5, 90)),
        ((14, 14, 14, 7), (56, 56)),
        ((14, 14, 14, 7), (61, 43)),
        ((4, 8, 8, 4), (33, 47)),
        ((2, 4, 6, 3), (21, 30)),
    ],
)
@pytest.mark.parametrize('out_indices', [(0, 1), (0, 1, 2, 3)])
def test_forward_is_the_naive_reference(window_sizes, size, out_indices):
    assert_is_the_reference(images(2, 3, *size), window_sizes, out_indices=out_indices)


@pytest.mark.parametrize('vanilla_depths', [(2, 2, 3, 2), (1, 2, 2, 1)])
def test_other_mixes_of_layers_are_the_reference_too(vanilla_depths):
    arch = {**ARCH, 'vanilla_depths': vanilla_depths}
    assert_is_the_reference(images(1, 3, 45, 70), arch=arch, qkv_bias=False)


@pytest.mark.parametrize(
    'size, out_indices',
    [((1, 1), (0, 1, 2, 3)), ((6, 90), (3,)), ((37, 51), (0, 2)), ((64, 64), (0, 1, 2, 3))],
)
@pytest.mark.parametrize('options', [STEM, OVERLAP, MIX, STEM | OVERLAP | MIX], ids=' and '.join)
def test_the_options_are_the_references(options, size, out_indices):
    assert_is_the_reference(images(2, 3, *size), out_indices=out_indices, **options)


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, STEM, OVERLAP, STEM | OVERLAP | MIX], ids=' and '.join)
def test_windows_over_the_whole_image_are_the_paper_to_the_letter(options):
    """But for the options, which are not the paper's."""
    x = images(2, 3, 64, 64)
    model = sharpen(small_lavit(window_sizes=(16, 8, 4, 2), **options), x)
    expected = reference.lavit_whole_image(x, model.state_dict(), ARCH['num_heads'])
    assert_maps(model(x), expected, 1e-10)


@pytest.mark.parametrize('options', [{}, STEM | OVERLAP | MIX], ids=' and '.join)
def test_gradients_are_those_of_the_reference(options):
    x = images(1, 3, 40, 24)
    model = sharpen(small_lavit(out_indices=(0, 1), **options), x)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    theirs = reference.lavit(x, weights, ARCH['num_heads'], (8, 8, 8, 8))
    ours = model(x)
    factors = [images(*m.shape, seed=i) for i, m in enumerate(ours)]
    sum((m * f).sum() for m, f in zip(ours, factors, strict=True)).backward()
    sum((m * f).sum() for m, f in zip(theirs, factors, strict=True)).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10, msg=name)


# ---- Padding, batches, sizes ---------------------------------------------------------------------


@pytest.mark.parametrize('size', [(1, 1), (5, 1), (2, 3), (40, 6)])
def test_gradients_are_set_where_weights_meet_padding_alone(size):
    """Some convolutions of PyTorch leave there what was in memory before."""
    model = small_lavit(**STEM, **OVERLAP).bfloat16().train()
    x = images(1, 3, *size).bfloat16()
    for _ in range(5):
        model.zero_grad()
        outs = model(x)
        garbage = [torch.full((2**i,), math.nan).bfloat16() for i in range(4, 17)]
        del garbage
        sum(m.float().square().mean() for m in outs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('with_gradients', [True, False])
@pytest.mark.parametrize('size', [(37, 50), (100, 36), (4, 4)])
def test_what_stands_at_padded_positions_changes_nothing(size, with_gradients, monkeypatch):
    model = small_lavit()
    x = images(2, 3, *size)
    poisoned = []

    def poison(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Q and K must be 0 at padded tokens, V is poisoned."""

        def partition(grid: WindowGrid, *args: object) -> Tensor:
            parts = original(grid, *args).clone()
            padded = ~grid.valid()[:, None, :, None]
            last = parts[-1].unflatten(0, (-1, len(padded))).masked_fill(padded, 1e4).flatten(0, 1)
            poisoned.append(grid.padded)
            return torch.cat([parts[:-1], last[None]])

        return partition

    with torch.set_grad_enabled(with_gradients):
        expected = model(x)
        for owner, name in ((WindowGrid, 'partition'), (inference, 'pad_and_partition')):
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
        assert_maps(model(x), expected, 1e-12)
    assert any(poisoned)


@torch.no_grad()
def test_an_image_does_not_see_its_batch_mates():
    model = small_lavit()
    x = images(3, 3, 52, 41)
    x[0] *= 1e3
    x[2] = 0
    for i, alone in enumerate(x.split(1)):
        assert_maps([m[i : i + 1] for m in model(x)], model(alone), 1e-10)


SIZE_MODELS = [
    LaViT({**ARCH, 'depths': (1, 2, 2, 2), 'vanilla_depths': (1, 1, 1, 1)}, **options)
    for options in ({}, STEM | OVERLAP)
]


@settings(max_examples=40, deadline=None, print_blob=True)
@given(
    st.sampled_from(SIZE_MODELS),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 2),
    st.booleans(),
)
def test_any_size_in_training_and_evaluation(model, height, width, batch, training):
    model.train(training)
    x = torch.randn(batch, 3, height, width)
    with torch.set_grad_enabled(training):
        maps = model(x)
    for m, stride, dims in zip(maps, STRIDES, ARCH['embed_dims'], strict=True):
        assert m.shape == (batch, dims, math.ceil(height / stride), math.ceil(width / stride))
        assert m.isfinite().all() and m.is_contiguous()
    if training:
        model.zero_grad()
        sum(m.square().mean() for m in maps).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('options', [{}, STEM | OVERLAP], ids=' and '.join)
def test_memory_formats_do_not_matter(training, options):
    model = small_lavit(**options).train(training)
    x = images(2, 3, 44, 36)
    expected = model(x)
    wide = images(2, 3, 44, 72)
    wide[..., ::2] = x
    for given_x in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        wide[..., ::2],
    ):
        maps = model(given_x)
        assert all(m.is_contiguous() for m in maps)
        assert_maps(maps, expected, 1e-10)


# ---- Options -------------------------------------------------------------------------------------


def test_signature_is_what_users_of_openmmlab_expect():
    defaults = {k: p.default for k, p in inspect.signature(LaViT).parameters.items()}
    assert defaults == dict(
        arch='small',
        in_channels=3,
        window_sizes=(8, 8, 8, 8),
        out_indices=(0, 1, 2, 3),
        conv_stem=None,
        overlap_downsample=None,
        mix_ffn=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.1,
        qkv_bias=True,
        frozen_stages=-1,
        with_cp=False,
        fused_attention='auto',
        init_cfg=None,
    )


class Classifier(nn.Module):
    """The paper's classifier: mean over the last map, then a linear layer to 1000 classes."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.backbone = LaViT(arch, out_indices=(3,))
        self.head = nn.Linear(self.backbone.arch.embed_dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1].mean((2, 3)))


@pytest.mark.parametrize(
    'arch, params, flops', [('tiny', 10.9, 1.6), ('small', 22.4, 3.3), ('base', 39.6, 6.1)]
)
def test_sizes_and_costs_are_the_papers(arch, params, flops):
    model = Classifier(arch).eval()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(params, rel=0.025)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    # Torch counts a multiplication and an addition as two, the paper (as MMEngine) as one. Windows
    # of 8 are padded at 224, and padded tokens are not projected: that is up to a tenth less.
    info = get_model_complexity_info(model, (3, 224, 224), show_table=False, show_arch=False)
    for found in (counter.get_total_flops() / 2e9, info['flops'] / 1e9):
        assert 0.9 * flops < found < 1.05 * flops


def test_nano_has_about_three_million_parameters():
    assert 2.5e6 < sum(p.numel() for p in LaViT('nano').parameters()) < 3.6e6


@pytest.mark.parametrize('name', ARCHS)
def test_an_arch_by_name_is_the_same_by_dict(name):
    arch = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(ARCHS[name]).items()}
    by_name, by_dict = LaViT(name), LaViT(arch)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (by_name, by_dict)]
    assert shapes[0] == shapes[1]
    assert by_dict.arch.name == name


def kernels(model: LaViT) -> dict[str, set[int]]:
    """Sides of the kernels that embed the image, that come between stages, and in MLPs."""
    sides = {'patch_embed': set(), 'downsample': set(), 'mlp': set()}
    for name, weight in model.state_dict().items():
        (place,) = [p for p in sides if p in name.split('.')] or [None]
        if place and weight.ndim == 4:
            sides[place].add(weight.shape[-1])
    return sides


PAPERS = dict(patch_embed={4}, downsample={2}, mlp=set())
WITH_STEM = PAPERS | dict(patch_embed={3})


@pytest.mark.parametrize(
    'arch, options, expected',
    [
        ('tiny', {}, PAPERS),
        ('small', {}, PAPERS),
        ('base', {}, PAPERS),
        (ARCH, {}, PAPERS),
        ('nano', {}, WITH_STEM | dict(mlp={3})),
        ('nano', dict(conv_stem=False, mix_ffn=False), PAPERS),
        ('tiny', STEM, WITH_STEM),
        ('tiny', OVERLAP, PAPERS | dict(downsample={3})),
        ('tiny', MIX, PAPERS | dict(mlp={3})),
        ('tiny', STEM | OVERLAP, WITH_STEM | dict(downsample={3})),
        ({**ARCH, **STEM}, {}, WITH_STEM),
        ({**ARCH, **MIX}, {}, PAPERS | dict(mlp={3})),
        ({**ARCH, **STEM, **OVERLAP}, dict(overlap_downsample=False), WITH_STEM),
    ],
)
def test_options_are_the_archs_unless_given(arch, options, expected):
    assert kernels(LaViT(arch, **options)) == expected


def test_a_stem_is_built_for_a_single_channel():
    model = LaViT({**ARCH, 'embed_dims': (1, 2, 3, 4)}, **STEM)
    assert model(torch.zeros(1, 3, 9, 9))[0].shape == (1, 1, 3, 3)


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (3,), (0, 1, 2, 3)])
def test_out_indices_build_what_they_need_and_nothing_else(out_indices):
    model = small_lavit(out_indices=out_indices)
    whole = small_lavit()
    own = model.state_dict()
    whole.load_state_dict({**whole.state_dict(), **own})
    x = images(1, 3, 40, 72)
    assert_maps(model(x), [whole(x)[i] for i in out_indices], 1e-12)
    assert {k.split('.')[1] for k in own if k.startswith('stages.')} == {
        str(m) for m in range(out_indices[-1] + 1)
    }
    assert {k.split('.')[0] for k in own if k.startswith('norm')} == {
        f'norm{m}' for m in out_indices
    }
    sum(images(*m.shape).mul(m).sum() for m in model(x)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, f'no gradient reaches {idle}'


def test_gradients_reach_psi_theta_the_residual_and_layer_scale_from_the_start():
    torch.manual_seed(0)
    model = LaViT(ARCH).train()
    sum(torch.randn_like(m).mul(m).sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    watched = ('psi', 'theta', 'dwconv.weight', 'pwconv.weight', 'layer_scale')
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith(watched)}
    assert len(grads) == 2 * 4 + 3 * 3
    assert all(g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
@pytest.mark.parametrize('options', [{}, STEM | OVERLAP], ids=' and '.join)
def test_frozen_stages(frozen_stages, options):
    model = small_lavit(frozen_stages=frozen_stages, drop_rate=0.5, **options).train()
    frozen = ['patch_embed.'] * (frozen_stages >= 0)
    frozen += [f'{kind}{m}.' for m in range(frozen_stages) for kind in ('stages.', 'norm')]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = images(2, 3, 40, 40)
    outs = model(x)
    if frozen_stages < 4:
        sum(images(*m.shape).mul(m).sum() for m in outs).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
    for name, parameter in model.named_parameters():
        held = name.startswith(tuple(frozen))
        assert parameter.requires_grad is not held, name
        assert (parameter.grad is None) is held, name
        assert torch.equal(parameter, before[name]) is held, name
    for name, module in model.named_modules():
        if name and not list(module.children()):
            assert module.training is not (name + '.').startswith(tuple(frozen)), name
    # In training a frozen stage has no dropout, so its maps do not change from run to run.
    for m, (a, b) in enumerate(zip(model(x), model(x), strict=True)):
        assert torch.equal(a, b) is (m < frozen_stages)


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_with_cp_changes_memory_and_nothing_else(drop_path_rate):
    grads, maps = [], []
    for with_cp in (False, True):
        model = small_lavit(with_cp=with_cp, drop_path_rate=drop_path_rate).train()
        torch.manual_seed(3)
        maps.append(model(images(2, 3, 40, 56)))
        sum(images(*m.shape).mul(m).sum() for m in maps[-1]).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert_maps(*maps, 0)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-12, msg=name)


def test_with_cp_really_recomputes():
    calls = []
    model = small_lavit(with_cp=True).train()
    model.stages[2].blocks[0].norm2.register_forward_hook(lambda *_: calls.append(1))
    sum(m.sum() for m in model(images(1, 3, 32, 32))).backward()
    assert len(calls) == 2


def test_drop_path_grows_linearly_to_its_rate():
    model = LaViT(ARCH, drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(9)])


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    seeded(0)
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop(x).flatten(1)
    kept = out[:, 0] != 0
    assert torch.equal(out, kept[:, None].expand_as(out) / 0.75)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
    assert drop.eval()(x) is x


@pytest.mark.parametrize('option', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_dropouts_act_in_training_alone(option):
    model = small_lavit(**{option: 0.5})
    plain = small_lavit()
    x = images(2, 3, 40, 40)
    assert_maps(model(x), plain(x), 1e-12)
    model.train()
    assert not torch.equal(model(x)[-1], model(x)[-1])


def test_other_input_channels():
    assert small_lavit(in_channels=5)(images(1, 5, 32, 32))[0].shape == (1, 16, 8, 8)


# ---- What optimisers ask -------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, STEM | OVERLAP], ids=' and '.join)
def test_layer_depth_follows_the_forward_pass(options):
    model = LaViT(ARCH, **options)
    num_layers = sum(ARCH['depths']) + 2
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (num_layers - 1, num_layers)
    assert model.get_layer_depth('backbone.norm3.bias', 'backbone.')[0] == num_layers - 1
    embedding = [name for name in model.state_dict() if name.startswith('patch_embed.')]
    assert {model.get_layer_depth(name) for name in embedding} == {(0, num_layers)}
    layer = 0
    for m, stage in enumerate(model.stages):
        if m:
            assert model.get_layer_depth(f'stages.{m}.downsample.proj.weight')[0] == layer
            assert (
                model.get_layer_depth(f'stages.{m}.attention_residual.layer_scale')[0] == layer + 1
            )
        for i in range(len(stage.blocks)):
            layer += 1
            assert model.get_layer_depth(f'stages.{m}.blocks.{i}.attn.proj.weight')[0] == layer
    assert layer == num_layers - 2


def test_mmpretrains_layer_decay_reaches_every_parameter():
    pytest.importorskip('mmpretrain')
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier
    from mmpretrain.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = ImageClassifier(
            backbone=dict(type='LaViT', arch=ARCH, out_indices=(3,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=64),
        )
        wrapper = build_optim_wrapper(
            model,
            dict(
                optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
                constructor='LearningRateDecayOptimWrapperConstructor',
                paramwise_cfg=dict(layer_decay_rate=0.5),
            ),
        )
    rates = {g['param_name']: g['lr'] for g in wrapper.optimizer.param_groups}
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates['head.fc.weight'] == 1.0
    assert rates['backbone.patch_embed.proj.weight'] == 0.5 ** (sum(ARCH['depths']) + 1)
    depths = [0.5 ** (9 - sum(ARCH['depths'][:m])) for m in range(4)]
    assert [rates[f'backbone.stages.{m}.blocks.0.attn.qkv.weight'] for m in range(4)] == depths


def test_weights_start_at_their_scale_and_are_reproducible():
    """Features and scores of 1 from any width; what is written to the tokens falls with depth."""
    first, second = [], []
    for weights in (first, second):
        torch.manual_seed(4)
        model = LaViT('base')
        model.init_weights()
        weights += model.state_dict().items()
    assert all(a == b and torch.equal(v, w) for (a, v), (b, w) in zip(first, second, strict=True))
    for depth, stage in zip(model.depths, model.stages, strict=True):
        share = min(1, math.sqrt(3 / depth))
        for name, module in stage.blocks.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(('proj', 'fc2'))
                expected = share * 0.02 if writes else module.in_features**-0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
                assert module.weight.abs().max() < 7 * expected, name
                assert module.bias is None or not module.bias.any()
    for module in model.modules():
        if isinstance(module, LessAttention):
            assert torch.equal(module.psi, torch.eye(64)) and torch.equal(
                module.theta, torch.eye(64)
            )


@pytest.mark.parametrize(
    'given, same',
    [
        (dict(out_indices=3), dict(out_indices=(3,))),
        (dict(out_indices=(-1,)), dict(out_indices=(3,))),
        (dict(out_indices=[1, -1]), dict(out_indices=(1, 3))),
        (dict(out_indices=np.array([0, 2])), dict(out_indices=(0, 2))),
        (dict(window_sizes=4), dict(window_sizes=(4, 4, 4, 4))),
        (dict(window_sizes=np.int64(4)), dict(window_sizes=(4, 4, 4, 4))),
        (dict(window_sizes=np.array([8, 8, 4, 4])), dict(window_sizes=(8, 8, 4, 4))),
        (dict(frozen_stages=np.int32(2)), dict(frozen_stages=2)),
        (dict(in_channels=np.int64(3)), dict(in_channels=3)),
    ],
)
def test_takes_what_the_field_takes(given, same):
    torch.manual_seed(0)
    lenient = LaViT(ARCH, **given)
    torch.manual_seed(0)
    plain = LaViT(ARCH, **same)
    for name in ('out_indices', 'window_sizes', 'frozen_stages', 'in_channels'):
        value = getattr(lenient, name)
        assert value == getattr(plain, name) and 'numpy' not in str(type(value)), name
    x = images(1, 3, 40, 24).float()
    assert all(map(torch.equal, lenient.eval()(x), plain.eval()(x)))


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 3), 2])
def test_says_what_its_maps_are(out_indices):
    model = LaViT(ARCH, out_indices=out_indices)
    maps = model(torch.zeros(1, 3, 64, 96))
    assert model.out_channels == tuple(m.shape[1] for m in maps)
    assert [(64 // s, 96 // s) for s in model.strides] == [tuple(m.shape[2:]) for m in maps]


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 3), 2])
def test_says_what_its_maps_are_in_timms_words(out_indices):
    """The module that is named gives the map itself, with channels last."""
    model = LaViT(ARCH, out_indices=out_indices)
    info = model.feature_info
    outputs = {}
    for name in info.module_name():
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    maps = model(torch.zeros(1, 3, 64, 96))
    assert len(info) == len(maps)
    for level, m in zip(info, maps, strict=True):
        assert (level['num_chs'], 64 // level['reduction']) == tuple(m.shape[1:3])
        assert torch.equal(outputs[level['module']].permute(0, 3, 1, 2), m)


def test_feature_info_answers_as_timms_own():
    timm = pytest.importorskip('timm', reason='timm is what it is compared with')
    ours = LaViT(ARCH, out_indices=(0, 2, 3)).feature_info
    theirs = timm.models.FeatureInfo([dict(level) for level in ours], out_indices=(0, 1, 2))
    assert len(ours) == len(theirs) and ours[-1]['num_chs'] == theirs[-1]['num_chs']
    for ask in ('channels', 'reduction', 'module_name'):
        for idx in (None, 1, -1, [2, 0], (1,)):
            assert getattr(ours, ask)(idx) == getattr(theirs, ask)(idx)
    # As a network of timm's answers whose maps have the same strides.
    names = dict(features_only=True, out_indices=(0, 2, 3), pretrained=False)
    peer = timm.create_model('swin_tiny_patch4_window7_224', **names).feature_info
    assert peer.reduction() == ours.reduction() and type(peer[0]) is type(ours[0])
