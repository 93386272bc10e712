"""What studies share: files of results, figures over seeds, and pages with tables between marks."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

_MARKS = '<!-- results: {} -->', '<!-- end of results -->'


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of results.

    Args:
        path: A JSON object a line.

    Returns:
        The objects; none where there is no file.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def add_line(path: Path, result: dict[str, Any]) -> None:
    """Add a result to a file, which is made if it is not there.

    Args:
        path: The file.
        result: What ``json`` writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a', encoding='utf-8') as file:
        file.write(json.dumps(result) + '\n')


def mean_and_spread(values: Sequence[float], digits: int = 1, sign: str = '') -> str:
    """A mean, and from two values on the standard deviation: ``'82.0 ± 2.0'``.

    Args:
        values: At least one.
        digits: After the point.
        sign: ``'+'`` to write a plus before what is not negative.
    """
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.{digits}f}{spread}'


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f'| {" | ".join(cells)} |'


def fill_in(page: str, table: Callable[[str], str]) -> str:
    """Put tables into a page.

    Args:
        page: Markdown with, for each table, a line ``<!-- results: NAME -->`` and later a line
            ``<!-- end of results -->``.
        table: The table of a name; it raises ``ValueError`` for a name that it does not know.

    Returns:
        The page with the present tables between those lines.
    """

    def fresh(match: re.Match) -> str:
        start, end = (mark.format(match[1]) for mark in _MARKS)
        return f'{start}\n\n{table(match[1])}\n\n{end}'

    start, end = (re.escape(mark) for mark in _MARKS)
    return re.sub(start.replace(r'\{\}', r'(\S+)') + '.*?' + end, fresh, page, flags=re.DOTALL)
