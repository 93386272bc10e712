"""The weights in checkpoints/: that they are what their index says, and reach its figures.

The folder may be empty. So that the checks themselves are seen to work, they are also run on a
small zoo that is trained, tested and published here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import yaml
from helpers import ROOT, assert_ran, run_python, run_tool
from mmengine.config import Config
from modelindex import load_model_index

from mmlavit.datasets.shapes import ShapesRecipe, make_shapes

# By the kind of a checkpoint: the toolbox, and its task in the index.
KINDS = {
    'classifier': 'Image Classification',
    'detector': 'Object Detection',
    'segmentor': 'Semantic Segmentation',
}
# Other processors, and half precision in another version of torch, round otherwise.
SHARE, DIFFERENCE = 5e-3, 1e-3


def models(repository: Path) -> list[dict]:
    text = (repository / 'checkpoints' / 'metafile.yml').read_text(encoding='utf-8')
    return yaml.safe_load(text)['Models']


def kind_of(entry: dict) -> str | None:
    """None for a backbone alone, which has no figures of its own."""
    tasks = {result['Task'] for result in entry.get('Results', [])}
    return next((kind for kind, task in KINDS.items() if task in tasks), None)


# ---- Checks --------------------------------------------------------------------------------------


def faults(repository: Path) -> list[str]:
    """What is wrong with the folder, without evaluating anything."""
    folder, found = repository / 'checkpoints', []
    entries = models(repository)
    listed = {entry['Weights'] for entry in entries}
    for path in sorted(folder.iterdir()):
        if path.suffix not in ('.pth', '.safetensors'):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not path.stem.endswith(f'-{digest[:8]}'):
            found.append(f'{path.name} is not what its name says')
        cards = [card for card in folder.glob('*.md') if digest in card.read_text(encoding='utf-8')]
        if not cards:
            found.append(f'no card tells of {path.name}')
        if path.suffix == '.pth' and f'checkpoints/{path.name}' not in listed:
            found.append(f'{path.name} is not in metafile.yml')
    for entry in entries:
        log = entry['Metadata'].get('Training Log')
        if log and not (repository / log).is_file():
            found.append(f'{log} is not there')
        file = repository / entry['Weights']
        if not file.is_file():
            found.append(f'{entry["Weights"]} is not there')
        elif hashlib.sha256(file.read_bytes()).hexdigest() != entry['Metadata']['SHA256']:
            found.append(f'{file.name} has another SHA-256 than metafile.yml says')
        if not (repository / entry['Config']).is_file():
            found.append(f'{entry["Config"]} is not there')
    return found


def files_of(config: Path) -> Iterator[str]:
    """What the test set of a config needs, as it is named there."""
    cfg = Config.fromfile(config)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or ''
    for part in [*(prefix.values() if isinstance(prefix, dict) else [prefix]), '']:
        yield os.path.join(root, part)
    if dataset.get('ann_file'):
        yield os.path.join(root, dataset.ann_file)


def data_for(config: Path, data: Path, downloads: Path | None, tmp_path: Path) -> Path:
    """A folder from which the config finds its data, or the test is skipped.

    Args:
        config: The config.
        data: A folder that is laid out as our configs have it.
        downloads: Where that of one set is missing, what its converter makes of a folder here.
        tmp_path: Where to make the folder.
    """
    needed = list(files_of(config))
    start = tmp_path / 'start'
    start.mkdir(parents=True)
    if all((data.parent / name).exists() for name in needed):
        (start / 'data').symlink_to(data)
        return start
    name = Path(needed[0]).parts[1]
    converter = ROOT / 'tools' / 'dataset_converters' / f'{name}.py'
    if downloads and (downloads / name).is_dir() and converter.is_file():
        assert_ran(run_tool(f'dataset_converters/{name}.py', downloads / name, cwd=start))
        return start
    pytest.skip(f'{config.name} needs {needed[-1]}, in {data.parent}, or MMLAVIT_DATA')


def evaluate(entry: dict, repository: Path, start: Path) -> dict[str, float]:
    """The figures of an entry's weights, by tools/test.py."""
    work_dir = start / entry['Name']
    config, weights = repository / entry['Config'], repository / entry['Weights']
    assert_ran(run_tool('test.py', config, weights, '--work-dir', work_dir, cwd=start))
    (log,) = work_dir.glob('*/2*.json')
    return json.loads(log.read_text(encoding='utf-8'))


def differences(entry: dict, found: dict[str, float]) -> list[str]:
    """Figures of the index that are not what was found."""
    return [
        f'{name} is {found.get(name)}, and {value} by metafile.yml'
        for result in entry['Results']
        for name, value in result['Metrics'].items()
        if found.get(name) != pytest.approx(value, rel=SHARE, abs=DIFFERENCE)
    ]


# ---- What is kept --------------------------------------------------------------------------------


def test_the_folder_is_what_its_index_says():
    assert faults(ROOT) == []
    index = load_model_index.load(str(ROOT / 'checkpoints' / 'metafile.yml'))
    index.build_models_with_collections()
    assert index.check(silent=True) == []
    assert all(entry['Metadata']['Trained'] is True for entry in models(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_kept_checkpoints_reach_their_figures(kind, tmp_path):
    entries = [entry for entry in models(ROOT) if kind_of(entry) == kind]
    if not entries:
        pytest.skip(f'checkpoints/ has no {kind}')
    found, downloads = [], os.environ.get('MMLAVIT_DATA')
    for entry in entries:
        start = data_for(
            ROOT / entry['Config'],
            ROOT / 'data',
            Path(downloads) if downloads else None,
            tmp_path / entry['Name'],
        )
        found += differences(entry, evaluate(entry, ROOT, start))
    assert found == []


# ---- The page ------------------------------------------------------------------------------------


def tool() -> SimpleNamespace:
    spec = importlib.util.spec_from_file_location('model_zoo', ROOT / 'tools' / 'model_zoo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_what_the_index_does():
    page = (ROOT / 'docs' / 'model_zoo.md').read_text(encoding='utf-8')
    assert tool().fill_in(page, models(ROOT)) == page
    assert all(f'## `{entry["Name"]}`' in page for entry in models(ROOT))


def test_the_page_says_first_what_is_trained():
    """And what is not, as configs/metafile.yml says."""
    first = (ROOT / 'docs' / 'model_zoo.md').read_text(encoding='utf-8').split('\n\n')[1]
    trained, marked, untrained = first.partition('Not trained')
    assert marked
    for entry in yaml.safe_load((ROOT / 'configs' / 'metafile.yml').read_text())['Models']:
        where = trained if entry['Metadata']['Trained'] else untrained
        assert entry['Metadata']['Training Data'] in where


@pytest.mark.slow
def test_a_name_is_enough_in_a_clone(tmp_path):
    # As cells look in a smear: pale discs, and one that is dark. As stained nuclei do: they shine.
    cells = np.full((360, 480, 3), (200, 205, 205), np.uint8)
    nuclei = np.full((256, 256, 3), 12, np.uint8)
    for x, y in itertools.product(range(60, 480, 120), range(60, 360, 120)):
        cv2.circle(cells, (x, y), 28, (150, 150, 190), -1, cv2.LINE_AA)
        cv2.circle(nuclei, (x // 2, y // 2), 9, (90, 90, 90), -1, cv2.LINE_AA)
    cv2.circle(cells, (240, 180), 45, (150, 60, 110), -1, cv2.LINE_AA)
    pictures = dict(retinanet_lavit_n_bccd=cells, maskrcnn_lavit_n_dsb2018=nuclei)
    for entry in models(ROOT):
        name, found = Path(entry['Config']).stem, []
        image = f'{name}.png'
        cv2.imwrite(str(tmp_path / image), pictures[name])
        for weights in ([], [ROOT / entry['Weights']], ['none']):
            out = f'{name}-{len(found)}'
            command = ['mmlavit', 'infer', name, *weights, image, '--out', out]
            assert_ran(run_python('-m', *command, '--no-pictures', cwd=tmp_path))
            found.append(json.loads((tmp_path / out / 'predictions.json').read_text()))
        assert found[0] == found[1] != found[2]
        assert any(box['score'] > 0.5 for box in found[0]['annotations'])


@pytest.mark.parametrize('text', ['', '<!-- models -->', '<!-- models -->\n' * 2])
def test_a_page_without_its_marks(text):
    with pytest.raises(ValueError, match='once each'):
        tool().fill_in(text, [])


# ---- On a small zoo ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def zoo(tmp_path_factory) -> Path:
    """A repository with a classifier in its zoo: trained, tested, published, entered."""
    root = tmp_path_factory.mktemp('zoo')
    make_shapes(
        root / 'data' / 'shapes', ShapesRecipe(num_train=4, num_val=16, size=64), progress=False
    )
    (root / 'configs').mkdir()
    config = root / 'configs' / 'tiny.py'
    config.write_text(f"""
_base_ = {str(ROOT / 'configs' / 'lavit_n_shapes.py')!r}
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
default_hooks = dict(checkpoint=dict(save_best=None))
""")
    assert_ran(run_tool('train.py', config, '--work-dir', 'run', cwd=root))
    (training_log,) = (root / 'run').glob('*/vis_data/2*.json')
    publish = ('publish_model.py', 'run/epoch_1.pth', 'checkpoints', '--half', '--data', 'shapes')
    publish += ('--log', training_log)
    assert_ran(run_tool(*publish, cwd=root))
    (weights,) = (root / 'checkpoints').glob('*.pth')
    # The figures are of the published file.
    assert_ran(run_tool('test.py', config, weights, '--work-dir', 'test', cwd=root))
    (log,) = (root / 'test').glob('*/2*.json')
    weights.with_suffix('.md').unlink()
    published = run_tool(*publish, '--test-log', log, cwd=root)
    assert_ran(published)
    entries = yaml.safe_load(published.stdout.partition('metafile.yml:\n')[2])
    (root / 'checkpoints' / 'metafile.yml').write_text(yaml.safe_dump(dict(Models=entries)))
    return root


@pytest.mark.slow
def test_a_model_that_is_what_its_entry_says(zoo, tmp_path):
    assert faults(zoo) == []
    (entry,) = models(zoo)
    assert kind_of(entry) == 'classifier'
    start = data_for(zoo / entry['Config'], zoo / 'data', None, tmp_path)
    found = evaluate(entry, zoo, start)
    assert differences(entry, found) == []
    for value in (found['accuracy/top1'] + 1, found['accuracy/top1'] - 1):
        entry['Results'][0]['Metrics'] = {'accuracy/top1': value}
        assert len(differences(entry, found)) == 1
    entry['Results'][0]['Metrics'] = {'another': 1.0}
    assert len(differences(entry, found)) == 1


@pytest.mark.slow
def test_data_that_is_not_there(zoo, tmp_path):
    config = zoo / 'configs' / 'tiny.py'
    with pytest.raises(pytest.skip.Exception, match='tiny.py needs data/shapes/imagenet.*nowhere'):
        data_for(config, tmp_path / 'nowhere' / 'data', tmp_path, tmp_path)


@pytest.mark.slow
def test_faults_are_found(zoo):
    (weights,) = (zoo / 'checkpoints').glob('*.pth')
    other = weights.with_name('other_20260101-00000000.pth')
    other.write_bytes(b'1')
    assert faults(zoo) == [
        f'{other.name} is not what its name says',
        f'no card tells of {other.name}',
        f'{other.name} is not in metafile.yml',
    ]
    other.unlink()
    index = zoo / 'checkpoints' / 'metafile.yml'
    before = index.read_text()
    (entry,) = models(zoo)
    entry['Metadata']['SHA256'] = '0' * 64
    gone = dict(entry, Config='configs/gone.py', Weights='checkpoints/gone.pth')
    gone['Metadata'] = dict(entry['Metadata'], **{'Training Log': 'checkpoints/gone.json'})
    index.write_text(yaml.safe_dump(dict(Models=[entry, gone])))
    assert faults(zoo) == [
        f'{weights.name} has another SHA-256 than metafile.yml says',
        'checkpoints/gone.json is not there',
        'checkpoints/gone.pth is not there',
        'configs/gone.py is not there',
    ]
    index.write_text(before)
    assert faults(zoo) == []


@pytest.mark.slow
def test_the_page_of_a_small_zoo(zoo):
    (entry,) = models(zoo)
    page = tool().fill_in('a\n<!-- models -->\nold\n<!-- end of models -->\nb\n', [entry])
    assert '## `tiny-half`' in page
    lines = [line.strip('| ') for line in page.splitlines() if line.startswith('| ')]
    rows = dict(line.split(' | ', 1) for line in lines if ' | ' in line)
    assert rows['task'] == 'Image Classification' and rows['trained on'] == 'shapes'
    assert rows['licence of the data'] == 'not stated'
    accuracy = entry['Results'][0]['Metrics']['accuracy/top1']
    assert f'accuracy/top1 {accuracy}' in rows['on its test set']
    weights = entry['Weights']
    assert '1 epochs' in rows['training'] and f'[weights in float16](../{weights})' in rows['files']
    assert f'(../{weights.removesuffix(".pth")}.log.json)' in rows['files']
    assert page.startswith('a\n') and page.endswith('\nb\n') and 'old' not in page
    assert tool().fill_in(page, [entry]) == page
