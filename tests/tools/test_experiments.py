"""Experiments: parts taken out, real trainings that resume, and what is reported of them."""

import itertools
import json
import os
import re
import shutil
import signal
import zipfile
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, run_tool
from mmengine.registry import MODELS
from small import ARCH, move_weights, seeded
from torch import nn

from mmlavit import AttentionHealthHook, LaViT
from mmlavit.models.attention import LessAttention
from repository.experiments import photographs, replacing, report, resizing, study, tasks, training
from repository.experiments.ablations import AblatedLaViT, GrowingDiagonalityLossHook
from repository.experiments.matching import MatchingRecipe
from repository.experiments.study import Training
from repository.experiments.tasks import TASKS
from repository.experiments.variants import (
    EXPERIMENTS,
    VARIANTS,
    Experiment,
    register_backbones,
)

PAGE = ROOT / 'docs/experiments/README.md'
RESULTS = ROOT / 'docs/experiments/results.jsonl'
FILES = ('times.json', 'resizing.json', 'replacing.json')


# ---------------------------------------------------------------------------------------------
# Parts taken out
# ---------------------------------------------------------------------------------------------


def without_residual(model: LaViT) -> None:
    for stage in model.stages[1:]:
        stage.attention_residual.layer_scale.data.zero_()


def without_mixing(model: LaViT) -> None:
    for layer in model.modules():
        if isinstance(layer, LessAttention):
            layer.psi.data.copy_(torch.eye(len(layer.psi)))
            layer.theta.data.copy_(torch.eye(len(layer.theta)))


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize(
    'part, without',
    [
        ('attention_residual', without_residual),
        ('mixing', without_mixing),
    ],
)
def test_a_part_taken_out_is_a_part_that_does_nothing(part, without, train):
    generator = seeded(3)
    whole = move_weights(LaViT(arch=ARCH, drop_path_rate=0.0).double(), generator, 0.1)
    whole.train(train)
    cut = AblatedLaViT(arch=ARCH, drop_path_rate=0.0, **{part: False}).double().train(train)
    missing = cut.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert not missing
    assert len(cut.state_dict()) < len(whole.state_dict())
    image = torch.randn(2, 3, 75, 90, generator=generator, dtype=torch.float64)
    with torch.set_grad_enabled(train):
        different = whole(image)
        without(whole)
        expected, found = whole(image), cut(image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # In the last map at least: the first stage has no residual.
    assert not torch.allclose(expected[-1], different[-1], rtol=1e-3)


def test_nothing_taken_out_is_lavit():
    whole = LaViT(arch=ARCH)
    cut = AblatedLaViT(arch=ARCH)
    cut.load_state_dict(whole.state_dict())
    assert cut.stages[1].attention_residual is not None


def test_a_position_convolution_may_start_from_zero():
    """It then does nothing, but learns."""
    torch.manual_seed(0)
    model = AblatedLaViT(arch=ARCH, position_std=0.0)
    model.init_weights()
    branches = []
    for stage in model.stages:
        for block in stage.blocks:
            block.pos_conv.register_forward_hook(lambda m, args, out: branches.append(out))
    sum(out.square().mean() for out in model(torch.randn(1, 3, 40, 50))).backward()
    assert len(branches) == sum(len(stage.blocks) for stage in model.stages)
    assert not any(branch.any() for branch in branches)
    assert all(block.pos_conv.weight.grad.any() for s in model.stages for block in s.blocks)


OTHER_STARTS = [
    *(dict(mixing=False), dict(attention_residual=False)),
    *(dict(position_std=0.3), dict(position_scale=0.5, position_std=0.5), dict(linear_std=0.3)),
    *(dict(query_key_std=0.3), dict(residual_scale=0.7)),
]


@pytest.mark.parametrize('change', OTHER_STARTS, ids=str)
def test_weights_drawn_anew_start_alike(change):
    """By what a model around the backbone asks for when a training begins."""
    torch.manual_seed(0)
    model = AblatedLaViT(arch=ARCH, **change)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.constant_(module.weight, 9.0)
    model.init_weights()
    for name, weight in model.named_parameters():
        ours, theirs = (w.detach().square().mean().sqrt().item() for w in (weight, before[name]))
        # Small ones, such as those that mix two heads, come out larger or smaller by chance.
        assert weight.numel() < 50 or ours == pytest.approx(theirs, rel=0.3, abs=1e-6), name


@pytest.mark.parametrize('part', ['attention_residual', 'mixing'])
def test_a_switch_is_a_bool(part):
    with pytest.raises(TypeError, match=f'{part} must be True or False, got 0'):
        AblatedLaViT(arch=ARCH, **{part: 0})


STARTS = [
    *('position_std', 'position_scale', 'linear_std'),
    *('query_key_std', 'residual_scale', 'norm_eps'),
]


@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('value', ['0.1', True])
def test_a_start_is_a_number(start, value):
    with pytest.raises(TypeError, match=f'{start} must be a number or None, got {value!r}'):
        AblatedLaViT(arch=ARCH, **{start: value})


@pytest.mark.parametrize('start', STARTS)
def test_another_start_is_the_start_that_was_asked_for(start):
    model = AblatedLaViT(arch=ARCH, **{start: 0.3})
    blocks = [block for stage in model.stages for block in stage.blocks]
    first = model.stages[0].blocks[0]
    queries_and_keys, values = first.attn.qkv.weight.detach().split((32, 16))
    own = 0.3 if start == 'linear_std' else 16**-0.5
    assert values.std().item() == pytest.approx(own, rel=0.2)
    if start == 'position_std':
        spread = torch.cat([block.pos_conv.weight.flatten() for block in blocks]).std()
        assert spread.item() == pytest.approx(0.3, rel=0.1)
    elif start == 'position_scale':
        x = torch.randn(1, 16, 5, 5)
        scaled = first.pos_conv(x)
        torch.testing.assert_close(scaled, 0.3 * first.pos_conv.conv(x))
    elif start == 'linear_std':
        assert all(
            m.weight.std().item() == pytest.approx(0.3, rel=0.1)
            for m in model.modules()
            if isinstance(m, nn.Linear)
        )
    elif start == 'query_key_std':
        assert queries_and_keys.std().item() == pytest.approx(0.3, rel=0.1)
    elif start == 'residual_scale':
        assert all((s.attention_residual.layer_scale == 0.3).all() for s in model.stages[1:])
    else:
        assert all(m.eps == 0.3 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_the_loss_as_it_was_grows_with_the_scores():
    scores = torch.randn(3, 2, 6, 6, generator=seeded(0), dtype=torch.float64)
    loss = GrowingDiagonalityLossHook().loss
    torch.testing.assert_close(loss(3 * scores), 3 * loss(scores))
    # By hand: |3 - 1| twice; 3 over 2 in row 0, 1 under 2 in row 1.
    assert loss(torch.tensor([[[[2.0, 3.0], [1.0, 2.0]]]])).item() == 2.5


def test_variants_are_of_like_size():
    register_backbones()
    sizes = {
        name: sum(p.numel() for p in MODELS.build(dict(v.backbone)).parameters())
        for name, v in VARIANTS.items()
    }
    for name, size in sizes.items():
        assert 0.85 < size / sizes['lavit'] < 1.15, (name, sizes)


@pytest.mark.parametrize('part', ['attention', 'convolution'])
def test_a_pvt_with_a_part_taken_out_is_one_in_which_it_does_nothing(part):
    register_backbones()
    torch.manual_seed(0)
    whole = MODELS.build(dict(VARIANTS['pvt'].backbone)).eval()
    whole.init_weights()
    cut = MODELS.build(dict(VARIANTS[f'pvt-no-{part}'].backbone)).eval()
    names = [name for name, _ in whole.named_modules()]
    for name in names if part == 'attention' else []:
        if name.endswith('.attn.attn.out_proj'):  # what a layer's attention adds to its tokens
            nn.init.zeros_(whole.get_submodule(name).weight)
            nn.init.zeros_(whole.get_submodule(name).bias)
    for name in names if part == 'convolution' else []:
        if name.endswith('ffn.layers.1'):
            nn.init.dirac_(
                whole.get_submodule(name).weight, groups=whole.get_submodule(name).groups
            )
            nn.init.zeros_(whole.get_submodule(name).bias)
    # Modules that come after one that is missing have a number less.
    for a, b in zip(cut.parameters(), matching(whole, cut), strict=True):
        a.data.copy_(b)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(cut(image), whole(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def matching(whole: nn.Module, cut: nn.Module) -> list[torch.Tensor]:
    """The parameters of one network that another has too, in order."""
    left = [p.shape for p in cut.parameters()]
    depthwise = {
        id(p)
        for m in whole.modules()
        if isinstance(m, nn.Conv2d) and m.groups > 1
        for p in m.parameters()
    }
    found = list(whole.parameters())
    return found if len(found) == len(left) else [p for p in found if id(p) not in depthwise]


def test_experiments_ask_for_what_is_there():
    for experiment in EXPERIMENTS.values():
        assert set(experiment.variants) <= set(VARIANTS)
    assert set().union(*(e.variants for e in EXPERIMENTS.values())) == set(VARIANTS)


# ---------------------------------------------------------------------------------------------
# Trainings
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_tasks(monkeypatch, tmp_path):
    """Tasks of a few steps on a few images, in a directory of their own."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, 'MATCHING', MatchingRecipe(20, 10, tasks.SIZE))
    monkeypatch.setattr(tasks, 'SHAPES', tasks.ShapesRecipe(20, 10, tasks.SIZE))
    for name, task in TASKS.items():
        # Of the whole of the photographs a validation would take longest of all.
        data = some_photographs if name == 'photo' else task.make_data
        monkeypatch.setitem(TASKS, name, replace(task, iterations=10, make_data=data))
    return tmp_path


def some_photographs() -> None:
    """Noise, in the folder tree of the photographs: no test of trainings needs real ones."""
    rng = np.random.default_rng(0)
    for split, label in itertools.product(('train', 'val'), range(20)):
        folder = tasks.DATA / 'photographs' / split / f'n{label:08d}'
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / '0.JPEG'), rng.integers(0, 255, (64, 64, 3), np.uint8))


def refuse(training: Training) -> str:
    return 'not now'


def test_a_study_is_trained_once_and_goes_on(small_tasks, monkeypatch, capfd):
    results = small_tasks / 'out' / 'results.jsonl'
    wanted = [Training('match', 'lavit', 0, 1e-3), Training('match', 'no-mixing', 0, 1e-3)]
    first = study.run(wanted, results)
    lines = results.read_text().splitlines()
    assert len(lines) == 2
    for result in first:
        assert list(result['curve']) == [2, 4, 6, 8, 10]
        assert result['metric'] == result['curve'][10]
        assert 0 <= result['metric'] <= 100
    monkeypatch.setattr(study, '_train', refuse)
    # What is there is not trained again.
    again = study.run(wanted, results)
    assert results.read_text().splitlines() == lines
    assert [r['metric'] for r in again] == [r['metric'] for r in first]
    # Under another budget or of other data it is something else.
    for change in (dict(iterations=20), dict(data=TASKS['match'].data + 1)):
        with monkeypatch.context() as patch:
            patch.setitem(TASKS, 'match', replace(TASKS['match'], **change))
            assert study.read_results(results) == []
            with pytest.raises(RuntimeError, match='2 trainings failed: .*match lavit seed 0'):
                study.run(wanted, results)
        assert results.read_text().splitlines() == lines
        assert 'FAILED, not now' in capfd.readouterr().out
    assert study.read_results(results) == [json.loads(line) for line in lines]


def test_what_went_wrong_is_in_the_log(small_tasks, monkeypatch):
    def fail(*args: object) -> None:
        raise KeyError('nowhere')

    monkeypatch.setattr(study, 'train_variant', fail)
    with pytest.raises(RuntimeError, match='1 trainings failed'):
        study.run([Training('match', 'lavit', 0, 1e-3)], small_tasks / 'results.jsonl')
    log = small_tasks / 'work_dirs/experiments/match/lavit-0-0.001/output.log'
    assert ', in fail\n' in log.read_text() and "KeyError: 'nowhere'" in log.read_text()


def test_a_killed_training_fails_and_the_others_go_on(small_tasks, monkeypatch, capfd):
    """As the system does where memory ends."""

    def train(task: str, variant: str, *args: object) -> dict:
        if variant == 'lavit':
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(task=task, variant=variant, seed=0, rate=1e-3, metric=50.0)

    monkeypatch.setattr(study, 'train_variant', train)
    wanted = [Training('match', name, 0, 1e-3) for name in ('lavit', 'vanilla', 'no-mixing')]
    with pytest.raises(RuntimeError, match='1 trainings failed: match lavit seed 0'):
        study.run(wanted, small_tasks / 'results.jsonl', jobs=1)
    assert 'FAILED, ended with status -9' in capfd.readouterr().out
    assert len((small_tasks / 'results.jsonl').read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize('task', list(TASKS))
def test_every_variant_trains_and_every_task(small_tasks, task):
    """LaViT for every task, each other variant for one of them."""
    results = small_tasks / 'results.jsonl'
    others = [name for name, v in VARIANTS.items() if name != 'lavit' and not v.pretrained]
    variants = ['lavit', *others[list(TASKS).index(task) :: len(TASKS)]]
    wanted = [Training(task, variant, 0, 3e-4) for variant in variants]
    metrics = study.run(wanted, results)
    assert [(r['task'], r['variant'], r['seed'], r['rate']) for r in metrics] == wanted


@pytest.mark.slow
def test_a_pretrained_backbone_is_that_of_the_classifier_of_its_seed(small_tasks):
    wanted = study.trainings(['pretraining'], ['seg'], [0, 1])
    photo, segmentor = ('photo', 'lavit'), ('seg', 'pretrained')
    assert [w[:3] for w in wanted] == [
        *((*('seg', 'lavit'), 0), (*('seg', 'lavit'), 1)),
        *((*photo, 0), (*photo, 1), (*segmentor, 0), (*segmentor, 1)),
    ]
    # Without the classifiers there is nothing to start from.
    alone = [w for w in wanted if w.variant == 'pretrained']
    with pytest.raises(RuntimeError, match='2 trainings failed'):
        study.run(alone, small_tasks / 'alone.jsonl')
    study.run(wanted, small_tasks / 'results.jsonl')

    def weights(task: str, variant: str, seed: int) -> torch.Tensor:
        state = torch.load(training.weights_of(task, variant, seed), weights_only=True)
        return next(w for name, w in state.items() if name.endswith('attn.proj.weight'))

    for seed in (0, 1):
        own, other = (weights(*photo, s) for s in (seed, 1 - seed))
        trained = weights(*segmentor, seed)
        near = (trained - own).abs().mean()
        assert near < 0.3 * (trained - other).abs().mean(), seed
        assert near < 0.3 * (trained - weights('seg', 'lavit', seed)).abs().mean(), seed


@pytest.mark.slow
def test_equal_seeds_give_equal_trainings(small_tasks):
    TASKS['match'].make_data()
    runs = [
        study.run([training], small_tasks / f'{i}.jsonl')[0]['curve']
        for i, training in enumerate(
            Training('match', 'diagonality-0.1', *settings)
            for settings in ((1, 1e-3), (1, 1e-3), (2, 1e-3), (1, 3e-4))
        )
    ]
    assert runs[0] == runs[1]
    assert runs[2] != runs[0] != runs[3]


def test_a_lavit_is_watched_while_it_trains(small_tasks, monkeypatch):
    """Its attention is even at the start, and stays so for ten iterations."""
    monkeypatch.setattr(training, 'AttentionHealthHook', lambda: AttentionHealthHook(interval=1))
    TASKS['match'].make_data()
    for variant, is_lavit in (('linear-0.02', True), ('resnet', False)):
        training.train_variant('match', variant, 0, 1e-3, small_tasks / variant)
        (log,) = (small_tasks / variant).glob('*/*.log')
        found = re.search(r'AttentionHealthHook: .* gone even', log.read_text())
        assert bool(found) == is_lavit, variant


def test_trainings_come_seed_by_seed_and_once():
    wanted = study.trainings(['parts'], ['cls', 'match'], [0, 1])
    # LaViT, without residual, without mixing.
    assert len(wanted) == len(set(wanted)) == 3 * 2 * 2
    assert [training.seed for training in wanted] == [0] * 6 + [1] * 6
    assert {training.rate for training in wanted} == {1e-3}


def test_a_question_may_be_asked_of_some_tasks_alone(monkeypatch):
    asked = Experiment('?', ('lavit', 'no-mixing'), tasks=('match',))
    monkeypatch.setitem(EXPERIMENTS, 'parts', asked)
    wanted = study.trainings(['parts', 'less'], ['cls', 'match'], [0])
    assert [training[:2] for training in wanted] == [
        *(('cls', 'vanilla'), ('cls', 'lavit')),
        *(('match', 'lavit'), ('match', 'no-mixing'), ('match', 'vanilla')),
    ]
    results = [*FAKE, {**FAKE[0], 'task': 'match', 'metric': 60.0}]
    head, _, *rows = report.table(asked, results, {}).splitlines()
    assert 'matching' in head and 'classification' not in head and '60.0' in rows[0]
    assert not report.is_whole(asked, results) and report.is_whole(replace(asked, tasks=()), FAKE)


def test_learning_rates_are_compared_with_the_first_seed(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, 'rates', Experiment('?', ('lavit', 'swin'), (1e-3, 3e-4)))
    monkeypatch.setitem(EXPERIMENTS, 'peers', Experiment('?', ('lavit', 'swin', 'resnet')))
    monkeypatch.setitem(VARIANTS, 'swin', replace(VARIANTS['swin'], rates={'cls': 3e-4}))
    wanted = study.trainings(['rates', 'peers'], ['cls'], [5, 6])
    assert sorted(w[1:] for w in wanted) == [
        *(('lavit', 5, 3e-4), ('lavit', 5, 1e-3), ('lavit', 6, 1e-3)),
        *(('resnet', 5, 1e-3), ('resnet', 6, 1e-3)),
        *(('swin', 5, 3e-4), ('swin', 5, 1e-3), ('swin', 6, 3e-4)),
    ]


@pytest.mark.parametrize(
    'experiments, names, message',
    [
        (['nothing'], ['cls'], "unknown experiment 'nothing'; there are rates, "),
        (['less'], ['caption'], "unknown task 'caption'; there are cls, det"),
    ],
)
def test_unknown_names_are_refused(experiments, names, message):
    with pytest.raises(ValueError, match=message):
        study.trainings(experiments, names, [0])


def test_the_tool_says_in_a_line_what_is_wrong(tmp_path):
    found = run_tool('experiments.py', 'nothing', cwd=tmp_path)
    assert found.returncode == 1
    assert found.stderr.count('\n') == 1
    assert "unknown experiment 'nothing'" in found.stderr


def test_the_tool_belongs_to_the_repository(tmp_path):
    found = run_tool('experiments.py', 'less', cwd=tmp_path)
    assert found.returncode == 1
    assert 'start at the top of the repository' in found.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_shapes_need_no_photographs(tmp_path):
    """With all results there and without the folder of real images."""
    page = tmp_path / 'docs/experiments/README.md'
    shutil.copytree(ROOT / 'docs/experiments', page.parent)
    before, asked = page.read_text(), ('--tasks', 'match', '--seeds', 0)
    found = run_tool('experiments.py', *asked, cwd=tmp_path, MMLAVIT_DATA='')
    assert found.returncode == 0, found.stderr
    assert 'all experiments but pretraining' in found.stdout
    assert page.read_text() == before
    # Whoever asks for it by name hears what is missing.
    found = run_tool('experiments.py', 'pretraining', *asked, cwd=tmp_path, MMLAVIT_DATA='')
    assert found.returncode == 1
    assert 'MMLAVIT_DATA, which is not set' in found.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['lavit', 'swin'])
def test_a_result_says_how_even_attention_is(small_tasks, variant):
    (result,) = study.run([Training('cls', variant, 0, 1e-3)], small_tasks / 'results.jsonl')
    assert ('entropy' in result) == ('scores' in result) == (variant == 'lavit')
    if variant == 'lavit':
        # Ten steps hardly move scores from their start, a standard deviation near 1.
        assert all(0.3 < s < 3 for s in result['scores']) and len(result['scores']) == 4
        assert all(0.5 < e < 0.99 for e in result['entropy']) and len(result['entropy']) == 4


@pytest.mark.slow
def test_a_trained_classifier_is_measured_at_other_windows(small_tasks):
    training = Training('photo', 'lavit', 0, 1e-3)
    with pytest.raises(FileNotFoundError, match='weights.pth is not there'):
        resizing.measure([0])
    (result,) = study.run([training], small_tasks / 'results.jsonl')
    rows = resizing.measure([0])
    assert [row['windows'] for row in rows] == list(resizing.SIZES)
    assert {row['seed'] for row in rows} == {0}
    # The first size is the one it was trained with.
    assert rows[0]['metric'] == result['metric']
    assert all(0 <= row['metric'] <= 100 for row in rows)


@pytest.mark.slow
def test_trained_classifiers_are_measured_without_their_attention(small_tasks):
    with pytest.raises(FileNotFoundError, match='weights.pth is not there'):
        replacing.measure([0])
    study.run(
        [Training('photo', name, 0, 1e-3) for name in replacing.COMPARED],
        small_tasks / 'results.jsonl',
    )
    rows = replacing.measure([0])
    assert {row['variant'] for row in rows} == set(replacing.COMPARED)
    for name in replacing.COMPARED:
        places = [(r['how'], r['stage']) for r in rows if r['variant'] == name]
        assert [stage for how, stage in places if how == 'even'] == [None, 0, 1, 2, 3]
        assert [stage for how, stage in places if how == 'ar'] == [None, 1, 2, 3]
        # The twin has no Psi and no Theta.
        assert ('psi_theta' in dict(places)) == (name != 'vanilla')
    assert all(-100 <= row['points'] <= 100 for row in rows)


# ---------------------------------------------------------------------------------------------
# Photographs
# ---------------------------------------------------------------------------------------------


def write_archive(folder, train: int, val: int) -> None:
    path = folder / photographs.ARCHIVE
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, 'w') as file:
        for split, count in (('train', train), ('val', val)):
            for i in range(count):
                file.writestr(f'{split}/n{i % 20}/{i}.JPEG', b'')
        file.writestr('boxes_val.json', '{}')


def test_photographs_are_unpacked_once(tmp_path, monkeypatch):
    write_archive(tmp_path / 'given', 10000, 1000)
    monkeypatch.setenv('MMLAVIT_DATA', str(tmp_path / 'given'))
    out = tmp_path / 'out'
    photographs.unpack_photographs(out)
    assert len(list(out.glob('train/*/*.JPEG'))) == 10000
    assert len(list(out.glob('val/*/*.JPEG'))) == 1000
    assert [p.name for p in out.iterdir() if p.name not in ('train', 'val')] == []
    (tmp_path / 'given' / photographs.ARCHIVE).unlink()
    photographs.unpack_photographs(out)


def test_other_photographs_are_refused(tmp_path, monkeypatch):
    write_archive(tmp_path, 10, 1000)
    out = tmp_path / 'out'
    monkeypatch.setenv('MMLAVIT_DATA', str(tmp_path))
    with pytest.raises(ValueError, match='must hold 10000 images of train, it has 10'):
        photographs.unpack_photographs(out)
    monkeypatch.setenv('MMLAVIT_DATA', str(out))
    with pytest.raises(FileNotFoundError, match='is not there; MMLAVIT_DATA is'):
        photographs.unpack_photographs(out)
    monkeypatch.delenv('MMLAVIT_DATA')
    with pytest.raises(FileNotFoundError, match='MMLAVIT_DATA, which is not set'):
        photographs.unpack_photographs(out)
    assert not out.exists()


# ---------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------

FAKE = [
    dict(task='cls', variant=v, seed=s, rate=1e-3, metric=m, curve={'10': m / 2, '20': m})
    | dict(parameters=1500000)
    for v, values in (('lavit', (80, 82, 84)), ('no-mixing', (70, 71, 75)))
    for s, m in enumerate(values)
]
REUSED = Experiment('?', ('lavit', 'no-mixing'))


def test_the_table_has_mean_spread_and_interval():
    found = report.table(REUSED, FAKE, {'lavit': 1.0, 'no-mixing': 0.9})
    lavit, reused = found.splitlines()[2:]
    assert lavit == '| LaViT (windows 8) | 1.50 | 1.00 | 82.0 ± 2.0 |'
    # By hand: differences of -10, -11 and -9; two degrees of freedom, t = 4.3027.
    assert reused.startswith('| attention reused as it is | 1.50 | 0.90 | 72.0 ± 2.6 (')
    low, high = map(float, re.search(r'\(([-+.\d]+) to ([-+.\d]+)\)', reused).groups())
    assert low == pytest.approx(-10 - 4.3027 / 3**0.5, abs=0.06)
    assert high == pytest.approx(-10 + 4.3027 / 3**0.5, abs=0.06)


def test_a_difference_is_that_of_the_same_seeds():
    mixed = [r for r in FAKE[::-1] if (r['variant'], r['seed']) != ('lavit', 2)]
    reused = report.table(REUSED, mixed, {}).splitlines()[3]
    # -10 and -11; one degree of freedom, t = 12.706.
    assert f'({-10.5 - 12.706 / 2:+.1f} to {-10.5 + 12.706 / 2:+.1f})' in reused


def test_learning_rates_side_by_side(monkeypatch):
    lower = [{**FAKE[0], 'rate': 3e-4, 'metric': 61.0}]
    both = Experiment('?', ('lavit', 'no-mixing'), (1e-3, 3e-4))
    head, _, lavit, reused = report.table(both, FAKE + lower, {}).splitlines()
    assert head == '| 0.001 / 0.0003 | classification |'
    assert lavit == '| LaViT (windows 8) | 80.0 / 61.0 |'
    assert reused == '| attention reused as it is | 70.0 / – |'
    # Elsewhere each variant has its own alone.
    assert report.table(REUSED, FAKE + lower, {}) == report.table(REUSED, FAKE, {})
    own = replace(VARIANTS['lavit'], rates={'cls': 3e-4})
    monkeypatch.setitem(VARIANTS, 'lavit', own)
    assert '| 61.0 [1 of 3 seeds] |' in report.table(REUSED, FAKE + lower, {})


def test_the_table_of_living_attention_has_a_mean_for_each_stage():
    seen = [
        dict(entropy=[0.2, 0.9], scores=[3.0, 0.5]),
        dict(entropy=[0.4, 1.0], scores=[5.0, 0.1]),
    ]
    results = [{**r, **s} for r, s in zip(FAKE[:2], seen, strict=True)] + FAKE[3:]
    head, _, lavit = report.alive(results).splitlines()
    assert head == '| | classification |'
    assert lavit == '| LaViT (windows 8) | 0.30 (4), 0.95 (0.3) |'


def test_the_table_of_other_windows_has_mean_differences():
    sizes = {(8, 8): (50.0, 60.0), (4, 4): (49.0, 57.0)}
    rows = [
        dict(seed=seed, windows=list(windows), metric=metric)
        for windows, metrics in sizes.items()
        for seed, metric in enumerate(metrics)
    ]
    assert report.resized(rows).splitlines()[2:] == [
        '| 8, 8 | 55.0 | +0.0 |',
        '| 4, 4 | 53.0 | -2.0 |',
    ]


def test_equal_measurements_have_no_spread():
    assert report.difference([10.0, 10.0]) == (10.0, 10.0)


def test_one_seed_has_no_interval():
    one = [r for r in FAKE if r['seed'] == 0]
    assert '| 70.0 [1 of 3 seeds] |' in report.table(REUSED, one, {})


def test_more_seeds_than_asked_are_counted_where_there_is_something_to_compare():
    more = [*FAKE, {**FAKE[0], 'seed': 3, 'metric': 82.0}]
    assert report.table(REUSED, more, {}) == report.table(REUSED, FAKE, {})
    more.append({**FAKE[3], 'seed': 3})
    assert '| 82.0 ± 1.6 [4 seeds] |' in report.table(REUSED, more, {})
    alone = [r for r in more if r['variant'] == 'lavit']
    assert '| 82.0 ± 1.6 [4 seeds] |' in report.table(REUSED, alone, {})


def test_curves_are_means_and_bands(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    report.draw(REUSED, FAKE, tmp_path / 'a' / 'p.png')
    (panel,) = figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert lines['attention reused as it is'] == [36.0, 72.0]
    (band, _) = panel.collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == (40.0, 84.0)


def test_the_table_of_replacements_has_means_and_ends():
    rows = [
        dict(variant='lavit', how=how, stage=stage, seed=seed, points=points)
        for how, stage, values in (
            ('even', None, (-30, -20)),
            ('even', 1, (1, -2)),
            ('ar', 1, (0, 0)),
        )
        for seed, points in enumerate(values)
    ]
    assert report.replaced(rows).splitlines() == [
        '| | even maps | AR off |',
        '|---|---|---|',
        '| LaViT (windows 8), all stages | -25.0 (-30.0 to -20.0) | – |',
        '| LaViT (windows 8), stage 2 | -0.5 (-2.0 to +1.0) | +0.0 (+0.0 to +0.0) |',
    ]


def test_a_page_is_filled_in_again_and_again():
    page = 'a\n<!-- results: parts -->\nold\n<!-- end of results -->\nb\n'
    filled = report.fill_in(page, FAKE, {}, [], [])
    assert 'old' not in filled and '82.0 ± 2.0' in filled
    assert filled.startswith('a\n') and filled.endswith('\nb\n')
    assert report.fill_in(filled, FAKE, {}, [], []) == filled
    with pytest.raises(ValueError, match="results of 'part'"):
        report.fill_in(page.replace('parts', 'part'), FAKE, {}, [], [])


def test_the_committed_page_is_of_the_committed_results():
    results = study.read_results(RESULTS)
    # None of an earlier budget or of earlier data.
    assert len(results) == len(RESULTS.read_text().splitlines())
    text = PAGE.read_text()
    kept = [json.loads((PAGE.parent / f).read_text()) for f in FILES]
    assert report.fill_in(text, results, *kept) == text
    for name, experiment in EXPERIMENTS.items():
        assert f'<!-- results: {name} -->' in text
        assert (f']({name}.png)' in text) == report.is_whole(experiment, results)
    for result in results:
        assert result['variant'] in VARIANTS and result['task'] in TASKS
        assert result['metric'] == list(result['curve'].values())[-1]


def test_each_backbone_has_the_learning_rate_that_was_better():
    """With the first seed, where both have been tried; 1e-3 where a point or less is between."""
    results = {study._key(r): r['metric'] for r in study.read_results(RESULTS)}
    tried = EXPERIMENTS['rates']
    for name in tried.variants:
        for task in TASKS:
            at = {rate: results.get(Training(task, name, 0, rate)) for rate in tried.rates}
            if None not in at.values():
                close = max(at.values()) - min(at.values()) <= 1
                best = 1e-3 if close else max(at, key=at.get)
                assert VARIANTS[name].rate(task) == best, (name, task)
