"""Real images: peers of one size, configs that differ in what is said, trainings that go on."""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_ran, run_tool
from mmengine.config import Config

from repository.real_images import report, study, training
from repository.real_images.backbones import BACKBONES
from repository.real_images.study import Job, Results, jobs
from repository.real_images.tasks import TASKS
from repository.real_images.training import TRIAL, Training

sys.path.insert(0, str(ROOT / 'tests/datasets/converters'))
import test_camvid
import test_dsb2018

DOCS = ROOT / 'docs/real_images'
EACH = [(task, name) for task, about in TASKS.items() for name in about.backbones]


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------------------------------------------
# Backbones and configs
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_peers_have_the_parameters_of_lavit_within_a_tenth(task):
    sizes = {name: training.parameters_of(task, name) for name in TASKS[task].backbones}
    for name, size in sizes.items():
        assert abs(size / sizes['lavit'] - 1) <= 0.1, (name, sizes)


@pytest.mark.parametrize('task', TASKS)
def test_maps_have_the_channels_and_strides_that_heads_are_told(task):
    about = TASKS[task]
    image = torch.randn(1, 3, 64, 96)
    for name in about.backbones:
        model = training.build_backbone(task, name)
        model.eval()
        with torch.no_grad():
            maps = model(image)
        expected = [(BACKBONES[name].dims[i], 16 >> i, 24 >> i) for i in about.out_indices]
        assert [tuple(m.shape[1:]) for m in maps] == expected, name


@pytest.mark.slow
def test_all_that_have_stochastic_depth_have_the_same():
    for task, name in EACH:
        cfg = training.resolved(Training(task, name, 0, 1e-3), None)
        # ResNet has none.
        assert cfg.model.backbone.get('drop_path_rate', 0.05) == 0.05, (task, name)


def differences(a: object, b: object, at: str = '') -> set[str]:
    """Where two configs differ, as paths."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = set(a) | set(b)
        return set().union(*(differences(a.get(k), b.get(k), f'{at}.{k}'.strip('.')) for k in keys))
    return set() if a == b else {at}


ALWAYS = {
    'randomness.seed',
    *(f'{loader}.{key}' for loader in training.LOADERS for key in ('num_workers',)),
    *(f'{loader}.persistent_workers' for loader in training.LOADERS),
    'default_hooks.checkpoint.max_keep_ckpts',
    'optim_wrapper.optimizer.lr',
    'optim_wrapper.type',
}
WIDTHS = {
    'tinyimagenet': {'model.head.in_channels'},
    'camvid': {'model.decode_head.in_channels', 'model.auxiliary_head.in_channels'},
    'dsb2018': {'model.neck.in_channels'},
    'bccd': {'model.neck.in_channels'},
}


@pytest.mark.slow
@pytest.mark.parametrize('task, name', EACH)
def test_a_written_config_is_the_committed_one_but_for_what_is_said(
    task, name, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, 'WORK_DIR', tmp_path)
    start = 'classifier.pth' if BACKBONES[name].pretrained else None
    wanted = Training(task, name, 7, 3e-4)
    written = Config.fromfile(training.write_config(wanted, start)).to_dict()
    committed = training.committed(TASKS[task].config).to_dict()
    found = differences(committed, written)
    allowed = set(ALWAYS)
    if name != 'lavit':
        found = {path for path in found if not path.startswith('model.backbone')}
    if BACKBONES[name].instead:
        allowed |= {*WIDTHS[task], 'custom_imports.imports'}
        assert written['model']['backbone']['type'] != 'LaViT'
    else:
        assert written['model']['backbone']['type'] == 'LaViT'
    if name == 'swin':
        allowed |= {'optim_wrapper.paramwise_cfg.custom_keys'}
        allowed |= {
            f'optim_wrapper.paramwise_cfg.custom_keys.relative_position_bias_table{rest}'
            for rest in ('', '.decay_mult')
        }
    if not BACKBONES[name].health:
        allowed |= {'custom_hooks'}
    assert found <= allowed
    assert written['randomness']['seed'] == 7
    assert written['optim_wrapper']['optimizer']['lr'] == 3e-4
    if start:
        assert written['model']['backbone']['init_cfg'] == dict(checkpoint=start)


@pytest.mark.parametrize('task', TASKS)
def test_a_trial_has_a_quarter_of_the_schedule_and_nothing_else(task):
    wanted = Training(task, 'lavit', 0, 1e-3)
    whole = training.resolved(wanted)
    trial = training.resolved(wanted._replace(share=TRIAL))
    found = differences(whole.to_dict(), trial.to_dict())
    unit = training.unit_of(whole)
    allowed = {f'train_cfg.{unit}', 'train_cfg.val_interval', 'param_scheduler'}
    assert found <= allowed | {'default_hooks.checkpoint.interval'}
    length = whole.train_cfg[unit]
    assert trial.train_cfg[unit] == round(length / 4)
    for before, after in zip(whole.param_scheduler, trial.param_scheduler, strict=True):
        assert differences(before, after) <= {'begin', 'end', 'T_max'}
        for key in {'begin', 'end', 'T_max'} & set(before):
            assert after[key] == pytest.approx(before[key] / 4, abs=0.76), key


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match='a share of 0.001 leaves 1 of .* epochs .* at least 2'):
        training.resolved(Training('bccd', 'lavit', 0, 1e-3, 1.0, 0.001))


def test_settings_have_folders_of_their_own():
    base = Training('bccd', 'lavit', 0, 1e-3)
    others = [
        base._replace(seed=1),
        base._replace(rate=5e-4),
        base._replace(share=TRIAL),
        base._replace(backbone='vanilla'),
    ]
    folders = {training.folder_of(wanted) for wanted in (base, *others)}
    starts = {training.folder_of(base._replace(backbone='pretrained'), s) for s in ('a', 'b')}
    assert len(folders | starts) == 7
    assert training.folder_of(base) == training.folder_of(Training('bccd', 'lavit', 0, 0.001))


# ---------------------------------------------------------------------------------------------
# What is trained, and when
# ---------------------------------------------------------------------------------------------


def result_of(wanted: Training, value: float, start: str | None = None, **more) -> dict:
    first = TASKS[wanted.task].measures[0]
    return {
        **{name: getattr(wanted, name) for name in Training._fields[:-1]},
        'unit': 'epochs',
        'length': 4,
        'curve': {'2': value / 2, '4': value},
        'metrics': {first.name: value},
        'checkpoint': 'epoch_4.pth',
        'parameters': 3_200_000,
        'seconds': 100,
        'torch': '2',
        'config': training.fingerprint(wanted, start),
        **more,
    }


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """Trainings that cost nothing: what was asked for, in order, and a result for each."""
    monkeypatch.setattr(training, 'WORK_DIR', tmp_path / 'work')
    monkeypatch.setattr(study, 'WORK_DIR', tmp_path / 'work')
    data = tmp_path / 'data'
    data.mkdir()
    for name, task in TASKS.items():
        cfg = deepcopy(training.committed(task.config))
        cfg.train_dataloader.dataset.data_root = str(data)
        path = tmp_path / f'{name}.py'
        cfg.dump(path)
        monkeypatch.setitem(TASKS, name, replace(task, config=path))
    training.resolved.cache_clear()
    training.fingerprint.cache_clear()
    asked = []

    def run(wanted, start=None):
        asked.append((wanted, start))
        folder = training.folder_of(wanted, start)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'epoch_4.pth').touch()
        # The lower rate is the better one for Swin alone.
        sign = -1 if wanted.backbone == 'swin' else 1
        return result_of(wanted, 0.5 + sign * wanted.rate, start)

    monkeypatch.setattr(training, 'run', run)
    yield asked
    training.resolved.cache_clear()
    training.fingerprint.cache_clear()


def test_a_study_tries_rates_then_trains_then_starts_from_the_classifier(fake_runs, tmp_path):
    results = Results(tmp_path / 'results.jsonl')
    study.run(jobs(['bccd'], ['pretrained', 'swin'], [0]), results)
    trials = [w for w, _ in fake_runs if w.share == TRIAL]
    whole = [(w, start) for w, start in fake_runs if w.share == 1]
    # What the pretrained one needs, and no training of LaViT from scratch.
    assert {(w.task, w.backbone) for w in trials} == {
        ('tinyimagenet', 'lavit'),
        ('bccd', 'lavit'),
        ('bccd', 'swin'),
    }
    assert {(w.task, w.backbone) for w, _ in whole} == {
        ('tinyimagenet', 'lavit'),
        ('bccd', 'pretrained'),
        ('bccd', 'swin'),
    }
    assert {(w.backbone, w.rate) for w, _ in whole} == {
        ('lavit', 1e-3),
        ('pretrained', 1e-3),
        ('swin', 5e-4),
    }
    classifier = next(w for w, _ in whole if w.task == 'tinyimagenet')
    start = next(start for w, start in whole if w.backbone == 'pretrained')
    assert start == str(training.folder_of(classifier) / 'epoch_4.pth')
    order = [w for w, _ in fake_runs]
    assert order.index(classifier) < [w.backbone for w in order].index('pretrained')


def test_what_is_there_is_not_trained_again(fake_runs, tmp_path):
    path = tmp_path / 'results.jsonl'
    wanted = jobs(['camvid'], ['lavit', 'vanilla'], [0, 1])
    study.run(wanted, Results(path))
    lines = path.read_text()
    assert len(fake_runs) == len(lines.splitlines()) == 2 * 2 + 2 * 2
    study.run(wanted, Results(path))
    assert len(fake_runs) == 8 and path.read_text() == lines
    study.run(jobs(['camvid'], ['lavit'], [0, 1, 2]), Results(path))
    assert [w.seed for w, _ in fake_runs[8:]] == [2]


def test_results_of_another_config_are_moved_away_and_trained_again(fake_runs, tmp_path):
    path = tmp_path / 'results.jsonl'
    wanted = jobs(['camvid'], ['lavit'], [0])
    study.run(wanted, Results(path))
    before = [json.loads(line) for line in path.read_text().splitlines()]
    config = TASKS['camvid'].config
    config.write_text(config.read_text().replace('cat_max_ratio=0.75', 'cat_max_ratio=0.5'))
    for cached in (training.committed, training.resolved, training.fingerprint):
        cached.cache_clear()
    study.run(wanted, Results(path))
    assert len(fake_runs) == 6
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(after) == 3 and not {r['config'] for r in before} & {r['config'] for r in after}
    earlier = (tmp_path / 'work/earlier.jsonl').read_text().splitlines()
    assert sorted(earlier) == sorted(map(json.dumps, before))


def test_a_seed_counts_once_whatever_its_learning_rate_was(fake_runs, tmp_path):
    results = Results(tmp_path / 'results.jsonl')
    results.add(result_of(Training('bccd', 'lavit', 0, 5e-4), 0.3))
    study.run(jobs(['bccd'], ['lavit'], [0]), results)
    assert [r['rate'] for r in Results(results.path).lines if r['share'] == 1] == [1e-3]


def test_what_is_there_needs_no_checkpoints(fake_runs, tmp_path):
    """As in a fresh clone."""
    results = Results(tmp_path / 'results.jsonl')
    wanted = jobs(['bccd'], ['pretrained'], [0])
    assert study.missing(wanted, results) == wanted
    study.run(wanted, results)
    shutil.rmtree(tmp_path / 'work')
    assert study.missing(wanted, Results(results.path)) == []
    count = len(fake_runs)
    study.run(wanted, Results(results.path))
    assert len(fake_runs) == count


def test_a_failure_leaves_the_others_and_says_what_waits(fake_runs, tmp_path, monkeypatch):
    run = training.run

    def fail(wanted, start=None):
        if wanted.backbone == 'vanilla':
            raise RuntimeError('no')
        return run(wanted, start)

    monkeypatch.setattr(training, 'run', fail)
    path = tmp_path / 'results.jsonl'
    with pytest.raises(RuntimeError, match='2 trainings failed, and 1 that need them wait: .*no'):
        study.run(jobs(['bccd'], ['lavit', 'vanilla'], [0]), Results(path))
    assert len(path.read_text().splitlines()) == 3


def test_a_classifier_that_is_gone_is_named(fake_runs, tmp_path):
    results = Results(tmp_path / 'results.jsonl')
    study.run(jobs(['tinyimagenet'], ['lavit'], [0]), results)
    shutil.rmtree(tmp_path / 'work')
    with pytest.raises(FileNotFoundError, match='epoch_4.pth is not there: checkpoints are not'):
        study.run(jobs(['bccd'], ['pretrained'], [0]), results)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(workers=0), 'jobs must be at least 1, got 0'),
        (dict(budget=0.0), 'budget must be over 0 and at most 1, got 0'),
        (dict(budget=2.0), 'budget must be over 0 and at most 1, got 2'),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        study.run([Job('bccd', 'lavit', 0)], Results(tmp_path / 'r.jsonl'), **options)


def test_a_backbone_that_is_not_compared_there_is_refused():
    with pytest.raises(ValueError, match='pvt.* not compared on bccd; there are lavit, .*resnet'):
        jobs(['bccd'], ['pvt'])


def test_all_of_the_page_is_asked_for():
    asked = jobs(TASKS)
    assert len(set(asked)) == len(asked)
    for task, name in EACH:
        seeds = [j.seed for j in asked if (j.task, j.backbone, j.rate) == (task, name, None)]
        assert seeds == ([0, 1, 2] if name in ('lavit', 'vanilla') else [0, 1])
        tried = {j.rate for j in asked if (j.task, j.backbone) == (task, name)} - {None}
        assert tried == (set() if name == 'pretrained' else set(TASKS[task].rates))


# ---------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------


def fake(backbone: str, values: dict[int, float], **metrics: float) -> list[dict]:
    found = []
    for seed, value in values.items():
        result = result_of(Training('bccd', backbone, seed, 1e-3), value)
        result['metrics'].update(metrics)
        found.append(result)
    return found


def rows(table: str) -> dict[str, dict[str, str]]:
    """Cells by the first of their line and the head of their column."""
    head, _, *lines = ([c.strip() for c in line.split('|')[1:-1]] for line in table.splitlines())
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_the_table_has_means_spreads_and_differences_by_seed():
    results = [
        *fake('swin', {1: 0.74, 0: 0.72}),
        *fake('lavit', {0: 0.70, 1: 0.71, 2: 0.78}, **{'coco/RBC_precision': 0.5}),
        *fake('vanilla', {2: 0.79}),
    ]
    found = rows(report.table('bccd', results, {'bccd': {'swin': dict(milliseconds=41.6)}}))
    # By hand: the mean of 70, 71 and 78 is 73; squares 9, 4 and 25, over two, 19.
    assert found['LaViT-nano']['AP50'] == f'73.0 ± {19**0.5:.1f}'
    assert found['LaViT-nano']['AP of red cells'] == '50.0 ± 0.0'
    assert found['LaViT-nano']['from LaViT'] == '–'
    assert found['LaViT-nano']['parameters M'] == '3.20'
    # 2 and 3 points.
    assert found['Swin']['from LaViT'] == '+2.5 ± 0.7'
    assert found['Swin']['ms'] == '42' and found['Swin']['GFLOPs'] == '–'
    assert found['all-vanilla twin']['AP50'] == '79.0 [1 of 3 seeds]'
    assert found['all-vanilla twin']['from LaViT'] == '+1.0'
    assert set(found['ResNet-18, narrowed'].values()) == {'ResNet-18, narrowed', '–'}
    assert found['*detectors on other splits of the images*']['AP50'] == '85 to 86'


def test_trials_are_no_results_and_have_a_table_of_their_own():
    trials = [
        result_of(Training('bccd', 'swin', 0, rate, TRIAL), value)
        for rate, value in ((1e-3, 0.31), (5e-4, 0.42))
    ]
    assert rows(report.table('bccd', trials, {}))['Swin']['AP50'] == '–'
    found = rows(report.rates(trials))
    assert found['Swin'][TASKS['bccd'].title] == '31.0 / 42.0'
    assert found['LaViT-nano'][TASKS['bccd'].title] == '– / –'
    # It is not trained there.
    assert found['PVTv2-B0'][TASKS['bccd'].title] == ''


def test_the_summary_has_a_line_a_task():
    found = rows(report.summary(fake('lavit', {0: 0.70, 1: 0.72}) + fake('swin', {0: 0.61})))
    assert len(found) == len(TASKS)
    (line,) = (cells for first, cells in found.items() if first.startswith('BCCD'))
    assert line['LaViT-nano'].startswith('71.0 ±') and line['Swin'] == '61.0'
    assert line['ResNet-18, narrowed'] == '–', 'to come'
    assert line['PVTv2-B0'] == '', 'not compared there'


def test_the_zoo_has_a_line_a_config_with_what_others_published():
    found = rows(report.zoo(fake('lavit', {0: 0.70, 1: 0.72}) + fake('pretrained', {0: 0.75})))
    assert len(found) == len(TASKS)
    (line,) = (cells for first, cells in found.items() if 'retinanet_lavit_n_bccd.py' in first)
    assert line['measure'] == 'AP50'
    assert line['LaViT-nano'].startswith('71.0 ±')
    assert line['LaViT-nano, from Tiny ImageNet'] == '75.0'
    assert line['Swin'] == '–' and line['PVTv2-B0'] == ''
    assert line['published, of others'].endswith(': 85 to 86')


@pytest.mark.slow
def test_the_page_says_that_it_is_being_filled_until_all_is_there():
    results = fake('lavit', {0: 0.7})
    assert 'being filled: 1 of ' in report.progress(results)
    everything = [
        result_of(Training(j.task, j.backbone, j.seed, 1e-3), 0.5, config='')
        for j in jobs(TASKS)
        if j.rate is None and j.backbone != 'pretrained'
    ]
    everything += [
        {**everything[0], 'task': j.task, 'backbone': j.backbone, 'seed': j.seed}
        for j in jobs(TASKS)
        if j.backbone == 'pretrained'
    ]
    assert report.progress(everything) == f'All {len(everything)} trainings are there.'


def test_the_committed_pages_are_of_the_committed_results():
    results = study.Results(DOCS / 'results.jsonl').lines
    costs = DOCS / 'costs.json'
    page = (DOCS / 'README.md').read_text()
    kept = json.loads(costs.read_text()) if costs.exists() else {}
    assert report.fill_in(page, results, kept) == page
    for name in (*TASKS, 'rates', 'progress'):
        assert f'<!-- results: {name} -->' in page
    for other, name in (('README.md', 'summary'), ('docs/model_zoo.md', 'zoo')):
        page = (ROOT / other).read_text()
        assert f'<!-- results: {name} -->' in page
        assert report.fill_in(page, results, kept) == page
    with pytest.raises(ValueError, match="results of 'coco'"):
        report.fill_in('<!-- results: coco -->\n<!-- end of results -->', results, kept)


def test_curves_are_means_and_bands(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    assert report.draw('bccd', [], tmp_path / 'none.png') is None
    results = fake('lavit', {0: 0.6, 1: 0.8})
    assert report.draw('bccd', results, tmp_path / 'a' / 'bccd.png').is_file()
    (panel,) = figures[0].axes
    (line,) = panel.get_lines()
    assert list(line.get_xdata()) == [2, 4]
    assert list(line.get_ydata()) == pytest.approx([35, 70])
    ys = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == pytest.approx((30, 80))


# ---------------------------------------------------------------------------------------------
# The tool
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'args, message',
    [
        (['report'], 'docs/real_images/README.md is not here; start at the top'),
        (['draw', 'bccd', 'x.pth'], 'docs/real_images/README.md is not here; start at the top'),
    ],
)
@pytest.mark.slow
def test_the_tool_belongs_to_the_repository(tmp_path, args, message):
    found = run_tool('real_images.py', *args, cwd=tmp_path)
    assert found.returncode == 1
    assert message in found.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


#: By task: what draws a download, and what a config has to say of the drawn images.
ANY_SIZE = dict(train_dataloader=dict(dataset=dict(filter_cfg=dict(min_size=1))))
DRAWN = {
    'camvid': (test_camvid.make, {}),
    # A few steps find nothing of which they are sure, and of that a lot.
    'dsb2018': (
        test_dsb2018.make,
        {
            'model.test_cfg.rcnn.score_thr': 0.0,
            'model.test_cfg.rcnn.max_per_img': 20,
            **ANY_SIZE,
        },
    ),
}


def set_up(folder: Path, task: str) -> Path:
    """A copy of the repository's top in which a task has drawn images and a short schedule."""
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    shutil.copytree(DOCS, folder / 'docs/real_images')
    shutil.copy(ROOT / 'README.md', folder)
    shutil.copy(ROOT / 'docs/model_zoo.md', folder / 'docs')
    (folder / 'docs/real_images/results.jsonl').unlink(missing_ok=True)
    (folder / 'tools').symlink_to(ROOT / 'tools')
    make, changes = DRAWN[task]
    make(folder / 'download')
    converter = f'dataset_converters/{task}.py'
    assert_ran(run_tool(converter, folder / 'download', cwd=folder))
    cfg = deepcopy(training.committed(TASKS[task].config))
    cfg.merge_from_dict(changes)
    # Eight, of which a trial is two.
    cfg.train_cfg.update({training.unit_of(cfg): 8, 'val_interval': 4})
    cfg.param_scheduler = []
    cfg.train_dataloader.batch_size = 2
    cfg.default_hooks.logger.interval = 1
    if 'max_iters' in cfg.train_cfg:
        cfg.default_hooks.checkpoint.interval = 4
    if task == 'camvid':
        # Of the drawn ones nothing is left in the last stage of some peers.
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.pipeline.insert(1, dict(type='Resize', scale=(96, 72)))
    cfg.dump(folder / TASKS[task].config)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('task', ['camvid', 'dsb2018'])
def test_drawn_images_are_trained_tested_reported_and_drawn(task, tmp_path):
    folder = set_up(tmp_path, task)
    command = ['real_images.py', 'run', '--tasks', task, '--backbones', 'lavit', '--seeds', 0]
    assert_ran(run_tool(*command, cwd=folder))
    results = Results(folder / 'docs/real_images/results.jsonl').lines
    assert [(r['share'], r['length']) for r in results] == [(TRIAL, 2), (TRIAL, 2), (1.0, 8)]
    whole = results[-1]
    about = TASKS[task]
    assert list(whole['curve']) == ['4', '8']
    assert all(measure.name in whole['metrics'] for measure in about.measures[:1])
    assert whole['parameters'] == training.parameters_of(task, 'lavit')
    work = folder / 'work_dirs/real_images' / task
    (checkpoint,) = work.glob(f'*/{whole["checkpoint"]}')
    assert checkpoint.name.startswith('best_') == about.best
    page = (folder / 'docs/real_images/README.md').read_text()
    assert 'being filled: 1 of ' in page and '[1 of 3 seeds]' in page
    (line,) = (r for r in (folder / 'README.md').read_text().splitlines() if about.title in r)
    assert line.count('| –') == len(about.backbones) - 2, 'the pretrained one has no column'
    zoo = (folder / 'docs/model_zoo.md').read_text().splitlines()
    (line,) = (row for row in zoo if f'[`{about.config.stem}`]' in row)
    assert line.count('| –') == len(about.backbones) - 1
    assert (folder / f'docs/real_images/{task}.png').is_file()

    if task == 'camvid':
        return  # the rest takes long, and is the same for all
    # Killed after its last checkpoint: nothing is trained again, and the same comes out.
    before = {path: path.stat().st_mtime_ns for path in work.glob('*/*.pth')}
    (folder / 'docs/real_images/results.jsonl').unlink()
    assert_ran(run_tool(*command, cwd=folder))
    again = Results(folder / 'docs/real_images/results.jsonl').lines[-1]
    assert {path: path.stat().st_mtime_ns for path in work.glob('*/*.pth')} == before
    for key in ('metrics', 'curve', 'config', 'checkpoint', 'length'):
        assert again[key] == whole[key]

    ran = run_tool('real_images.py', 'draw', task, checkpoint, '--images', 2, cwd=folder)
    assert_ran(ran)
    assert Path(ran.stdout.splitlines()[-1]).is_file()


#: One of the two learning rates that the tool would try for each peer.
ONE_RATE = """
from pathlib import Path
from repository.real_images import study
from repository.real_images.tasks import TASKS

task = TASKS['camvid']
peers = [name for name in task.backbones if name not in ('lavit', 'pretrained')]
wanted = [study.Job('camvid', name, 0, task.rates[0]) for name in peers]
study.run(wanted, study.Results(Path('docs/real_images/results.jsonl')))
"""


@pytest.mark.slow
def test_every_peer_trains_where_it_is_compared(tmp_path):
    folder = set_up(tmp_path, 'camvid')
    (folder / 'one_rate.py').write_text(ONE_RATE)
    assert_ran(run_tool(folder / 'one_rate.py', cwd=folder, path=[ROOT / 'tools']))
    results = Results(folder / 'docs/real_images/results.jsonl').lines
    peers = [name for name in TASKS['camvid'].backbones if name not in ('lavit', 'pretrained')]
    rate = TASKS['camvid'].rates[0]
    assert {(r['backbone'], r['rate']) for r in results} == {(name, rate) for name in peers}
