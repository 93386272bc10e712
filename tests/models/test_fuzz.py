"""Models and images drawn at random, against the naive reference.

``FUZZ_SEED=n`` repeats the run whose seed was printed.
"""

import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import reference
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from small import STD, STEEP, allowed, largest, largest_difference, move_weights, sharpen
from torch import Tensor

from mmlavit import LaViT
from mmlavit.models.block import ConvStem, PatchEmbed
from mmlavit.models.mlp import MLP
from mmlavit.models.windows import WindowGrid
from mmlavit.ops import inference
from mmlavit.ops.pieces import Slab, cut_into_slabs

STAGES = 4

PRECISIONS = {
    'float64': torch.float64,
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'autocast': torch.bfloat16,
}
EXACT = 1e-9  # of the largest value, in float64


@dataclass(frozen=True)
class Case:
    """A model, an image and how the one is applied to the other."""

    arch: dict[str, tuple]
    window_sizes: tuple[int, ...]
    out_indices: tuple[int, ...]
    in_channels: int
    conv_stem: bool
    overlap_downsample: bool
    mix_ffn: bool
    qkv_bias: bool
    frozen_stages: int
    with_cp: bool
    shape: tuple[int, int, int]
    precision: str
    layout: str
    channels_last_model: bool
    training: bool
    grad: str
    slab_tokens: int
    std: float
    seed: int

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return self.grad in ('weights', 'weights and images')

    def model(self) -> LaViT:
        """The model, in the precision of its weights."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = LaViT(
                self.arch,
                self.in_channels,
                self.window_sizes,
                self.out_indices,
                self.conv_stem,
                self.overlap_downsample,
                self.mix_ffn,
                drop_path_rate=0.0,
                qkv_bias=self.qkv_bias,
                frozen_stages=self.frozen_stages,
                with_cp=self.with_cp,
            ).double()
        move_weights(model, torch.Generator().manual_seed(self.seed), 0.15)
        sharpen(model.eval(), self.images(), self.std)
        if self.channels_last_model:
            model.to(memory_format=torch.channels_last)
        dtype = torch.float32 if self.precision == 'autocast' else PRECISIONS[self.precision]
        return model.to(dtype).train(self.training)

    def images(self) -> Tensor:
        """Normal noise in float64, NCHW-contiguous."""
        batch, height, width = self.shape
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = 1 if self.layout == 'expanded' else batch, self.in_channels, height, width
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.expand(batch, -1, -1, -1).contiguous()

    def context(self) -> AbstractContextManager:
        """Whether gradients are recorded."""
        if self.grad == 'inference mode':
            return torch.inference_mode()
        return torch.set_grad_enabled(self.grad != 'no_grad')

    def autocast(self) -> AbstractContextManager:
        """Autocast to bfloat16, if that is the precision."""
        if self.precision == 'autocast':
            return torch.autocast('cpu', torch.bfloat16)
        return nullcontext()

    def kinds(self) -> list[str]:
        """What makes this case different from others, to count."""
        batch, rows, cols = self.shape
        stages = range(self.out_indices[-1] + 1)
        sides = [(-(-rows // (4 * 2**m)), -(-cols // (4 * 2**m))) for m in stages]
        windows = self.window_sizes
        kinds = [self.precision, self.layout, self.grad]
        kinds += ['train' if self.training else 'eval']
        flags = ('with_cp', 'channels_last_model', 'conv_stem', 'overlap_downsample', 'mix_ffn')
        kinds += [name for name in flags if getattr(self, name)]
        kinds += ['frozen'] if self.frozen_stages >= 0 else []
        kinds += ['no qkv_bias'] if not self.qkv_bias else []
        kinds += ['batch'] if batch > 1 else []
        depths, vanilla = self.arch['depths'], self.arch['vanilla_depths']
        kinds += ['less attention'] if any(depths[m] > vanilla[m] for m in stages) else []
        kinds += ['two vanilla'] if any(vanilla[m] > 1 for m in stages) else []
        kinds += [f'ratio {2 * windows[m] // windows[m - 1]}' for m in stages[1:]]
        kinds += ['odd window'] if windows[stages[-1]] % 2 else []
        for (height, width), window in zip(sides, windows, strict=False):
            kinds += ['padded' if height % window or width % window else 'whole windows']
        grid = WindowGrid(*sides[0], windows[0])
        if not self.training and self.grad in ('no_grad', 'inference mode'):
            kinds += [
                'slabs' if len(cut_into_slabs(grid, batch, self.slab_tokens)) > 1 else 'one slab'
            ]
        return sorted(set(kinds))


@st.composite
def window_chains(draw: st.DrawFn) -> tuple[int, ...]:
    """Windows that nest: each a multiple of half the one before, even but for the last."""
    windows = [draw(st.sampled_from([2, 2, 2, 4, 4, 6, 8, 14]))]
    while len(windows) < STAGES:
        half = windows[-1] // 2
        last = len(windows) == STAGES - 1
        fitting = [w for w in range(half, 15, half) if last or w % 2 == 0]
        windows.append(draw(st.sampled_from(fitting)))
    return tuple(windows)


@st.composite
def archs(draw: st.DrawFn) -> dict[str, tuple]:
    """Small dims; an MLP has at least one hidden channel.

    At least four channels: of two, LayerNorm gives a sign, which any rounding may turn.
    """

    def per_stage(values: st.SearchStrategy) -> tuple:
        return draw(st.tuples(*[values] * STAGES))

    heads = per_stage(st.sampled_from([1, 1, 1, 2, 2, 3]))
    of_head = per_stage(st.integers(2, 6))
    dims = tuple(h * max(d, math.ceil(4 / h)) for h, d in zip(heads, of_head, strict=True))
    depths = per_stage(st.sampled_from([1, 2, 2, 3]))
    return dict(
        embed_dims=dims,
        num_heads=heads,
        depths=depths,
        vanilla_depths=tuple(draw(st.integers(1, depth)) for depth in depths),
        mlp_ratios=per_stage(st.sampled_from([0.5, 1, 1.7, 3])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """All that the backbone promises to take, small enough for the reference."""
    without = ['no_grad', 'inference mode']
    grad = draw(st.sampled_from([*without, *without, 'recorded', 'weights', 'weights and images']))
    # Patches over the whole batch; the reference takes them one by one.
    most = 14 if grad.startswith('weights') else 40
    height = draw(st.integers(1, 80))
    width = draw(st.integers(1, min(80, 4 * max(1, most // math.ceil(height / 4)))))
    batch = draw(
        st.integers(1, min(3, max(1, most // (math.ceil(height / 4) * math.ceil(width / 4)))))
    )
    return Case(
        arch=draw(archs()),
        window_sizes=draw(window_chains()),
        out_indices=tuple(sorted(draw(st.sets(st.integers(0, STAGES - 1), min_size=1)))),
        in_channels=draw(st.integers(1, 5)),
        conv_stem=draw(st.booleans()),
        overlap_downsample=draw(st.booleans()),
        mix_ffn=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        frozen_stages=draw(st.sampled_from([-1, -1, -1, 0, 1, 2, 3, 4])),
        with_cp=draw(st.booleans()),
        shape=(batch, height, width),
        precision=draw(st.sampled_from(['float64', *PRECISIONS])),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        channels_last_model=draw(st.booleans()),
        training=draw(st.booleans()),
        grad=grad,
        # Images this small would otherwise always be one slab.
        slab_tokens=draw(st.sampled_from([inference.SLAB_TOKENS, 30, 10, 1])),
        std=draw(st.sampled_from([STD, STD, STEEP])),
        seed=draw(st.integers(0, 2**31)),
    )


def every_other_pixel(x: Tensor) -> Tensor:
    """A view of every other pixel and row of a larger image."""
    larger = x.new_full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), math.nan)
    larger[..., ::2, 1::2] = x
    return larger[..., ::2, 1::2]


def crop(x: Tensor) -> Tensor:
    """A view of the middle of a larger image with more channels."""
    larger = x.new_full((len(x), x.shape[1] + 2, x.shape[2] + 4, x.shape[3] + 3), math.nan)
    larger[:, 1:-1, 3:-1, 1:-2] = x
    return larger[:, 1:-1, 3:-1, 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'every other pixel': every_other_pixel,
    'crop': crop,
    'batch last': lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    'turned': lambda x: x.mT.contiguous().mT,
    'expanded': lambda x: x[:1].expand_as(x),
}


def by_the_reference(
    case: Case, weights: dict[str, Tensor], images: Tensor, trainable: list[str], dtype: torch.dtype
) -> list[Tensor]:
    """Maps, then gradients if the case asks for them, of the reference in ``dtype``, as float64."""
    weights = {name: w.to(dtype) for name, w in weights.items()}
    images = images.to(dtype)
    sources = [weights[name].requires_grad_(case.backward) for name in trainable]
    if case.grad == 'weights and images':
        sources.append(images.requires_grad_())
    with torch.set_grad_enabled(case.backward):
        maps = reference.lavit(images, weights, case.arch['num_heads'], case.window_sizes)
    return results(case, maps, sources)


def results(case: Case, maps: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    """Maps, then gradients of a random sum of them, as float64."""
    grads = []
    if case.backward and sources:
        generator = torch.Generator().manual_seed(case.seed + 2)
        factors = [torch.randn(m.shape, generator=generator).to(m.dtype) for m in maps]
        # Maps of frozen stages have none.
        learned = [mf for mf in zip(maps, factors, strict=True) if mf[0].requires_grad]
        grads = torch.autograd.grad([m for m, _ in learned], sources, [f for _, f in learned])
    return [t.detach().double() for t in (*maps, *grads)]


def check(case: Case) -> None:
    """The case's model computes what the reference does and leaves its input alone."""
    model, images = case.model(), case.images()
    weights = {name: w.detach().double() for name, w in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    sources = [p for p in model.parameters() if p.requires_grad]
    dtype = sources[0].dtype if sources else next(model.parameters()).dtype
    images = images.to(dtype)
    x = LAYOUTS[case.layout](images.clone())
    if case.grad == 'weights and images':
        x = x.detach().requires_grad_()
        sources.append(x)

    with mock.patch.object(inference, 'SLAB_TOKENS', case.slab_tokens):
        with case.context(), case.autocast():
            maps = model(x)
        ours = results(case, maps, sources)

    assert torch.equal(x, images), 'the images changed'
    after = model.state_dict()
    assert all(torch.equal(after[name].double(), w) for name, w in weights.items()), 'weights moved'
    assert all(m.is_contiguous() for m in maps), 'RoIAlign needs contiguous maps'

    exact = by_the_reference(case, weights, images.double(), trainable, torch.float64)
    low = PRECISIONS[case.precision]
    rough = exact
    if low != torch.float64:
        rough = by_the_reference(case, weights, images.double(), trainable, low)

    def nudged() -> Iterator[list[Tensor]]:
        """Of the reference in ``low``, all that it is given moved by a rounding, eight times."""
        generator = torch.Generator().manual_seed(case.seed + 3)

        def nudge(t: Tensor) -> Tensor:
            signs = torch.randint(-1, 2, t.shape, generator=generator)
            return t * (1 + torch.finfo(low).eps * signs.double())

        for _ in range(8):
            moved = {name: nudge(w) for name, w in weights.items()}
            yield by_the_reference(case, moved, nudge(images.double()), trainable, low)

    assert [t.shape for t in ours] == [t.shape for t in exact]
    num_maps = len(case.out_indices)
    names = [f'map {m}' for m in case.out_indices] + [f'gradient of {n}' for n in trainable]
    # Maps with maps, gradients with gradients: a gradient may be 0 but for rounding.
    for part in (slice(0, num_maps), slice(num_maps, None)):
        if not exact[part]:
            continue
        error = largest_difference(ours[part], exact[part])
        if low == torch.float64:
            limit = EXACT * largest(exact[part])
        else:
            limit = allowed(exact[part], rough[part], low)
            if error > limit:
                # A LayerNorm over four channels may multiply a rounding by any number, and one
                # run of the reference does not show by which.
                limit = max(allowed(exact[part], moved[part], low) for moved in nudged())
        worst = max(
            zip(ours[part], exact[part], [*names, 'gradient of images'][part], strict=False),
            key=lambda t: largest([t[0] - t[1]]),
        )[2]
        verdict = f'{error:.2e} off where {limit:.2e} is allowed, most in {worst}'
        note(verdict)
        assert error <= limit, verdict


def fuzz(number: int, start: int, shrink: bool = True) -> Counter[str]:
    """Check ``number`` cases and count what they were."""
    start = int(os.environ.get('FUZZ_SEED', start))
    print(f'seed {start}; FUZZ_SEED={start} repeats it')
    counts: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        counts.update(case.kinds())
        check(case)

    # So small, tensors are faster on one thread, and the numbers do not depend on the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
    finally:
        torch.set_num_threads(threads)
    print(dict(counts))
    return counts


def test_a_few_dozen_cases_are_the_reference():
    counts = fuzz(24, start=0)
    assert counts['padded'] and counts['less attention'] and counts['weights']


@pytest.mark.slow
def test_five_hundred_cases_are_the_reference():
    counts = fuzz(500, start=random.SystemRandom().randrange(2**32))
    assert sum(counts[name] for name in PRECISIONS) >= 500
    wanted = [*PRECISIONS, *LAYOUTS, 'train', 'eval', 'no_grad', 'inference mode', 'recorded']
    wanted += ['weights', 'weights and images', 'with_cp', 'channels_last_model', 'frozen', 'batch']
    wanted += ['no qkv_bias', 'less attention', 'two vanilla', 'ratio 1', 'ratio 2', 'ratio 3']
    wanted += ['odd window', 'padded', 'whole windows', 'slabs', 'one slab']
    wanted += ['conv_stem', 'overlap_downsample', 'mix_ffn']
    assert not [kind for kind in wanted if not counts[kind]], counts


# ---- What it would find --------------------------------------------------------------------------


def no_mask(grid: WindowGrid, like: Tensor) -> Tensor:
    return like.new_zeros(grid.rows * grid.cols, 1, 1, grid.window**2)


def no_fill(grid: WindowGrid, pairs: Tensor, **values: float) -> None:
    """Padded pairs stay as they are."""


def psi_and_theta_swapped(scores: Tensor, psi: Tensor, theta: Tensor, *_: object) -> Tensor:
    return theta @ scores @ psi.mT


def slabs_from_the_top(grid: WindowGrid, batch: int, tokens: int) -> list[Slab]:
    return [replace(slab, image=0, row=0) for slab in cut_into_slabs(grid, batch, tokens)]


original_rows = sys.modules['mmlavit.ops.halve_pairs']._rows_of_keys


def rows_for_columns(scores: Tensor, kernel: Tensor) -> Tensor:
    return original_rows(scores, kernel.transpose(2, 3))


original_embed = PatchEmbed.forward


def overlap_below_and_right(embed: PatchEmbed, x: Tensor) -> Tensor:
    overlaps = embed.proj.kernel_size > embed.proj.stride
    return original_embed(embed, x.roll((-1, -1), (1, 2)) if overlaps else x)


def mlp_slab_by_slab(mlp: MLP, x: Tensor) -> Tensor:
    """As if the convolution did not look beyond the upper half of the map."""
    half = x.shape[1] // 2
    parts = [x[:, :half], x[:, half:]] if half else [x]
    return torch.cat([original_mlp(mlp, part) for part in parts], dim=1)


original_mlp = MLP.forward


original_neighbours = Slab.with_neighbours


def rows_around_are_zeros(slab: Slab, x: Tensor) -> Tensor:
    near = original_neighbours(slab, x)
    kept = torch.zeros_like(near)
    slab.without_neighbours(kept).copy_(slab.without_neighbours(near))
    return kept


def stem_without_gelu(stem: ConvStem, x: Tensor) -> Tensor:
    return stem.conv2(stem.conv1(x))


FAULTS = {
    'padded keys not masked': ('attend', 'key_mask', no_mask),
    'padded pairs not cleared in inference': ('inference', 'fill_padded', no_fill),
    'padded pairs not cleared': (
        'plain_less_attention',
        'zero_padded_pairs',
        lambda scores, _: scores,
    ),
    'Psi for Theta': ('inference', 'two_sided_linear', psi_and_theta_swapped),
    'every slab the first one': ('inference', 'cut_into_slabs', slabs_from_the_top),
    'the residual turned': ('halve_pairs', '_rows_of_keys', rows_for_columns),
    'overlap on the other sides': (PatchEmbed, 'forward', overlap_below_and_right),
    'the MLP blind to its neighbours': (MLP, 'forward', mlp_slab_by_slab),
    'a slab blind to the rows around it': (Slab, 'with_neighbours', rows_around_are_zeros),
    'no GELU in the stem': (ConvStem, 'forward', stem_without_gelu),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found(fault):
    place, name, other = FAULTS[fault]
    if isinstance(place, str):
        place = sys.modules[f'mmlavit.ops.{place}']
    with mock.patch.object(place, name, other), pytest.raises(AssertionError, match='is allowed'):
        fuzz(300, start=0, shrink=False)
