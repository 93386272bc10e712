"""What is read of logs, and what a card and an index entry say; real files are in test_publish."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from mmengine.config import Config
from modelindex.models.ModelIndex import ModelIndex

from mmlavit.export.model_card import (
    Facts,
    metafile_entry,
    model_card,
    read_literals,
    read_test_log,
    read_training_log,
    training_log,
)
from mmlavit.export.publish import PublishError, Release

CONFIGS = sorted((Path(__file__).resolve().parents[2] / 'configs').glob('*.py'))
EACH = [
    pytest.param(file, id=file.stem, marks=[] if '_n_' in file.stem else [pytest.mark.slow])
    for file in CONFIGS
]
DETECTOR = next(file for file in CONFIGS if file.stem == 'maskrcnn_lavit_n_shapes')


def write(path: Path, *lines: dict) -> Path:
    path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    return path


def step(step: int, time: float = 0.5, **others: object) -> dict:
    """A line of training, as LoggerHook writes it."""
    return dict(lr=0.1, loss=1.0, time=time, iter=step, step=step, **others)


def val(step: int, **metrics: object) -> dict:
    return {**metrics, 'data_time': 0.1, 'time': 0.2, 'step': step}


# ---- Logs ----------------------------------------------------------------------------------------


def test_the_validation_of_this_checkpoint(tmp_path):
    """Not the last one, nor the best."""
    lines = []
    for epoch, accuracy in enumerate((40.0, 90.0, 58.12345, 60.0), start=1):
        lines += [step(10 * epoch, epoch=epoch), val(epoch, **{'accuracy/top1': accuracy})]
    log = write(tmp_path / 'log.json', *lines)
    found, point, _ = read_training_log([log], dict(epoch=3, iter=30))
    assert found == {'accuracy/top1': 58.12} and point == 'epoch 3'


@pytest.mark.parametrize('logged', ['iteration', 'nothing'])
def test_trainings_without_epochs(tmp_path, logged):
    """MMEngine logs their validations with the iteration, or as of epoch 0."""
    lines = []
    for i in (100, 200, 300):
        lines += [step(i), val(i if logged == 'iteration' else 0, mIoU=i / 10)]
    log = write(tmp_path / 'log.json', *lines)
    found, point, _ = read_training_log([log], dict(epoch=0, iter=200))
    assert found == {'mIoU': 20.0} and point == 'iteration 200'


def test_no_validation_of_this_checkpoint(tmp_path):
    log = write(tmp_path / 'log.json', step(10, epoch=1), val(1, mIoU=1.0), step(20, epoch=2))
    assert read_training_log([log], dict(epoch=2, iter=20)) == ({}, 'epoch 2', 10.0)


def test_seconds_up_to_this_checkpoint(tmp_path):
    """A training that was resumed at iteration 20 has two logs; what came after does not count."""
    first = write(tmp_path / '1.json', step(10, 1.0), step(20, 2.0), step(25, 4.0))
    second = write(tmp_path / '2.json', step(30, 0.5), step(40, 0.5), step(50, 100.0))
    _, _, seconds = read_training_log([first, second], dict(epoch=0, iter=40))
    assert seconds == 10 * 1.0 + 10 * 2.0 + 5 * 4.0 + 5 * 0.5 + 10 * 0.5
    only = write(tmp_path / '3.json', val(0, mIoU=1.0))
    assert read_training_log([only], dict(epoch=0, iter=40))[2] is None


def test_a_log_is_published_by_its_numbers(tmp_path):
    lines = [step(10, 1.0), val(1, mIoU=0.5), step(20, 2.0)]
    first = write(tmp_path / '1.json', *(line | {'host': 'mine'} for line in lines[:2]))
    second = write(tmp_path / '2.json', lines[2])
    assert [json.loads(line) for line in training_log([first, second]).splitlines()] == lines


def test_figures_of_a_test(tmp_path):
    log = write(
        tmp_path / 'log.json',
        {
            'coco/bbox_mAP': 0.41649,
            'coco/bbox_mAP_l': -1.0,  # COCO's tools: there are no large objects
            'per_class': [1, 2],
            'bad': float('nan'),
            'time': 1.0,
            'data_time': 0.1,
        },
    )
    assert read_test_log(log) == {'coco/bbox_mAP': 0.4165}


@pytest.mark.parametrize(
    ('read', 'content', 'words'),
    [
        (read_test_log, '', 'is no log'),
        (read_test_log, '{"a": 1}\n{"a": 2}', 'no result of a test'),
        (read_test_log, '{"mIoU": 1.0, "step": 3}', 'no result of a test'),
        (read_test_log, '{"time": 1.0}', 'no result of a test'),
        (read_test_log, 'not JSON', 'is no log'),
        (read_test_log, '[1]', 'is no log'),
        (read_test_log, None, 'cannot read'),
        (lambda file: read_training_log([file], {}), '{"mIoU": 1.0}', 'no log of a training'),
        (lambda file: read_training_log([file], {}), '{"step": 1}\n{"st', 'is no log'),
        (lambda file: read_training_log([file], {}), None, 'cannot read'),
    ],
)
def test_files_that_are_no_logs(tmp_path, read, content, words):
    file = tmp_path / 'log.json'
    if content is not None:
        file.write_text(content)
    with pytest.raises(PublishError, match=words) as caught:
        read(file)
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)


# ---- Cards and entries ---------------------------------------------------------------------------


def release(file: Path = DETECTOR, **meta: object) -> Release:
    cfg = Config.fromfile(file).pretty_text
    known = dict(
        cfg=cfg,
        name=file.stem,
        time='20261126_081500',
        epoch=3,
        iter=300,
        mmlavit_version='0.1.0',
        **meta,
    )
    weights = OrderedDict(a=torch.ones(3, 4), steps=torch.tensor(1))
    return Release(file.stem, dict(meta=known, state_dict=weights))


FILES = {'m_20261126-aaaaaaaa.pth': b'1' * 1234, 'm_20261126-bbbbbbbb.safetensors': b'2'}


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table in a Markdown text, as a reader of it sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt('commonmark').enable('table').parse(text):
        if token.type == 'table_open':
            found.append([])
        elif token.type == 'tr_open':
            found[-1].append([])
        elif token.type == 'inline' and found and token.level > 3:
            found[-1][-1].append(token.content)
    return found


def test_a_card_says_what_is_known():
    facts = Facts(
        data='shapes | of ours\nhere',
        data_licence='CC0',
        command='python tools/train.py a | tee b',
        hardware='two cores',
        metrics={'coco/bbox_mAP': 0.5},
        validation={'coco/bbox_mAP': 0.25},
        validated_at='epoch 3',
        seconds=3 * 3600 + 120.0,
    )
    classes = dict(classes=[f'class {i}' for i in range(21)])
    text = model_card(release(dataset_meta=classes, seed=0, weights='ema'), FILES, facts)
    files, test, validation, training = tables(text)
    assert [row[:2] for row in files[1:]] == [
        ['`m_20261126-aaaaaaaa.pth`', '1,234'],
        ['`m_20261126-bbbbbbbb.safetensors`', '1'],
    ]
    assert test[1:] == [['coco/bbox_mAP', '0.5']] and validation[1:] == [['coco/bbox_mAP', '0.25']]
    rows = dict(training[1:])
    assert rows['data'] == 'shapes | of ours here'
    assert rows['licence of the data'] == 'CC0'
    assert rows['command'] == '`python tools/train.py a | tee b`'
    assert rows['seed'] == '0' and rows['parameters'] == '12'
    assert rows['length'] == '3 epochs, 300 iterations'
    assert rows['time'].startswith('3 h 2 min') and rows['time'].endswith('two cores')
    assert (
        rows['classes'].startswith('21: class 0, class 1, ') and 'class 20' not in rows['classes']
    )
    assert rows['weights saved'] == '2026-11-26'
    assert 'EMAHook' in rows['weights']
    assert 'DetInferencer(' in text and 'LaViT` (nano)' in text


def test_a_card_says_what_is_not_known():
    text = model_card(release(), FILES, Facts())
    assert '## Figures\n\nNone were given.' in text
    rows = dict(tables(text)[-1][1:])
    assert rows['licence of the data'].startswith('not stated')
    assert rows['command'] == rows['time'] == 'not recorded'
    assert 'seed' not in rows and 'classes' not in rows
    text = model_card(release(), FILES, Facts(validated_at='epoch 3'))
    assert 'no validation at epoch 3' in text


@pytest.mark.parametrize('appended', ['', 'unknown', '6edcf04e7a353b0708a325bb9b4877194eaf6cd9'])
def test_the_version_is_told_from_what_mmengine_appends(appended):
    """MMEngine saves its version and a commit as one word."""
    text = model_card(release(mmengine_version='0.10.12' + appended), FILES, Facts())
    trained_with = dict(tables(text)[-1][1:])['trained with']
    assert re.match(r'MMEngine 0\.10\.12(?![\w.])', trained_with)
    assert ('commit 6edcf04e' in trained_with) == (len(appended) == 40)


def test_a_backbones_figures_are_of_the_whole_model():
    facts = Facts(metrics={'mIoU': 0.5})
    part = release(part='backbone')
    assert 'Of the whole model' in model_card(part, FILES, facts)
    assert 'Inferencer' not in model_card(part, FILES, facts)
    assert 'Results' not in metafile_entry(part, FILES, facts)


@pytest.mark.parametrize('file', EACH)
def test_entries_are_of_the_format_of_openmmlab(file, tmp_path):
    facts = Facts(metrics={'a/b': 0.5}, data='D', data_licence='CC0', seconds=90.0)
    entry = metafile_entry(release(file), FILES, facts)
    assert entry['Config'] == f'configs/{file.name}'
    index = dict(Collections=[dict(Name='LaViT', Paper=dict(URL='https://a.b', Title='c'))])
    again = yaml.safe_load(yaml.safe_dump({**index, 'Models': [entry]}))
    model = ModelIndex.from_dict(again)
    model.build_models_with_collections()
    assert model.check(silent=True) == []
    task = {'mmdet': 'Object Detection', 'mmseg': 'Semantic Segmentation'}
    scope = Config.fromfile(file).default_scope
    assert entry['Results'][0]['Task'] == task.get(scope, 'Image Classification')


def test_figures_of_masks_are_of_another_task_than_those_of_boxes():
    metrics = {'coco/bbox_mAP': 0.3, 'coco/segm_mAP': 0.2, 'own/score': 0.4}
    found = metafile_entry(release(DETECTOR), FILES, Facts(metrics=metrics))['Results']
    assert {result['Task']: result['Metrics'] for result in found} == {
        'Object Detection': {'coco/bbox_mAP': 0.3},
        'Instance Segmentation': {'coco/segm_mAP': 0.2, 'own/score': 0.4},
    }


@pytest.mark.parametrize('file', EACH)
def test_configs_are_read_without_being_run(file):
    cfg = Config.fromfile(file)

    def lists(value: object) -> object:
        if isinstance(value, dict):
            return {key: lists(part) for key, part in value.items()}
        return [lists(v) for v in value] if isinstance(value, list | tuple) else value

    assert read_literals(cfg.pretty_text) == lists(cfg.to_dict())


def test_a_config_with_more_than_values_in_it():
    text = "a = dict(b=open('x'), c=-1, d={'e f': [1], **{}}, g=dict({'h i': 2}, j=3))\nimport os\n"
    expected = dict(b=None, c=-1, d={'e f': [1]}, g={'h i': 2, 'j': 3})
    assert read_literals(text) == dict(a=expected)


def test_a_toolbox_that_is_none():
    one = release()
    one.meta['cfg'] = "model = dict(type='Model')\ndefault_scope = 'mmother'\n"
    with pytest.raises(PublishError, match="default_scope='mmother'.*mmdet"):
        model_card(one, FILES, Facts())
    one.meta['cfg'] = "model = dict(type='mmseg.models.EncoderDecoder')\n"
    assert 'MMSegmentation' in model_card(one, FILES, Facts())
