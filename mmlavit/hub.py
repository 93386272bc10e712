"""Our configs in the hubs of MMEngine and mmpretrain, which know closed lists of packages.

``mmengine.hub.get_config('mmlavit::...')`` and ``get_model``, and mmpretrain's ``get_model`` and
``list_models``, then answer for them as for those of their own.
"""

from __future__ import annotations

import functools
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from .shipped import folder, weights_of

_SCOPE = 'mmlavit::'
#: What stands for the weights that a config does not have.
_NO_WEIGHTS = 'mmlavit://'
_MMPRETRAINS_HUB = 'mmpretrain.apis.model'


def serve_mmengines_hub() -> None:
    """Let MMEngine's hub find ``mmlavit::...``, as configs do (``serve_config_bases``).

    It insists on a folder before the name of a config, and looks for the metafile in a folder that
    an editable installation does not have.
    """
    from mmengine import hub
    from mmengine.config import Config

    find, build = hub.get_config, hub.get_model
    if hasattr(find, '__wrapped__'):
        return

    @functools.wraps(find)
    def get_config(cfg_path: str, pretrained: bool = False) -> Config:
        # get_model below puts a toolbox before our name.
        _, ours, name = cfg_path.partition(_SCOPE)
        if not ours:
            return find(cfg_path, pretrained)
        path = _path_of(name)
        cfg = Config.fromfile(path)
        if pretrained:
            cfg.model_path = weights_of(path)
            if cfg.model_path is None:
                raise ValueError(_no_weights(path.stem))
        return cfg

    @functools.wraps(build)
    def get_model(cfg_path: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if cfg_path.startswith(_SCOPE):
            # The models of a package are registered by the name before the colons.
            cfg_path = f'{get_config(cfg_path).default_scope}::{cfg_path}'
        return build(cfg_path, pretrained, **kwargs)

    hub.get_config = hub.hub.get_config = get_config
    hub.get_model = hub.hub.get_model = get_model


def _path_of(name: str) -> Path:
    path = folder('configs') / name
    path = path if path.suffix else path.with_suffix('.py')
    if not path.is_file():
        raise FileNotFoundError(f"no config is called {name!r}; 'mmlavit configs' lists all")
    return path


def _no_weights(name: str) -> str:
    return (
        f'{name} has no trained weights, so pretrained=True has none to load; train it '
        f'(mmlavit train {name}), or name a checkpoint'
    )


def serve_mmpretrains_hub() -> None:
    """Let mmpretrain's hub know our classifiers, as soon as something imports it.

    It is not imported here, which would cost seconds wherever mmlavit is imported.
    """
    from mmengine.runner import CheckpointLoader

    CheckpointLoader.register_scheme(_NO_WEIGHTS, load_from_mmlavit, force=True)
    if module := sys.modules.get(_MMPRETRAINS_HUB):
        _add_classifiers(module)
    elif not any(isinstance(finder, _WaitForHub) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForHub())


def load_from_mmlavit(filename: str, map_location: object = None) -> dict:
    """What MMEngine calls to load weights that a config does not have.

    Args:
        filename: ``mmlavit://``, and the name of the config.
        map_location: As of ``torch.load``.

    Raises:
        ValueError: In any case; the text says what to do instead.
    """
    raise ValueError(_no_weights(filename.removeprefix(_NO_WEIGHTS)))


class _WaitForHub(importlib.abc.MetaPathFinder):
    """Finds mmpretrain's hub like any module, and adds our classifiers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MMPRETRAINS_HUB:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _add_classifiers(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _add_classifiers(module: ModuleType) -> None:
    """Add what ``configs/metafile.yml`` says of our classifiers to mmpretrain's hub.

    Not by its ``register_model_index``: that would add detectors and segmentors as well, and for
    ``pretrained=True`` without weights mmpretrain warns and returns chance.
    """
    top = folder('configs').parent
    index = module.load(str(top / 'model-index.yml'))
    index.build_models_with_collections()
    for model in index.models:
        # Whatever has a head is named after it first.
        if model.name.startswith('lavit_'):
            model.config = str(top / model.config)
            model.weights = model.weights or f'{_NO_WEIGHTS}{model.name}'
            module.ModelHub._models_dict[model.name] = model
