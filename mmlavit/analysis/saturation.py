"""Measures of attention per layer, and its similarity between layers, over many images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from .measures import (
    alignment,
    centred_gram,
    cosine_similarity,
    diagonality,
    entropy,
    hsic,
    symmetry,
    visible_attention,
)
from .pairs import home_of, shared_cells, visible_pairs
from .record import LayerAttention

# Of one layer; those of square maps alone, and those of all.
SQUARE_MEASURES = {'diagonality': diagonality, 'symmetry': symmetry}
MEASURES = {**SQUARE_MEASURES, 'entropy': entropy}
# Of two layers.
SIMILARITIES = ('cosine', 'cka')
# CKA takes so many queries of an image; its estimate has no bias, so more only make it steadier.
QUERIES = 256


@dataclass(frozen=True)
class LayerNumbers:
    """What was measured of one layer; None where a measure is not defined.

    Args:
        stage: Its stage, from 0.
        layer: Its place in the stage, from 0.
        kind: Its kind of attention, see :class:`~mmlavit.analysis.record.LayerAttention`.
        diagonality: Mean of :func:`mmlavit.analysis.measures.diagonality`.
        symmetry: Mean of :func:`mmlavit.analysis.measures.symmetry`.
        entropy: Mean of :func:`mmlavit.analysis.measures.entropy`.
        cosine: Mean similarity to each layer of its stage, in order.
        cka: The same by CKA.
    """

    stage: int
    layer: int
    kind: str
    diagonality: float | None
    symmetry: float | None
    entropy: float | None
    cosine: tuple[float | None, ...]
    cka: tuple[float | None, ...]

    def to_previous(self, similarity: str) -> float | None:
        """Similarity (``'cosine'`` or ``'cka'``) to the layer before; None for a stage's first."""
        return getattr(self, similarity)[self.layer - 1] if self.layer else None


class SaturationMeter:
    """Measures layers as they are recorded, and keeps those of one stage at a time.

    ::

        meter = SaturationMeter()
        for images in batches:
            with recording_any(model, meter.see), torch.no_grad():
                model(images)
            meter.end_batch()
        meter.numbers()

    Each image counts alike. A measure of an image is the mean over its windows and heads; CKA is
    the ratio of HSICs that are averaged over images, of ``queries`` tokens of each, whose features
    are the attention that they pay to each key in each head, less that of even attention.

    Args:
        queries: Tokens of an image that CKA compares, or all of them where there are fewer.

    Raises:
        ValueError: If ``queries`` is less than 4.
    """

    def __init__(self, queries: int = QUERIES) -> None:
        if queries < 4:
            raise ValueError(f'queries must be at least 4, got {queries}')
        self.queries = queries
        self._stage: list[LayerAttention] = []
        self._kinds: dict[tuple[int, int], str] = {}
        # By measure, stage and layer (or two): the sum over images, and how many have a value.
        self._sums: Mapping[tuple, Tensor] = defaultdict(lambda: torch.zeros(2).double())

    def see(self, layer: LayerAttention) -> None:
        """Take the next layer of a forward pass, in the order in which they run."""
        if self._stage and self._stage[0].stage != layer.stage:
            self._measure_stage()
        # What is not needed need not wait for the rest of its stage.
        self._stage.append(replace(layer, scores=None, residual=None))

    def end_batch(self) -> None:
        """Measure what is left of a forward pass."""
        if self._stage:
            self._measure_stage()

    def numbers(self) -> list[LayerNumbers]:
        """What has been measured so far, layer by layer.

        Raises:
            ValueError: If there is nothing.
        """
        if not self._kinds:
            raise ValueError('no attention has been recorded; did the model run?')
        depths: dict[int, int] = defaultdict(int)
        for stage, _ in self._kinds:
            depths[stage] += 1
        return [
            LayerNumbers(
                stage,
                layer,
                kind,
                **{name: self._mean(name, stage, layer) for name in MEASURES},
                cosine=tuple(self._cosine(stage, layer, i) for i in range(depths[stage])),
                cka=tuple(self._cka(stage, layer, i) for i in range(depths[stage])),
            )
            for (stage, layer), kind in sorted(self._kinds.items())
        ]

    def _measure_stage(self) -> None:
        layers, self._stage = self._stage, []
        for layer in layers:
            self._kinds[layer.stage, layer.layer] = layer.kind
            self._measure(layer)
        for a, b in combinations(layers, 2):
            self._add('cosine', a.stage, a.layer, b.layer, values=_cosine(a, b))
        self._align(layers)

    def _measure(self, layer: LayerAttention) -> None:
        maps, visible = _flat(layer.attn, _visible(layer))
        square = layer.attn.shape[-1] == layer.attn.shape[-2]
        for name, measure in MEASURES.items():
            if square or name not in SQUARE_MEASURES:
                found = _per_image(measure(maps, visible), layer.attn.shape[0])
                self._add(name, layer.stage, layer.layer, values=found)

    def _align(self, layers: list[LayerAttention]) -> None:
        """HSIC of each layer with itself and each other, image by image."""
        tokens = _spread(_real_tokens(layers[0]), self.queries)
        if len(tokens) < 4:
            return
        for image in range(layers[0].attn.shape[0]):
            grams = [centred_gram(_rows(layer, image, tokens)) for layer in layers]
            for i, a in enumerate(layers):
                for b, gram in zip(layers[i:], grams[i:], strict=True):
                    found = hsic(grams[i], gram)[None]
                    self._add('hsic', a.stage, a.layer, b.layer, values=found)

    def _add(self, *key: object, values: Tensor) -> None:
        there = ~values.isnan()
        self._sums[key] += torch.stack([values[there].double().sum().cpu(), there.sum().cpu()])

    def _mean(self, *key: object) -> float | None:
        total, count = self._sums.get(key, (0, 0))
        return float(total / count) if count else None

    def _cosine(self, stage: int, i: int, j: int) -> float | None:
        return 1.0 if i == j else self._mean('cosine', stage, *sorted((i, j)))

    def _cka(self, stage: int, i: int, j: int) -> float | None:
        keys = [sorted((i, j)), (i, i), (j, j)]
        found = [self._mean('hsic', stage, *key) for key in keys]
        if None in found:
            return None
        value = float(alignment(*torch.tensor(found).double()))
        return None if math.isnan(value) else value


def _visible(layer: LayerAttention) -> Tensor | None:
    return None if layer.grid is None else visible_pairs(layer.grid).to(layer.attn.device)


def _flat(attn: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Maps (B * windows, heads, n, m) of a batch, and which pairs count in each."""
    repeated = None if visible is None else visible.repeat(attn.shape[0], 1, 1)
    return attn.flatten(0, 1), repeated


def _per_image(values: Tensor, images: int) -> Tensor:
    """The mean of each image over windows and heads, of values (B * windows, heads)."""
    return values.double().view(images, -1).nanmean(dim=1)


def _cosine(a: LayerAttention, b: LayerAttention) -> Tensor:
    """Mean cosine of each image of a batch."""
    images = a.attn.shape[0]
    if a.grid is None or b.grid is None or a.grid == b.grid:
        maps, visible = _flat(a.attn, _visible(a))
        other = b.attn.flatten(0, 1)
    else:
        cells = shared_cells(a.grid, b.grid)
        maps, visible = _flat(cells.cut(a.attn, 0), cells.visible.to(a.attn.device))
        other = cells.cut(b.attn, 1).flatten(0, 1)
    return _per_image(cosine_similarity(maps, other, visible), images)


def _real_tokens(layer: LayerAttention) -> int:
    return layer.attn.shape[-2] if layer.grid is None else layer.grid.height * layer.grid.width


def _spread(count: int, most: int) -> Tensor:
    """At most ``most`` of ``count`` tokens, drawn once for good, so that all see the same."""
    if count <= most:
        return torch.arange(count)
    # Not every so-manieth, which would be the same columns of the map again and again.
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:most]


def _rows(layer: LayerAttention, image: int, tokens: Tensor) -> Tensor:
    """What tokens of an image attend to, above even attention, (tokens, heads * m).

    Even attention has no say, so that it is not taken for a likeness of two layers that windows at
    the edges of the map have fewer keys in both.
    """
    if layer.grid is None:
        windows, places, visible = torch.zeros_like(tokens), tokens, None
    else:
        windows, places = home_of(layer.grid, tokens)
        visible = visible_pairs(layer.grid).to(layer.attn.device)[windows, places].unsqueeze(1)
    rows = layer.attn[image][windows, :, places].unsqueeze(2)
    above = visible_attention(rows, visible) - visible_attention(torch.ones_like(rows), visible)
    return above.flatten(1)
