"""The commands that convert data sets, as a user runs them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import ROOT, assert_ran, run_tool, the_one_line
from PIL import Image

TOOLS = sorted((ROOT / 'tools' / 'dataset_converters').glob('*.py'))
LICENCES = {
    'camvid': 'CC BY-NC 4.0',
    'dsb2018': 'CC0',
    'bccd': 'MIT',
    'tinyimagenet': 'research only',
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'{path.stem}_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The command for Tiny ImageNet, in this process."""
    monkeypatch.chdir(tmp_path)
    return load(ROOT / 'tools' / 'dataset_converters' / 'tinyimagenet.py').main


@pytest.fixture
def download(tmp_path) -> Path:
    """Two classes of Tiny ImageNet, one image each in train and val."""
    root = tmp_path / 'tiny-imagenet-200'
    rng = np.random.default_rng(0)
    for name in ('train/n1/images/n1_0', 'train/n2/images/n2_0', 'val/images/a', 'val/images/b'):
        path = root / f'{name}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    (root / 'val' / 'val_annotations.txt').write_text('a.JPEG\tn1\t0\nb.JPEG\tn2\t0\n')
    (root / 'wnids.txt').write_text('n2\nn1\n')
    (root / 'words.txt').write_text('n1\ta thing\nn2\tanother\n')
    return root


def test_there_is_one_for_each_data_set():
    assert {tool.stem for tool in TOOLS} == LICENCES.keys()


@pytest.mark.parametrize('tool', TOOLS, ids=lambda tool: tool.stem)
def test_help_names_the_licence_the_result_and_the_default(tool, capsys):
    with pytest.raises(SystemExit) as left:
        load(tool).main(['--help'])
    assert left.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert LICENCES[tool.stem] in text and 'docs/datasets.md' in text
    assert f'(default: data/{tool.stem})' in text
    assert '{train,val' in text or '{train,test}' in text


@pytest.mark.parametrize('tool', TOOLS, ids=lambda tool: tool.stem)
def test_what_is_not_there_is_one_line(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load(tool).main(['gone']) == 2
    assert capsys.readouterr().err == f'{tool.stem}: error: gone is not there\n'
    assert not list(tmp_path.iterdir())


def test_as_a_program(download, tmp_path):
    tool = 'dataset_converters/tinyimagenet.py'
    ran = run_tool(tool, download, '--out', 'out', cwd=tmp_path)
    assert_ran(ran)
    assert '5/5' in ran.stderr  # the progress bar: four images, and the classes' names
    said = ran.stdout.splitlines()
    assert said[0] == 'out: written'
    assert re.fullmatch(r' +train +2 images, 2 classes', said[1])
    assert 'research only' in said[-1]
    assert (tmp_path / 'out' / 'val' / 'n2' / 'b.JPEG').is_file()

    refused = run_tool(tool, download / 'words.txt', cwd=tmp_path)
    assert refused.returncode == 2
    assert the_one_line(refused.stderr).startswith('tinyimagenet: error: ')
    assert not (tmp_path / 'data').exists()


def test_the_second_time_there_is_nothing_to_do(download, tmp_path, main, capsys):
    assert main([str(download)]) == 0
    first = capsys.readouterr().out.splitlines()
    assert first[0] == 'data/tinyimagenet: written'
    assert main([str(download)]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again == ['data/tinyimagenet: already complete, nothing to do', *first[1:]]


def test_another_number_of_classes_goes_elsewhere(download, tmp_path, main, capsys):
    assert main([str(download)]) == 0
    assert main([str(download), '--classes', '1']) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "options is {'classes': 2} there and {'classes': 1} here" in last
    assert main([str(download), '--classes', '1', '--out', 'one']) == 0
    assert [path.name for path in (tmp_path / 'one' / 'train').iterdir()] == ['n2']


@pytest.mark.parametrize('classes', ['0', '3'])
def test_a_number_of_classes_that_there_are_not(download, main, capsys, classes):
    assert main([str(download), '--classes', classes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert classes in line and 'classes' in line


def test_a_broken_file_is_one_line_and_leaves_nothing(download, tmp_path, main, capsys):
    broken = download / 'val' / 'images' / 'b.JPEG'
    broken.write_bytes(broken.read_bytes()[:500])
    assert main([str(download)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f'tinyimagenet: error: {broken} is no whole image')
    assert not (tmp_path / 'data').exists()


def test_an_interruption_says_what_to_do(capsys):
    from mmlavit.datasets.converters.command import run

    def plan(source: str):
        raise KeyboardInterrupt

    assert run('set', plan, 'a folder', 'a licence', ['download']) == 130
    assert 'the same command again goes on' in capsys.readouterr().err
