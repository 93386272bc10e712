"""Handing a config to the script of the package that it was written for."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import mmlavit

from ..compat import leave_process_group, let_cpus_take_part, repair_torchvision
from ..errors import MMLaViTError
from ..shipped import config_path
from .checkpoint_file import guard_checkpoints
from .data_checks import check_data

if TYPE_CHECKING:
    from mmengine.config import Config

# The packages whose scripts we hand over to, under the name that configs call their scope, and the
# distributions that provide them, maintained and original.
PACKAGES = {
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'mmrotate': ('onedl-mmrotate', 'mmrotate'),
}
_CONFIG_SUFFIXES = ('.py', '.json', '.yaml', '.yml')


class LaunchError(MMLaViTError):
    """What keeps a script from being found; its text is one line for the user."""


def find_config(argv: list[str]) -> Path | None:
    """The config among command-line arguments.

    Args:
        argv: Arguments of ``train.py`` or ``test.py``, without the script's own name.

    Returns:
        The path of the first that is a file with the name of a config, one of Python before any
        other; else the first that looks like one; or None.
    """
    named = [arg for arg in argv if arg.endswith(_CONFIG_SUFFIXES) and not arg.startswith('-')]
    there = [arg for arg in named if Path(arg).is_file()]
    python = [arg for arg in there if arg.endswith('.py')]
    plain = [arg for arg in named if '=' not in arg]
    return next((Path(arg) for arg in (*python, *there, *plain)), None)


def read_scope(config: Path) -> str:
    """Read the ``default_scope`` of a config.

    Args:
        config: Path of the config.

    Returns:
        ``'mmdet'``, ``'mmseg'``, ``'mmpretrain'`` or ``'mmrotate'``.

    Raises:
        LaunchError: If the file is missing or unreadable, or says no scope that we know.
    """
    from mmengine.config import Config

    if not config.is_file():
        raise LaunchError(f'config file not found: {config}')
    repair_torchvision()
    try:
        cfg = Config.fromfile(config)
        scope = cfg.get('default_scope') or _scope_of_type(cfg)
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        # MMEngine names the distribution, or the package where both have one name.
        if missing := re.match(r'(\S+) is not installed', reason):
            for package, names in PACKAGES.items():
                if missing[1] in (package, *names):
                    require_package(package)
        raise LaunchError(f'cannot read {config}: {reason}') from error
    if scope not in PACKAGES:
        raise LaunchError(
            f'{config} has default_scope = {scope!r}; it must be one of {list(PACKAGES)}: add, for '
            "example, default_scope = 'mmdet'"
        )
    return scope


def _scope_of_type(cfg: Config) -> str | None:
    """The package of the model's type, in a config of pure Python, which names no scope."""
    kind = (cfg.get('model') or {}).get('type')
    return None if isinstance(kind, str) else getattr(kind, '__module__', '').partition('.')[0]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder without ``__init__.py`` is the remains of one."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def require_package(package: str) -> None:
    """Make sure that a toolbox is installed.

    Args:
        package: Import name.

    Raises:
        LaunchError: If it is not.
    """
    if not is_installed(package):
        names = ' or '.join(PACKAGES.get(package, (package,)))
        raise LaunchError(f'this config needs {package}, which is not installed; install {names}')


def find_script(name: str, argv: list[str]) -> Path:
    """The installed package's own script for the config on a command line.

    Without a config (as in ``--help``) the first installed package's script answers. What that
    package does not have (mmpretrain alone draws schedules, say) is looked for in the others.

    Args:
        name: ``'train.py'``, ``'test.py'``, or another script in a toolbox's folder ``tools``: its
            path there, or its name alone, with or without ``.py``.
        argv: Arguments of the script.

    Returns:
        Path of the script.

    Raises:
        LaunchError: If there is none; the text says why.
    """
    config = find_config(argv)
    if config is None:
        given = argv[0] if name in ('train.py', 'test.py') and argv else '-'
        if not given.startswith('-') and not Path(given).exists():
            raise LaunchError(
                f"config file not found: {given}; 'mmlavit configs' lists those that have a name"
            )
        package = next(filter(is_installed, PACKAGES), None)
        if package is None:
            raise LaunchError(
                f'none of {list(PACKAGES)} is installed; README.md, "Installing", has them'
            )
    else:
        package = read_scope(config)
        require_package(package)
    tools = _tools(package)
    if not tools.is_dir() or (name in ('train.py', 'test.py') and not (tools / name).is_file()):
        raise LaunchError(
            f'{package} is installed without its tools ({tools / name} is missing); install it '
            'with pip from its wheel or sdist'
        )
    for folder in [tools, *map(_tools, filter(is_installed, PACKAGES))]:
        if script := _script(folder, name):
            return script
    raise LaunchError(f"no toolbox has a script {name!r}; 'mmlavit tool --help' lists them all")


def scripts() -> dict[str, list[str]]:
    """The scripts of the toolboxes that are installed, as paths in their folders, by toolbox."""
    return {
        package: sorted(path.relative_to(tools).as_posix() for path in tools.glob('**/*.py'))
        for package in PACKAGES
        if is_installed(package) and (tools := _tools(package)).is_dir()
    }


def _script(folder: Path, name: str) -> Path | None:
    """The script of that path in a folder, or the least deep one that is called so."""
    if (folder / name).is_file():
        return folder / name
    called = [path for path in folder.glob('**/*.py') if name in (path.name, path.stem)]
    return min(called, key=lambda path: (len(path.parts), path), default=None)


def _tools(package: str) -> Path:
    """The folder of the scripts of a toolbox that is installed."""
    spec: Any = find_spec(package)
    return Path(spec.origin).parent / '.mim' / 'tools'


def main(name: str, prog: str | None = None) -> None:
    """Run the installed package's ``name`` with this process's arguments, as if called directly.

    A config that comes with this package may be given by its name, as the first argument.

    Args:
        name: ``'train.py'``, ``'test.py'``, or another script, see :func:`find_script`.
        prog: What the script's help and errors call it; None for its own name.
    """
    sys.argv[1:] = with_config_path(sys.argv[1:])
    try:
        script = find_script(name, sys.argv[1:])
    except LaunchError as error:
        _fail(str(error))
    repair_torchvision()
    guard_checkpoints()
    let_cpus_take_part()
    check_data()
    try:
        run_script(script, prog)
    except FileNotFoundError as error:
        path = error.filename or _path_in(str(error))
        if path is None:
            raise
        _fail(
            f'file not found: {path} (looked for in {Path.cwd()}); if it belongs to a data set, '
            'README.md, section "Data", says how to get it and where it goes'
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if (message := _said_by_us(error) or _unknown_type(error)) is None:
            raise
        _fail(message)
    leave_process_group()


def with_config_path(argv: list[str]) -> list[str]:
    """Arguments with the path of a config of ours in the place of its name, if that comes first."""
    return [*(str(config_path(arg)) for arg in argv[:1]), *argv[1:]]


def run_script(script: Path, prog: str | None = None) -> None:
    """Run a script with this process's arguments, as Python does when it is called directly.

    That is what :func:`runpy.run_path` does, but for the name that argparse has for it.

    Args:
        script: The file.
        prog: What its help and errors call it; None for its own name.
    """
    module = ModuleType('__main__')
    module.__file__ = str(script)
    sys.argv[0] = prog or str(script)
    sys.path.insert(0, str(script.parent))
    caller, sys.modules['__main__'] = sys.modules['__main__'], module
    try:
        code = compile(script.read_bytes(), str(script), 'exec', dont_inherit=True)
        exec(code, module.__dict__)
    finally:
        sys.modules['__main__'] = caller
        sys.path.remove(str(script.parent))


def _said_by_us(error: BaseException) -> str | None:
    """The message of an error that mmlavit raised on purpose, also where another repeats it."""
    # MMEngine's original build function raises the same error again, with the class before it.
    inner = error.__cause__ or error.__context__
    while inner is not None and type(inner) is type(error) and str(error).endswith(str(inner)):
        error, inner = inner, inner.__cause__ or inner.__context__
    for frame, line in list(traceback.walk_tb(error.__traceback__))[-1:]:
        module = frame.f_globals.get('__name__', '')
        statement = linecache.getline(frame.f_code.co_filename, line).strip()
        if module.startswith('mmlavit.') and statement.startswith('raise '):
            return str(error)
    unknown = re.fullmatch(
        r'(\w+)\.__init__\(\) (got an unexpected keyword argument \'.+\')',
        str(error).rpartition(': ')[2],
    )
    if unknown and unknown[1] in mmlavit.__all__:
        return f'{unknown[1]} {unknown[2]}; README.md lists its options'
    return None


def _unknown_type(error: Exception) -> str | None:
    """The message for MMEngine's complaint that a registry has no such type."""
    if isinstance(error, KeyError) and (
        found := re.search(r'(\S+) is not in the (\S+) registry', str(error.args[0]))
    ):
        name, registry = found.groups()
        name = name.lstrip('\'"')
        return (
            f"the config names a type {name!r} that is not in MMEngine's {registry} registry; "
            'check its spelling, or list the module that registers it in custom_imports'
        )
    return None


def _path_in(message: str) -> str | None:
    """The path in the message of a FileNotFoundError that MMEngine raised or wrapped.

    A data loader's worker sends a whole traceback, which is left as it is.
    """
    wordings = (
        r".*No such file or directory: '([^'\n]+)'",
        r'file "(.+)" does not exist',
        r'(.+) can not be found\.',
    )
    found = re.fullmatch('|'.join(wordings), message)
    return found and next(filter(None, found.groups()))


def _fail(message: str) -> NoReturn:
    print(f'mmlavit: {message}', file=sys.stderr)
    sys.exit(2)
