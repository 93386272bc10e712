"""The examples of docs/deployment.md, run as they are printed there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_ran, run_tool
from mmengine.config import ConfigDict
from PIL import Image
from small import needs_exporter
from test_exportable import (
    RETINANET,
    UPERNET,
    make_model,
    pixels,
    toolbox_segmentation,
    write_config,
)

PAGE = (ROOT / 'docs' / 'deployment.md').read_text(encoding='utf-8')
ALLOWED = {'json', 'numpy', 'onnxruntime', 'PIL'}
NAMES = ['circle', 'square', 'triangle']


@pytest.fixture(autouse=True)
def _scope(own_scope: None) -> None:
    """Building a model sets MMEngine's default scope."""


def example(word: str) -> str:
    """The only program of the page that has a word in it."""
    blocks = re.findall(r'^```python\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if word in block]
    return found


def run_example(word: str, folder: Path) -> str:
    """What it prints."""
    ran = subprocess.run(
        [sys.executable, '-c', example(word)], cwd=folder, capture_output=True, text=True
    )
    assert_ran(ran)
    return ran.stdout


def test_examples_need_three_packages() -> None:
    for word in ('labels.png', 'suppress'):
        imported = set()
        for node in ast.walk(ast.parse(example(word))):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition('.')[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition('.')[0])
        assert imported <= ALLOWED


@pytest.mark.slow
@needs_exporter
def test_segmentor(tmp_path: Path) -> None:
    """On a file of one size, which is quick to make; the input is the same."""
    pytest.importorskip('onnxruntime')
    config = write_config(tmp_path, 'upernet_lavit_n_shapes', UPERNET)
    model = make_model(config, tmp_path / 'model.pth')
    x = pixels(1, 3, 80, 120)
    # The toolbox loads BGR, PNG files are RGB.
    Image.fromarray(x[0].flip(0).permute(1, 2, 0).numpy()).save(tmp_path / 'image.png')
    command = ['export.py', config, tmp_path / 'model.pth', '--out', 'segmentor.onnx', '--head']
    command += ['--labels', '--preprocess', '--fixed', '--size', 80, 120]
    assert_ran(run_tool(*command, cwd=tmp_path))

    said = run_example('labels.png', tmp_path)
    labels = torch.from_numpy(np.array(Image.open(tmp_path / 'labels.png')))
    expected = toolbox_segmentation(model, x)[1][0]
    assert len(expected.unique()) > 1
    assert (labels == expected).float().mean() > 0.999
    for label, name in enumerate(['background', *NAMES]):
        assert f'{name}: {(labels == label).float().mean():.1%}' in said


@pytest.mark.slow
@needs_exporter
def test_detector_and_int8(tmp_path: Path) -> None:
    """An image that is made smaller to 64 x 96."""
    onnxruntime = pytest.importorskip('onnxruntime')
    from mmdet.structures import DetDataSample

    config = write_config(tmp_path, 'retinanet_lavit_n_shapes', RETINANET)
    model = make_model(config, tmp_path / 'model.pth')
    image = Image.fromarray(pixels(1, 3, 80, 120)[0].permute(1, 2, 0).numpy())
    image.save(tmp_path / 'image.png')
    command = ['export.py', config, tmp_path / 'model.pth', '--out', 'detector.onnx', '--head']
    command += ['--preprocess', '--fixed', '--size', 64, 96]
    assert_ran(run_tool(*command, cwd=tmp_path))
    found = [line.split() for line in run_example('suppress', tmp_path).splitlines()]

    resized = np.asarray(image.resize((96, 64), Image.BILINEAR))
    x = torch.from_numpy(resized.copy()).permute(2, 0, 1).flip(0)
    model.bbox_head.test_cfg = ConfigDict(
        nms_pre=10**6, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
    )
    meta = dict(ori_shape=(80, 120), img_shape=(64, 96), scale_factor=(0.8, 0.8))
    with torch.no_grad():
        (sample,) = model.test_step(dict(inputs=[x], data_samples=[DetDataSample(metainfo=meta)]))
    expected = sample.pred_instances
    assert len(found) == len(expected) > 10
    assert len(expected.labels.unique()) > 1
    matched = 0
    for name, *numbers in found:
        score, *box = map(float, numbers)
        same = (expected.labels == NAMES.index(name)) & ((expected.scores - score).abs() < 2e-3)
        matched += bool((same & ((expected.bboxes - torch.tensor(box)).abs() < 0.1).all(1)).any())
    # Which of two boxes with the same score is kept may differ.
    assert matched >= 0.95 * len(found)
    scores = [float(score) for _, score, *_ in found]
    assert scores == sorted(scores, reverse=True)

    run_example('quantize_dynamic', tmp_path)
    whole, small = (tmp_path / name for name in ('detector.onnx', 'detector_int8.onnx'))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    # Of four bytes of each weight one is left, and the file gains nodes.
    assert whole.stat().st_size - small.stat().st_size > 0.7 * 3 * linear
    x = x.flip(0)[None].numpy()
    boxes, scores = onnxruntime.InferenceSession(whole).run(None, {'image': x})
    boxes_int8, scores_int8 = onnxruntime.InferenceSession(small).run(None, {'image': x})
    assert 0 < np.abs(boxes_int8 - boxes).mean() < 2
    assert np.abs(scores_int8 - scores).mean() < 0.2 * scores.std()
