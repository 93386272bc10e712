"""One HTML file that shows what a clicked token attends to, in every layer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.events import DocumentReady, Tap
from bokeh.layouts import column, row
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    CustomJS,
    Div,
    LinearColorMapper,
    Range1d,
    Select,
    Toggle,
)
from bokeh.palettes import Inferno256, RdBu11, interp_palette
from bokeh.plotting import figure
from bokeh.resources import INLINE

from .contact_sheet import KINDS, PANELS, QUERY, by_stage
from .record import LayerAttention
from .tokens import stride_of

#: Bytes of attention in a file, unless stages are chosen.
LIMIT = 30e6
#: Bytes of attention in a file in any case; browsers fail at some more.
MOST = 200e6
PANEL, WIDE = 190, 430  # pixels: side of a layer's panel, width of the image
RESIDUAL = ('own QK\u1d40/\u221ad', '+ brought in by AR', '= scores of layer 1')

# Runs in the browser: shows the attention of the token at the pixel of `state`.
SHOW = """
if (cb_obj.event_name == 'tap') {
    const inside = cb_obj.x >= 0 && cb_obj.x < width && cb_obj.y >= 0 && cb_obj.y < height
    if (!inside) return
    state.data = {x: [cb_obj.x], y: [cb_obj.y]}
}
const stage = stages[stage_select.value]
const {stride, side, heads, rows, cols, grid_height, grid_width} = stage
const names = ['mean', ...Array(heads).keys()].map(String)
if (head_select.options.length != names.length) {
    head_select.options = names
    if (!names.includes(head_select.value)) head_select.value = 'mean'
}
const n = side * side
const r = Math.floor(state.data.y[0] / stride), c = Math.floor(state.data.x[0] / stride)
const window_row = Math.floor(r / side), window_col = Math.floor(c / side)
const at = window_row * cols + window_col
const place = (r % side) * side + c % side
const high = Math.min(side, grid_height - window_row * side)
const wide = Math.min(side, grid_width - window_col * side)
const left = window_col * side * stride, top = window_row * side * stride

const chosen = head_select.value == 'mean' ? [...Array(heads).keys()] : [+head_select.value]
function keys({values, scales}) {
    // Over the real keys of the window, row by row.
    const out = []
    for (let i = 0; i < high; i++) {
        const line = new Array(wide).fill(0)
        for (const h of chosen) {
            const query = (at * heads + h) * n + place
            for (let j = 0; j < wide; j++) {
                line[j] += values[query * n + i * side + j] * scales[query] / chosen.length
            }
        }
        out.push(line)
    }
    return out
}
function draw(source, map) {
    // Bokeh takes no other arrays than its own.
    const NDArray = source.data.image[0].constructor
    source.data = {
        image: [new NDArray(map.flat(), [high, wide])],
        x: [left], y: [top], dw: [wide * stride], dh: [high * stride],
    }
}
function range_of(maps) {
    const all = maps.flat(2)
    return [Math.min(...all), Math.max(...all)]
}

const maps = stage.layers.map(keys)
const [least, most] = range_of(maps)
mapper.low = stretch.active ? least : 0
mapper.high = most
panels.forEach((panel, i) => {
    panel.visible = i < maps.length
    if (i >= maps.length) return
    const [word, colour] = stage.kinds[i]
    panel.title.text = `${word}  layer ${i + 1}`
    panel.title.text_color = colour
    panel.outline_line_color = colour
    draw(heats[i], maps[i])
})
residual_panels.forEach((panel) => { panel.visible = stage.residual != null })
if (stage.residual != null) {
    const own = keys(stage.own), brought = keys(stage.residual)
    const sum = own.map((line, i) => line.map((value, j) => value + brought[i][j]))
    const parts = [own, brought, sum]
    const large = Math.max(...range_of([own, sum]).map(Math.abs), 1e-12)
    const small = Math.max(...range_of([brought]).map(Math.abs), 1e-12)
    parts.forEach((map, i) => {
        residual_mappers[i].low = i == 1 ? -small : -large
        residual_mappers[i].high = i == 1 ? small : large
        draw(residual_heats[i], map)
    })
}

frames.data = {
    left: [left, c * stride], right: [left + wide * stride, (c + 1) * stride],
    top: [top, r * stride], bottom: [top + high * stride, (r + 1) * stride],
}
const step = side * stride
const lines = {x0: [], y0: [], x1: [], y1: []}
function line(x0, y0, x1, y1) {
    lines.x0.push(x0); lines.y0.push(y0); lines.x1.push(x1); lines.y1.push(y1)
}
for (let x = step; x < width; x += step) line(x, 0, x, height)
for (let y = step; y < height; y += step) line(0, y, width, y)
grid.data = lines
const around = step / 8
x_range.setv({start: left - around, end: left + step + around})
y_range.setv({start: top + step + around, end: top - around})
const itself = maps.map((map) => map[r % side][c % side].toPrecision(3)).join(', ')
info.text = `pixel ${Math.floor(state.data.x[0])}, ${Math.floor(state.data.y[0])}: token in row `
    + `${r}, column ${c} of ${grid_height} x ${grid_width}; it gives itself ${itself}; `
    + `even attention is ${(1 / (high * wide)).toPrecision(3)}`
"""


def choose_stages(layers: Sequence[LayerAttention], limit: float = LIMIT) -> list[int]:
    """The last stages that fit into a file; earlier ones are larger.

    Args:
        layers: All layers of one image.
        limit: Bytes that the file may take for attention.

    Returns:
        The stages, ascending; at least the last.
    """
    chosen: list[int] = []
    size = 0.0
    for of_stage in reversed(by_stage(layers)):
        size += size_of(of_stage)
        if chosen and size > limit:
            break
        chosen.insert(0, of_stage[0].stage)
    return chosen


def size_of(layers: Sequence[LayerAttention]) -> float:
    """Bytes that layers of one image take in a file."""
    maps = sum(3 if x.residual is not None else 1 for x in layers)
    windows, heads, n, _ = layers[0].attn.shape[1:]
    # Base64 adds a third, and the compression before it takes about as much away, or more.
    return maps * windows * heads * n * (n + 4)


def draw_page(
    picture: np.ndarray,
    layers: Sequence[LayerAttention],
    point: tuple[int, int],
    title: str = '',
) -> str:
    """Make the page: one click on a token shows its attention in every layer.

    Attention is kept in 8 bits for each pair, with a scale of its own for each query and head, so
    it is off by at most 1/510 of the most that a query gives to any key (scores of the residual: by
    1/254 of the largest of the query).

    Args:
        picture: The image, RGB (H, W, 3).
        layers: Layers of one image, whole stages.
        point: ``x, y`` of the pixel whose token is shown first.
        title: What to write above.

    Returns:
        The text of an HTML file that needs nothing else.

    Raises:
        ValueError: If it would be more than :data:`MOST` bytes.
    """
    grouped = by_stage(layers)
    size = sum(size_of(of_stage) for of_stage in grouped)
    if size > MOST:
        raise ValueError(
            f'stages {[x[0].stage + 1 for x in grouped]} would take {size / 1e6:.0f} MB of HTML, '
            f'and browsers take about {MOST / 1e6:.0f}; choose fewer stages or a smaller image'
        )
    height, width = picture.shape[:2]
    stages = {f'stage {x[0].stage + 1}': _stage_data(x) for x in grouped}
    # Without colours of its own beneath the colours of attention.
    grey = picture.mean(axis=-1, keepdims=True).astype(np.uint8).repeat(3, axis=-1)
    image, grey = (ColumnDataSource(dict(url=[_data_url(x)])) for x in (picture, grey))
    frames = ColumnDataSource({side: [] for side in ('left', 'right', 'top', 'bottom')})
    grid = ColumnDataSource({end: [] for end in ('x0', 'y0', 'x1', 'y1')})
    mapper = LinearColorMapper(Inferno256)

    ranges = Range1d(0, width), Range1d(height, 0)
    overview = _panel(image, (width, height), ranges, (WIDE, round(WIDE * height / width)))
    overview.title.text = 'click a token'
    overview.segment('x0', 'y0', 'x1', 'y1', source=grid, color='white', alpha=0.5)
    _draw_frames(overview, frames)
    bar = ColorBar(color_mapper=mapper, title='attention', width=10)
    overview.add_layout(bar, 'right')

    x_range, y_range = ranges = Range1d(0, 1), Range1d(1, 0)
    square = PANEL, PANEL
    panels, heats = [], []
    for _ in range(max(map(len, grouped))):
        panel = _panel(grey, (width, height), ranges, square)
        heats.append(_draw_heat(panel, mapper, frames))
        panels.append(panel)
    residual_panels, residual_heats, residual_mappers = [], [], []
    for name in RESIDUAL:
        panel = _panel(grey, (width, height), ranges, square)
        panel.title.text = name
        of_scores = LinearColorMapper(interp_palette(RdBu11, 255))
        residual_mappers.append(of_scores)
        residual_heats.append(_draw_heat(panel, of_scores, frames))
        panel.add_layout(ColorBar(color_mapper=of_scores, width=8), 'right')
        residual_panels.append(panel)

    stage_select = Select(title='stage', options=list(stages), value=list(stages)[-1], width=110)
    head_select = Select(title='head', options=['mean'], value='mean', width=110)
    stretch = Toggle(label='colours from the least, not from 0', width=230, margin=(23, 5, 5, 5))
    info = Div()
    show = CustomJS(
        args=dict(
            **dict(stages=stages, width=width, height=height, info=info),
            **dict(stage_select=stage_select, head_select=head_select, stretch=stretch),
            **dict(mapper=mapper, panels=panels, heats=heats, frames=frames, grid=grid),
            **dict(residual_panels=residual_panels, residual_heats=residual_heats),
            **dict(residual_mappers=residual_mappers, x_range=x_range, y_range=y_range),
            state=ColumnDataSource(dict(x=[point[0]], y=[point[1]])),
        ),
        code=SHOW,
    )
    for panel in (overview, *panels, *residual_panels):
        panel.js_on_event(Tap, show)
    for select in (stage_select, head_select):
        select.js_on_change('value', show)
    stretch.js_on_change('active', show)

    lines = [row(panels[i : i + PANELS]) for i in range(0, len(panels), PANELS)]
    page = column(
        Div(text=_heading(title)),
        row(stage_select, head_select, stretch),
        info,
        row(overview, column(*lines, row(residual_panels))),
    )
    document = Document(title=title or 'attention')
    document.add_root(page)
    document.js_on_event(DocumentReady, show)
    return file_html(document, INLINE)


def _stage_data(layers: Sequence[LayerAttention]) -> dict:
    """What the page knows of a stage."""
    first = layers[0]
    grid = first.window_grid
    data = dict(
        stride=stride_of(first.stage),
        side=grid.window,
        heads=first.attn.shape[2],
        rows=grid.rows,
        cols=grid.cols,
        grid_height=grid.height,
        grid_width=grid.width,
        kinds=[list(KINDS[x.kind]) for x in layers],
        layers=[quantized(x.attn[0].numpy(), 255) for x in layers],
        own=None,
        residual=None,
    )
    if first.scores is not None and first.residual is not None:
        data['own'] = quantized((first.scores - first.residual)[0].numpy(), 127)
        data['residual'] = quantized(first.residual[0].numpy(), 127)
    return data


def quantized(maps: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    """Maps in 8 bits, each row with a scale of its own.

    Args:
        maps: (windows, heads, n, n).
        steps: To which number the largest of a row goes: 255 for what is never negative, 127 for
            what has a sign.

    Returns:
        ``values``, uint8 or int8, all in one row, and ``scales``, one for each row: their product
        is about ``maps``.
    """
    scales = np.abs(maps).max(axis=-1, keepdims=True).astype(np.float32) / steps
    values = np.round(maps / np.where(scales > 0, scales, 1))
    values = values.astype(np.uint8 if steps == 255 else np.int8)
    return dict(values=values.ravel(), scales=scales.ravel())


def _data_url(picture: np.ndarray) -> str:
    _, jpeg = cv2.imencode('.jpg', picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return 'data:image/jpeg;base64,' + base64.b64encode(jpeg.tobytes()).decode()


def _panel(
    image: ColumnDataSource,
    size: tuple[int, int],
    ranges: tuple[Range1d, Range1d],
    shown: tuple[int, int],
) -> figure:
    """An image of ``size`` (width, height), of which ``ranges`` are ``shown`` pixels large."""
    panel = figure(
        **dict(x_range=ranges[0], y_range=ranges[1], frame_width=shown[0], frame_height=shown[1]),
        **dict(tools='', toolbar_location=None, outline_line_width=3, min_border=4),
        title='layer',
    )
    panel.axis.visible = False
    panel.grid.visible = False
    panel.image_url('url', x=0, y=0, w=size[0], h=size[1], source=image)
    return panel


def _draw_heat(
    panel: figure, mapper: LinearColorMapper, frames: ColumnDataSource
) -> ColumnDataSource:
    heat = ColumnDataSource(
        dict(image=[np.zeros((1, 1), np.float32)], x=[0], y=[0], dw=[0], dh=[0])
    )
    panel.image(source=heat, color_mapper=mapper, global_alpha=0.75)
    _draw_frames(panel, frames)
    return heat


def _draw_frames(panel: figure, frames: ColumnDataSource) -> None:
    edges = dict(left='left', right='right', top='top', bottom='bottom', fill_color=None)
    panel.quad(**edges, source=frames, line_color='black', line_width=4)
    panel.quad(**edges, source=frames, line_color=QUERY, line_width=2)


def _heading(title: str) -> str:
    meanings = {'VA': 'vanilla attention', 'LA': 'less attention'}
    kinds = ' &nbsp; '.join(
        f'<b style="color: {colour}">{word}: {meanings[word]}</b>'
        for word, colour in KINDS.values()
    )
    return (
        f'<b style="font-size: 120%">{escape(title)}</b><br>{kinds} &nbsp; small square: the query '
        'token; frame: its window, where attention ends; AR: attention residual from the stage '
        'before'
    )
