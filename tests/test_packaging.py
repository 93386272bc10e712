"""What the distributions hold and ask for, and what the model index says of the configs.

A user's MMEngine, MMCV and toolboxes are never touched, and no number of the paper's passes for
ours.
"""

import email
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from modelindex import load_model_index
from modelindex.models.ModelIndex import ModelIndex
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.utils.flop_counter import FlopCounterMode

import mmlavit

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ['3.10', '3.11', '3.12']

# Every distribution that provides one of the import names mmengine, mmcv, mmdet, mmseg, mmpretrain.
ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
}
OPENMMLAB = {
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
}
PROVIDERS = {*ONEDL, *OPENMMLAB, 'mmengine-lite', 'mmcv-full', 'mmcv-lite', 'mmcls'}

# Everything that the paper reports of what the configs repeat, and how the index has to call it.
BY_THE_PAPER = 'Reported by the Paper'
REPORTED = {
    'lavit_t_imagenet': {'Top 1 Accuracy': 79.2},
    'lavit_s_imagenet': {'Top 1 Accuracy': 82.6},
    'lavit_b_imagenet': {'Top 1 Accuracy': 83.1},
    'retinanet_lavit_t_coco': {'box AP': 46.2},
    'retinanet_lavit_s_coco': {'box AP': 46.7},
    'retinanet_lavit_t_3x_coco': {'box AP': 48.4},
    'retinanet_lavit_s_3x_coco': {'box AP': 48.9},
    'semfpn_lavit_s_ade20k': {'mIoU': 44.1},
    'upernet_lavit_s_ade20k': {'mIoU': 47.2, 'mIoU Multi-Scale': 49.5},
}
REPORTED_SIZES = {
    'lavit_t_imagenet': ('10.9M', '1.6G'),
    'lavit_s_imagenet': ('22.4M', '3.3G'),
    'lavit_b_imagenet': ('39.6M', '6.1G'),
}
REPORTED_COSTS = {
    'retinanet_lavit_t_coco': '202G',
    'retinanet_lavit_s_coco': '290G',
    'upernet_lavit_s_ade20k': '920G',
}


@pytest.fixture(scope='module')
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope='module')
def requirements(metadata: email.message.Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all('Requires-Dist')]


def of_extra(requirements: list[Requirement], extra: str, python: str = '3.11') -> dict:
    """Name -> specifier of what an extra asks for; the empty extra is the bare package."""
    env = {'extra': extra, 'python_version': python, 'python_full_version': f'{python}.0'}
    return {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(env)
    }


def pins(python: str) -> dict[str, str]:
    """Name -> version in constraints.txt, on one Python."""
    found: dict[str, str] = {}
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        if not line or line.startswith('#'):
            continue
        requirement = Requirement(line)
        env = {'python_version': python}
        if requirement.marker is None or requirement.marker.evaluate(env):
            (specifier,) = requirement.specifier
            assert specifier.operator == '==', line
            name = canonicalize_name(requirement.name)
            assert name not in found, f'{name} is pinned twice on Python {python}'
            found[name] = specifier.version
    return found


@pytest.mark.parametrize('python', PYTHONS)
def test_hard_requirements_are_torch_and_numpy(
    requirements: list[Requirement], python: str
) -> None:
    hard = of_extra(requirements, '', python)
    assert set(hard) == {'torch', 'numpy'}
    assert '2.1.0' in hard['torch']
    assert '2.0.1' not in hard['torch']


def test_no_provider_without_an_extra(requirements: list[Requirement]) -> None:
    for requirement in requirements:
        if canonicalize_name(requirement.name) in PROVIDERS:
            assert 'extra ==' in str(requirement.marker)


def test_each_extra_is_of_one_family(
    metadata: email.message.Message, requirements: list[Requirement]
) -> None:
    extras = metadata.get_all('Provides-Extra')
    assert set(extras) == {'onedl', 'openmmlab', 'export', 'docs', 'analysis', 'dev'}
    families = {
        extra: {name for name in of_extra(requirements, extra) if name in PROVIDERS}
        for extra in extras
    }
    assert families == {'onedl': set(ONEDL), 'openmmlab': set(OPENMMLAB)} | {
        'export': set(),
        'docs': set(),
        'analysis': set(),
        'dev': set(),
    }


@pytest.mark.parametrize(('extra', 'tried'), [('onedl', ONEDL), ('openmmlab', OPENMMLAB)])
def test_extras_take_what_was_tried(
    requirements: list[Requirement], extra: str, tried: dict[str, str]
) -> None:
    wanted = of_extra(requirements, extra)
    for name, version in tried.items():
        assert version in wanted[name], name


def test_python_that_torch_and_the_code_need(metadata: email.message.Message) -> None:
    assert metadata['Requires-Python'] == '>=3.10'
    assert metadata['Name'] == 'mmlavit'
    assert metadata['Version'] == mmlavit.__version__


def content(wheel: Path) -> dict[str, bytes]:
    """Path -> bytes of the files in a wheel, without those that describe the distribution."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if '.dist-info/' not in name]
        return {name: archive.read(name) for name in names}


def test_wheel_holds_package_configs_and_tools_and_nothing_else(wheel: Path) -> None:
    expected = {str(file.relative_to(ROOT)): file for file in (ROOT / 'mmlavit').rglob('*.py')}
    expected['mmlavit/py.typed'] = ROOT / 'mmlavit/py.typed'
    for pattern in ('configs/**/*.py', 'configs/**/*.yml', 'configs/**/*.md', 'tools/**/*.py'):
        for file in ROOT.glob(pattern):
            expected[f'mmlavit/.mim/{file.relative_to(ROOT)}'] = file
    for name in ('model-index.yml', 'README.md'):
        expected[f'mmlavit/.mim/{name}'] = ROOT / name
    # They work on the repository.
    for name in (
        'setup_env.py',
        'benchmark.py',
        'compare_commits.py',
        'demo.py',
        'config_table.py',
        'attention_cost.py',
        'architecture_figures.py',
        'experiments.py',
        'real_images.py',
        'roofline.py',
        'start_figure.py',
        'model_zoo.py',
    ):
        del expected[f'mmlavit/.mim/tools/{name}']
    alone = 'mmlavit/.mim/tools/repository/'
    expected = {name: file for name, file in expected.items() if not name.startswith(alone)}
    assert content(wheel) == {name: file.read_bytes() for name, file in expected.items()}


def build(hook: str, source: Path, out: Path) -> Path:
    """What a build frontend does: call a hook of the backend in the source folder; its result."""
    out.mkdir()
    code = f'from setuptools import build_meta; build_meta.{hook}({str(out)!r})'
    ran = subprocess.run([sys.executable, '-c', code], cwd=source, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (built,) = out.iterdir()
    return built


def test_sdist_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / 'source')
    sdist = build('build_sdist', tree, tmp_path / 'sdist')
    shutil.unpack_archive(sdist, tmp_path)
    again = build('build_wheel', tmp_path / sdist.name.removesuffix('.tar.gz'), tmp_path / 'wheel')
    assert content(again) == content(wheel)


def test_wheel_holds_no_config_of_an_earlier_build(source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / 'source')
    gone = tree / 'configs' / 'gone.py'
    gone.touch()
    assert 'mmlavit/.mim/configs/gone.py' in content(build('build_wheel', tree, tmp_path / '1'))
    gone.unlink()
    assert 'mmlavit/.mim/configs/gone.py' not in content(build('build_wheel', tree, tmp_path / '2'))


def files(tree: Path) -> set[str]:
    """What is in a source tree, apart from what git ignores of setuptools' traces."""
    paths = (path.relative_to(tree) for path in tree.rglob('*'))
    return {str(path) for path in paths if path.parts[0] not in ('build', 'mmlavit.egg-info')}


@pytest.mark.parametrize('hook', ['build_wheel', 'build_editable'])
def test_installing_adds_no_copies_to_the_source_tree(
    source: Path, tmp_path: Path, hook: str
) -> None:
    tree = shutil.copytree(source, tmp_path / 'source')
    before = files(tree)
    build(hook, tree, tmp_path / 'out')
    assert files(tree) == before


def test_installing_it_here_would_install_nothing_else(wheel: Path) -> None:
    dry = ['install', '--dry-run', '--no-index', '--quiet', '--report', '-', str(wheel)]
    ran = subprocess.run([sys.executable, '-m', 'pip', *dry], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert {entry['metadata']['name'] for entry in report['install']} <= {'mmlavit'}


@pytest.mark.parametrize('python', PYTHONS)
def test_constraints_fit_the_extras(requirements: list[Requirement], python: str) -> None:
    pinned = pins(python)
    for extra in ('onedl', 'export', 'docs', 'dev'):
        for name, specifier in of_extra(requirements, extra, python).items():
            assert pinned[name] in specifier, name
    for name, version in ONEDL.items():
        assert pinned[name] == version
    assert not set(OPENMMLAB).intersection(pinned)


def test_constraints_leave_the_build_of_torch_open() -> None:
    # torch==2.13.0+cpu would not be found where only a CUDA build is, and the other way round.
    assert re.fullmatch(r'[\d.]+', pins('3.11')['torch'])


def test_pre_commit_runs_the_ruff_of_the_constraints() -> None:
    config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
    hooks = [hook for repo in config['repos'] for hook in repo['hooks']]
    found = {name for hook in hooks for name in hook['additional_dependencies'] if 'ruff' in name}
    assert found == {f'ruff=={pins(python)["ruff"]}' for python in PYTHONS}


def test_citation_is_the_readmes() -> None:
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
    paper = citation['preferred-citation']
    authors = ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors'])
    readme = (ROOT / 'README.md').read_text()
    for field, value in (('title', paper['title']), ('author', authors), ('year', paper['year'])):
        assert re.search(rf'{field} *= \{{{re.escape(str(value))}\}}', readme), field


def test_setuptools_still_has_pkg_resources() -> None:
    assert int(pins('3.11')['setuptools'].split('.')[0]) < 81


def pip_lines(text: str) -> list[list[str]]:
    """The words after each `pip install`, which a backslash carries over to the next line."""
    lines = text.replace('\\\n', ' ').splitlines()
    found = [re.search(r'\bpip install (.*)', line) for line in lines if not line.startswith('#')]
    return [shlex.split(match[1].partition('&&')[0]) for match in found if match]


def test_dockerfile_installs_what_the_readme_does() -> None:
    """And mmcv in a layer of its own, between the two, for it takes long to compile."""
    first, mmcv, last = pip_lines((ROOT / 'Dockerfile').read_text())
    assert mmcv == ['-c', 'constraints.txt', '--no-build-isolation', 'onedl-mmcv']
    readme = (ROOT / 'README.md').read_text()
    assert [first, last] == [words for words in pip_lines(readme) if '-c' in words]


def test_docker_is_given_what_is_installed(tmp_path: Path) -> None:
    """By the rules of .dockerignore that are used here: names alone, and exceptions."""
    lines = (ROOT / '.dockerignore').read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith('#')]
    assert rules[0] == '*' and rules[-1] == '**/__pycache__'
    for rule in rules[1:-1]:
        source = ROOT / rule.removeprefix('!')
        if source.is_dir():
            shutil.copytree(source, tmp_path / source.name)
        else:
            shutil.copy(source, tmp_path)
    assert (tmp_path / 'constraints.txt').is_file()
    build('build_wheel', tmp_path, tmp_path / 'out')


@pytest.fixture(scope='module')
def index() -> ModelIndex:
    return load_model_index.load(str(ROOT / 'model-index.yml'))


def test_model_index_is_valid(index: ModelIndex) -> None:
    assert index.check(silent=True) == []
    (collection,) = index.collections
    assert collection.name == 'LaViT'
    assert collection.paper['URL'] == 'https://arxiv.org/abs/2406.00427'
    assert (ROOT / collection.code).is_file()


def test_each_config_of_the_paper_has_one_entry(index: ModelIndex) -> None:
    configs = {path.stem for path in (ROOT / 'configs').glob('*.py')}
    expected = sorted(name for name in configs if not name.endswith('_shapes'))
    assert sorted(model.name for model in index.models) == expected
    for model in index.models:
        assert model.config == f'configs/{model.name}.py'
        assert model.in_collection == 'LaViT'


def keys(node: object) -> Iterator[str]:
    """Every key of nested dicts and lists."""
    if isinstance(node, dict):
        yield from node
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from keys(child)


def test_no_weights_are_claimed(index: ModelIndex) -> None:
    found = {
        key.lower() for key in keys(yaml.safe_load((ROOT / 'configs/metafile.yml').read_text()))
    }
    assert 'config' in found
    assert 'weights' not in found


def test_what_is_called_trained_has_results(index: ModelIndex) -> None:
    lines = (ROOT / 'docs' / 'real_images' / 'results.jsonl').read_text().splitlines()
    results = [json.loads(line) for line in lines]
    trained = {r['task'] for r in results if r['backbone'] == 'lavit' and r['share'] == 1}
    assert {
        model.name.rsplit('_', 1)[1] for model in index.models if model.metadata.data['Trained']
    } == trained


def test_every_accuracy_is_called_the_papers(index: ModelIndex) -> None:
    found = {}
    for model in index.models:
        for result in model.results or ():
            found.setdefault(model.name, {}).update(result.metrics)
    assert found == {
        name: {f'{metric} {BY_THE_PAPER}': value for metric, value in metrics.items()}
        for name, metrics in REPORTED.items()
    }


def test_sizes_and_costs_are_of_the_models_here(index: ModelIndex) -> None:
    data_of = {model.name: model.metadata.data for model in index.models}
    models = {name: data for name, data in data_of.items() if 'Parameters' in data}
    assert models.keys() == REPORTED_SIZES.keys()
    for name, data in models.items():
        arch = {'t': 'tiny', 's': 'small', 'b': 'base'}[name.split('_')[1]]
        with torch.device('meta'), FlopCounterMode(display=False) as counter:
            backbone = mmlavit.LaViT(arch, out_indices=(3,)).eval()
            head = torch.nn.Linear(backbone.arch.embed_dims[-1], 1000)
            head(backbone(torch.zeros(1, 3, 224, 224))[0].mean((2, 3)))
        parameters = [*backbone.parameters(), *head.parameters()]
        assert data['Parameters'] == sum(parameter.numel() for parameter in parameters)
        assert data['FLOPs'] == counter.get_total_flops() / 2  # torch counts both halves of each
        reported = (data[f'{what} {BY_THE_PAPER}'] for what in ('Parameters', 'FLOPs'))
        assert tuple(reported) == REPORTED_SIZES[name]
    costs = {n: d.get(f'FLOPs {BY_THE_PAPER}') for n, d in data_of.items() if n not in models}
    assert {name: cost for name, cost in costs.items() if cost} == REPORTED_COSTS
