"""A config as others may see it: without paths, users and names of the machine that trained."""

from __future__ import annotations

import ast
import getpass
import re
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import MMLaViTError

#: Settings of one training on one machine, which no reader has a use for.
OF_ONE_RUN = ('work_dir', 'load_from', 'resume')
#: Names of accounts and machines that tell nothing.
COMMON_NAMES = frozenset(
    ('root', 'user', 'users', 'admin', 'ubuntu', 'debian', 'docker', 'runner')
    + ('data', 'home', 'host', 'localhost', 'node', 'server', 'work')
)
# Settings whose texts are no paths, whatever they look like ('/m/011k07' is a class of OpenImages).
_LABELS = {'classes', 'CLASSES', 'palette', 'PALETTE'}
# Settings whose folders tell nothing: what they name is not there for others.
_WEIGHTS = {'checkpoint', 'pretrained'}
# Where results go; None is what each of them is by default.
_OUTPUTS = {'out_dir', 'save_dir', 'work_dir', 'outfile_prefix'}
_ABSOLUTE = re.compile(r'/[^/\s]|~\w*[/\\]|[A-Za-z]:[\\/]|\\\\[\w.$-]+\\')
# Within another text: two folders at least, a drive of Windows, or a URL of a local file.
_INSIDE = re.compile(
    r"""(?<![\w.~/])(?:~|[A-Za-z]:)?/[^\s/'",;:]+/[^\s'",;:]*"""
    r"""|(?<!\w)[A-Za-z]:\\[^\s'",;:]+|\w+:/{3,}[^\s'",;]+"""
)
_URL = re.compile(r'(\w[\w+.-]*)://')
_PUBLIC_URLS = {'http', 'https', 'torchvision', 'open-mmlab', 'openmmlab', 'mmcls', 'modelzoo'}
_ADDRESS = re.compile(r'\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<=\bhttp://)[\w-]+(?![\w.-])')
_SECRET = re.compile(r'(?:.*_)?(?:api_?key|access_?key|auth_token|password|secret)', re.IGNORECASE)
# At the start of a path; 'work/home/x' is a folder of somebody's.
_HOME = re.compile(r'(?<![\w.~/-])(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)([^/\\\s\'"]+)')


class PrivacyError(MMLaViTError, ValueError):
    """Something private would be published; the text is one line that says what and where."""


class Change(NamedTuple):
    """What a setting of a config was and what it is now; None where it was left out."""

    setting: str
    before: str
    after: str | None


@dataclass(frozen=True)
class Privacy:
    """What may not be published.

    Args:
        names: Users and machines.
        drop: Top-level settings of a config to leave out, beside :data:`OF_ONE_RUN`.
        public: Names and addresses that may be known, though they look private.
    """

    names: frozenset[str] = frozenset()
    drop: tuple[str, ...] = ()
    public: frozenset[str] = frozenset()

    @classmethod
    def of_this_machine(cls, drop: Collection[str] = (), public: Collection[str] = ()) -> Privacy:
        """With this machine's user and name.

        Args:
            drop: Further settings to leave out.
            public: Names that may be known although they are this user's or machine's.

        Returns:
            What to keep private.
        """
        names = {socket.gethostname(), socket.gethostname().partition('.')[0], Path.home().name}
        # A container's user may have no name.
        with suppress(KeyError, OSError):
            names.add(getpass.getuser())
        return cls(frozenset(names), tuple(drop), frozenset(public))

    def check(self, text: str, where: str) -> None:
        """Refuse a text that is not to be published.

        Args:
            text: The text.
            where: What it is, for the message.

        Raises:
            PrivacyError: If it has one of the names, as a word, or an absolute path.
        """
        if name := self._name_in(text):
            raise PrivacyError(
                f'{where} has {name!r}, which is a user or a machine: {text!r}; write it without, '
                f'or let it be known with --public {name}'
            )
        if _ABSOLUTE.match(text) or _INSIDE.search(text):
            raise PrivacyError(
                f'{where} has a path of this machine: {text!r}; write it as it is seen from the '
                'top of the repository'
            )

    def clean_config(self, text: str) -> tuple[str, list[Change]]:
        """Make a config fit to be published.

        Paths below an absolute ``data_root`` become ``data/NAME/...``; of checkpoints and of other
        absolute paths the last part is left, of folders for results nothing. Of URLs only user and
        password are taken out. The config is read, never run.

        Args:
            text: The config as MMEngine writes it (``Config.pretty_text``).

        Returns:
            The config, and what is different.

        Raises:
            PrivacyError: If it cannot be read, or one of the names, an address of a machine or a
                secret is left in it.
        """
        try:
            statements = ast.parse(text).body
        except (SyntaxError, ValueError) as error:
            raise PrivacyError(f'the config in the checkpoint cannot be read: {error}') from error
        source = _Source(text)
        roots = {
            text: f'data/{_last(text)}'
            for statement in statements
            for setting, text, _ in _texts(statement)
            if setting == 'data_root' and _ABSOLUTE.match(text)
        }
        private = replace(self, names=self.names | set(_HOME.findall(text)))
        changes = []
        for statement in statements:
            target = _target(statement)
            if target in (*OF_ONE_RUN, *self.drop):
                before = source.drop(statement)
                if target in self.drop or not before.endswith(('= None', '= False')):
                    changes.append(Change(target, before, None))
                continue
            for setting, before, node in _texts(statement):
                if setting in _OUTPUTS and _ABSOLUTE.match(before):
                    source.replace(node, 'None')
                    changes.append(Change(setting, before, None))
                    continue
                after = _relative(before, setting, roots)
                if before and _SECRET.fullmatch(setting):
                    raise PrivacyError(
                        f'the config has a text under {setting!r}, which looks like a secret; '
                        f'leave the setting out with --drop {target}'
                    )
                if name := private._name_in(after):
                    raise PrivacyError(
                        f'the config has {setting}={after!r}, and {name!r} is a user or a machine; '
                        f'leave the setting out with --drop {target}, or let the name be known '
                        f'with --public {name}'
                    )
                if after != before:
                    source.replace(node, repr(after))
                    changes.append(Change(setting, before, after))
        return source.text(), changes

    def clean_text(self, text: str, where: str) -> str:
        """Make a text that may be a path fit to be published.

        Args:
            text: The text.
            where: What it is, for the message.

        Returns:
            The text; of an absolute path, its last part.

        Raises:
            PrivacyError: If one of the names is left in it.
        """
        text = _relative(text, '', {})
        self.check(text, where)
        return text

    def _name_in(self, text: str) -> str | None:
        """A user, a machine or an address of one in a text."""
        allowed = COMMON_NAMES | {name.lower() for name in self.public}
        # Names of two letters are found everywhere.
        names = sorted(n for n in self.names if len(n) > 2 and n.lower() not in allowed)
        for name in names:
            # What is beside a name, such as an underscore, ends it, but for letters and digits.
            if re.search(rf'(?<![^\W_]){re.escape(name)}(?![^\W_])', text, re.IGNORECASE):
                return name
        addresses = (found[0] for found in _ADDRESS.finditer(text.replace('https://', 'http://')))
        return next((a for a in addresses if a.lower() not in allowed), None)


def _target(statement: ast.stmt) -> str:
    """What a statement sets."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return next((target.id for target in targets if isinstance(target, ast.Name)), '')


def _texts(statement: ast.stmt) -> Iterator[tuple[str, str, ast.expr]]:
    """Every text in a statement but labels: the setting that it belongs to, it, and its place."""

    def walk(node: ast.AST, setting: str) -> Iterator[tuple[str, str, ast.expr]]:
        if setting in _LABELS:
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield setting, node.value, node
        elif isinstance(node, ast.keyword):
            yield from walk(node.value, node.arg or setting)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None:
                    yield from walk(key, 'key')
                name = key.value if isinstance(key, ast.Constant) else None
                yield from walk(value, name if isinstance(name, str) else setting)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, setting)

    yield from walk(statement, _target(statement))


def _relative(text: str, setting: str, roots: dict[str, str]) -> str:
    """A setting without what only this machine knows."""
    if url := _URL.match(text):
        if url[1] in _PUBLIC_URLS:
            return re.sub(r'//[^/@]*@', '//', text, count=1)
        return _last(text)
    for root in sorted(roots, key=len, reverse=True):
        bare = root.rstrip('/\\')
        if text.startswith(bare) and text[len(bare) : len(bare) + 1] in ('', '/', '\\'):
            return roots[root] + text[len(bare) :].replace('\\', '/')
    if _ABSOLUTE.match(text) or (setting in _WEIGHTS and '/' in text):
        return _last(text) + ('/' if text[-1] in '/\\' else '')
    return _INSIDE.sub(lambda path: _last(path[0]), text)


def _last(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r'[/\\]+', path.rstrip('/\\'))[-1]


class _Source:
    """The text of a program, with parts replaced and all else as it was."""

    def __init__(self, text: str) -> None:
        # Places in a syntax tree are lines and bytes.
        self._source = text.encode()
        self._starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._edits: list[tuple[int, int, bytes]] = []

    def replace(self, node: ast.expr, new: str) -> None:
        start, end = self._span(node)
        self._edits.append((start, end, new.encode()))

    def drop(self, node: ast.stmt) -> str:
        """Take a statement out, with the lines that it stands on; the statement."""
        start, end = self._span(node)
        self._edits.append((start, self._starts[node.end_lineno or node.lineno], b''))
        return self._source[start:end].decode()

    def text(self) -> str:
        result = self._source
        for start, end, new in sorted(self._edits, reverse=True):
            result = result[:start] + new + result[end:]
        return result.decode()

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        last, column = node.end_lineno or node.lineno, node.end_col_offset or 0
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[last - 1] + column
