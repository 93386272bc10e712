"""What a benchmark leaves: JSON with every figure, a Markdown table of ratios, a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import torch

from .suites import Row
from .workload import Settings


def describe_machine(settings: Settings, rate: float, rounds: int) -> dict[str, object]:
    """What the figures hold for.

    Args:
        settings: How things were computed.
        rate: Floating-point operations a second in matrix products.
        rounds: Rounds of each comparison.

    Returns:
        Names and values, as they are to be read.
    """
    return {
        'date': datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        'processor': _processor(),
        'threads': torch.get_num_threads(),
        'device': torch.cuda.get_device_name() if settings.device == 'cuda' else 'CPU',
        'torch': torch.__version__,
        'type': settings.amp or 'fp32',
        'mode': 'torch.compile' if settings.compile else 'eager',
        'matrix products': f'{rate / 1e9:.0f} GFLOP/s',
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


def markdown(machine: dict[str, object], comparisons: Sequence[Sequence[Row]]) -> str:
    """The tables, one for each comparison.

    Args:
        machine: Of :func:`describe_machine`.
        comparisons: The rows of each comparison; the first row is what the others are held against.

    Returns:
        Markdown. Ratios are a model's figure over the first model's: over 1 speaks for the first.
    """
    name = f'{machine["processor"]}, {machine["threads"]} threads'
    if machine.get('device', 'CPU') != 'CPU':
        name = machine['device']
    lines = [f'# Benchmark: {name}', '']
    lines += [', '.join(f'{name} {value}' for name, value in machine.items()), '']
    lines += ["Medians of interleaved rounds (least - most). Ratios: over the first row's figure."]
    for rows in comparisons:
        first = rows[0]
        lines += ['', f'## {first.task}, {first.input}', '', _HEAD, '|---' * 11 + '|']
        lines += [_line(row, first) for row in rows]
    return '\n'.join(lines) + '\n'


_HEAD = (
    '| model | seconds | images/s | time ratio | peak MiB | memory ratio | params M | GFLOPs '
    '| floor s | time / floor | format |'
)


def _line(row: Row, first: Row) -> str:
    def show(value: float | None, digits: int) -> str:
        return '' if value is None else f'{value:.{digits}f}'

    ratio = row.memory / first.memory if row.memory and first.memory else None
    cells = [
        row.model,
        f'{row.median:.4g} ({min(row.seconds):.4g} - {max(row.seconds):.4g})',
        show(row.images / row.median, 2),
        f'**{row.median / first.median:.2f}**',
        show(row.memory, 0),
        show(ratio, 2),
        show(row.params and row.params / 1e6, 1),
        show(row.gflops, 1),
        show(row.floor, 4),
        show(row.floor and row.median / row.floor, 2),
        row.memory_format,
    ]
    return f'| {" | ".join(cells)} |'


def write(
    out: Path, machine: dict[str, object], comparisons: Sequence[Sequence[Row]]
) -> list[Path]:
    """Write ``results.json``, ``README.md`` and ``speed.png``; each appears whole or not at all.

    Args:
        out: Folder; made if it does not exist.
        machine: Of :func:`describe_machine`.
        comparisons: The rows of each comparison.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        asdict(row) | {'median': row.median} for comparison in comparisons for row in comparison
    ]
    files = {
        out / 'results.json': json.dumps({'machine': machine, 'rows': rows}, indent=1) + '\n',
        out / 'README.md': markdown(machine, comparisons),
    }
    for path, text in files.items():
        scratch = path.with_suffix('.partial')
        scratch.write_text(text, encoding='utf-8')
        scratch.replace(path)
    return [*files, draw(machine, comparisons, out / 'speed.png')]


def draw(machine: dict[str, object], comparisons: Sequence[Sequence[Row]], out: Path) -> Path:
    """Draw the speed of every model relative to the first one of its comparison.

    Args:
        machine: Of :func:`describe_machine`.
        comparisons: The rows of each comparison.
        out: Picture to write.

    Returns:
        ``out``.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    columns = min(3, len(comparisons))
    lines = -(-len(comparisons) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 2.6 * lines), layout='constrained', squeeze=False
    )
    for panel in panels.flat[len(comparisons) :]:
        panel.remove()
    for panel, rows in zip(panels.flat, comparisons, strict=False):
        speeds = [rows[0].median / row.median for row in rows]
        colours = ['tab:blue' if row.model.startswith('LaViT-S') else 'tab:grey' for row in rows]
        colours[0] = 'tab:red'
        bars = panel.barh([row.model for row in rows], speeds, color=colours)
        panel.bar_label(bars, fmt='%.2f', padding=2)
        panel.invert_yaxis()
        panel.set(title=f'{rows[0].task}, {rows[0].input}', xlim=(0, 1.2 * max(speeds)))
        panel.title.set_fontsize(10)
    figure.suptitle(f'Relative speed (longer is faster): {machine["processor"]}', fontsize=11)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out
