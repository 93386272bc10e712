"""Configs without what is private: what goes, what stays, and what is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from mmlavit.export.privacy import Privacy, PrivacyError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / 'configs').glob('*.py'))
HIDDEN = Privacy(frozenset({'quixote', 'rocinante-01'}))


def clean(text: str, **options: object) -> str:
    return Privacy(HIDDEN.names, **options).clean_config(text)[0]


def value(text: str) -> object:
    """What a config of one setting says."""
    return ast.literal_eval(text.partition('=')[2].strip())


# ---- What goes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('setting', 'before', 'after'),
    [
        ('ann_file', '/mnt/raid/x.json', 'x.json'),
        ('img', '/mnt/raid/images/', 'images/'),
        ('a', '~/x/y.json', 'y.json'),
        ('a', '~sancho/y.json', 'y.json'),
        ('a', r'C:\Users\sancho\y.json', 'y.json'),
        ('a', 'D:/data/y.json', 'y.json'),
        ('a', r'\\server\share\y.json', 'y.json'),
        ('a', 'file:///mnt/y.json', 'y.json'),
        ('a', 's3://bucket/of/ours/y.json', 'y.json'),
        ('a', 'sqlite:////mnt/x/y.db', 'y.db'),
        ('a', 'see /mnt/x/y.txt, and z', 'see y.txt, and z'),
        ('a', '--out=/mnt/x/y --in=/mnt/z/w', '--out=y --in=w'),
        ('checkpoint', 'work_dirs/third_try/epoch_3.pth', 'epoch_3.pth'),
        ('a', 'https://me:secret@a.example/b/c.pth', 'https://a.example/b/c.pth'),
    ],
)
def test_paths_are_made_relative(setting, before, after):
    assert value(clean(f'{setting} = {before!r}\n')) == after
    nested = Config.fromstring(clean(f'a = [dict(b=dict({setting}={before!r}))]\n'), '.py')
    assert nested.a[0].b[setting] == after


@pytest.mark.parametrize('end', ['', '/'])
def test_what_is_below_the_data_stays_below_it(end):
    text = f"""
train = dict(data_root='/mnt/raid/é/coco{end}', ann_file='annotations/a.json')
evaluator = dict(ann_file='/mnt/raid/é/coco/annotations/b.json')
other = dict(ann_file='/mnt/raid/é/coconut/b.json')
windows = [dict(data_root='C:\\\\data\\\\ade'), dict(x='C:\\\\data\\\\ade\\\\images\\\\1.jpg')]
"""
    found = Config.fromstring(clean(text), '.py')
    assert found.train == dict(data_root=f'data/coco{end}', ann_file='annotations/a.json')
    assert found.evaluator.ann_file == 'data/coco/annotations/b.json'
    assert found.other.ann_file == 'b.json'
    assert [dict(part) for part in found.windows] == [
        dict(data_root='data/ade'),
        dict(x='data/ade/images/1.jpg'),
    ]


def test_settings_of_one_run_go_with_their_lines():
    text = (
        "a = 1\nwork_dir = './work_dirs/x'\nload_from = dict(\n    x=1,\n)\nresume = False\nb = 2\n"
    )
    assert clean(text) == 'a = 1\nb = 2\n'
    assert clean(text, drop=('a',)) == 'b = 2\n'


@pytest.mark.parametrize('setting', ['out_dir', 'save_dir', 'outfile_prefix'])
def test_where_results_went_is_forgotten(setting):
    assert (
        clean(f"a = [dict({setting}='/mnt/x/third-try', b=1)]\n")
        == f'a = [dict({setting}=None, b=1)]\n'
    )
    assert clean(f"a = [dict({setting}='results')]\n") == f"a = [dict({setting}='results')]\n"


def test_changes_are_told():
    text = "work_dir = 'x'\nload_from = None\na = dict(b='/mnt/raid/c')\nd = 'data/e'\n"
    _, changes = HIDDEN.clean_config(text)
    assert [tuple(change) for change in changes] == [
        ('work_dir', "work_dir = 'x'", None),
        ('b', '/mnt/raid/c', 'c'),
    ]


# ---- What stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize('file', CONFIGS, ids=lambda file: file.stem)
def test_our_own_configs_stay_as_they_are(file):
    cfg = Config.fromfile(file)
    kept, changes = HIDDEN.clean_config(cfg.pretty_text)
    assert changes == []
    again = Config.fromstring(kept, '.py')
    cfg.pop('load_from', None), cfg.pop('resume', None)
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    'text',
    [
        'coco/bbox_mAP',
        'data/coco/annotations/x.json',
        r'(\w+)\.conv\.(\w+)',
        r'^backbone\.stages\.\d+/',
        'https://download.openmmlab.com/a/b.pth',
        'torchvision://resnet50',
        'open-mmlab://x/y',
        'a / b',
        '/',
        '.../x',
        'MMDet/3.x',
        'quixotes',
        'Don_Quixot',
        'é\n"\'\\',
    ],
)
def test_what_is_no_path_and_no_name(text):
    assert clean(f'a = dict(b=[{text!r}])\n') == f'a = dict(b=[{text!r}])\n'


def test_labels_are_no_paths():
    """Of OpenImages, say; and a class may be called like a user."""
    text = "a = dict(metainfo=dict(classes=('/m/011k07', 'quixote'), palette=[(1, 2, 3)]))\n"
    assert clean(text) == text


@given(st.text(alphabet='abc"\'\\éñ\n\t{}', max_size=20).filter(lambda t: t[:2] != r'\\'))
def test_a_text_comes_through_as_it_is(text):
    """Its quotes, escapes and letters of several bytes, also beside one that is changed."""
    found = Config.fromstring(clean(f'a = dict(é={text!r}, b="/mnt/x/y", c={text!r})\n'), '.py')
    assert found.a == {'é': text, 'b': 'y', 'c': text}


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'name'),
    [
        ("a = dict(b='data/quixote/coco')", 'quixote'),
        ("a = dict(b='run_quixote_3')", 'quixote'),
        ("a = dict(b='QUIXOTE')", 'quixote'),
        ("a = dict(b='tcp on rocinante-01')", 'rocinante-01'),
        ("c = '/home/sancho/x'\na = dict(b='by sancho')", 'sancho'),
        ("c = 'C:\\\\Users\\\\sancho\\\\x'\na = dict(b='by sancho')", 'sancho'),
        ("a = dict(b='http://10.1.2.3:5000/x')", '10.1.2.3'),
        ("a = dict(b='https://mlflow:5000')", 'mlflow'),
    ],
)
def test_a_name_that_is_left(text, name):
    with pytest.raises(PrivacyError) as caught:
        clean(text)
    words = str(caught.value)
    assert 'b=' in words and '--drop a' in words and f'--public {name}' in words
    assert '\n' not in words
    assert clean(text, public=frozenset({name}))
    assert name.lower() not in clean(text, drop=('a',)).lower()


@pytest.mark.parametrize('setting', ['api_key', 'wandb_api_key', 'password', 'aws_secret'])
def test_a_secret(setting):
    with pytest.raises(PrivacyError, match=f"'{setting}'.*--drop a") as caught:
        clean(f"a = dict(b=dict({setting}='4711'))")
    assert '4711' not in str(caught.value)
    assert clean(f'a = dict(b=dict({setting}=None), cls_token=True)')


@pytest.mark.parametrize('text', ['a = (', 'a = 1\n  b = 2', 'a = \0'])
def test_what_is_no_config(text):
    with pytest.raises(PrivacyError, match='cannot be read'):
        clean(text)


def test_it_is_read_and_never_run(tmp_path):
    path = tmp_path / 'ran'
    clean(f"a = __import__('pathlib').Path({str(path)!r}).touch()")
    assert not path.exists()


def test_this_machines_own_names(monkeypatch):
    for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'):
        monkeypatch.setenv(name, 'dulcinea')
    privacy = Privacy.of_this_machine()
    with pytest.raises(PrivacyError, match='--public dulcinea'):
        privacy.check('trained by dulcinea', 'command')
    Privacy.of_this_machine(public=['Dulcinea']).check('trained by dulcinea', 'command')
    # The name of an account that everybody has says nothing.
    monkeypatch.setenv('LOGNAME', 'root')
    Privacy.of_this_machine().check('the root of all', 'command')


@pytest.mark.parametrize('text', ['python /mnt/x/train.py', '/mnt', 'a ~/x/y', 'D:\\x'])
def test_a_path_in_what_a_user_says(text):
    with pytest.raises(PrivacyError, match='command has a path'):
        HIDDEN.check(text, 'command')


@pytest.mark.parametrize(
    'text', ['python tools/train.py configs/a.py --cfg-options b=c/d', 'BCCD, https://a.b/c/d', '']
)
def test_what_a_user_may_say(text):
    HIDDEN.check(text, 'command')
