"""tools/analysis/attention.py as a user runs it, and what it draws, token by token."""

import base64
import dataclasses
import gzip
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from helpers import ROOT, SHAPES_CONFIG
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from small import images, move_weights, seeded, small_lavit

pytest.importorskip('bokeh', reason='pip install bokeh')
cv2 = pytest.importorskip('cv2')

from mmlavit.analysis.contact_sheet import draw_sheet  # noqa: E402
from mmlavit.analysis.interactive import SHOW, choose_stages, draw_page, size_of  # noqa: E402
from mmlavit.analysis.record import LayerAttention, recording  # noqa: E402

CONFIGS = {
    'mmdet': SHAPES_CONFIG,
    'mmseg': ROOT / 'configs' / 'upernet_lavit_n_shapes.py',
    'mmpretrain': ROOT / 'configs' / 'lavit_n_shapes.py',
}
WINDOWS = (4, 4, 4, 2)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The tool's main; the loader that it guards is put back."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    spec = importlib.util.spec_from_file_location(
        'attention_tool', ROOT / 'tools' / 'analysis' / 'attention.py'
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return lambda *args: tool.main([str(arg) for arg in args])


@pytest.fixture(scope='module')
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Neither square nor of a size that windows divide."""
    path = tmp_path_factory.mktemp('image') / 'noise.png'
    print('seed 3')
    noise = np.random.default_rng(3).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(noise, (90, 70), interpolation=cv2.INTER_CUBIC))
    return path


@pytest.fixture(scope='module')
def layers() -> list[LayerAttention]:
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    with recording(model) as found, torch.no_grad():
        model(images(1, 3, 52, 74))
    return found


PICTURE = np.full((52, 74, 3), 90, dtype=np.uint8)


def links_of(page: str) -> list[str]:
    """What the tags of a page would fetch; scripts are text to the parser."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.extend(
        value for name, value in attrs if name in ('src', 'href')
    )
    parser.feed(page)
    return found


def embedded(page: str) -> dict:
    """The stages in a page, arrays decoded as its JavaScript does."""
    (found,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)

    def decode(value: object) -> object:
        if isinstance(value, list):
            return [decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        if value.get('type') == 'map':
            return {k: decode(v) for k, v in value['entries']}
        if value.get('type') == 'ndarray':
            data = gzip.decompress(base64.b64decode(value['array']['data']))
            return np.frombuffer(data, value['dtype']).reshape(value['shape'])
        return {k: decode(v) for k, v in value.items()}

    def find(value: object) -> dict | None:
        if isinstance(value, dict):
            if 'stages' in value:
                return value['stages']
            value = list(value.values())
        if isinstance(value, list):
            return next(filter(None, map(find, value)), None)
        return None

    return find(decode(json.loads(found)))


def maps_of(quantized: dict, like: torch.Tensor) -> torch.Tensor:
    values, scales = (torch.from_numpy(quantized[k].copy()) for k in ('values', 'scales'))
    return (values.view(like.shape[1:]) * scales.view(*like.shape[1:-1], 1))[None]


def assert_holds(page: str, layers: list[LayerAttention], tol: float = 0.0) -> None:
    """A page has these layers, and a residual where there is one, to the step of 8 bits."""
    stages = embedded(page)
    assert list(stages) == [f'stage {m + 1}' for m in sorted({x.stage for x in layers})]
    for layer in layers:
        stage = stages[f'stage {layer.stage + 1}']
        assert stage['kinds'][layer.layer][0] == {'vanilla': 'VA', 'less': 'LA'}[layer.kind]
        parts = [(stage['layers'][layer.layer], layer.attn, 255)]
        if layer.residual is not None:
            parts.append((stage['residual'], layer.residual, 127))
            parts.append((stage['own'], layer.scores - layer.residual, 127))
        elif layer.layer == 0:
            assert stage['residual'] is None
        for quantized, expected, steps in parts:
            most = expected.abs().amax(-1, keepdim=True)
            off = (maps_of(quantized, expected) - expected).abs()
            assert (off <= most * (0.501 / steps) + tol).all()
            assert most.max() > 100 * tol


def run_toolbox(scope: str, config: Path, checkpoint: Path, image: Path) -> list[LayerAttention]:
    """What the LaViT does in the toolbox's own inference on an image file."""
    if scope == 'mmdet':
        from mmdet.apis import inference_detector as infer
        from mmdet.apis import init_detector as init
    elif scope == 'mmseg':
        from mmseg.apis import inference_model as infer
        from mmseg.apis import init_model as init
    else:
        from mmpretrain.apis import ImageClassificationInferencer, get_model

        def init(cfg, checkpoint, device):
            return get_model(cfg, pretrained=checkpoint, device=device)

        def infer(model, image):
            return ImageClassificationInferencer(model, classes=['a', 'b', 'c'])(image)

    cfg = Config.fromfile(config)
    # mmseg's takes another pipeline than its tools/test.py.
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    model = init(cfg, str(checkpoint), device='cpu')
    with recording(model) as layers:
        infer(model, str(image))
    return layers


@pytest.mark.parametrize(
    'scope',
    [
        pytest.param('mmdet', marks=pytest.mark.slow),
        pytest.param('mmseg', marks=pytest.mark.slow),
        'mmpretrain',
    ],
)
def test_draws_what_the_toolbox_computes(scope, image, main, tmp_path, capsys):
    config = CONFIGS[scope]
    cfg = Config.fromfile(config)
    init_default_scope(scope)
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    move_weights(model.backbone, seeded(4))
    checkpoint = tmp_path / 'moved.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, checkpoint)
    expected = run_toolbox(scope, config, checkpoint, image)
    assert len(expected) == 8

    out = tmp_path / 'new' / 'out'
    main(config, checkpoint, image, '--out', out)
    assert {f.name for f in out.iterdir()} == {'noise.png', 'noise.html'}
    said = capsys.readouterr().out
    assert f'written: {out / "noise.png"}' in said
    assert 'LaViT at backbone of' in said
    # mmdet enlarges and pads; the others take it as it is.
    assert ('96 x 96 pixels' if scope == 'mmdet' else '90 x 70 pixels') in said
    page = (out / 'noise.html').read_text(encoding='utf-8')
    assert not links_of(page)
    assert_holds(page, expected, tol=1e-6)
    sheet = cv2.imread(str(out / 'noise.png'))
    assert sheet is not None
    assert min(sheet.shape[:2]) > 800
    # More than paper and ink.
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000


def test_none_is_the_same_chance_each_time(image, main, tmp_path, capsys):
    config = CONFIGS['mmpretrain']
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name in ('one', 'two'):
        main(config, 'none', image, '--out', tmp_path / name, '--stages', 4, 2, '--points', '89,69')
    assert torch.equal(torch.random.get_rng_state(), before)
    one, two = (embedded((tmp_path / name / 'noise.html').read_text()) for name in ('one', 'two'))
    assert list(one) == ['stage 2', 'stage 4']
    np.testing.assert_equal(one, two)
    assert 'random weights' in (tmp_path / 'one' / 'noise.html').read_text()
    # What is there stays unless the user says so.
    sheet = tmp_path / 'one' / 'noise.png'
    sheet.write_bytes(b'mine')
    capsys.readouterr()
    with pytest.raises(SystemExit, match='2'):
        main(config, 'none', image, '--out', tmp_path / 'one')
    assert 'noise.png is there already' in capsys.readouterr().err
    assert sheet.read_bytes() == b'mine'
    main(config, 'none', image, '--out', tmp_path / 'one', '--force', '--stages', 1)
    assert sheet.read_bytes() != b'mine'


NO_LAVIT = "_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'"
TWO_STAGES = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmlavit'])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='LaViT', arch='nano', out_indices=(1,)),
    data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255]),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
test_dataloader = dict(dataset=dict(type='Any', dataset=dict(type='Any', pipeline=pipeline)))
"""
UNTESTED = TWO_STAGES.replace('test_dataloader', 'val_dataloader')


@pytest.mark.parametrize(
    'config, arguments, message',
    [
        (TWO_STAGES, ['none', 'gone.jpg'], 'image not found: gone.jpg'),
        (TWO_STAGES, ['none', 'text.jpg'], 'image text.jpg does not come through'),
        (TWO_STAGES, ['gone.pth', 'IMAGE'], 'gone.pth can not be found'),
        (TWO_STAGES, ['other.pth', 'IMAGE'], 'other.pth does not fit'),
        (TWO_STAGES, ['none', 'IMAGE', '--stages', 2, 3], 'stage 3 is not there: the LaViT of'),
        (TWO_STAGES, ['none', 'IMAGE', '--points', '9,9', '90,5'], 'point 90,5 is outside'),
        (TWO_STAGES, ['none', 'IMAGE', '--points', '5,70'], 'is 90 x 70 pixels'),
        (TWO_STAGES, ['none', 'IMAGE', '--heads', 1], 'one of 0..0, which stage 1 has, got 1'),
        (TWO_STAGES, ['none', 'IMAGE', '--device', 'abacus'], "device 'abacus' cannot be used"),
        (TWO_STAGES, ['none', 'IMAGE', '--out', 'text.jpg'], 'text.jpg is a file; name a folder'),
        (UNTESTED, ['none', 'IMAGE'], 'no test_dataloader.dataset.pipeline'),
        (NO_LAVIT, ['none', 'IMAGE'], 'model must hold a LaViT, ImageClassifier holds none'),
        ("default_scope = 'mmpretrain'", ['none', 'IMAGE'], 'has no model'),
        (None, ['none', 'IMAGE'], 'config file not found: config.py'),
    ],
)
def test_bad_input_is_one_line(
    config, arguments, message, image, main, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if config is not None:
        Path('config.py').write_text(config)
    Path('text.jpg').write_text('no image')
    torch.save({'state_dict': {'backbone.patch_embed.norm.weight': torch.ones(32)}}, 'other.pth')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit, match='2'):
        main('config.py', *(image if a == 'IMAGE' else a for a in arguments))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('mmlavit:')]
    assert len(said) == 1
    assert message in said[0]
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--stages', '0'], "'0' is no stage; it must be one of 1 to 4"),
        (['--points', '3;4'], "'3;4' is no point; it must be X,Y"),
        (['--points', '-3,4'], 'expected at least one argument'),
        (['--heads', 'all'], "'all' must be 'mean', 'each' or the number"),
    ],
)
def test_bad_options(arguments, message, main, capsys):
    with pytest.raises(SystemExit, match='2'):
        main('config.py', 'none', 'image.jpg', *arguments)
    assert message in capsys.readouterr().err


def query_of(layer: LayerAttention, x: int, y: int) -> tuple[int, int, tuple[int, int], list]:
    """Window and place of the token at a pixel, the window's place, its real tokens."""
    stride, window = 4 * 2**layer.stage, WINDOWS[layer.stage]
    height, width = -(-52 // stride), -(-74 // stride)
    token = y // stride, x // stride
    win = token[0] // window, token[1] // window
    tokens = reference.real_tokens(win, height, width, window)
    number = list(reference.windows_of(height, width, window)).index(win)
    return number, reference.place(token, window), win, tokens


def expected_heat(layer: LayerAttention, maps: torch.Tensor, head: int | None, x: int, y: int):
    """What the query at a pixel has for each real key of its window, token by token."""
    number, place, win, tokens = query_of(layer, x, y)
    window = WINDOWS[layer.stage]
    rows, cols = (1 + max(t[axis] for t in tokens) - win[axis] * window for axis in (0, 1))
    heat = np.zeros((rows, cols))
    for row, col in tokens:
        pair = maps[0, number, :, place, reference.place((row, col), window)]
        heat[row - win[0] * window, col - win[1] * window] = (
            pair.mean() if head is None else pair[head]
        )
    return heat


# The last is in a window that both edges cut.
POINTS = [(0, 0), (40, 25), (73, 51)]


@pytest.mark.parametrize('heads', ['first', 1, -1])
def test_heads_that_are_not_there(layers, heads):
    with pytest.raises(ValueError, match=f'one of 0..0, which stage 1 has, got {heads!r}'):
        draw_sheet(PICTURE, layers, POINTS, heads, window_sizes=WINDOWS)


def test_layers_without_windows_are_not_drawn(layers):
    layers = [dataclasses.replace(layer, grid=None) for layer in layers]
    message = 'layer must attend in windows, stages.0.blocks.0.attn does not'
    with pytest.raises(ValueError, match=message):
        draw_sheet(PICTURE, layers, POINTS, window_sizes=WINDOWS)
    with pytest.raises(ValueError, match=message):
        draw_page(PICTURE, layers, POINTS[0])


@pytest.mark.parametrize('heads', ['mean', pytest.param('each', marks=pytest.mark.slow), 0])
def test_sheet_has_the_attention_of_each_query(layers, heads):
    figure = draw_sheet(PICTURE, layers, POINTS, heads, window_sizes=WINDOWS)
    drawn = [
        (axes.get_title(), axes.images[1].get_array(), axes.images[1].get_extent())
        for axes in figure.axes
        if len(axes.images) == 2
    ]
    expected = []
    for stage in range(4):
        of_stage = [x for x in layers if x.stage == stage]
        count = of_stage[0].attn.shape[2]
        for x, y in POINTS:
            for head in {'mean': [None], 'each': range(count), 0: [0]}[heads]:
                for layer in of_stage:
                    word = 'VA' if layer.kind == 'vanilla' else 'LA'
                    title = f'{word}  layer {layer.layer + 1}'
                    expected.append((layer, title, layer.attn, head, x, y))
                first = of_stage[0]
                if first.residual is not None:
                    own = first.scores - first.residual
                    expected.append((first, 'own  $QK^T/\\sqrt{d}$', own, head, x, y))
                    expected.append((first, '+ brought in by AR', first.residual, head, x, y))
                    expected.append((first, '= scores of layer 1', first.scores, head, x, y))
    assert len(drawn) == len(expected)
    for (title, heat, extent), (layer, words, maps, head, x, y) in zip(
        drawn, expected, strict=True
    ):
        assert title == words
        np.testing.assert_allclose(heat, expected_heat(layer, maps, head, x, y), atol=1e-6)
        # Over its window, in pixels: left, right, bottom, top.
        side, (_, _, win, tokens) = 4 * 2**layer.stage, query_of(layer, x, y)
        bottom, right = tokens[-1][0] + 1, tokens[-1][1] + 1
        top, left = (WINDOWS[layer.stage] * i for i in win)
        assert list(extent) == [left * side, right * side, bottom * side, top * side]


def test_stretched_colours_begin_at_the_least(layers):
    for stretch in (False, True):
        figure = draw_sheet(PICTURE, layers, [(40, 25)], window_sizes=WINDOWS, stretch=stretch)
        of_layers = [a for a in figure.axes if a.get_title()[:2] in ('VA', 'LA')]
        heats = [a.images[1] for a in of_layers[:2]]  # of the first stage
        least = min(heat.get_array().min() for heat in heats)
        most = max(heat.get_array().max() for heat in heats)
        for heat in heats:
            assert (heat.norm.vmin, heat.norm.vmax) == (least if stretch else 0, most)


def test_page_leaves_out_large_stages_and_refuses_to_be_huge(layers, monkeypatch):
    assert choose_stages(layers) == [0, 1, 2, 3]
    assert choose_stages(layers, limit=1) == [3]
    sizes = [size_of([x for x in layers if x.stage == m]) for m in range(4)]
    assert choose_stages(layers, limit=sizes[2] + sizes[3]) == [2, 3]
    assert choose_stages(layers, limit=sizes[2] + sizes[3] - 1) == [3]
    assert_holds(draw_page(PICTURE, layers[-2:], (40, 25), 'a <b> title'), layers[-2:])
    monkeypatch.setattr('mmlavit.analysis.interactive.MOST', 100)
    with pytest.raises(ValueError, match='choose fewer stages or a smaller image'):
        draw_page(PICTURE, layers, (40, 25))


# Runs the page's own code with stand-ins for what Bokeh gives it.
NODE = """
const {stages, show, clicks} = JSON.parse(require('fs').readFileSync(0, 'utf8'))
const source = () => ({data: {image: [new Grid([], [0, 0])]}})
class Grid extends Array {
    constructor(values, shape) { super(); this.values = [...values]; this.shape = shape }
}
const list = (make) => Array.from({length: 3}, make)
const args = {
    stages, width: 74, height: 52, info: {},
    stage_select: {}, head_select: {options: [], value: 'mean'}, stretch: {active: false},
    mapper: {}, panels: list(() => ({title: {}})), heats: list(source), frames: {}, grid: {},
    residual_panels: list(() => ({})), residual_heats: list(source),
    residual_mappers: list(() => ({})), x_range: {setv() {}}, y_range: {setv() {}},
    state: {data: {x: [0], y: [0]}},
}
const run = new Function(...Object.keys(args), 'cb_obj', show)
const out = clicks.map(([stage, head, x, y]) => {
    args.stage_select.value = stage
    args.head_select.value = head
    run(...Object.values(args), {event_name: 'tap', x, y})
    const read = ({data}) => ({...data, image: data.image[0].values, shape: data.image[0].shape})
    return {
        heats: args.heats.map(read), residual: args.residual_heats.map(read),
        visible: args.panels.map((panel) => panel.visible),
        with_residual: args.residual_panels[0].visible, frames: args.frames.data,
    }
})
console.log(JSON.stringify(out))
"""


@pytest.mark.skipif(
    shutil.which('node') is None, reason='no node to run the JavaScript of the page'
)
def test_a_click_shows_the_attention_of_its_token(layers):
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value.tolist() if isinstance(value, np.ndarray) else value

    stages = plain(embedded(draw_page(PICTURE, layers, (0, 0))))
    clicks = [
        (m, head, x + 0.3, y + 0.6) for m in range(4) for head in ('mean', '0') for x, y in POINTS
    ]
    given = [(f'stage {m + 1}', *rest) for m, *rest in clicks]
    ran = subprocess.run(
        ['node', '-e', NODE],
        input=json.dumps(dict(stages=stages, show=SHOW, clicks=given)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    for (m, head, x, y), shown in zip(clicks, json.loads(ran.stdout), strict=True):
        of_stage = [layer for layer in layers if layer.stage == m]
        head = None if head == 'mean' else int(head)
        x, y = int(x), int(y)
        assert shown['visible'] == [i < len(of_stage) for i in range(3)]
        parts = [
            (layer, layer.attn, heat) for layer, heat in zip(of_stage, shown['heats'], strict=False)
        ]
        first = of_stage[0]
        assert shown['with_residual'] == (first.residual is not None)
        if first.residual is not None:
            maps = first.scores - first.residual, first.residual, first.scores
            parts += [
                (first, part, heat) for part, heat in zip(maps, shown['residual'], strict=True)
            ]
        stride, (_, _, win, _) = 4 * 2**m, query_of(first, x, y)
        for layer, maps, heat in parts:
            expected = expected_heat(layer, maps, head, x, y)
            assert heat['shape'] == list(expected.shape)
            found = np.array(heat['image']).reshape(expected.shape)
            steps = maps.abs().max().item() / 127
            np.testing.assert_allclose(found, expected, atol=steps, rtol=0)
            left, top = win[1] * WINDOWS[m] * stride, win[0] * WINDOWS[m] * stride
            assert (heat['x'], heat['y']) == ([left], [top])
        assert shown['frames']['left'] == [left, x // stride * stride]
        assert shown['frames']['bottom'][1] == (y // stride + 1) * stride
