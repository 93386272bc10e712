"""The table of configs/README.md is the one that the configs give."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_readme_and_script_agree():
    ran = subprocess.run(
        [sys.executable, '-W', 'ignore', ROOT / 'tools' / 'config_table.py'],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    table = ran.stdout.strip().splitlines()
    named = [line.split('`')[1] for line in table[2:]]
    configs = {path.name for path in (ROOT / 'configs').glob('*.py')}
    assert sorted(named) == sorted(name for name in configs if not name.endswith('_shapes.py'))
    readme = (ROOT / 'configs' / 'README.md').read_text(encoding='utf-8').splitlines()
    rows = [line for line in readme if line.count('|') == table[0].count('|')]
    assert [line for line in rows if '`' in line and line.split('`')[1] in named] == table[2:]
    assert table[0] in readme


def test_every_difference_over_five_percent_is_explained():
    readme = (ROOT / 'configs' / 'README.md').read_text(encoding='utf-8')
    explained = readme.partition('**Where ours differs')[2].partition('**')[0]
    far = set()
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.split('|')]
        if (
            len(cells) > 6
            and ' / ' in cells[6]
            and '–' not in cells[6]
            and 'GFLOPs' not in cells[6]
        ):
            ours, papers = map(float, cells[6].split(' / '))
            if abs(ours / papers - 1) > 0.05:
                far.add(cells[2].split(' on ')[0])
    assert far
    assert all(task in explained for task in far)
