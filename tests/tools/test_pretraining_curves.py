"""The comparison with and without pretraining: what it asks for and plots; nothing is trained."""

import json
from pathlib import Path

import cv2
import pytest

from repository import pretraining_curves
from repository.demo import DEMOS


@pytest.fixture
def trained(monkeypatch, tmp_path) -> list[tuple]:
    """The trainings asked for; each leaves a log whose mIoU tells which it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining_curves, 'make_shapes', lambda root, recipe: None)
    calls = []

    def train(config: Path, work_dir: Path, *options: str) -> Path:
        calls.append((config, work_dir, options))
        log = work_dir / 'run' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        records = [{'mIoU': 10.0 * len(calls) + i, 'step': 250 * i} for i in (1, 2)]
        log.write_text('\n'.join(json.dumps(r) for r in [{'loss': 1.0, 'step': 25}, *records]))
        return Path('best.pth')

    monkeypatch.setattr(pretraining_curves, 'train', train)
    return calls


def test_only_the_first_weights_differ(trained, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pretraining_curves, 'draw', lambda c, out: drawn.append(c) or out)
    assert pretraining_curves.compare(tmp_path / 'p.png') == tmp_path / 'p.png'
    (cls, _, nothing), (first, a, scratch), (second, b, pretrained) = trained
    assert (cls, nothing) == (DEMOS['cls'].config, ())
    assert first == second == DEMOS['seg'].config
    # The demo's own training is the one from scratch: run before, it is not run again.
    assert a == DEMOS['seg'].work_dir != b
    assert scratch == () and pretrained == ('model.backbone.init_cfg.checkpoint=best.pth',)
    assert drawn == [
        {
            'from scratch': {250: 21.0, 500: 22.0},
            'from the classifier': {250: 31.0, 500: 32.0},
        }
    ]


def test_both_curves_are_in_the_picture(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    curves = {'from scratch': {250: 20.0, 500: 60.0}, 'from the classifier': {250: 50.0, 500: 70.0}}
    out = pretraining_curves.draw(curves, tmp_path / 'p.png')
    assert cv2.imread(str(out)) is not None
    lines = figures[0].axes[0].get_lines()
    drawn = {ln.get_label(): dict(zip(ln.get_xdata(), ln.get_ydata(), strict=True)) for ln in lines}
    assert drawn == curves
