"""Two commits by turns: what is slower is said to be slower, and nothing stays behind."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from math import comb
from pathlib import Path

import pytest
from helpers import ROOT

from repository.commits.pairs import MIN_PAIRS, Case, Outcome

# A commit's package, whose LaViT takes so many milliseconds.
PACKAGE = """
import time
from torch import nn

class LaViT(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        print('chatter')
        time.sleep({milliseconds} / 1000)
        return (self.conv(x),)
"""
TINY = ['--cases', 'inference:1x8x8:fp32', '--pairs', str(MIN_PAIRS), '--threads', '1']


class Repository:
    """A repository with the tool and packages of different speed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder.with_name('temporary')
        self.temporary.mkdir()
        tools = ROOT / 'tools'
        shutil.copytree(tools / 'repository', folder / 'tools' / 'repository')
        shutil.copy(tools / 'compare_commits.py', folder / 'tools')
        (folder / 'mmlavit').mkdir()
        self.git('init', '--quiet')
        for name, content in [
            ('fast', PACKAGE.format(milliseconds=30)),
            ('slow', PACKAGE.format(milliseconds=90)),
            ('broken', 'import no_such_package'),
            ('last', PACKAGE.format(milliseconds=30)),
        ]:
            self.package.write_text(content)
            self.git('add', 'mmlavit')
            self.git('commit', '--quiet', '--message', f'the {name} one')
            self.git('tag', name)

    @property
    def package(self) -> Path:
        return self.folder / 'mmlavit' / '__init__.py'

    def git(self, *words: str) -> None:
        who = ('-c', 'user.name=A', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false')
        subprocess.run(['git', *who, *words], cwd=self.folder, check=True)

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, 'tools/compare_commits.py', *words],
            cwd=self.folder,
            env=os.environ | {'TMPDIR': str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def compare(self, *words: str) -> tuple[int, str, str]:
        """Exit status and what was said."""
        process = self.start(*words)
        said = process.communicate(timeout=300)
        assert not list(self.temporary.iterdir())
        return process.returncode, *said


@pytest.fixture(scope='module')
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp('commits') / 'repository')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('names', 'status', 'verdict'),
    [
        (('fast', 'slow'), 1, 'slower'),
        (('slow', 'fast'), 0, 'faster'),
        (('fast', 'last'), 0, 'same'),
    ],
)
def test_verdict(repository: Repository, names: tuple[str, str], status: int, verdict: str) -> None:
    """Of sleeps so far apart that a busy machine does not close the gap."""
    found, out, err = repository.compare(*names, *TINY, '--tolerance', '0.5')
    assert found == status, err
    assert f'the {names[0]} one' in out and f'the {names[1]} one' in out
    (line,) = (line for line in out.splitlines() if line.startswith('| inference:1x8x8:fp32'))
    cells = [cell.strip() for cell in line.split('|')[1:-1]]
    assert cells[-1] == verdict
    expected = {'slower': 3, 'faster': 1 / 3, 'same': 1}[verdict]
    assert float(cells[3]) == pytest.approx(expected, rel=0.4)
    low, high = map(float, cells[4].split(' - '))
    assert low <= float(cells[3]) <= high
    slower = 'inference:1x8x8:fp32' if verdict == 'slower' else 'nothing'
    assert out.splitlines()[-1] == f'slower: {slower}'


@pytest.mark.slow
def test_what_is_in_no_commit_is_not_passed_over(repository: Repository) -> None:
    before = repository.package.read_text()
    repository.package.write_text(before + '\n')
    try:
        status, _, err = repository.compare('fast', *TINY)
        assert status == 2 and 'mmlavit/__init__.py' in err and '--ignore-changes' in err
        assert err.count('\n') == 1
        status, out, _ = repository.compare('fast', '--ignore-changes', *TINY, '--tolerance', '9')
        assert status == 0 and 'not timed' in out and 'mmlavit/__init__.py' in out
        # Nobody can mean those two by what is in the working tree.
        status, _, err = repository.compare('fast', 'slow', *TINY, '--tolerance', '9')
        assert status == 0, err
    finally:
        repository.package.write_text(before)


@pytest.mark.parametrize(
    ('names', 'reason'),
    [
        (('fast', 'broken'), 'broken failed: .*no_such_package'),
        (('fast', 'gone'), "'gone' is no commit"),
        (('--', '--help'), "'--help' is no commit"),
    ],
)
def test_what_cannot_be_compared(
    repository: Repository, names: tuple[str, str], reason: str
) -> None:
    status, out, err = repository.compare(*TINY, *names)
    assert status == 2
    assert re.fullmatch(f'mmlavit: .*{reason}.*\n', err), err
    assert 'slower' not in out


def test_stopped_it_leaves_nothing(repository: Repository) -> None:
    process = repository.start('fast', 'slow', *TINY, '--pairs', '100000')
    deadline = time.monotonic() + 120
    while len(list(repository.temporary.glob('*/after.log'))) == 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(repository.temporary.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no clone')
def test_a_commit_is_as_fast_as_itself() -> None:
    """Through LaViT itself."""
    command = [sys.executable, ROOT / 'tools' / 'compare_commits.py', 'HEAD', '--ignore-changes']
    command += ['--arch', 'nano', '--cases', 'inference:1x32x32:fp32', 'training:1x32x32:bf16-amp']
    command += ['--threads', '1', '--pairs', '12', '--tolerance', '0.5']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split('|') for line in done.stdout.splitlines() if line.startswith('| ')][1:]
    assert [row[1].strip() for row in rows] == [
        'inference:1x32x32:fp32',
        'training:1x32x32:bf16-amp',
    ]
    for row in rows:
        assert float(row[4]) == pytest.approx(1, abs=0.5)


def outcome(ratios: list[float], tolerance: float = 0.02) -> Outcome:
    return Outcome(Case.of('inference:1x8x8:fp32'), [1.0] * len(ratios), ratios, tolerance)


@pytest.mark.parametrize('pairs', [MIN_PAIRS, 15, 40])
def test_interval_is_that_of_the_sign_test(pairs: int) -> None:
    """The narrowest pair of order statistics that miss the median with at most 0.5 % on a side."""
    ratios = [1 + i / 100 for i in range(pairs)]
    misses, tail = 0, 0.0
    while tail + comb(pairs, misses) / 2**pairs <= 0.005:
        tail += comb(pairs, misses) / 2**pairs
        misses += 1
    assert misses > 0
    shuffled = random.Random(0).sample(ratios, pairs)
    assert outcome(shuffled).interval == (ratios[misses - 1], ratios[-misses])


@pytest.mark.parametrize(('slowdown', 'verdict'), [(1.0, 'same'), (1.1, 'slower'), (0.9, 'faster')])
def test_noise_of_some_percent_and_a_few_disasters(slowdown: float, verdict: str) -> None:
    print('seed 0')
    chance = random.Random(0)
    verdicts = []
    for _ in range(200):
        ratios = [slowdown * chance.lognormvariate(0, 0.03) for _ in range(20)]
        ratios[:2] = [3.0, 0.3]
        verdicts.append(outcome(ratios).verdict)
    assert verdicts.count(verdict) >= 195


def test_less_than_the_tolerance_is_no_difference() -> None:
    assert outcome([1.015] * 20).verdict == 'same'
    assert outcome([1.015] * 20, tolerance=0.01).verdict == 'slower'


@pytest.mark.parametrize('text', ['inference:4x224x224:bf16-amp', 'training:1x800x1280:fp32'])
def test_cases_by_name(text: str) -> None:
    assert str(Case.of(text)) == text


@pytest.mark.parametrize(
    'text',
    ['inference:224:fp32', 'testing:1x8x8:fp32', 'inference:1x8x8:int8', 'inference:0x8x8:fp32'],
)
def test_bad_cases(text: str) -> None:
    with pytest.raises(ValueError, match='got|such as'):
        Case.of(text)
