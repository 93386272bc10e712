"""Safetensors as checkpoints: what goes in comes out, in MMEngine's hands too."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import load_file, save_file
from small import seeded, small_lavit
from torch import nn

from mmlavit.engine.checkpoint_file import CheckpointError, read_checkpoint
from mmlavit.engine.safetensors_file import dump_safetensors, load_safetensors

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


def checkpoint(**meta: object) -> dict:
    """Weights of every kind that models have, with the versions that PyTorch keeps beside them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(small_lavit().float(), nn.BatchNorm2d(3), nn.Linear(2, 2).half())
    return dict(meta=meta, state_dict=model.state_dict())


def assert_same(some: dict, other: dict) -> None:
    a, b = some['state_dict'], other['state_dict']
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name
    assert a._metadata == b._metadata
    assert some['meta'] == other['meta']


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / 'model.safetensors'
    path.write_bytes(dump_safetensors(checkpoint(dataset_meta=dict(classes=('a', 'b')))))
    return path


def test_what_goes_in_comes_out(tmp_path):
    meta = dict(
        dataset_meta=dict(classes=('é', 'b'), palette=[(1, 2, 3)], label_map={0: 1, 255: 0}),
        cfg="a = dict(b='ü')\n",
        epoch=3,
        seed=None,
        scale=(0.5, [True]),
    )
    path = tmp_path / 'model.safetensors'
    path.write_bytes(dump_safetensors(checkpoint(**meta)))
    assert_same(load_safetensors(path), checkpoint(**meta))
    palette = load_safetensors(path)['meta']['dataset_meta']['palette']
    # The visualizers take a tuple for a colour, and a list for several.
    assert type(palette) is list and type(palette[0]) is tuple


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_any_plain_value(tmp_path_factory, meta):
    path = tmp_path_factory.getbasetemp() / 'any.safetensors'
    path.write_bytes(dump_safetensors(dict(meta=meta, state_dict=OrderedDict())))
    found = load_safetensors(path)['meta']
    # repr, as 1 == 1.0 == True.
    assert repr(found) == repr(meta)


def test_the_same_checkpoint_gives_the_same_bytes():
    """In other processes too, whose hashes differ."""
    code = 'import test_safetensors as t, hashlib as h; '
    code += 'print(h.sha256(t.dump_safetensors(t.checkpoint(a=1, b=(2, 3)))).hexdigest())'
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    said = {
        subprocess.run(
            [sys.executable, '-c', code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, 'PYTHONPATH': path, 'PYTHONHASHSEED': seed},
        ).stdout.split()[-1]
        for seed in '12'
    }
    assert len(said) == 1


def test_others_read_its_tensors(file):
    """By safetensors' own function, and its header as the format says, which is all JSON."""
    ours, theirs = read_checkpoint(file)['state_dict'], load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    content = file.read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header['__metadata__']['checkpoint'])['meta']['dataset_meta']


def test_reads_those_of_others(tmp_path):
    weights = {'a': torch.arange(3.0), 'b': torch.ones(2, 2, dtype=torch.bfloat16)}
    for metadata in (None, {'format': 'pt'}):
        save_file(weights, tmp_path / 'other.safetensors', metadata)
        found = read_checkpoint(tmp_path / 'other.safetensors')
        assert found.keys() == {'state_dict'}
        assert all(torch.equal(found['state_dict'][name], weights[name]) for name in weights)


# ---- In MMEngine's hands -------------------------------------------------------------------------


class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = small_lavit().float()

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.backbone(inputs)


@pytest.mark.parametrize('prefix', ['', './', 'with space/', 'a.pth/'])
def test_mmengine_loads_it_as_a_checkpoint(tmp_path, prefix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f'{prefix}model.safetensors'
    path.parent.mkdir(exist_ok=True)
    source = Model()
    path.write_bytes(dump_safetensors(dict(meta=dict(epoch=3), state_dict=source.state_dict())))
    model = Model()
    nn.init.zeros_(model.backbone.norm3.weight)
    for name in (str(path), f'{prefix}model.safetensors'):
        found = load_checkpoint(model, name, strict=True)
        assert found['meta'] == dict(epoch=3)
    weights = source.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    'name',
    ['model.pth', 'safetensors', 'model.safetensors.pth', 'http://a.b/model.safetensors']
    + ['https://a.b/model.safetensors', 's3://a/model.safetensors', 'x:s3://a/model.safetensors'],
)
def test_all_else_stays_with_its_loader(name):
    """By who raises: none of these is loaded as a local safetensors file."""
    chosen = CheckpointLoader._get_checkpoint_loader(name)
    assert chosen is not CheckpointLoader._get_checkpoint_loader('model.safetensors')


# ---- What is no such file ------------------------------------------------------------------------


def test_truncated_anywhere(file):
    content = file.read_bytes()
    print('seed 0')
    lengths = np.random.default_rng(0).integers(1, len(content), size=20).tolist()
    for length in [1, 7, 8, 9, 63, len(content) - 1, *lengths]:
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(file))) as caught:
            CheckpointLoader.load_checkpoint(str(file))
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'empty'),
        (b'<!DOCTYPE html>', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        (b'PK\x03\x04', 'safetensors'),
        (struct.pack('<Q', 4) + b'{"a}', 'safetensors'),
        (struct.pack('<Q', 1 << 60) + b'{"a":1}', 'safetensors'),
        (struct.pack('<Q', 2) + b'{}' + b'rest', 'safetensors'),
    ],
)
def test_other_content(tmp_path, content, words):
    path = tmp_path / 'model.safetensors'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['[1]', '{', '{"meta": {}}', '{"meta": {}, "versions": 3}'])
def test_a_text_that_is_not_ours(tmp_path, text):
    path = tmp_path / 'model.safetensors'
    save_file({'a': torch.ones(1)}, path, {'checkpoint': text})
    with pytest.raises(CheckpointError, match='safetensors'):
        read_checkpoint(path)


def test_one_under_another_name_is_said_to_be(file):
    other = file.rename(file.with_suffix('.pth'))
    with pytest.raises(CheckpointError, match=r'is a safetensors file.*\.safetensors'):
        read_checkpoint(other)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.safetensors can not be found'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'nowhere.safetensors'))


@pytest.mark.parametrize('where', ['cpu', torch.device('cpu'), None])
def test_map_location(file, where):
    assert_same(read_checkpoint(file, where), read_checkpoint(file))
    with pytest.raises(TypeError, match='map_location'):
        read_checkpoint(file, lambda storage, location: storage)


def test_without_the_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.delitem(sys.modules, 'safetensors.torch', raising=False)
    with pytest.raises(ImportError, match='pip install safetensors'):
        read_checkpoint(file)
    with pytest.raises(ImportError, match='pip install safetensors'):
        dump_safetensors(checkpoint())


def test_weights_far_from_their_start(tmp_path):
    """Every bit of float64, infinities and NaN too."""
    weights = OrderedDict(a=torch.randn(7, 3, generator=seeded(0), dtype=torch.float64))
    weights['a'][0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    path = tmp_path / 'model.safetensors'
    path.write_bytes(dump_safetensors(dict(meta={}, state_dict=weights)))
    found = load_safetensors(path)['state_dict']['a']
    assert torch.equal(found.view(torch.int64), weights['a'].view(torch.int64))
