"""Attention of every layer over the image, on one sheet to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter
from torch import Tensor

from .record import LayerAttention
from .tokens import Box, Query

# Of a kind of layer: what it is called, and its colour (told apart by the colour-blind, too).
KINDS = {'vanilla': ('VA', '#0072b2'), 'less': ('LA', '#d55e00')}
QUERY, GRID = '#00e5ff', 'white'
ATTENTION, SCORES = 'inferno', 'RdBu_r'  # colour maps
PANELS = 6  # layers beside each other; more go on further lines
# In inches: a panel, its title, gaps, a colour bar with its ticks, the title of the sheet.
SIDE, TITLE, GAP, BAR, HEAD, LABEL = 1.5, 0.24, 0.08, 0.66, 0.75, 0.95

# What to draw (rows, columns) of what there is (heads, rows, columns).
Choice = Callable[[np.ndarray], np.ndarray]


def draw_sheet(
    picture: np.ndarray,
    layers: Sequence[LayerAttention],
    points: Sequence[tuple[int, int]],
    heads: int | str = 'mean',
    *,
    stretch: bool = False,
    window_sizes: Sequence[int],
    title: str = '',
) -> Figure:
    """Draw the attention of some points of an image.

    For each stage, point and choice of heads there is a row: the image with the windows of the
    stage; the window of the point, with what its token attends to in every layer; and what came
    into the first layer's scores, in stages that the residual reaches.

    Args:
        picture: The image, RGB (H, W, 3).
        layers: The layers of some stages, of one image.
        points: ``x, y`` in pixels of the image.
        heads: ``'mean'`` over heads, ``'each'`` for a row for each, or the one to draw.
        stretch: Whether colours begin at the least attention of a row instead of at 0, which shows
            faint patterns in attention that is almost even.
        window_sizes: Side of the windows of every stage of the model, in tokens.
        title: What to write above.

    Returns:
        The figure.

    Raises:
        ValueError: If a stage has no such head.
    """
    rows = [
        (of_stage, point, label, choice)
        for of_stage in by_stage(layers)
        for point in points
        for label, choice in _choices(of_stage[0], heads)
    ]
    widest = min(PANELS, max(len(of_stage) for of_stage, *_ in rows))
    has_residual = any(of_stage[0].residual is not None for of_stage, *_ in rows)
    lines = [-(-len(of_stage) // widest) for of_stage, *_ in rows]
    sheet = _Sheet(
        width=LABEL + (1 + widest) * (SIDE + GAP) + BAR + has_residual * 3 * (SIDE + BAR),
        height=HEAD + sum(lines) * (SIDE + TITLE) + len(rows) * 2 * GAP,
    )
    _draw_head(sheet, title, has_residual)
    top = HEAD
    for (of_stage, point, label, choice), count in zip(rows, lines, strict=True):
        query = Query.at(of_stage[0], *point)
        stage = of_stage[0].stage
        words = (
            f'stage {stage + 1}',
            f'stride {query.stride}',
            '',
            'x, y =',
            '{}, {}'.format(*point),
        )
        sheet.text(LABEL - 0.08, top + TITLE + SIDE / 2, '\n'.join([*words, '', label]))
        overview = sheet.panel(LABEL, top)
        _draw_overview(overview, picture, query)
        left = LABEL + SIDE + GAP
        attended = [choice(query.keys(x.attn[0].numpy())) for x in of_stage]
        least = min(a.min() for a in attended) if stretch else 0
        norm = Normalize(least, max(a.max() for a in attended))
        for i, (layer, heat) in enumerate(zip(of_stage, attended, strict=True)):
            line, place = divmod(i, widest)
            axes = sheet.panel(left + place * (SIDE + GAP), top + line * (SIDE + TITLE))
            _draw_window(axes, picture, query)
            _draw_heat(axes, heat, query, ATTENTION, norm, 0.75)
            word, colour = KINDS[layer.kind]
            _frame(axes, f'{word}  layer {layer.layer + 1}', colour)
        sheet.bar(left + min(len(of_stage), widest) * (SIDE + GAP), top, ATTENTION, norm, 0.75)
        scores, residual = of_stage[0].scores, of_stage[0].residual
        if scores is not None and residual is not None:
            left += widest * (SIDE + GAP) + BAR
            # Where the windows of the stage before were.
            step = window_sizes[stage - 1] // 2 * query.stride
            _draw_residual(sheet, left, top, picture, query, (scores, residual), choice, step)
        top += count * (SIDE + TITLE) + 2 * GAP
    return sheet.figure


def by_stage(layers: Sequence[LayerAttention]) -> list[list[LayerAttention]]:
    """Layers, stage by stage in the order of both."""
    stages = sorted({x.stage for x in layers})
    return [sorted((x for x in layers if x.stage == m), key=lambda x: x.layer) for m in stages]


def _choices(layer: LayerAttention, heads: int | str) -> list[tuple[str, Choice]]:
    """What to draw of the heads of a stage, by name."""
    count = layer.attn.shape[2]
    if heads == 'mean':
        return [(f'mean of\n{count} heads' if count > 1 else '1 head', lambda x: x.mean(0))]
    if heads != 'each' and (isinstance(heads, str) or not 0 <= heads < count):
        raise ValueError(
            f"heads must be 'mean', 'each' or one of 0..{count - 1}, which stage {layer.stage + 1} "
            f'has, got {heads!r}'
        )
    chosen = range(count) if heads == 'each' else [heads]
    return [(f'head {h}', itemgetter(h)) for h in chosen]


class _Sheet:
    """A figure on which things are placed in inches from the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor='white')

    def panel(self, left: float, top: float) -> Axes:
        """A square below its title."""
        return self._axes(left, top + TITLE, SIDE, SIDE)

    def bar(self, left: float, top: float, colours: str, norm: Normalize, alpha: float) -> None:
        """A colour bar beside a panel."""
        axes = self._axes(left, top + TITLE, 0.09, SIDE)
        bar = self.figure.colorbar(ScalarMappable(norm, colours), cax=axes, alpha=alpha)
        bar.locator = FixedLocator([norm.inverse(share) for share in (0, 0.5, 1)])
        bar.formatter = FuncFormatter(lambda value, _: f'{value:.3g}')
        bar.update_ticks()
        axes.tick_params(labelsize=6, length=2, pad=1)

    def text(self, left: float, top: float, words: str, **options: Any) -> None:
        """Text, by default ending there."""
        options = {'ha': 'right', 'va': 'center', 'fontsize': 8, **options}
        self.figure.text(left / self.width, 1 - top / self.height, words, **options)

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        box = left / self.width, bottom / self.height, width / self.width, height / self.height
        return self.figure.add_axes(box)


def _draw_head(sheet: _Sheet, title: str, has_residual: bool) -> None:
    sheet.text(0.1, 0.2, title, ha='left', fontsize=10, fontweight='bold')
    left, top = 0.1, 0.47
    for word, meaning in (('VA', 'vanilla attention'), ('LA', 'less attention')):
        colour = dict(KINDS.values())[word]
        sheet.text(left, top, f'{word}: {meaning}', ha='left', fontsize=9, color=colour)
        left += 1.6
    words = 'square: the query token    frame: its window; attention ends there'
    if has_residual:
        words += '    AR: attention residual from the stage before'
    sheet.text(left, top, words, ha='left')


def _draw_overview(axes: Axes, picture: np.ndarray, query: Query) -> None:
    """The whole image, with the windows and the one that holds the query."""
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0))
    step = query.grid.window * query.stride
    for x in range(step, width, step):
        axes.axvline(x, color=GRID, lw=min(0.5, 4 * step / max(width, height)), alpha=0.7)
    for y in range(step, height, step):
        axes.axhline(y, color=GRID, lw=min(0.5, 4 * step / max(width, height)), alpha=0.7)
    _outline(axes, query.window_box, QUERY, 1.5)
    left, top, right, bottom = query.box
    axes.plot((left + right) / 2, (top + bottom) / 2, marker='s', ms=3, mfc=QUERY, mec='black')
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())
    axes.set_title('windows', fontsize=8, pad=3)


def _draw_window(axes: Axes, picture: np.ndarray, query: Query) -> None:
    """The query's window in grey and some of the image around it, dimmed."""
    height, width = picture.shape[:2]
    side = query.grid.window * query.stride
    seen = min(side + side // 3, max(side, height, width))
    left, top, right, bottom = query.window_box
    x0, y0 = _start(left, side, seen, width), _start(top, side, seen, height)
    # Only what is seen, or a large image would be kept once for each panel.
    grey = picture[y0 : y0 + seen, x0 : x0 + seen].mean(axis=-1, keepdims=True)
    shown = (0.4 * grey + 0.6 * 255).repeat(3, axis=-1)
    box = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
    shown[box] = grey[box]
    y1, x1 = y0 + shown.shape[0], x0 + shown.shape[1]
    axes.imshow(shown.astype(np.uint8), extent=(x0, x1, y1, y0))
    axes.set(xlim=(x0, x0 + seen), ylim=(y0 + seen, y0), xticks=(), yticks=())


def _start(window: int, side: int, seen: int, size: int) -> int:
    """Where to begin to show ``seen`` pixels around a window, outside of the image at most then."""
    return max(min(window - (seen - side) // 2, size - seen), 0)


def _draw_heat(
    axes: Axes, heat: np.ndarray, query: Query, colours: str, norm: Normalize, alpha: float
) -> None:
    left, top, right, bottom = query.window_box
    axes.imshow(
        heat,
        cmap=colours,
        norm=norm,
        alpha=alpha,
        extent=(left, right, bottom, top),
        interpolation='nearest',
    )
    _outline(axes, query.window_box, 'black', 2.4)
    _outline(axes, query.window_box, QUERY, 1.4)
    _outline(axes, query.box, 'black', 2.2)
    _outline(axes, query.box, QUERY, 1.2)


def _draw_residual(
    sheet: _Sheet,
    left: float,
    top: float,
    picture: np.ndarray,
    query: Query,
    of_layer: tuple[Tensor, Tensor],
    choice: Choice,
    step: int,
) -> None:
    """What the layer computed itself, what the residual brought in, and their sum."""
    scores, residual = (choice(query.keys(x[0].numpy())) for x in of_layer)
    own = scores - residual
    large = _symmetric(own, scores)
    parts = (
        ('own  $QK^T/\\sqrt{d}$', own, large),
        ('+ brought in by AR', residual, _symmetric(residual)),
        ('= scores of layer 1', scores, large),
    )
    for title, heat, norm in parts:
        axes = sheet.panel(left, top)
        _draw_window(axes, picture, query)
        _draw_heat(axes, heat, query, SCORES, norm, 0.85)
        if heat is residual:
            x0, y0, x1, y1 = query.window_box
            for x in range(x0 + step, x1, step):
                axes.plot((x, x), (y0, y1), color='black', lw=0.6, ls=':')
            for y in range(y0 + step, y1, step):
                axes.plot((x0, x1), (y, y), color='black', lw=0.6, ls=':')
        _frame(axes, title, '#555555')
        sheet.bar(left + SIDE + GAP / 2, top, SCORES, norm, 0.85)
        left += SIDE + BAR


def _symmetric(*maps: np.ndarray) -> Normalize:
    most = max(max(np.abs(m).max() for m in maps), 1e-12)
    return Normalize(-most, most)


def _outline(axes: Axes, box: Box, colour: str, width: float) -> None:
    left, top, right, bottom = box
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=width)
    )


def _frame(axes: Axes, title: str, colour: str) -> None:
    axes.set_title(title, fontsize=8, color=colour, fontweight='bold', pad=3)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.8)
