"""Writing a data set: as a whole, over nothing else, and on after an interruption."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from downloads import tree, write

from mmlavit.datasets.converters import conversion as module
from mmlavit.datasets.converters.conversion import Conversion, ConversionError
from mmlavit.datasets.converters.reading import Download

FILES = {f'{split}/{i}.txt': f'{split} {i}'.encode() for split in ('a', 'b') for i in range(5)}


def conversion(**changes: object) -> Conversion:
    files = {path: (lambda data=data: data) for path, data in FILES.items()}
    plain = Conversion('set', 1, 'a licence', {'input': 3}, files, {'a': {'images': 5}})
    return dataclasses.replace(plain, **changes)


def interrupted(after: int, error: BaseException) -> Conversion:
    """The conversion whose file of that number cannot be made."""

    def fail() -> bytes:
        raise error

    files = dict(conversion().files)
    files[list(files)[after]] = fail
    return conversion(files=files)


def convert(out: Path, what: Conversion | None = None) -> bool:
    return module.write(what or conversion(), out, progress=False)


def written(out: Path) -> bool:
    """Whether all of it is there and nothing else, in the folder or beside it."""
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
    found = tree(out)
    del found[module.MANIFEST]
    return found == FILES


@pytest.mark.parametrize('there', [False, True])
def test_writes_into_a_new_or_an_empty_folder(tmp_path, there):
    out = tmp_path / 'out'
    if there:
        out.mkdir()
    assert convert(out)
    assert written(out)


def test_a_link_to_a_folder_stays_one(tmp_path):
    disk, out = tmp_path / 'disk' / 'big', tmp_path / 'data' / 'out'
    disk.mkdir(parents=True)
    out.parent.mkdir()
    out.symlink_to(disk)
    assert convert(out)
    assert out.is_symlink() and written(disk) and written(out)
    assert not convert(out)


def test_the_second_time_nothing_is_done(tmp_path):
    out = tmp_path / 'out'
    convert(out)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert not convert(out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


def test_lost_files_are_written_again(tmp_path):
    out = tmp_path / 'out'
    convert(out)
    (out / 'b' / '2.txt').unlink()
    assert convert(out)
    assert written(out)


@pytest.mark.parametrize('after', range(len(FILES)))
@pytest.mark.parametrize('error', [KeyboardInterrupt(), ConversionError('broken'), OSError(28)])
def test_goes_on_after_an_interruption(tmp_path, after, error):
    out = tmp_path / 'out'
    with pytest.raises(type(error)):
        convert(out, interrupted(after, error))
    assert not out.exists()
    (scratch,) = tmp_path.iterdir()
    done = {path: path.stat().st_ino for path in scratch.rglob('*.txt')}
    assert len(done) == after
    assert convert(out)
    assert written(out)
    assert {(out / p.relative_to(scratch)).stat().st_ino for p in done} == {*done.values()}


def test_goes_on_after_a_kill(tmp_path):
    out = tmp_path / 'out'
    code = (
        'import os, signal, sys\n'
        f'sys.path[:0] = {sys.path!r}\n'
        'from test_conversion import conversion, convert\n'
        'files = dict(conversion().files)\n'
        'files["b/1.txt"] = lambda: os.kill(os.getpid(), signal.SIGKILL)\n'
        f'convert({str(out)!r}, conversion(files=files))\n'
    )
    killed = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    (scratch,) = tmp_path.iterdir()
    write(scratch / '.4711.tmp', 'half a fi')  # what a kill in the middle of a file leaves
    assert convert(out)
    assert written(out)


def test_what_another_version_left_half_done_goes(tmp_path):
    out = tmp_path / 'out'
    other = interrupted(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(out, dataclasses.replace(other, version=2))
    mine = [write(tmp_path / name, 'mine') for name in ('.out.partial', '.out.0123.partial')]
    assert convert(out)
    assert [path.read_text() for path in mine] == ['mine', 'mine']
    assert {path.name for path in tmp_path.iterdir()} == {'out', *(path.name for path in mine)}


@pytest.mark.parametrize('at', [0, 4, len(FILES) - 1])
def test_another_process_may_be_first(tmp_path, at):
    out = tmp_path / 'out'
    files = dict(conversion().files)
    path = list(files)[at]

    def overtaken() -> bytes:
        assert convert(out)
        return FILES[path]

    files[path] = overtaken
    assert not convert(out, conversion(files=files))
    assert written(out)


def test_refuses_a_file(tmp_path):
    out = write(tmp_path / 'out', 'mine')
    with pytest.raises(FileExistsError, match='is not a directory'):
        convert(out)
    assert tree(tmp_path) == {'out': b'mine'}


@pytest.mark.parametrize(
    'name, content',
    [
        ('photo.jpg', 'mine'),
        ('dataset.json', 'no json'),
        ('dataset.json', '[]'),
        ('dataset.json', '{"generator": {"name": "mmlavit.shapes"}, "complete": true}'),
    ],
)
def test_refuses_what_something_else_wrote(tmp_path, name, content):
    out = tmp_path / 'out'
    write(out / name, content)
    with pytest.raises(FileExistsError) as caught:
        convert(out)
    assert f'{out} holds {name!r}' in str(caught.value) and '--out' in str(caught.value)
    assert tree(tmp_path) == {f'out/{name}': content.encode()}


@pytest.mark.parametrize(
    'changes, told',
    [
        (dict(name='other'), "converter is 'mmlavit.other' there"),
        (dict(version=2), 'version is 2 there and 1 here'),
        (dict(options={'classes': 5}), "options is {'classes': 5} there and {} here"),
        (dict(inputs={'input': 4}), 'it was made of other files'),
    ],
)
def test_refuses_another_conversion(tmp_path, changes, told):
    out = tmp_path / 'out'
    convert(out, conversion(**changes))
    before = tree(tmp_path)
    with pytest.raises(FileExistsError) as caught:
        convert(out)
    assert told in str(caught.value)
    assert tree(tmp_path) == before


def test_the_order_of_inputs_does_not_matter(tmp_path):
    convert(tmp_path / 'out', conversion(inputs={'a': 1, 'b': 2}))
    assert not convert(tmp_path / 'out', conversion(inputs={'b': 2, 'a': 1}))


def test_a_folder_below_a_file_is_an_error(tmp_path):
    write(tmp_path / 'file', 'mine')
    with pytest.raises(OSError, match='file'):
        convert(tmp_path / 'file' / 'out')
    assert tree(tmp_path) == {'file': b'mine'}


@pytest.mark.parametrize(
    'mark, base',
    [
        ('list.txt', 'top/'),
        ('train/', 'top/'),
        ('train/images/', 'top/'),
        ('images/', 'top/train/'),
        ('top/list.txt', ''),
        ('list', None),
        ('rain/', None),
        ('val/', 'top/deep/'),
    ],
)
def test_the_folder_that_holds_what_tells_a_layout(tmp_path, mark, base):
    for name in ('top/list.txt', 'top/deep/list.txt', 'top/train/images/a.png', 'top/deep/val/b'):
        write(tmp_path / name, 'x')
    assert Download(tmp_path).base(mark) == base


def test_hidden_files_are_left_out(tmp_path):
    for name in ('.git/list.txt', '__MACOSX/list.txt', 'a/.DS_Store', 'a/b.txt'):
        write(tmp_path / name, 'x')
    assert Download(tmp_path).files == {'a/b.txt': 1}


def test_links_to_folders_are_followed_and_may_lead_in_a_circle(tmp_path):
    write(tmp_path / 'disk' / 'deep' / 'b.txt', 'x')
    write(tmp_path / 'download' / 'a.txt', 'x')
    (tmp_path / 'download' / 'linked').symlink_to(tmp_path / 'disk')
    (tmp_path / 'disk' / 'back').symlink_to(tmp_path / 'download')
    (tmp_path / 'disk' / 'gone').symlink_to(tmp_path / 'nowhere')
    assert Download(tmp_path / 'download').files == {'a.txt': 1, 'linked/deep/b.txt': 1}
