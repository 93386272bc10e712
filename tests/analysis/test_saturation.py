"""tools/analysis/saturation.py over real configs and data, and its figures."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, make_shapes, run_tool, run_tool_here, the_one_line
from matplotlib.image import imread

from mmlavit import LaViT
from mmlavit.analysis.peers import recording_any
from mmlavit.analysis.saturation import LayerNumbers, SaturationMeter
from mmlavit.analysis.saturation_figures import draw, draw_curves, draw_heat_maps, to_image

run = partial(run_tool_here, 'analysis/saturation.py')
CONFIG = ROOT / 'configs' / 'lavit_n_shapes.py'
MEASURES = ('diagonality', 'symmetry', 'entropy')


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set, a checkpoint of a classifier, and a small Swin's config."""
    folder = tmp_path_factory.mktemp('project')
    (folder / 'data').mkdir()
    make_shapes(folder / 'data' / 'shapes', 3, 5)
    torch.manual_seed(7)
    backbone = LaViT('nano', window_sizes=(8, 12, 6, 3), out_indices=(3,))
    for name, weight in backbone.named_parameters():
        if name.endswith(('psi', 'theta', 'qkv.weight')):
            weight.data += 0.1 * torch.randn_like(weight)
    weights = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    weights['head.fc.bias'] = torch.zeros(3)
    torch.save(dict(state_dict=weights, meta={}), folder / 'trained.pth')
    backbone = dict(type='SwinTransformer', arch=dict(embed_dims=12, depths=[2], num_heads=[2]))
    backbone |= dict(out_indices=(0,), init_cfg=dict(type='Pretrained', checkpoint='no/such.pth'))
    model = dict(type='ImageClassifier', backbone={**backbone, 'window_size': 4})
    (folder / 'swin.py').write_text(f"default_scope = 'mmpretrain'\nmodel = {model}\n")
    return folder


@pytest.fixture(scope='module')
def measured(project: Path) -> Path:
    """What the tool wrote of a trained model, its random start and a Swin."""
    with pytest.MonkeyPatch.context() as patch:
        models = ['--model', 'start', CONFIG, '--model', 'Swin', 'swin.py']
        run(patch, project, CONFIG, 'trained.pth', '--name', 'trained', *models, '--images', 3)
    return project / 'saturation'


def test_json_holds_what_the_meter_finds_on_images_spread_over_the_data(project, measured):
    found = json.loads((measured / 'saturation.json').read_text())
    assert [model['name'] for model in found] == ['trained', 'start', 'Swin']
    assert [model['weights'] for model in found] == ['trained.pth', *2 * ['random, seed 0']]
    assert {model['images'] for model in found} == {3}
    # The images, by other means: of 5 in order of their paths, 3; normalized as ImageNet's are.
    files = sorted((project / 'data/shapes/imagenet/val').glob('*/*'))
    assert len(files) == 5
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    meter = SaturationMeter()
    backbone = LaViT('nano', window_sizes=(8, 12, 6, 3), out_indices=(3,)).eval()
    weights = torch.load(project / 'trained.pth')['state_dict']
    backbone.load_state_dict(
        {k[9:]: value for k, value in weights.items() if k.startswith('backbone.')}
    )
    for i in (0, 1, 3):
        pixels = np.rint(255 * imread(files[i])[..., :3]) if files[i].suffix == '.png' else None
        if pixels is None:
            pixels = imread(files[i])
        image = torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1)).float()[None]
        with recording_any(backbone, meter.see), torch.no_grad():
            backbone(image)
        meter.end_batch()
    expected = meter.numbers()
    assert len(found[0]['layers']) == len(expected) == 8
    for layer, numbers in zip(found[0]['layers'], expected, strict=True):
        assert (layer['stage'], layer['layer']) == (numbers.stage + 1, numbers.layer + 1)
        assert layer['kind'] == numbers.kind
        for name in MEASURES:
            assert layer[name] == pytest.approx(getattr(numbers, name), rel=1e-3, abs=1e-5)
        for name in ('cosine', 'cka'):
            assert layer[name] == pytest.approx(getattr(numbers, name), rel=1e-2, abs=1e-3)


def test_random_weights_reuse_attention_and_others_do_not(measured):
    trained, start, swin = json.loads((measured / 'saturation.json').read_text())
    for layer in start['layers']:
        assert layer['cosine'] == pytest.approx([1, 1], abs=1e-6)
    assert min(layer['cka'][0] for layer in trained['layers']) < 0.9
    assert [layer['kind'] for layer in swin['layers']] == ['window', 'shifted']


def test_csv_has_a_line_for_each_layer(measured):
    with (measured / 'saturation.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    found = json.loads((measured / 'saturation.json').read_text())
    layers = [(model, layer) for model in found for layer in model['layers']]
    assert len(rows) == len(layers) == 8 + 8 + 2
    for row, (model, layer) in zip(rows, layers, strict=True):
        assert (row['model'], row['weights']) == (model['name'], model['weights'])
        assert (int(row['stage']), int(row['layer'])) == (layer['stage'], layer['layer'])
        for name in MEASURES:
            assert float(row[name]) == pytest.approx(layer[name], rel=1e-5)
        for name in ('cosine', 'cka'):
            text = row[f'{name}_to_previous']
            if layer['layer'] == 1:
                assert text == ''
            else:
                before = layer[name][layer['layer'] - 2]
                assert float(text) == pytest.approx(before, rel=1e-5)


def test_draws_a_picture(measured):
    picture = imread(measured / 'saturation.png')
    assert picture.shape[1] > 1200 and picture.shape[0] > 800
    assert len(np.unique(picture.reshape(-1, picture.shape[-1])[::50], axis=0)) > 50


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['no.py'], 'config file not found: no.py'),
        (['mmdet::no/such.py'], 'no config mmdet::no/such.py'),
        ([CONFIG, 'no.pth'], 'no.pth can not be found.'),
        (['resnet.py'], 'model must hold a LaViT, or a Swin or PVT'),
        (['swin.py'], 'swin.py has no val_dataloader and no test_dataloader'),
        (['swin.py', 'trained.pth'], 'trained.pth does not fit the backbone of swin.py'),
        (['empty.py'], 'empty.py has no model.backbone'),
        (['typo.py'], 'cannot build the backbone of typo.py'),
        ([CONFIG, '--model', 'lavit_n_shapes', CONFIG], 'must have different names'),
        ([CONFIG, '--device', 'abacus'], "--device: cannot use 'abacus'"),
        (['nodata.py'], 'no/where'),
        ([CONFIG, '--out', 'swin.py'], 'swin.py is a file; name a folder'),
    ],
    ids=lambda value: '' if isinstance(value, str) else ' '.join(Path(str(a)).name for a in value),
)
def test_says_in_a_line_what_is_wrong(args, message, project, monkeypatch, capsys):
    base = f'_base_ = {str(CONFIG)!r}\n'
    extra = {
        'resnet.py': "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18))",
        'nodata.py': "val_dataloader = dict(dataset=dict(data_root='no/where'))",
        'typo.py': "model = dict(backbone=dict(arch='nanu'))",
    }
    for name, text in extra.items():
        (project / name).write_text(base + text + '\n')
    (project / 'empty.py').write_text("default_scope = 'mmpretrain'\nmodel = dict()\n")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, project, '--out', project / 'none', *args, '--images', 2)
    assert stop.value.code == 2
    line = the_one_line(capsys.readouterr().err)
    assert line.startswith('mmlavit: ') and message in line
    assert not (project / 'none').exists()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([CONFIG, '--images', '0'], 'argument --images: must be at least 1, got 0'),
        (
            [CONFIG, '--model', 'name'],
            "argument --model: takes NAME CONFIG [CHECKPOINT], got ['name']",
        ),
    ],
)
def test_refuses_a_command_line_that_is_wrong(args, message, project, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, project, *args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_replaces_files_only_when_forced_to(measured, project, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, project, CONFIG)
    line = the_one_line(capsys.readouterr().err)
    assert line == (
        'mmlavit: saturation/saturation.png is there already; name another folder, or use --force'
    )
    (project / 'copy').mkdir()
    (project / 'copy' / 'saturation.csv').write_text('old')
    run(monkeypatch, project, CONFIG, '--out', 'copy', '--force', '--images', 1)
    assert (project / 'copy' / 'saturation.csv').read_text().startswith('model,')


@pytest.mark.slow
def test_a_detector_beside_swin_and_pvt_of_the_installed_package(project):
    """By the names that the package has for its configs, which want to download weights."""
    result = run_tool(
        *('analysis/saturation.py', ROOT / 'configs' / 'maskrcnn_lavit_n_shapes.py'),
        *('--model', 'Swin-T', 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
        *('--model', 'PVTv2-B0', 'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py'),
        *('--images', 2, '--out', 'peers'),
        cwd=project,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith('written: peers/saturation.png')
    found = json.loads((project / 'peers' / 'saturation.json').read_text())
    assert [len(model['layers']) for model in found] == [8, 12, 8]
    assert {layer['kind'] for layer in found[2]['layers']} == {'reduced'}


# ---- Figures -------------------------------------------------------------------------------------


def made_up(depths: tuple[int, ...], kinds: tuple[str, str]) -> list[LayerNumbers]:
    return [
        LayerNumbers(
            stage,
            layer,
            kinds[min(layer, 1)],
            diagonality=None if stage == 0 else 0.1 * layer,
            symmetry=0.5,
            entropy=0.25 * (stage + 1),
            cosine=tuple(1.0 if i == layer else 0.1 * abs(i - layer) for i in range(depth)),
            cka=(None,) * depth,
        )
        for stage, depth in enumerate(depths)
        for layer in range(depth)
    ]


def test_curves_hold_the_numbers_stage_by_stage():
    layers = made_up((2, 3), ('vanilla', 'less'))
    figure = draw_curves({'one': layers})
    panels = {panel.get_title().split(' ')[0]: panel for panel in figure.axes[:5]}
    lines = [line for line in panels['entropy'].lines if len(line.get_xdata()) > 1]
    assert [line.get_ydata().tolist() for line in lines] == [[0.25, 0.25], [0.5, 0.5, 0.5]]
    for stage, line in enumerate(lines):
        assert all(stage < x < stage + 1 for x in line.get_xdata())
    (first,) = [line for line in panels['cosine'].lines if len(line.get_xdata()) == 2]
    assert np.isnan(first.get_ydata()[0]) and first.get_ydata()[1] == 0.1
    marks = [line for line in panels['symmetry'].lines if len(line.get_xdata()) == 1]
    hollow = [line.get_markerfacecolor() == 'white' for line in marks]
    assert hollow == [False, True, False, True, True]
    assert [label.get_text() for label in panels['entropy'].get_xticklabels()] == [
        'stage 1',
        'stage 2',
    ]


def test_heat_maps_hold_all_pairs_of_a_stage():
    layers = made_up((2, 3), ('vanilla', 'less'))
    other = made_up((1,), ('window', 'shifted'))
    figure = draw_heat_maps({'one': layers, 'two': other})
    found = {}
    for panel in figure.axes:
        if panel.images and panel.get_title():
            found.setdefault(panel.get_title(), []).append(panel)
    panel = found['cosine, stage 2'][0]
    np.testing.assert_allclose(panel.images[0].get_array(), [n.cosine for n in layers[2:]])
    assert [label.get_text() for label in panel.get_xticklabels()] == ['VA1', 'LA2', 'LA3']
    assert [text.get_text() for text in panel.texts] == [
        *('1', '.10', '.20', '.10', '1', '.10', '.20', '.10', '1')
    ]
    # What is not defined is a dash, and a model with fewer stages leaves room.
    assert {text.get_text() for text in found['CKA, stage 2'][0].texts} == {'–'}
    assert len(found['cosine, stage 1']) == 2 and len(found['cosine, stage 2']) == 1


def test_a_deep_stage_has_no_numbers_in_its_cells_and_nothing_belongs_to_a_window():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    models = {'deep': made_up((18,), ('vanilla', 'less'))}
    figure = draw(models, 'title')
    texts = {text.get_text() for panel in figure.axes if panel.images for text in panel.texts}
    assert texts == {'deep'}
    pixels = to_image(draw_curves(models), dpi=50)
    assert pixels.dtype == np.uint8 and pixels.shape == (310, 650, 3)
    assert pixels.min() < 100 < 200 < pixels.max()
    assert pyplot.get_fignums() == before
