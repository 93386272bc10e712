"""Figures of what :class:`mmlavit.analysis.saturation.SaturationMeter` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from .saturation import LayerNumbers

Models = Mapping[str, Sequence[LayerNumbers]]

# By kind of layer: its short name, its long one, and its marker; filled or not.
KINDS = {
    'vanilla': ('VA', 'vanilla attention (VA)', 'o', True),
    'less': ('LA', 'less attention (LA)', 'D', False),
    'window': ('W', 'windows (W)', 's', True),
    'shifted': ('SW', 'shifted windows (SW)', 's', False),
    'reduced': ('SR', 'spatial reduction (SR)', '^', True),
}
_PANELS = {
    'cosine': 'cosine similarity to the layer before',
    'cka': 'CKA with the layer before',
    'diagonality': 'diagonality (0: even, 1: all to oneself)',
    'symmetry': 'symmetry (1: all is mutual)',
    'entropy': 'entropy (1: even, 0: one key)',
}
_SIMILARITIES = (('cosine', 'cosine', 'viridis'), ('cka', 'CKA', 'magma'))
# Inches.
_WIDTH, _CURVES_HEIGHT, _ROW_HEIGHT = 13, 6.2, 2.05
# What a reader has to know, by the kinds of layers that it is about; None for any.
_NOTES = {
    None: 'Maps that are nearly even have a cosine near 1 whatever they tell.',
    'less': 'LA starts as a copy: with random weights its similarity is 1.',
    'shifted': (
        'Swin: the cosine of W and SW is over pairs in a window of both.\n'
        'Its heads do not correspond across layers, so cosines are low.'
    ),
    'reduced': (
        'PVT: heads as in Swin; maps that are not square (merged keys)\n'
        'have no diagonality and no symmetry.'
    ),
}


def draw(models: Models, title: str = '') -> Figure:
    """Curves and heat maps in one figure.

    Args:
        models: By name, the numbers of each layer.
        title: What stands above it.

    Returns:
        The figure; it belongs to no window.
    """
    heights = [0.35, _CURVES_HEIGHT, _heat_map_height(models)]
    figure = Figure(figsize=(_WIDTH, sum(heights)))
    head, top, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).ravel()
    head.text(0.5, 0.4, title, fontsize=13, ha='center', va='center')
    _curves(models, top)
    _heat_maps(models, bottom)
    return figure


def draw_curves(models: Models) -> Figure:
    """Similarity to the layer before, diagonality, symmetry and entropy over the layers.

    Args:
        models: By name, the numbers of each layer.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(_WIDTH, _CURVES_HEIGHT))
    _curves(models, figure)
    return figure


def _curves(models: Models, figure: Figure | SubFigure) -> None:
    panels = figure.subplots(2, 3).ravel()
    # By hand: matplotlib's own layouts take as long as drawing does.
    figure.subplots_adjust(0.035, 0.05, 0.99, 0.94, wspace=0.17, hspace=0.25)
    stages = 1 + max(layer.stage for layers in models.values() for layer in layers)
    for panel, (measure, title) in zip(panels, _PANELS.items(), strict=False):
        for place, layers in enumerate(models.values()):
            # Side by side within a layer, so that equal values do not hide each other.
            shift = 0.05 * (place - (len(models) - 1) / 2)
            _curve(panel, layers, measure, f'C{place}', shift)
        for stage in range(0, stages, 2):
            panel.axvspan(stage, stage + 1, color='0.94', zorder=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(0, stages)
        panel.set_xticks(
            [m + 0.5 for m in range(stages)], [f'stage {m + 1}' for m in range(stages)]
        )
        panel.tick_params('x', length=0)
        if measure == 'diagonality':
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, -0.02), max(high, 0.1))
        else:
            panel.set_ylim(min(0, panel.get_ylim()[0]), 1.03)
        panel.grid(axis='y', alpha=0.3)
    _legend(panels[-1], models)


def _curve(
    panel: Axes, layers: Sequence[LayerNumbers], measure: str, color: str, shift: float
) -> None:
    """A line for each stage; models of any depth have their stages side by side."""
    depths = {layer.stage: layer.layer + 1 for layer in layers}
    for stage, depth in depths.items():
        own = [layer for layer in layers if layer.stage == stage]
        xs = [stage + (layer.layer + 0.5) / depth + shift for layer in own]
        ys = [_value(layer, measure) for layer in own]
        panel.plot(xs, ys, color=color, linewidth=1.5, zorder=2)
        for x, y, layer in zip(xs, ys, own, strict=True):
            panel.plot(x, y, **_marker(layer.kind, color), zorder=3)


def _value(layer: LayerNumbers, measure: str) -> float:
    similarity = measure in ('cosine', 'cka')
    value = layer.to_previous(measure) if similarity else getattr(layer, measure)
    return np.nan if value is None else value


def _marker(kind: str, color: str) -> dict:
    _, _, marker, filled = KINDS[kind]
    face = color if filled else 'white'
    return dict(marker=marker, color=color, markerfacecolor=face, markersize=6, linestyle='')


def _legend(panel: Axes, models: Models) -> None:
    panel.axis('off')
    lines = [
        Line2D([], [], color=f'C{i}', linewidth=3, label=name) for i, name in enumerate(models)
    ]
    used = {layer.kind for layers in models.values() for layer in layers}
    marks = [
        Line2D([], [], **_marker(kind, '0.2'), label=name)
        for kind, (_, name, _, _) in KINDS.items()
        if kind in used
    ]
    panel.legend(handles=lines + marks, loc=(-0.02, 0.36), frameon=False, fontsize=9.5)
    notes = '\n'.join(note for kind, note in _NOTES.items() if kind is None or kind in used)
    panel.text(-0.02, 0, notes, transform=panel.transAxes, fontsize=7.5, color='0.35')


def _heat_map_height(models: Models) -> float:
    return _ROW_HEIGHT * len(models) + 0.1


def draw_heat_maps(models: Models) -> Figure:
    """Similarity of all pairs of layers of each stage, by cosine on the left and CKA on the right.

    Args:
        models: By name, the numbers of each layer.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(_WIDTH, _heat_map_height(models)))
    _heat_maps(models, figure)
    return figure


def _heat_maps(models: Models, figure: Figure | SubFigure) -> None:
    height = _heat_map_height(models)
    stages = 1 + max(layer.stage for layers in models.values() for layer in layers)
    columns = figure.add_gridspec(
        nrows=len(models),
        ncols=2 * stages + 3,
        width_ratios=[*stages * [1], 0.07, 0.12, *stages * [1], 0.07],
        left=0.035,
        right=0.965,
        wspace=0.4,
        bottom=0.4 / height,
        top=1 - 0.6 / height,
        hspace=0.95,
    )
    for row, (name, layers) in enumerate(models.items()):
        for first, (similarity, title, colors) in zip((0, stages + 2), _SIMILARITIES, strict=True):
            for stage in sorted({layer.stage for layer in layers}):
                panel = figure.add_subplot(columns[row, first + stage])
                own = [layer for layer in layers if layer.stage == stage]
                image = _heat_map(panel, own, similarity, colors)
                panel.set_title(f'{title}, stage {stage + 1}', fontsize=9)
                if not first and not stage:
                    panel.annotate(
                        *(name, (0, 1)),
                        xytext=(-24, 24),
                        xycoords='axes fraction',
                        textcoords='offset points',
                        weight='bold',
                    )
            bar = figure.add_subplot(columns[row, first + stages])
            figure.colorbar(image, cax=bar, ticks=(0, 0.5, 1)).ax.tick_params(labelsize=8)


def _heat_map(
    panel: Axes, layers: Sequence[LayerNumbers], similarity: str, colors: str
) -> AxesImage:
    values = np.array([getattr(layer, similarity) for layer in layers], dtype=float)
    values = values.reshape(len(layers), len(layers))
    image = panel.imshow(values, cmap=colors, vmin=0, vmax=1)
    names = [f'{KINDS[layer.kind][0]}{layer.layer + 1}' for layer in layers]
    size = 8 if len(layers) <= 6 else 5
    panel.set_xticks(range(len(layers)), names, fontsize=size, rotation=90)
    panel.set_yticks(range(len(layers)), names, fontsize=size)
    panel.tick_params(length=0)
    if len(layers) <= 6:
        for (i, j), value in np.ndenumerate(values):
            text = '–' if np.isnan(value) else '1' if value > 0.995 else f'{value:.2f}'
            text = text.replace('0.', '.')
            # On the upper half of both scales dark letters are legible, on the lower light ones.
            red, green, blue, _ = colormaps[colors](value)
            dark = np.isnan(value) or 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
            panel.text(
                *(j, i, text),
                ha='center',
                va='center',
                fontsize=7.5 if len(layers) <= 4 else 6,
                color='black' if dark else 'white',
            )
    return image


def to_image(figure: Figure, dpi: int = 100) -> np.ndarray:
    """A figure as pixels.

    Args:
        figure: The figure.
        dpi: Pixels for an inch of it.

    Returns:
        RGB image (height, width, 3), uint8.
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
