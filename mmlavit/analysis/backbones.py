"""Backbones and images of configs, for analysis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from ..engine.checkpoint_file import read_weights
from ..engine.data_checks import check_data
from ..engine.launch import read_scope, require_package
from ..models.state_dict import strip_prefix
from ..shipped import config_path
from .loading import AnalysisError, one_line

# mmpretrain's models add the type themselves.
_PREPROCESSORS = {'mmpretrain': 'ClsDataPreprocessor'}


def read_config(name: str) -> tuple[Config, str]:
    """Read a config.

    Args:
        name: A file, the name of a config of ours, or that of an installed package, such as
            ``'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'``.

    Returns:
        The config and its scope: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``.

    Raises:
        AnalysisError: If a package has no such config.
        mmlavit.engine.launch.LaunchError: If the file is missing or unreadable, or of another
            scope.
    """
    path = str(config_path(name))
    if '::' in path:
        require_package(name.partition('::')[0])
        try:
            path, _ = Config._get_cfg_path(name, '')
        except (ImportError, OSError, ValueError) as error:
            raise AnalysisError(f'no config {name}: {one_line(error)}') from error
    scope = read_scope(Path(path))
    require_package(scope)
    return Config.fromfile(path), scope


def load_backbone(name: str, checkpoint: str | None = None, seed: int = 0) -> nn.Module:
    """Build the backbone of a config, with weights.

    Args:
        name: A config, see :func:`read_config`.
        checkpoint: A checkpoint of the whole model or of its backbone alone; None for random
            weights, whatever checkpoint the config's ``init_cfg`` names.
        seed: Of random weights.

    Returns:
        The backbone in evaluation mode.

    Raises:
        AnalysisError: If the config has no backbone, it cannot be built, or the checkpoint does not
            fit.
        mmlavit.engine.launch.LaunchError: As :func:`read_config`.
        OSError: If the checkpoint is not there.
        mmlavit.engine.checkpoint_file.CheckpointError: If it cannot be read.
    """
    cfg, scope = read_config(name)
    if 'backbone' not in cfg.get('model', {}):
        raise AnalysisError(f'{name} has no model.backbone to look into')
    backbone = cfg.model.backbone
    backbone.init_cfg = _without_checkpoint(backbone.get('init_cfg'))
    init_default_scope(scope)
    torch.manual_seed(seed)
    try:
        model = MODELS.build(backbone)
    except Exception as error:
        raise AnalysisError(f'cannot build the backbone of {name}: {one_line(error)}') from error
    model.init_weights()
    if checkpoint is not None:
        weights = read_weights(checkpoint)
        # A checkpoint of the backbone alone has no prefix.
        weights = strip_prefix(weights, 'backbone.') or weights
        try:
            model.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise AnalysisError(
                f'{checkpoint} does not fit the backbone of {name}: {one_line(error)}'
            ) from error
    model.eval()  # of Swin it returns nothing
    return model


def _without_checkpoint(init_cfg: Any) -> Any:
    """The ``init_cfg`` of a backbone, less what loads a checkpoint."""
    cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg]
    kept = [cfg for cfg in cfgs if isinstance(cfg, Mapping) and 'checkpoint' not in cfg]
    return kept or None


def load_images(name: str, count: int) -> Iterator[Tensor]:
    """Images of a config's validation data, or test data, as its backbone gets them.

    Args:
        name: A config, see :func:`read_config`.
        count: How many, spread evenly over the data set; all of it if it has fewer.

    Yields:
        Normalized images (1, C, H, W), one by one, since their sizes may differ.

    Raises:
        AnalysisError: If the config has no such data, or they cannot be built.
        mmlavit.engine.launch.LaunchError: As :func:`read_config`.
        OSError: If they are not there.
        ValueError: If ``count`` is less than 1, or the data are empty.
    """
    if count < 1:
        raise ValueError(f'count must be at least 1, got {count}')
    cfg, scope = read_config(name)
    settings = cfg.get('val_dataloader') or cfg.get('test_dataloader')
    if settings is None:
        raise AnalysisError(f'{name} has no val_dataloader and no test_dataloader')
    init_default_scope(scope)
    check_data()
    worker_options = ('persistent_workers', 'prefetch_factor', 'timeout')
    settings = {k: v for k, v in settings.items() if k not in worker_options}
    model = cfg.get('model', {})
    preprocessor = dict(model.get('data_preprocessor') or cfg.get('data_preprocessor') or {})
    preprocessor.setdefault('type', _PREPROCESSORS.get(scope, 'BaseDataPreprocessor'))
    try:
        preprocess = MODELS.build(preprocessor)
        loader = Runner.build_dataloader({**settings, 'num_workers': 0})
    except (KeyError, TypeError) as error:
        raise AnalysisError(f'cannot build the data of {name}: {one_line(error)}') from error
    data = loader.dataset
    count = min(count, len(data))
    for i in range(count):
        batch = loader.collate_fn([data[i * len(data) // count]])
        inputs = preprocess(batch, training=False)['inputs']
        yield inputs if isinstance(inputs, Tensor) else torch.stack(inputs)
