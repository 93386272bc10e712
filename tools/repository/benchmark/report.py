"""What a benchmark leaves: JSON with every figure, a Markdown table of ratios, a plot."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import torch

from .suites import Comparison, Row


def describe_machine(device: str, rounds: int) -> dict[str, object]:
    """What the figures of all comparisons hold for.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        rounds: Rounds of each comparison.

    Returns:
        Names and values, as they are to be read.
    """
    return {
        'date': datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        'processor': _processor(),
        'cores': os.cpu_count(),
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'CPU',
        'torch': torch.__version__,
        'rounds': rounds,
        'load before': round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def markdown(machine: dict[str, object], comparisons: Sequence[Comparison]) -> str:
    """The tables, one for each comparison.

    Args:
        machine: Of :func:`describe_machine`.
        comparisons: What was measured.

    Returns:
        Markdown. Ratios are a model's figure over the first model's: over 1 speaks for the first.
    """
    name = f'{machine["processor"]}, {machine["cores"]} cores'
    if machine.get('device', 'CPU') != 'CPU':
        name = machine['device']
    lines = [f'# Benchmark: {name}', '']
    lines += [', '.join(f'{name} {value}' for name, value in machine.items()), '']
    lines += ["Medians of interleaved rounds (least - most). Ratios: over the first row's figure."]
    if any(row.linear == 'ours' for comparison in comparisons for row in comparison.rows):
        lines += ['', _OUR_LINEAR]
    for comparison in comparisons:
        lines += ['', f'## {comparison.task}, {comparison.input} ({comparison.conditions})', '']
        lines += _table(comparison)
        lines += [f'Not measured: {name}. {reason}' for name, reason in comparison.absent.items()]
    return '\n'.join(lines) + '\n'


_OUR_LINEAR = (
    '"Our linear layers": those of all models go to oneDNN, as LaViT\'s do. PyTorch sends the '
    "peers' to MKL, which is the other figure."
)
_SUFFIX = {'own': '', 'ours': ', our linear layers'}


def _table(comparison: Comparison) -> list[str]:
    """A line for each model, with figures for each route of its linear layers."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in comparison.rows:
        # Where the routes are one, the figure belongs to both.
        routes = ('own', 'ours') if row.linear == 'same' else (row.linear,)
        by_model.setdefault(row.model, {}).update(dict.fromkeys(routes, row))
    if not by_model:
        return []
    differing = {row.linear for row in comparison.rows} - {'same'} or {'own'}
    routes = [route for route in _SUFFIX if route in differing]
    head = ['model']
    for route in routes:
        head += [f'seconds{_SUFFIX[route]}', f'time ratio{_SUFFIX[route]}']
    head += ['images/s', 'peak MiB', 'memory ratio', 'params M', 'GFLOPs']
    head += ['floor s', 'time / floor', 'format']
    first = next(iter(by_model.values()))
    lines = [head, ['---'] * len(head)]
    for model, of in by_model.items():
        cells = [model]
        for route in routes:
            row = of[route]
            cells.append(f'{row.median:.4g} ({min(row.seconds):.4g} - {max(row.seconds):.4g})')
            cells.append(f'**{row.median / first[route].median:.2f}**')
        row, base = of[routes[0]], first[routes[0]]
        ratio = row.memory / base.memory if row.memory and base.memory else None
        cells += [
            _show(comparison.images / row.median, 2),
            _show(row.memory, 0),
            _show(ratio, 2),
            _show(row.params and row.params / 1e6, 1),
            _show(row.gflops, 1),
            _show(row.floor, 4),
            _show(row.floor and row.median / row.floor, 2),
            ' / '.join(dict.fromkeys(of[route].format for route in routes)),
        ]
        lines.append(cells)
    return [f'| {" | ".join(cells)} |' for cells in lines] + ['']


def _show(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def write(out: Path, machine: dict[str, object], comparisons: Sequence[Comparison]) -> list[Path]:
    """Write ``results.json``, ``README.md`` and ``speed.png``; each appears whole or not at all.

    Args:
        out: Folder; made if it does not exist.
        machine: Of :func:`describe_machine`.
        comparisons: What was measured.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for comparison in comparisons:
        medians = [row.median for row in comparison.rows]
        found.append(asdict(comparison))
        for row, median in zip(found[-1]['rows'], medians, strict=True):
            row['median'] = median
    results = {'machine': machine, 'comparisons': found}
    files = {
        out / 'results.json': json.dumps(results, indent=1) + '\n',
        out / 'README.md': markdown(machine, comparisons),
    }
    for path, text in files.items():
        scratch = path.with_suffix('.partial')
        scratch.write_text(text, encoding='utf-8')
        scratch.replace(path)
    return [*files, draw(machine, comparisons, out / 'speed.png')]


def draw(machine: dict[str, object], comparisons: Sequence[Comparison], out: Path) -> Path:
    """Draw the speed of every model relative to the first one of its comparison.

    Args:
        machine: Of :func:`describe_machine`.
        comparisons: What was measured.
        out: Picture to write.

    Returns:
        ``out``.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    drawn = [comparison for comparison in comparisons if comparison.rows]
    columns = min(3, max(1, len(drawn)))
    lines = -(-len(drawn) // columns) or 1
    most = max((len(comparison.rows) for comparison in drawn), default=0)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, (0.9 + 0.28 * most) * lines),
        layout='constrained',
        squeeze=False,
    )
    for panel in panels.flat[len(drawn) :]:
        panel.remove()
    for panel, comparison in zip(panels.flat, drawn, strict=False):
        rows = comparison.rows
        speeds = [_base(row, rows).median / row.median for row in rows]
        colours = ['tab:blue' if row.model.startswith('LaViT-S') else 'tab:grey' for row in rows]
        colours[0] = 'tab:red'
        bars = panel.barh([f'{row.model}{_suffix(row)}' for row in rows], speeds, color=colours)
        panel.bar_label(bars, fmt='%.2f', padding=2)
        panel.invert_yaxis()
        # A line that is wider than its panel would be cut off at the edge of the figure.
        conditions = textwrap.fill(comparison.conditions, 28)
        title = f'{comparison.task}, {comparison.input}\n{conditions}'
        panel.set(title=title, xlim=(0, 1.2 * max(speeds)))
        panel.title.set_fontsize(10)
    figure.suptitle(f'Relative speed (longer is faster): {machine["processor"]}', fontsize=11)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def _base(row: Row, rows: Sequence[Row]) -> Row:
    """The first model's row that a row is held against: by the same route, if it took two."""
    candidates = [other for other in rows if other.model == rows[0].model]
    return next((other for other in candidates if other.linear == row.linear), candidates[0])


def _suffix(row: Row) -> str:
    return _SUFFIX.get(row.linear, '')
