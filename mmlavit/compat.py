"""What the packages around mmlavit get wrong, and what it says when one is missing."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import pickle
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mmengine.runner import Runner

# torchvision registers "fake" kernels for these two on import, whether or not its compiled
# library, which declares them, could be loaded. The schemas are torchvision's own.
_TORCHVISION_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
_TORCHVISION_SYMPTOM = 'operator torchvision::nms does not exist'

# A declaration lives as long as its Library object does.
_declarations: list[torch.library.Library] = []


def require_mmengine() -> None:
    """Import MMEngine, or say in one line how to get it.

    Two distributions provide the import name `mmengine`, and installing one over the other
    corrupts both, so mmlavit depends on neither and the user chooses.

    Raises:
        ImportError: MMEngine is not installed.
    """
    import_yapf()
    try:
        importlib.import_module('mmengine')
    except ModuleNotFoundError as error:
        if error.name != 'mmengine':
            raise
        raise ImportError(
            'mmlavit needs MMEngine, which two distributions provide; install one of them: '
            'onedl-mmengine (maintained) or mmengine (the original name); README.md, "Installing", '
            'has them with the toolboxes',
            name='mmengine',
        ) from None


def import_yapf() -> None:
    """Import yapf, with which MMEngine formats configs, even where the cache of yapf is torn.

    On import yapf reads its grammar from a file in the user's cache, and where that is missing or
    older than yapf it writes the file in place. Whoever reads it meanwhile fails
    (google/yapf#1204), such as processes of torchrun in a new environment; and if the writer was
    killed, all who come later. Here the grammar is then made anew, which takes a few
    hundredths of a second, and the file is left to who writes it.

    Some versions of MMEngine import yapf themselves at once, others when they format a config, so
    it is imported before MMEngine. An ImportError is left for MMEngine to meet; any other error is
    passed on.
    """
    try:
        importlib.import_module('yapf')
    except ImportError:
        return
    except (EOFError, pickle.UnpicklingError):
        # The failed import leaves submodules behind.
        for name in [name for name in sys.modules if name.split('.')[0] == 'yapf']:
            del sys.modules[name]
        driver: Any = importlib.import_module('yapf_third_party._ylib2to3.pgen2.driver')
        driver.load_grammar = partial(driver.load_grammar, force=True, save=False)
        importlib.import_module('yapf')


def repair_torchvision() -> bool:
    """Make `import torchvision` work beside a torch that it was not compiled for.

    PyPI's torchvision cannot load its compiled operators beside a CPU-only torch, and then fails
    on import while it describes operators that nobody declared; mmdet and mmpretrain fail with it,
    although neither uses them here. Declaring the two operators first cures the import; calling
    them still raises torchvision's own error.

    An import that fails is the only sure sign (a declaration that is made before a healthy
    torchvision loads its library would clash with it), so this imports torchvision. An ImportError
    is left for whoever needs torchvision to meet; any other error is passed on.

    Returns:
        True if torchvision was broken in this way and is now imported.
    """
    if 'torchvision' in sys.modules:
        return False
    try:
        importlib.import_module('torchvision')
    except ImportError:
        return False
    except RuntimeError as error:
        if _TORCHVISION_SYMPTOM not in str(error):
            raise
    else:
        return False

    # The failed import leaves its submodules behind.
    for name in [name for name in sys.modules if name.startswith('torchvision.')]:
        del sys.modules[name]
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _declarations.append(library)
    importlib.import_module('torchvision')
    return True


def leave_process_group() -> None:
    """Leave the process group that this process joined, if any, as torch asks for.

    The scripts of the toolboxes do not. Then a thread of gloo that lets go of a tensor while Python
    shuts down aborts the process (pytorch/pytorch#190489), and torchrun calls a training failed
    that has come to its end. The thread ends with the group, which lives as long as a wrapped
    model; that is part of reference cycles.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def let_cpus_take_part() -> None:
    """Let several processes train and test without a GPU (``--launcher pytorch``, backend gloo).

    MMEngine sets the process's CUDA device and gives DDP a GPU on any machine; both fail where
    there is none.
    """
    from mmengine.device import get_device
    from mmengine.dist import utils
    from mmengine.runner import Runner

    if get_device() != 'cpu' or hasattr(Runner.wrap_model, '__wrapped__'):
        return

    def init(backend: str, init_backend: str = 'torch', **kwargs: Any) -> None:
        torch.distributed.init_process_group(backend=backend, **kwargs)

    wrap = Runner.wrap_model

    @functools.wraps(wrap)
    def wrap_model(self: Runner, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> Any:
        if self.distributed and model_wrapper_cfg is None:
            unused = self.cfg.get('find_unused_parameters', False)
            model_wrapper_cfg = dict(broadcast_buffers=False, find_unused_parameters=unused)
        kind = str((model_wrapper_cfg or {}).get('type', 'MMDistributedDataParallel'))
        if model_wrapper_cfg is not None and kind.endswith('DistributedDataParallel'):
            model_wrapper_cfg.setdefault('device_ids', None)
        return wrap(self, model_wrapper_cfg, model)

    utils._init_dist_pytorch = init
    Runner.wrap_model = wrap_model


def repair_config_bases() -> None:
    """Let configs inherit from `mmseg::...` whichever distribution provides mmseg.

    MMEngine looks for a base config in the distribution that it knows a package by; for mmseg that
    is the original name alone. Where only onedl-mmsegmentation is installed, it is told to look for
    the package itself.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    if not _is_distributed(MODULE2PACKAGE['mmseg']) and _is_distributed('onedl-mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _is_distributed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def serve_config_bases() -> None:
    """Let configs inherit from `mmlavit::...`, as they do from the toolboxes.

    MMEngine keeps a closed list of the packages that this works for, insists on a folder in the
    name, and would mark all that is inherited with a scope that has no registry. So names that
    start with `mmlavit::` are handed to it as plain paths: of the configs in the wheel or, where
    the repository itself is installed (`pip install -e`), of its own.
    """
    from mmengine.config import Config

    from .shipped import folder

    configs = folder('configs')
    find = Config._get_cfg_path
    if hasattr(find, '__wrapped__'):
        return

    @functools.wraps(find)
    def find_ours_too(cfg_path: str, filename: str) -> tuple[str, str | None]:
        scope, separator, name = cfg_path.partition('::')
        if separator and scope == 'mmlavit':
            return str(configs / name), None
        return find(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find_ours_too)


def read_metafiles_once() -> None:
    """Let MMEngine read the metafiles of a toolbox once a process.

    It reads all of them, a hundred of mmdet's, for each `mmdet::...` that a config inherits from.
    """
    from mmengine.config import utils

    if not hasattr(utils.load, '__wrapped__'):
        utils.load = functools.cache(utils.load)
