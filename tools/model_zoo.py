"""Writes the table of docs/model_zoo.md: the weights that checkpoints/metafile.yml lists."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'model_zoo.md'
INDEX = ROOT / 'checkpoints' / 'metafile.yml'
START, END = '<!-- models -->', '<!-- end of models -->'

HEAD = [
    '| model | task | trained on | figures on its test set | params M | training | files |',
    '|---|---|---|---|---|---|---|',
]
NONE = 'There are no weights yet.'


def row(entry: dict) -> str:
    """The line of one model, from its entry in the index."""
    about = entry['Metadata']
    results = entry.get('Results', [])
    figures = [f'{name} {value}' for r in results for name, value in r['Metrics'].items()]
    time = [about.get('Training Time'), about.get('Training Resources')]
    training = [
        f'`{about["Training Command"]}`' if 'Training Command' in about else '',
        f'{about.get("Epochs", 0)} epochs, {about.get("Iterations", 0)} iterations',
        f'seed {about["Seed"]}' if 'Seed' in about else '',
        ', '.join(filter(None, time)),
    ]
    weights = entry['Weights']
    files = {
        f'weights, {about["Precision"]}': weights,
        'card': f'{weights.removesuffix(".pth")}.md',
        'log': about.get('Training Log'),
        'config': entry['Config'],
    }
    links = [f'[{name}](../{file})' for name, file in files.items() if file]
    cells = [
        f'`{entry["Name"]}`',
        ', '.join(dict.fromkeys(result['Task'] for result in results)) or '–',
        f'{about["Training Data"]} ({about.get("Licence of the Data", "licence not stated")})',
        '<br>'.join(figures) or '–',
        f'{about["Parameters"] / 1e6:.1f}',
        '<br>'.join(filter(None, training)),
        '<br>'.join([*links, f'SHA-256 `{about["SHA256"][:16]}…`']),
    ]
    return f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in cells)} |'


def table(entries: list[dict]) -> str:
    """The table in Markdown, or what stands in its place."""
    return '\n'.join([*HEAD, *map(row, entries)]) if entries else NONE


def fill_in(page: str, entries: list[dict]) -> str:
    """A page with the table between its marks.

    Args:
        page: The page, in Markdown.
        entries: Models of the index.

    Returns:
        The page.

    Raises:
        ValueError: If a mark is missing or is there twice.
    """
    if page.count(START) != 1 or page.count(END) != 1:
        raise ValueError(f'the page must have {START} and {END} once each')
    before, _, rest = page.partition(START)
    return f'{before}{START}\n\n{table(entries)}\n\n{END}{rest.partition(END)[2]}'


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    entries = yaml.safe_load(INDEX.read_text(encoding='utf-8'))['Models']
    try:
        page = fill_in(PAGE.read_text(encoding='utf-8'), entries)
    except ValueError as error:
        sys.exit(f'{PAGE}: {error}')
    PAGE.write_text(page, encoding='utf-8')
    print(f'{PAGE}: {len(entries)} model{"s" * (len(entries) != 1)}')


if __name__ == '__main__':
    main()
