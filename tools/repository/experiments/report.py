"""What experiments came to: tables and learning curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

from mmlavit.analysis.replacement_run import COLUMNS

from .. import results as pages
from .tasks import TASKS
from .variants import EXPERIMENTS, VARIANTS, Experiment

#: As many as an experiment must have before its figures mean something.
SEEDS = 3


def table(experiment: Experiment, results: list[dict[str, Any]], times: dict[str, float]) -> str:
    """The table of an experiment.

    Args:
        experiment: Which.
        results: As :func:`repository.experiments.study.run` returns them; others than the
            experiment's are left out, and so are variants and tasks that have none.
        times: As :func:`repository.experiments.cost.step_ratios` returns them.

    Returns:
        Markdown. For each variant and task the mean and the standard deviation over the seeds, in
        percent; how many seeds there are, if not :data:`SEEDS`; where there is something to
        hold it against, the 95 % confidence interval of the difference (see :func:`difference`).
        For an experiment on learning rates, what each came to with the first seed.
    """
    tasks = _asked(experiment, results)
    if experiment.rates:
        return _rates_table(experiment, results, tasks)
    results = _compared(experiment, results)
    lines = [
        '| | parameters M | step | ' + ' | '.join(TASKS[t].title for t in tasks) + ' |',
        '|---' * (len(tasks) + 3) + '|',
    ]
    first = experiment.variants[0]
    for variant in experiment.variants:
        own = [r for r in results if r['variant'] == variant]
        if not own:
            continue
        cells = [
            VARIANTS[variant].title,
            f'{own[0]["parameters"] / 1e6:.2f}',
            f'{times[variant]:.2f}' if variant in times else '–',
        ]
        for task in tasks:
            base = [] if variant == first else _of(results, task, first)
            cells.append(_cell(_of(results, task, variant), base))
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def _asked(experiment: Experiment, results: list[dict[str, Any]]) -> list[str]:
    """Tasks of an experiment that there are results of."""
    return [t for t in TASKS if experiment.asks(t) and any(r['task'] == t for r in results)]


def _of(results: list[dict[str, Any]], task: str, variant: str) -> list[dict[str, Any]]:
    """Results of a variant in a task with its own learning rate, one for each seed."""
    wanted = task, variant, VARIANTS[variant].rate(task)
    return [r for r in results if (r['task'], r['variant'], r['rate']) == wanted]


def _compared(experiment: Experiment, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of an experiment, but for a seed of a task that one of several variants has alone.

    LaViT is in most experiments, and has the seeds of the one that asks for most.
    """
    own = {(t, v): _of(results, t, v) for t in TASKS for v in experiment.variants}
    kept = []
    for (task, variant), found in own.items():
        others = [own[task, v] for v in experiment.variants if v != variant and own[task, v]]
        seeds = {r['seed'] for rows in others for r in rows}
        kept += [r for r in found if not others or r['seed'] in seeds]
    return kept


def _rates_table(experiment: Experiment, results: list[dict[str, Any]], tasks: list[str]) -> str:
    """Learning rates side by side, with the first seed."""
    first = min(r['seed'] for r in results)
    found = {(r['task'], r['variant'], r['rate']): r for r in results if r['seed'] == first}
    lines = [
        f'| {" / ".join(f"{rate:g}" for rate in experiment.rates)} | '
        + ' | '.join(TASKS[t].title for t in tasks)
        + ' |',
        '|---' * (len(tasks) + 1) + '|',
    ]
    for variant in experiment.variants:
        cells = [VARIANTS[variant].title]
        for task in tasks:
            at = [found.get((task, variant, rate)) for rate in experiment.rates]
            cells.append(' / '.join(f'{r["metric"]:.1f}' if r else '–' for r in at))
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def alive(results: list[dict[str, Any]]) -> str:
    """The table of how even the attention of each trained LaViT is.

    Args:
        results: As for :func:`table`.

    Returns:
        Markdown. For each variant and task the entropy of the attention in each stage over the
        validation images, the mean over the seeds: 1 is a plain average over all keys. In brackets
        the standard deviation of a query's scores over its keys.
    """
    tasks = [t for t in TASKS if any(r['task'] == t for r in results)]
    lines = [
        '| | ' + ' | '.join(TASKS[t].title for t in tasks) + ' |',
        '|---' * (len(tasks) + 1) + '|',
    ]
    for variant, about in VARIANTS.items():
        cells = []
        for task in tasks:
            own = [r for r in _of(results, task, variant) if 'entropy' in r]
            entropies, spreads = (_mean(r[name] for r in own) for name in ('entropy', 'scores'))
            stages = zip(entropies, spreads, strict=True)
            cells.append(', '.join(f'{e:.2f} ({s:.2g})' for e, s in stages) or '–')
        if any(cell != '–' for cell in cells):
            lines.append(f'| {about.title} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def resized(rows: list[dict[str, Any]]) -> str:
    """The table of classifiers at other window sizes than they were trained with.

    Args:
        rows: As :func:`repository.experiments.resizing.measure` returns them.

    Returns:
        Markdown: for each size the mean over the seeds and the mean difference from the first.
    """
    by_size: dict[tuple[int, ...], dict[int, float]] = {}
    for row in rows:
        by_size.setdefault(tuple(row['windows']), {})[row['seed']] = row['metric']
    lines = ['| windows | top-1 | difference |', '|---|---|---|']
    trained = next(iter(by_size.values()), {})
    for windows, metrics in by_size.items():
        gap = statistics.mean(metrics[seed] - trained[seed] for seed in metrics)
        lines.append(
            f'| {", ".join(map(str, windows))} | {statistics.mean(metrics.values()):.1f} | '
            f'{gap:+.1f} |'
        )
    return '\n'.join(lines)


def replaced(rows: list[dict[str, Any]]) -> str:
    """The table of classifiers with something simple in the place of their attention.

    Args:
        rows: As :func:`repository.experiments.replacing.measure` returns them.

    Returns:
        Markdown: for each variant, and all stages together or one of them, the mean change over the
        seeds, in points; in brackets the least and the largest.
    """
    hows = list(dict.fromkeys(row['how'] for row in rows))
    lines = [f'| | {" | ".join(COLUMNS[how] for how in hows)} |', '|---' * (len(hows) + 1) + '|']
    for variant, stage in dict.fromkeys((row['variant'], row['stage']) for row in rows):
        cells = []
        for how in hows:
            wanted = variant, how, stage
            points = [r['points'] for r in rows if (r['variant'], r['how'], r['stage']) == wanted]
            ends = f' ({min(points):+.1f} to {max(points):+.1f})' if len(points) > 1 else ''
            cells.append(f'{statistics.mean(points):+.1f}{ends}' if points else '–')
        place = 'all stages' if stage is None else f'stage {stage + 1}'
        lines.append(f'| {VARIANTS[variant].title}, {place} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def _mean(rows: Iterable[list[float]]) -> list[float]:
    """Of each place in some lists."""
    return [statistics.mean(values) for values in zip(*rows, strict=True)]


def _cell(results: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    if not results:
        return '–'
    values = [r['metric'] for r in results]
    text = pages.mean_and_spread(values)
    if len(values) < SEEDS:
        text += f' [{len(values)} of {SEEDS} seeds]'
    elif len(values) > SEEDS:
        text += f' [{len(values)} seeds]'
    by_seed = {r['seed']: r['metric'] for r in base}
    gaps = [r['metric'] - by_seed[r['seed']] for r in results if r['seed'] in by_seed]
    if len(gaps) > 1:
        low, high = difference(gaps)
        text += f' ({low:+.1f} to {high:+.1f})'
    return text


def difference(gaps: list[float]) -> tuple[float, float]:
    """95 % confidence interval of a mean difference, by the t-test for pairs.

    Trainings of one seed have the same order of images and, where parts are taken out or windows
    changed, a backbone with the same first weights. Some seeds are lucky, for all variants alike;
    pairs are free of that.

    Args:
        gaps: The difference of each of at least two seeds.

    Returns:
        The interval's ends.
    """
    from scipy.stats import ttest_1samp

    if statistics.pvariance(gaps) == 0:
        return gaps[0], gaps[0]
    interval = ttest_1samp(gaps, 0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def is_whole(experiment: Experiment, results: list[dict[str, Any]]) -> bool:
    """Whether an experiment has all seeds of all its variants in at least one task."""
    return not experiment.rates and any(
        all(len(_of(results, task, v)) >= SEEDS for v in experiment.variants)
        for task in TASKS
        if experiment.asks(task)
    )


def draw(experiment: Experiment, results: list[dict[str, Any]], out: Path) -> Path:
    """Plot the learning curves of an experiment, a panel for each task.

    Args:
        experiment: Which.
        results: As for :func:`table`.
        out: Picture to write.

    Returns:
        ``out``. A line is the mean over the seeds, the band goes from the least to the largest.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    tasks = _asked(experiment, results)
    results = _compared(experiment, results)
    width = 3.6 * len(tasks)
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(width, 3.6), layout='constrained', squeeze=False
    )
    for panel, task in zip(panels[0], tasks, strict=True):
        for number, variant in enumerate(experiment.variants):
            curves = [r['curve'] for r in _of(results, task, variant)]
            if not curves:
                continue
            steps = [int(step) for step in curves[0]]
            points = list(zip(*(curve.values() for curve in curves), strict=True))
            # One colour a variant, also where another has no results.
            title, colour = VARIANTS[variant].title, f'C{number}'
            panel.plot(steps, list(map(statistics.mean, points)), 'o-', label=title, color=colour)
            panel.fill_between(
                steps, list(map(min, points)), list(map(max, points)), color=colour, alpha=0.2
            )
        if TASKS[task].chance is not None:
            panel.axhline(TASKS[task].chance, color='grey', linestyle=':', label='chance')
        panel.set(title=TASKS[task].title, xlabel='iteration', ylabel=f'{TASKS[task].metric}, %')
        panel.grid(alpha=0.3)
    # Below the panels: inside, it lies on a curve.
    found: dict[str, Any] = {}
    for panel in panels[0]:
        lines, names = panel.get_legend_handles_labels()
        found.update(zip(names, lines, strict=True))
    order = [*(VARIANTS[variant].title for variant in experiment.variants), 'chance']
    shown = {name: found[name] for name in order if name in found}
    # A letter takes less than 0.075 inches, the line before a name 0.6.
    columns = min(len(shown), max(1, int(width / (0.6 + 0.075 * max(map(len, shown))))))
    figure.legend(shown.values(), shown, loc='outside lower center', ncols=columns, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out


def fill_in(
    page: str,
    results: list[dict[str, Any]],
    times: dict[str, float],
    resizing: list[dict[str, Any]],
    replacing: list[dict[str, Any]],
) -> str:
    """Put the tables into a page.

    Args:
        page: Markdown with, for each experiment that has a table, a line
            ``<!-- results: NAME -->`` and later a line ``<!-- end of results -->``. The name
            ``alive`` is for :func:`alive`, ``resizing`` for :func:`resized`, ``replacing`` for
            :func:`replaced`.
        results: As for :func:`table`.
        times: As for :func:`table`.
        resizing: As for :func:`resized`.
        replacing: As for :func:`replaced`.

    Returns:
        The page with the present tables between those lines.

    Raises:
        ValueError: If a name is none of :data:`~repository.experiments.variants.EXPERIMENTS`.
    """

    def table_of(name: str) -> str:
        if name == 'alive':
            return alive(results)
        if name == 'resizing':
            return resized(resizing)
        if name == 'replacing':
            return replaced(replacing)
        if name in EXPERIMENTS:
            return table(EXPERIMENTS[name], results, times)
        raise ValueError(
            f'the page asks for results of {name!r}; there are alive, resizing, replacing, '
            f'{", ".join(EXPERIMENTS)}'
        )

    return pages.fill_in(page, table_of)
