"""Writes the tables of docs/model_zoo.md: the weights that checkpoints/metafile.yml lists."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'model_zoo.md'
INDEX = ROOT / 'checkpoints' / 'metafile.yml'
START, END = '<!-- models -->', '<!-- end of models -->'

NONE = 'There are no weights yet.'


def section(entry: dict) -> str:
    """What the page says of one model, from its entry in the index."""
    about = entry['Metadata']
    results = entry.get('Results', [])
    figures = [f'{name} {value}' for r in results for name, value in r['Metrics'].items()]
    training = [
        f'{about["Epochs"]} epochs' if about.get('Epochs') else '',
        f'{about["Iterations"]} iterations' if about.get('Iterations') else '',
        f'seed {about["Seed"]}' if 'Seed' in about else '',
        about.get('Training Time', ''),
        about.get('Training Resources', ''),
    ]
    weights = entry['Weights']
    files = {
        f'weights in {about["Precision"]}': weights,
        'card': f'{weights.removesuffix(".pth")}.md',
        "training's log": about.get('Training Log'),
        'config': entry['Config'],
    }
    rows = {
        'task': ', '.join(dict.fromkeys(result['Task'] for result in results)),
        'trained on': about['Training Data'],
        'licence of the data': about.get('Licence of the Data', 'not stated'),
        'on its test set': ', '.join(figures),
        'parameters': f'{about["Parameters"] / 1e6:.1f} M',
        'training': ', '.join(filter(None, training)),
        'command': f'`{about["Training Command"]}`' if 'Training Command' in about else '',
        'files': ', '.join(f'[{name}](../{file})' for name, file in files.items() if file),
        'SHA-256': f'`{about["SHA256"]}`',
    }
    lines = [f'## `{entry["Name"]}`', '', '| | |', '|---|---|']
    for name, text in rows.items():
        if text:
            lines.append(f'| {name} | {text.replace("|", chr(92) + "|")} |')
    return '\n'.join(lines)


def fill_in(page: str, entries: list[dict]) -> str:
    """A page with the models between its marks.

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
    text = '\n\n'.join(map(section, entries)) or NONE
    return f'{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}'


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
