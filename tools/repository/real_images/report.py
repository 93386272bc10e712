"""What came out: tables and learning curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .. import results as pages
from .backbones import BACKBONES
from .study import SEEDS, counts
from .tasks import TASKS, Measure

NONE = '–'
COSTS = (
    ('parameters M', 'parameters', 1e-6, 2),
    ('GFLOPs', 'gflops', 1.0, 2),
    ('ms', 'milliseconds', 1.0, 0),
    ('MiB', 'mib', 1.0, 0),
)


def table(task: str, results: list[dict[str, Any]], costs: dict[str, Any]) -> str:
    """The table of a task.

    Args:
        task: Name in :data:`~repository.real_images.tasks.TASKS`.
        results: As :func:`repository.real_images.training.run` returns them.
        costs: As :func:`repository.real_images.cost.images` returns it.

    Returns:
        Markdown. For each backbone what an image costs, the mean and the standard deviation over
        the seeds of each measure, and of the first the difference from LaViT with the same seed, as
        a mean and a standard deviation as well; then published figures.
    """
    about = TASKS[task]
    titles = [measure.title for measure in about.measures]
    head = ['', 'learning rate', *(c[0] for c in COSTS), titles[0], 'from LaViT', *titles[1:]]
    lines = [pages.row(head), '|---' * len(head) + '|']
    base = whole(results, task, 'lavit')
    for name in about.backbones:
        own = whole(results, task, name)
        cells = [
            BACKBONES[name].title,
            f'{own[0]["rate"]:g}' if own else NONE,
            *_costs(costs.get(task, {}).get('lavit' if name == 'pretrained' else name), own),
            _cell(own, about.measures[0], len(SEEDS[name])),
            NONE if name == 'lavit' else _gap(own, base, about.measures[0]),
            *(_cell(own, measure) for measure in about.measures[1:]),
        ]
        lines.append(pages.row(cells))
    for who, figures in about.published:
        # Not ours, so without what we have measured.
        found = [figures.get(title, '') for title in titles]
        lines.append(pages.row([f'*{who}*', '', *[''] * len(COSTS), found[0], '', *found[1:]]))
    return '\n'.join(lines)


def whole(results: list[dict[str, Any]], task: str, backbone: str) -> list[dict[str, Any]]:
    """The results of whole trainings, one for each seed, by seed."""
    found = [r for r in results if (r['task'], r['backbone'], r['share']) == (task, backbone, 1)]
    return sorted(found, key=lambda r: r['seed'])


def _costs(cost: dict[str, float] | None, results: list[dict[str, Any]]) -> list[str]:
    known = dict(cost or {})
    if results:
        known['parameters'] = results[0]['parameters']
    return [
        f'{scale * known[key]:.{digits}f}' if key in known else NONE
        for _, key, scale, digits in COSTS
    ]


def _value(result: dict[str, Any], measure: Measure) -> float:
    # A detector that finds nothing is not given a figure by mmdet.
    return measure.scale * float(result['metrics'].get(measure.name, 0.0))


def _cell(results: list[dict[str, Any]], measure: Measure, seeds: int = 0) -> str:
    if not results:
        return NONE
    values = [_value(result, measure) for result in results]
    missing = f' [{len(values)} of {seeds} seeds]' if len(values) < seeds else ''
    return pages.mean_and_spread(values, measure.digits) + missing


def _gap(results: list[dict[str, Any]], base: list[dict[str, Any]], measure: Measure) -> str:
    by_seed = {result['seed']: _value(result, measure) for result in base}
    gaps = [_value(r, measure) - by_seed[r['seed']] for r in results if r['seed'] in by_seed]
    return pages.mean_and_spread(gaps, measure.digits, '+') if gaps else NONE


def rates(results: list[dict[str, Any]]) -> str:
    """The table of learning rates that were tried.

    Args:
        results: As for :func:`table`.

    Returns:
        Markdown: for each backbone and task the first measure at each rate, in validation.
    """
    lines = [pages.row(['', *(t.title for t in TASKS.values())]), '|---' * (len(TASKS) + 1) + '|']
    lines.append(pages.row(['', *(' / '.join(f'{r:g}' for r in t.rates) for t in TASKS.values())]))
    trials = {(r['task'], r['backbone'], r['rate']): r for r in results if r['share'] < 1}
    for name, backbone in BACKBONES.items():
        if backbone.pretrained:
            continue
        cells = [backbone.title]
        for key, task in TASKS.items():
            measure = task.measures[0]
            at = [trials.get((key, name, rate)) for rate in task.rates]
            shown = [f'{measure.scale * counts(r):.{measure.digits}f}' if r else NONE for r in at]
            cells.append(' / '.join(shown) if name in task.backbones else '')
        lines.append(pages.row(cells))
    return '\n'.join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """The first measure of each task and backbone, for who reads no more.

    Args:
        results: As for :func:`table`.

    Returns:
        Markdown: a line a task; means and standard deviations over the seeds. A backbone that a
        task is not for has an empty cell.
    """
    columns = [name for name, backbone in BACKBONES.items() if not backbone.pretrained]
    lines = [pages.row(['', *(BACKBONES[name].title for name in columns)])]
    lines.append('|---' * (len(columns) + 1) + '|')
    for task, about in TASKS.items():
        title = f'{about.title}: {about.measures[0].title}'
        lines.append(pages.row([title, *_first_measures(task, results, columns)]))
    return '\n'.join(lines)


def zoo(results: list[dict[str, Any]]) -> str:
    """What a model zoo says of each config beyond the weights of one seed.

    Args:
        results: As for :func:`table`.

    Returns:
        Markdown: a line a config; the cells of :func:`summary`, those from pretraining as well, and
        published figures of others.
    """
    titles = [backbone.title for backbone in BACKBONES.values()]
    lines = [pages.row(['config', 'measure', *titles, 'published, of others'])]
    lines.append('|---' * (len(titles) + 3) + '|')
    for task, about in TASKS.items():
        measure = about.measures[0].title
        others = '; '.join(f'{who}: {found[measure]}' for who, found in about.published)
        config = f'[`{about.config.stem}`](../{about.config.as_posix()})'
        lines.append(
            pages.row([config, measure, *_first_measures(task, results, list(BACKBONES)), others])
        )
    return '\n'.join(lines)


def _first_measures(
    task: str, results: list[dict[str, Any]], backbones: Sequence[str]
) -> list[str]:
    about = TASKS[task]
    return [
        _cell(whole(results, task, name), about.measures[0]) if name in about.backbones else ''
        for name in backbones
    ]


def progress(results: list[dict[str, Any]]) -> str:
    """What is there of what the page wants, in a sentence.

    Args:
        results: As for :func:`table`.
    """
    wanted = {
        (task, name, seed)
        for task, about in TASKS.items()
        for name in about.backbones
        for seed in SEEDS[name]
    }
    found = {(r['task'], r['backbone'], r['seed']) for r in results if r['share'] == 1} & wanted
    if found == wanted:
        return f'All {len(wanted)} trainings are there.'
    return (
        f'**This page is being filled: {len(found)} of {len(wanted)} trainings are there.** '
        f'{NONE} is what is missing.'
    )


def fill_in(page: str, results: list[dict[str, Any]], costs: dict[str, Any]) -> str:
    """Put the tables into a page, as :func:`repository.results.fill_in` does.

    Args:
        page: Markdown with marks for the tasks, ``rates``, ``summary``, ``zoo`` and ``progress``.
        results: As for :func:`table`.
        costs: As for :func:`table`.

    Returns:
        The page with the present tables.

    Raises:
        ValueError: If a mark is for something else.
    """

    def table_of(name: str) -> str:
        if name == 'rates':
            return rates(results)
        if name == 'summary':
            return summary(results)
        if name == 'zoo':
            return zoo(results)
        if name == 'progress':
            return progress(results)
        if name in TASKS:
            drawn = any(whole(results, name, backbone) for backbone in TASKS[name].backbones)
            curves = f'\n\n![Validation over the schedule]({name}.png)' if drawn else ''
            return table(name, results, costs) + curves
        raise ValueError(
            f'the page asks for results of {name!r}; '
            f'there are progress, rates, summary, zoo, {", ".join(TASKS)}'
        )

    return pages.fill_in(page, table_of)


def draw(task: str, results: list[dict[str, Any]], out: Path) -> Path | None:
    """Plot the validations of a task's trainings.

    Args:
        task: Name in :data:`~repository.real_images.tasks.TASKS`.
        results: As for :func:`table`.
        out: Picture to write.

    Returns:
        ``out``, or None where there is nothing to draw. A line is the mean over the seeds, the
        band goes from the least to the largest.
    """
    about = TASKS[task]
    groups = {name: whole(results, task, name) for name in about.backbones}
    if not any(groups.values()):
        return None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4.5), layout='constrained')
    measure = about.measures[0]
    for name, own in groups.items():
        if not own:
            continue
        steps = sorted(int(step) for step in own[0]['curve'])
        points = [[measure.scale * r['curve'][str(step)] for r in own] for step in steps]
        (line,) = panel.plot(
            steps, list(map(statistics.mean, points)), '.-', label=BACKBONES[name].title
        )
        least, most = list(map(min, points)), list(map(max, points))
        panel.fill_between(steps, least, most, color=line.get_color(), alpha=0.15)
    unit = next(own[0]['unit'] for own in groups.values() if own)
    where = 'validation images' if about.held_out else 'test images'
    panel.set(title=about.title, xlabel=unit, ylabel=f'{measure.title}, {where}')
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out
