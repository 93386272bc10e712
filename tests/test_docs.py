"""The documentation: its links on GitHub and on the site, its site, its figures and its tables."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.testing.compare import compare_images
from torch.utils.flop_counter import FlopCounterMode

import mmlavit
from mmlavit import LaViT
from mmlavit.models.windows import WindowGrid
from mmlavit.shipped import configs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
EXTERNAL = re.compile(r'[a-z][a-z0-9+.-]*:|//', re.IGNORECASE)


def load(path: Path) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for what their annotations mean
    spec.loader.exec_module(module)
    return module


# ---- Markdown, as GitHub shows it ----------------------------------------------------------------


def documents(root: Path) -> list[Path]:
    """Every Markdown file that is documentation."""
    top = [root / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
    files = [*top, root / 'configs' / 'README.md', *(root / 'docs').rglob('*.md')]
    files += (root / 'checkpoints').glob('*.md')
    return sorted(file for file in files if file.exists() and '_build' not in file.parts)


def tokens(text: str) -> Iterator[Token]:
    """All tokens of a Markdown text, those inside lines too."""
    for token in MarkdownIt('commonmark').enable('table').parse(text):
        yield token
        yield from token.children or []


def anchors(file: Path) -> set[str]:
    """What may follow the # of a link to a file: GitHub's names of headings, names in Python."""
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.py':
        return set(names_in(ast.parse(text).body))
    found: list[str] = []
    parsed = list(MarkdownIt('commonmark').parse(text))
    for before, token in zip(parsed, parsed[1:], strict=False):
        if before.type == 'heading_open':
            shown = ''.join(child.content for child in token.children)
            name = re.sub(r'[^\w\- ]', '', shown.lower()).replace(' ', '-')
            count = sum(
                re.fullmatch(re.escape(name) + r'(-\d+)?', other) is not None for other in found
            )
            found.append(f'{name}-{count}' if count else name)
    return set(found)


def names_in(body: list[ast.stmt], prefix: str = '') -> Iterator[str]:
    """Classes, functions and constants of a module, and the methods of its classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from names_in(node.body, f'{prefix}{node.name}.')
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id
        if isinstance(node, ast.Assign):
            yield from (prefix + t.id for t in node.targets if isinstance(t, ast.Name))


def broken_links(root: Path, kept: set[Path] | None = None) -> list[str]:
    """Links, pictures and named files of the Markdown below a folder that lead nowhere.

    Args:
        root: The repository.
        kept: The files that git keeps, as others do not reach GitHub; None for all that are there.
    """
    wrong = []

    def is_there(target: Path) -> bool:
        if kept is None:
            return target.exists()
        return any(target in (file, *file.parents) for file in kept)

    for file in documents(root):
        text = file.read_text(encoding='utf-8')
        for token in tokens(text):
            link = token.attrGet('href') or token.attrGet('src')
            links = [link] if link else []
            if token.type in ('html_inline', 'html_block'):
                links += re.findall(r'(?:href|src)="([^"]*)"', token.content)
            for link in links:
                if EXTERNAL.match(link):
                    continue
                path, anchor = urldefrag(unquote(link))
                target = (file.parent / path).resolve() if path else file
                if not is_there(target) or (anchor and anchor not in anchors(target)):
                    wrong.append(f'{file.relative_to(root)}: {link}')
        for name in re.findall(r'\b(?:configs|docs|mmlavit|tests|tools)/[\w./-]*\.\w+', text):
            if not is_there((root / name).resolve()) and not is_there(
                (file.parent / name).resolve()
            ):
                wrong.append(f'{file.relative_to(root)}: {name}')
    return wrong


def kept_by_git() -> set[Path]:
    """The files that git has or would take."""
    ran = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        pytest.skip('not a git repository')
    return {ROOT / name for name in ran.stdout.split('\0') if name}


def test_links_lead_somewhere_on_github() -> None:
    assert len(documents(ROOT)) >= 9
    assert broken_links(ROOT, kept_by_git()) == []


@pytest.mark.parametrize(
    ('text', 'wrong'),
    [
        ('# A b, c!\n[x](#a-b-c) [y](b.py#C.d) ![z](z.png) [w](https://nowhere) `docs/b.py`', []),
        ('[x](gone.md)', ['gone.md']),
        ('![x](gone.png)', ['gone.png']),
        ('# A\n[x](#b)', ['#b']),
        ('# A\n# A\n[x](#a-1) [x](#a-2)', ['#a-2']),
        ('[x](b.py#C.e)', ['b.py#C.e']),
        ('<img src="gone.png">', ['gone.png']),
        ('run `docs/gone.py`', ['docs/gone.py']),
    ],
)
def test_broken_links_are_found(tmp_path: Path, text: str, wrong: list[str]) -> None:
    docs = tmp_path / 'docs'
    docs.mkdir()
    (docs / 'a.md').write_text(text)
    (docs / 'b.py').write_text('class C:\n    def d(self): ...\n')
    (docs / 'z.png').touch()
    assert broken_links(tmp_path) == [f'docs/a.md: {link}' for link in wrong]


# ---- The site ------------------------------------------------------------------------------------

SPHINX = '-m sphinx -W --keep-going -q'


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made as `make docs` makes it, where no warning is let pass."""
    if torch.__version__ < '2.6':
        pytest.skip('the site is made on the maintained distributions')
    assert SPHINX in (ROOT / 'Makefile').read_text()
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, *SPHINX.split(), '-d', out / 'doctrees', DOCS, out / 'html']
    # Not through this process: it has imported what a fresh one has not.
    ran = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert ran.returncode == 0, ran.stderr
    return out / 'html'


class Page(HTMLParser):
    """What an HTML page refers to, and the places in it that others may refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == 'id':
                self.ids.add(value)
            # A reader may follow a link to elsewhere; the page itself may need nothing from there.
            elif name in ('href', 'src') and not (tag == 'a' and EXTERNAL.match(value)):
                self.links.append(value)


def broken_references(site: Path, pages: dict[Path, Page]) -> list[str]:
    """What pages refer to and the site does not have: pages, places in them, pictures, styles."""
    wrong = []
    for file, page in pages.items():
        for link in page.links:
            path, anchor = urldefrag(unquote(link))
            target = (file.parent / path.partition('?')[0]).resolve() if path else file
            found = not EXTERNAL.match(link) and target.exists()
            # "#" alone is the top of the page.
            if not found or (anchor and anchor not in pages[target].ids):
                wrong.append(f'{file.relative_to(site)}: {link}')
    return wrong


@pytest.mark.slow
def test_everything_the_site_refers_to_is_in_it(site: Path) -> None:
    """Scripts, styles and pictures too, so it needs no network."""
    pages = {file: Page(file.read_text(encoding='utf-8')) for file in site.rglob('*.html')}
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert broken_references(site, pages) == []
    name = 'mmlavit.models.windows.WindowGrid.nest'
    pages[site / 'api' / 'mmlavit.models.windows.html'].ids.remove(name)
    pages[site / 'index.html'].links += ['gone.html', 'https://cdn.example/script.js']
    found = broken_references(site, pages)
    assert f'architecture.html: api/mmlavit.models.windows.html#{name}' in found
    assert {'index.html: gone.html', 'index.html: https://cdn.example/script.js'} <= set(found)


@pytest.mark.slow
def test_pages_of_the_site(site: Path) -> None:
    """One for each Markdown file of docs/ and each public module, and what is private in none."""
    modules = []
    for file in (ROOT / 'mmlavit').rglob('*.py'):
        parts = file.relative_to(ROOT).with_suffix('').parts
        modules.append('.'.join(parts[: -1 if parts[-1] == '__init__' else None]))
    public = {name for name in modules if '._' not in name}
    assert {page.stem for page in (site / 'api').glob('mmlavit*.html')} == public
    for name in public - {'mmlavit'}:
        # On the page of its package; those of packages on the first.
        above = name.rpartition('.')[0].replace('mmlavit', 'index', name.count('.') == 1)
        page = site / 'api' / f'{above}.html'
        assert f'href="{name}.html#module-{name}"' in page.read_text(encoding='utf-8')
    for file in documents(ROOT):
        if DOCS in file.parents:
            assert (site / file.relative_to(DOCS).with_suffix('.html')).exists()
    for file in (site / 'api').glob('*.html'):
        ids = Page(file.read_text(encoding='utf-8')).ids
        assert not [name for name in ids if re.search(r'^mmlavit.*\._', name)]


@pytest.mark.slow
def test_the_reference_begins_with_what_is_public(site: Path) -> None:
    text = (site / 'api' / 'index.html').read_text(encoding='utf-8')
    places = [text.find(f'.{name}"') for name in mmlavit.__all__]
    assert min(places) > 0
    assert max(places) < text.index('href="mmlavit.models.html#module-mmlavit.models"')
    assert min(places) == places[mmlavit.__all__.index('LaViT')]


class Sidebar(HTMLParser):
    """The links of a page's sidebar, with the level of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.level, self.links = 0, []
        start = text.index('class="sidebar-tree"')
        self.feed(text[start : text.index('class="main"', start)])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.level += tag == 'ul'
        if tag == 'a' and self.level and (link := dict(attrs).get('href')):
            self.links.append((self.level, link))

    def handle_endtag(self, tag: str) -> None:
        self.level -= tag == 'ul'


@pytest.mark.slow
def test_the_sidebar_begins_where_a_user_begins(site: Path) -> None:
    """Every page is in it, modules below their packages, and the top is short."""
    links = Sidebar((site / 'index.html').read_text(encoding='utf-8')).links
    top = [link for level, link in links if level == 1]
    assert len(top) < 25
    order = ['get_started', 'own_data', 'command_line', 'model_zoo', 'api/index', 'architecture']
    places = [top.index(f'{name}.html') for name in (*order, 'upstream', 'changelog')]
    assert places == sorted(places) and places[0] == 0
    pages = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    pages -= {'index.html', 'genindex.html', 'py-modindex.html', 'search.html'}
    pages = {page for page in pages if not page.startswith('_')}
    assert pages == {link for _, link in links}


@pytest.mark.slow
def test_code_can_be_copied(site: Path) -> None:
    page = Page((site / 'get_started.html').read_text(encoding='utf-8'))
    assert any('copybutton' in link for link in page.links)


def test_the_first_lines_of_python_do_what_the_page_says() -> None:
    text = (DOCS / 'get_started.md').read_text(encoding='utf-8')
    code, shown = re.search(
        r'^```python\n(import torch.*?)^```\n\nprints `(.*?)`', text, flags=re.MULTILINE | re.DOTALL
    ).groups()
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ran.stdout.strip() == shown, ran.stderr


@pytest.mark.parametrize('stem', [True, False])
def test_weights_are_widened_as_the_page_says(tmp_path: Path, stem: bool) -> None:
    """They load into a model of four channels, which sees in a grey image what it saw before."""
    text = (DOCS / 'faq.md').read_text(encoding='utf-8')
    (code,) = re.findall(r'^```python\n(.*?)^```', text, flags=re.MULTILINE | re.DOTALL)
    model = LaViT('nano', conv_stem=stem).eval()
    weights = {f'backbone.{name}': value for name, value in model.state_dict().items()}
    torch.save({'state_dict': weights, 'meta': {}}, tmp_path / 'rgb.pth')
    ran = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    start = dict(checkpoint=str(tmp_path / 'rgbx.pth'))
    wide = LaViT('nano', in_channels=4, conv_stem=stem, init_cfg=start)
    wide.init_weights()
    grey = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    image = grey.expand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        after = wide.eval()(torch.cat([image, torch.zeros_like(grey)], dim=1))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('page', ['../README', 'get_started', 'training', 'attention', 'faq'])
def test_configs_and_commands_that_pages_name_are_there(page: str) -> None:
    text = (DOCS / f'{page}.md').read_text(encoding='utf-8')
    commands = set(re.findall(r'mmlavit (\w+) (?=CONFIG|NAME|\w+_lavit)', text))
    assert commands and commands <= set(re.findall(r'^ {2,4}(\w+)', command_help(), re.MULTILINE))
    names = set(re.findall(r'\b\w+_lavit_\w+?(?=[\s`/.])', text))
    assert names and names <= set(configs())


def command_help() -> str:
    ran = subprocess.run(
        [sys.executable, '-m', 'mmlavit', '--help'], capture_output=True, text=True
    )
    return ran.stdout


@pytest.mark.slow
def test_files_from_elsewhere_are_pages(site: Path) -> None:
    start = (site / 'index.html').read_text(encoding='utf-8')
    assert '<h1>mmlavit<' in start and 'href="configs.html"' in start
    for name in ('Configs', 'Contributing', 'Changelog'):
        page = (site / f'{name.lower()}.html').read_text(encoding='utf-8')
        assert f'<h1>{name}<' in page
    architecture = (site / 'architecture.html').read_text(encoding='utf-8')
    for name in ('attention.LessAttention', 'windows.WindowGrid.nest', 'arch.ARCHS'):
        page = '.'.join(['mmlavit.models', name.split('.')[0], 'html'])
        assert f'href="api/{page}#mmlavit.models.{name}"' in architecture


# ---- docs/architecture.md ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def figures() -> ModuleType:
    return load(ROOT / 'tools' / 'architecture_figures.py')


@pytest.fixture(scope='module')
def costs() -> ModuleType:
    return load(ROOT / 'tools' / 'attention_cost.py')


def test_figures_are_what_the_script_draws(figures: ModuleType, tmp_path: Path) -> None:
    figures.draw_stage(tmp_path / 'architecture_stage.png')
    figures.draw_nesting(tmp_path / 'architecture_nesting.png')
    for drawn in tmp_path.glob('*.png'):
        # Fonts are rendered a little differently by other versions of matplotlib.
        assert compare_images(str(DOCS / drawn.name), str(drawn), tol=5) is None
        assert (DOCS / drawn.name).stat().st_size < 300_000


@pytest.mark.parametrize('window', [2, 4, 6])
def test_nesting_is_drawn_as_the_tokens_lie(figures: ModuleType, window: int) -> None:
    """By coordinates: a pair is there where one previous window holds tokens of both."""
    prev, w = figures.PREV, figures.PREV.window
    height, width = -(-prev.height // 2), -(-prev.width // 2)
    grid = WindowGrid(height, width, window)
    drawn = figures.nested_windows(prev, grid)
    assert drawn.shape == (grid.rows * grid.cols, window**2, window**2)
    for index, pairs in enumerate(drawn):
        top, left = index // grid.cols * window, index % grid.cols * window
        where = [(top + p // window, left + p % window) for p in range(window**2)]
        for i, (y, x) in enumerate(where):
            for j, (v, u) in enumerate(where):
                if max(y, v) >= height or max(x, u) >= width:
                    expected = figures.PADDED
                elif (2 * y // w, 2 * x // w) != (2 * v // w, 2 * u // w):
                    expected = figures.NOTHING
                else:
                    expected = 2 * y // w * prev.cols + 2 * x // w
                assert pairs[i, j] == expected
    # Sorted by previous window, what was brought down lies on diagonal blocks.
    r = 2 * window // w
    ordered = figures.by_previous_window(drawn[0], r)
    block = np.arange(window**2) // (w // 2) ** 2
    assert not (ordered >= 0)[block[:, None] != block].any()


def test_tables_are_what_the_script_prints(costs: ModuleType) -> None:
    lines = (DOCS / 'architecture.md').read_text(encoding='utf-8').splitlines()
    for table in (costs.window_table(), costs.whole_table()):
        at = lines.index(table[0])
        assert lines[at : at + len(table)] == table
        assert not lines[at + len(table)]


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
@pytest.mark.parametrize('window', [4, 8, 14])
def test_costs_are_those_of_the_layers(costs: ModuleType, arch: str, window: int) -> None:
    """As PyTorch counts the matrix products of real layers in training."""
    images = [(224, 224), (60, 100)] + [(800, 1280)] * (window == 8)
    with torch.device('meta'):
        model = LaViT(arch, window_sizes=(window,) * 4)
    for image in images:
        for stage, module in enumerate(model.stages):
            vanilla, less = module.blocks[0], module.blocks[-1]
            grid = WindowGrid(*(-(-side // (4 << stage)) for side in image), window)
            x = torch.empty(1, grid.height, grid.width, vanilla.norm1.normalized_shape[0])
            n, heads = window**2, vanilla.attn.num_heads
            scores = torch.empty(grid.rows * grid.cols, heads, n, n, device='meta')
            cost = costs.Cost.of(arch, stage, image, window)
            for block, given, own in (
                (vanilla, None, cost.vanilla_scores),
                (less, scores, cost.less_scores),
            ):
                with FlopCounterMode(display=False) as counter:
                    block.attn(x.to('meta'), grid, given)
                assert counter.get_total_flops() == 2 * (own + cost.values)
            if cost.real == cost.tokens:  # the formula is of whole windows
                cheaper = cost.less_scores < cost.vanilla_scores
                assert costs.less_is_cheaper(cost.dims, heads, n) == cheaper


def test_what_the_text_says_of_the_costs(costs: ModuleType) -> None:
    text = (DOCS / 'architecture.md').read_text(encoding='utf-8')
    first, second = (costs.Cost(*of) for of in ((3136, 3136, 3136, 64, 1), (784, 784, 784, 128, 2)))
    times = [round(cost.less_scores / cost.vanilla_scores) for cost in (first, second)]
    assert f'costs {times[0]} times what' in text and f'and {times[1]} times in stage 2' in text
    tiny = costs.Cost.of('tiny', 0, (224, 224), 8)
    dearer = tiny.less_scores / tiny.vanilla_scores - 1
    assert f'*dearer* one by {dearer:.0%}'.replace('%', ' %') in text
    assert [
        costs.less_is_cheaper(d, h, 14**2) for d, h in ((64, 1), (128, 2), (320, 5), (640, 10))
    ] == [*(False, False, False, True)]


def test_the_site_is_not_committed() -> None:
    ignored = ['docs/_build/html/index.html', 'docs/api/index.rst']
    if not (ROOT / '.git').exists():
        pytest.skip('not a git repository')
    ran = subprocess.run(
        ['git', 'check-ignore', *ignored], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stdout.split() == ignored
