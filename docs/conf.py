"""How Sphinx makes the site: `make docs`, or `sphinx-build -W --keep-going docs docs/_build/html`.

Pages are the Markdown files of this folder, some from elsewhere in the repository (`BORROWED`; the
start page is README.md), and one page of the docstrings of each public module. Links in Markdown
are written as GitHub wants them, relative to the file. Here those to borrowed files are led to
their pages, and those to modules to the modules' pages: `../mmlavit/models/windows.py` to the
whole, `../mmlavit/models/windows.py#WindowGrid` to one class or function.
"""

import ast
import importlib.util
import os
import posixpath
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
API = DOCS / 'api'
PACKAGE = 'mmlavit'

sys.path.insert(0, str(ROOT))

project = PACKAGE
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = PACKAGE
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sphinx = False
html_copy_source = False
myst_heading_anchors = 4  # with GitHub's names

autodoc_default_options = {
    'members': True,
    # What a package takes from its modules is described there alone.
    'ignore-module-all': True,
    'member-order': 'bysource',
    'no-value': True,
    'show-inheritance': True,
}

autodoc_typehints_format = 'short'
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
# Triton is for some platforms only; elsewhere its module is described without it.
autodoc_mock_imports = [name for name in ['triton'] if importlib.util.find_spec(name) is None]

# Google's `Returns:` may hold a colon in its text, so what is before it is no type to look up.
napoleon_use_rtype = False
# Whatever is named has to be there, but for what others document on sites of their own.
nitpicky = True
nitpick_ignore_regex = [('py:.*', rf'(?!{PACKAGE}\.)\w+(\.\w+)+')]

# The pages whose text is a file elsewhere; the site's own file only adds to it.
BORROWED = {
    'index': 'README.md',
    'configs': 'configs/README.md',
    'contributing': 'CONTRIBUTING.md',
    'changelog': 'CHANGELOG.md',
}


def public_modules() -> dict[str, Path]:
    """Name -> file of every module without an underscore, found without importing any."""
    found = {}
    for file in sorted((ROOT / PACKAGE).rglob('*.py')):
        parts = file.relative_to(ROOT).with_suffix('').parts
        if parts[-1] == '__init__':
            parts = parts[:-1]
        if not any(part.startswith('_') for part in parts):
            found['.'.join(parts)] = file
    return found


def write_api_pages(app: Sphinx) -> None:
    """Write a page for each module, and drop those of modules that are gone."""
    lines = ['API', '===', '', 'Every public module, from its docstrings.', '']
    pages = {}
    for name, file in public_modules().items():
        title = name.replace('_', r'\_')
        pages[f'{name}.rst'] = f'{title}\n{"=" * len(title)}\n\n.. automodule:: {name}\n'
        doc = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
        summary = doc.partition('\n\n')[0].replace('\n', '\n   ')
        lines += [f':py:mod:`{name}`', f'   {summary}', '']
    lines += ['.. toctree::', '   :hidden:', '', *(f'   {name}' for name in public_modules()), '']
    pages['index.rst'] = '\n'.join(lines)
    API.mkdir(exist_ok=True)
    for path in API.glob('*.rst'):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        # Unchanged files keep their time, so that Sphinx reads only what is new.
        if not (API / name).exists() or (API / name).read_text(encoding='utf-8') != text:
            (API / name).write_text(text, encoding='utf-8')


def site_links(text: str, source: str, page: str) -> str:
    """Lead the relative links of a Markdown text to where the site has their targets.

    Args:
        text: The Markdown.
        source: The file that it comes from, as seen from the root of the repository.
        page: The page that it goes to, as seen from this folder.

    Returns:
        The Markdown for that page.
    """
    modules = {file.relative_to(ROOT).as_posix(): name for name, file in public_modules().items()}
    borrowed = {file: f'{name}.md' for name, file in BORROWED.items()}

    def lead(match: re.Match) -> str:
        start, label, target = match['start'], match['label'], match['target']
        path, _, anchor = target.partition('#')
        if not path or re.match(r'[a-z]+:', target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in modules:
            name = f'{modules[path]}.{anchor}' if anchor else modules[path]
            role = 'py:obj' if anchor else 'py:mod'
            return f'{{{role}}}`{label.replace("`", "")} <{name}>`'
        here = posixpath.dirname(posixpath.join('docs', page))
        path = posixpath.relpath(f'docs/{borrowed[path]}' if path in borrowed else path, here)
        return f'{start}[{label}]({path}{"#" * bool(anchor)}{anchor})'

    # Not in blocks of code.
    parts = re.split(r'(^```.*?^```$)', text, flags=re.MULTILINE | re.DOTALL)
    link = re.compile(r'(?P<start>!?)\[(?P<label>[^\[\]]*)\]\((?P<target>[^()\s]+)\)')
    return ''.join(part if i % 2 else link.sub(lead, part) for i, part in enumerate(parts))


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill the borrowed pages, and set links right."""
    path = Path(app.env.doc2path(page))
    if path.suffix != '.md':
        return
    file = path.relative_to(ROOT).as_posix()
    if page in BORROWED:
        own, file = source[0], BORROWED[page]
        app.env.note_dependency(str(ROOT / file))
        source[0] = f'{(ROOT / file).read_text(encoding="utf-8")}\n{own}'
    source[0] = site_links(source[0], file, os.path.relpath(path, DOCS))


def setup(app: Sphinx) -> None:
    """Hook into the build."""
    from mmlavit.compat import repair_torchvision

    repair_torchvision()
    app.connect('builder-inited', write_api_pages)
    app.connect('source-read', read)
