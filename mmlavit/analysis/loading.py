"""The model of a config with its weights, and an image as it comes to that model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..engine.checkpoint_file import read_weights
from ..engine.launch import read_scope, require_package
from ..engine.lavits import lavits
from ..errors import MMLaViTError
from ..models.lavit import LaViT
from ..models.state_dict import strip_prefix

# What a preprocessor adds at the bottom and right is drawn in this grey.
PADDING = 127


class AnalysisError(MMLaViTError):
    """What keeps a model from being looked into; its text is one line for the user."""


@dataclass(frozen=True)
class ModelImage:
    """An image as a model gets it.

    Args:
        inputs: What its backbone takes: normalized and padded (1, C, H, W).
        picture: The same to look at: RGB (H, W, 3), uint8.
    """

    inputs: Tensor
    picture: np.ndarray


def load_model(config: str | Path, checkpoint: str | None) -> tuple[nn.Module, Config]:
    """Build the model of a config, with weights in its LaViT.

    Args:
        config: A config of mmdet, mmseg or mmpretrain.
        checkpoint: A checkpoint of that model or of its LaViT alone. Without one the model starts
            as in training, from its ``init_cfg`` or from chance with the seed 0.

    Returns:
        The model in evaluation mode, and its config.

    Raises:
        AnalysisError: If the config has no model, the model no LaViT, or the checkpoint does not
            fit it. Errors of the config itself are a :class:`mmlavit.engine.launch.LaunchError`.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, cfg = build_model(config)
        if checkpoint is None:
            model.init_weights()
    if checkpoint is not None:
        path, lavit = find_lavit(model)
        weights = read_weights(checkpoint)
        # A checkpoint of the LaViT alone has no prefix.
        weights = strip_prefix(weights, f'{path}.' if path else '') or weights
        load_weights(lavit, weights, checkpoint, config)
    return model.eval(), cfg


def build_model(config: str | Path) -> tuple[nn.Module, Config]:
    """Build the model of a config, without initializing its weights.

    Args:
        config: A config of mmdet, mmseg or mmpretrain.

    Returns:
        The model and its config.

    Raises:
        AnalysisError: If the config has no model, or the model no LaViT. Errors of the config
            itself are a :class:`mmlavit.engine.launch.LaunchError`.
    """
    scope = read_scope(Path(config))
    require_package(scope)
    cfg = Config.fromfile(config)
    init_default_scope(scope)
    if 'model' not in cfg:
        raise AnalysisError(f'{config} has no model')
    if 'data_preprocessor' in cfg:
        # As MMEngine's runner does.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    try:
        model = MODELS.build(cfg.model)
        find_lavit(model)
    except Exception as error:
        # What is wrong with a config shows as almost any error.
        raise AnalysisError(f'{config}: {one_line(error)}') from error
    return model, cfg


def load_weights(
    module: nn.Module, weights: Mapping[str, Any], checkpoint: str, config: str | Path
) -> None:
    """Load all weights of a module, and nothing else.

    Args:
        module: What to load them into.
        weights: Names and weights.
        checkpoint: Where they are from, for the error.
        config: Where the module is from, for the error.

    Raises:
        AnalysisError: If they do not fit.
    """
    try:
        module.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise AnalysisError(f'{checkpoint} does not fit {config}: {one_line(error)}') from error


def one_line(error: Exception) -> str:
    """The message of an error for an :class:`AnalysisError`, or its type where it has none."""
    words = ' '.join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f'{words[:300]} ...'


def find_lavit(model: nn.Module) -> tuple[str, LaViT]:
    """The first LaViT in a model.

    Args:
        model: Any model.

    Returns:
        Its path in the model, and itself.

    Raises:
        ValueError: If there is none.
    """
    found = lavits(model)
    if not found:
        raise ValueError(f'model must hold a LaViT, {type(model).__name__} holds none')
    return next(iter(found.items()))


def load_image(cfg: Config, model: nn.Module, image: str | Path) -> ModelImage:
    """Read an image by the test pipeline of a config and the preprocessor of its model.

    Args:
        cfg: The config.
        model: Its model.
        image: The image file.

    Returns:
        The image, its inputs on the device of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        AnalysisError: If the config has no test pipeline, or the image does not come through it.
    """
    image = Path(image)
    if not image.is_file():
        raise FileNotFoundError(f'image not found: {image}')
    # Annotations come with a data set, and this is an image alone.
    steps = [s for s in _test_pipeline(cfg) if 'Annotations' not in str(s['type'])]
    try:
        packed = Compose(steps)({'img_path': str(image), 'img_id': 0})
        data = model.data_preprocessor(pseudo_collate([packed]), False)
    except Exception as error:
        # What cannot be decoded shows as almost any error.
        raise AnalysisError(
            f"image {image} does not come through the config's test pipeline: {one_line(error)}"
        ) from error
    inputs = data['inputs']
    return ModelImage(inputs, _picture(packed['inputs'], *inputs.shape[-2:]))


def _test_pipeline(cfg: Config) -> list[dict]:
    """The test pipeline, from whatever wraps the data set."""
    dataset = cfg.get('test_dataloader', {}).get('dataset')
    while dataset is not None and 'pipeline' not in dataset:
        dataset = dataset.get('dataset') or (dataset.get('datasets') or [None])[0]
    if dataset is None:
        raise AnalysisError('config has no test_dataloader.dataset.pipeline to read images by')
    return dataset['pipeline']


def _picture(packed: Tensor, height: int, width: int) -> np.ndarray:
    """What a pipeline packed (C, H', W'), in RGB, with grey where the preprocessor padded it."""
    pixels = packed.permute(1, 2, 0).numpy()
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 255:
            # Normalized in the pipeline; any stretch shows what is where.
            pixels = (pixels - low) * (255 / max(high - low, 1e-12))
        pixels = pixels.round().astype(np.uint8)
    # OpenMMLab reads BGR, and preprocessors turn it around. Of other channels one shows the place.
    pixels = pixels[..., ::-1] if pixels.shape[-1] == 3 else pixels[..., :1].repeat(3, axis=-1)
    picture = np.full((height, width, 3), PADDING, dtype=np.uint8)
    picture[: pixels.shape[0], : pixels.shape[1]] = pixels[:height, :width]
    return picture
