"""How Sphinx makes the site: `make docs`, or `sphinx-build -W --keep-going docs docs/_build/html`.

Pages are the Markdown files of this folder, some from elsewhere in the repository (`BORROWED`; the
start page is README.md), and the reference from docstrings: first the names that `mmlavit` exports,
then a page for each public module, by packages. Links in Markdown
are written as GitHub wants them, relative to the file. Here those to borrowed files are led to
their pages, and those to modules to the modules' pages: `../mmlavit/models/windows.py` to the
whole, `../mmlavit/models/windows.py#WindowGrid` to one class or function.
"""

import ast
import importlib.util
import inspect
import os
import posixpath
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

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
    'sphinx_copybutton',
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

# The packages, in the order in which a reader needs them.
ROOMS = ['models', 'engine', 'datasets', 'evaluation', 'inference', 'export', 'analysis', 'ops']

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


def public_names() -> dict[str, tuple[str, str]]:
    """Name -> module and first sentence of whatever `mmlavit` exports, constants last."""
    import mmlavit

    found = {}
    for name in mmlavit.__all__:
        thing = getattr(mmlavit, name)
        if not name.isupper():
            found[name] = thing.__module__, inspect.getdoc(thing)
    # A constant does not know where it is from; its comment is there.
    for module in public_modules():
        for (_, name), lines in ModuleAnalyzer.for_module(module).find_attr_docs().items():
            if name in mmlavit.__all__:
                found[name] = module, '\n'.join(lines)
    found = {name: (module, first_paragraph(doc)) for name, (module, doc) in found.items()}
    return {name: found[name] for name in sorted(mmlavit.__all__, key=str.isupper)}


def first_paragraph(doc: str | None) -> str:
    """Of a docstring, on one line."""
    return ' '.join((doc or '').partition('\n\n')[0].split())


def summary(file: Path) -> str:
    """What a module is, by its docstring."""
    return first_paragraph(ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))))


def title(text: str, line: str = '=') -> list[str]:
    """A heading in reStructuredText."""
    text = text.replace('_', r'\_')
    return [text, line * len(text), '']


def place(room: str) -> int:
    """Where a package stands in the reference; one that is not named, after the others."""
    name = room.rpartition('.')[2]
    return ROOMS.index(name) if name in ROOMS else len(ROOMS)


def contents(pages: list[str]) -> list[str]:
    """What a page has below it in the site's sidebar."""
    return ['.. toctree::', '   :hidden:', '', *(f'   {page}' for page in pages), '']


def write_api_pages(app: Sphinx) -> None:
    """Write the pages of the reference, and drop those of modules that are gone."""
    modules = public_modules()
    inside: dict[str, list[str]] = {name: [] for name in modules}
    for name in modules:
        if name != PACKAGE:
            inside[name.rpartition('.')[0]].append(name)

    lines = [*title('Public names and modules'), *title('Public names', '-')]
    for name, (module, doc) in public_names().items():
        lines += [f':py:obj:`~{module}.{name}`', f'   {doc}', '']
    # Single modules last.
    rooms = sorted(inside[PACKAGE], key=lambda name: (not inside[name], place(name), name))
    lines += title('Modules', '-')
    for room in [PACKAGE, *rooms]:
        lines += [f':py:mod:`{room}`', f'   {summary(modules[room])}', '']
    pages = {'index.rst': '\n'.join([*lines, *contents([PACKAGE, *rooms])])}

    for name in modules:
        lines = [*title(name), f'.. automodule:: {name}', '']
        if inside[name] and name != PACKAGE:
            for module in inside[name]:
                lines += [f':py:mod:`{module}`', f'   {summary(modules[module])}', '']
            lines += contents(inside[name])
        pages[f'{name}.rst'] = '\n'.join(lines)
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
        if path.endswith('.md') and path not in borrowed and not path.startswith('docs/'):
            # Only pages of the site are linked as such; a model card is not one.
            return f'{{download}}`{label} <{posixpath.relpath(path, here)}>`'
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
