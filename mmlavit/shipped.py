"""The configs and tools that come with the package: of the clone, or of the wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """A folder that comes with the package.

    Args:
        name: ``'configs'`` or ``'tools'``; ``'checkpoints'`` is in no wheel.

    Returns:
        The wheel's or, where the repository itself is installed (``pip install -e``), its own.
    """
    installed = _PACKAGE / '.mim'
    return (installed if installed.is_dir() else _PACKAGE.parent) / name


def configs() -> dict[str, Path]:
    """The configs that come with the package, by name: ``'lavit_t_imagenet'``, for one."""
    return {path.stem: path for path in sorted(folder('configs').glob('*.py'))}


def config_path(config: str) -> Path:
    """The file that is meant by a config on a command line.

    Args:
        config: A file; or the name of a config that comes with the package, with or without
            ``mmlavit::`` before it and ``.py`` after it. A file of that name is taken first.

    Returns:
        The path; where there is neither, that of the missing file.
    """
    path = Path(config)
    if path.is_file():
        return path
    return configs().get(config.removeprefix('mmlavit::').removesuffix('.py'), path)


def weights_of(config: Path) -> str | None:
    """The weights that the model zoo has for a config that comes with the package.

    Args:
        config: Its path.

    Returns:
        A file; None where there are no weights, as in a wheel, which comes without them.
    """
    from mmengine.fileio import load

    index = folder('checkpoints') / 'metafile.yml'
    if config.resolve().parent != folder('configs').resolve() or not index.is_file():
        return None
    for model in load(index)['Models']:
        if Path(model['Config']).name == config.name:
            return str(index.parents[1] / model['Weights'])
    return None
