"""What is exported: backbones and whole models, as functions of images alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.checkpoint_file import dataset_meta_of, read_anywhere, weights_of
from ..engine.launch import read_scope, require_package
from ..errors import MMLaViTError
from ..models.state_dict import strip_prefix
from .agreement import BOXES, LABELS, VALUES, Agreement

# What data_preprocessor builds where a config names no type.
_PREPROCESSORS = {
    'mmdet': 'DetDataPreprocessor',
    'mmseg': 'SegDataPreProcessor',
    'mmpretrain': 'ClsDataPreprocessor',
}


class ExportError(MMLaViTError, ValueError):
    """What keeps a model from being exported; its text is one line for the user."""


class Preprocessing(nn.Module):
    """What a toolbox's ``data_preprocessor`` does to a batch of images of one size, in testing.

    Args:
        source: The ``data_preprocessor``.

    Raises:
        ExportError: If it is of another kind than the toolboxes' own, or pads to a fixed size.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        kind = type(source).__name__
        if kind not in (*_PREPROCESSORS.values(), 'ImgDataPreprocessor'):
            raise ExportError(
                f'{kind} cannot be part of the file; export without preprocessing, or use one of '
                f'{list(_PREPROCESSORS.values())}'
            )
        self.swaps_channels: bool = (
            source.to_rgb if hasattr(source, 'to_rgb') else source._channel_conversion
        )
        if kind == 'SegDataPreProcessor':
            # What it pads to in training is not for testing.
            testing = source.test_cfg or {}
            if testing.get('size') is not None:
                raise ExportError(
                    f'data_preprocessor.test_cfg pads images to {testing["size"]}, which a file '
                    'for images of any size does not; take its size out of the config'
                )
            self.divisor, self.pad_value = testing.get('size_divisor') or 1, source.pad_val
        else:
            self.divisor, self.pad_value = source.pad_size_divisor, source.pad_value
        normalizes: bool = source._enable_normalize
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer('mean', source.mean if normalizes else None)
        self.register_buffer('std', source.std if normalizes else None)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize and pad.

        Args:
            images: uint8 images (B, 3, H, W), in the order of channels that the config's pipeline
                loads.

        Returns:
            Float images (B, 3, H', W'), padded at the bottom and on the right.
        """
        if self.swaps_channels:
            images = images.flip(1)
        images = images.float()
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        if self.divisor > 1:
            rows, cols = (
                (side + self.divisor - 1) // self.divisor * self.divisor - side
                for side in images.shape[2:]
            )
            images = F.pad(images, (0, cols, 0, rows), value=self.pad_value)
        return images


class Exportable(nn.Module):
    """A model as a function of images alone, whose outputs have names.

    This one is a backbone, with a map for each of its outputs.

    Args:
        model: The model.
        preprocessing: What comes before it in the file; None for images that are normalized.
        metadata: What else users of the file want to know; goes into it.
    """

    #: The outputs, and how each is compared; empty for one map after the other.
    outputs: dict[str, Agreement] = {}

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.preprocessing = preprocessing
        self.metadata = dict(metadata or {})

    def forward(self, images: Tensor) -> Any:
        """Compute the outputs.

        Args:
            images: Images (B, C, H, W), normalized; or uint8 with preprocessing.

        Returns:
            A tensor, or a tuple of tensors.
        """
        height, width = images.shape[2:]
        if self.preprocessing is not None:
            images = self.preprocessing(images)
        return self.compute(images, height, width)

    def compute(self, images: Tensor, height: int, width: int) -> Any:
        """Compute the outputs of images that are normalized.

        Args:
            images: Images (B, C, H, W).
            height: Rows of an image without its padding.
            width: Its columns.

        Returns:
            As :meth:`forward` does.
        """
        return self.model(images)


class Classifier(Exportable):
    """A classifier of mmpretrain: ``scores`` (B, classes), before the softmax."""

    outputs = {'scores': VALUES}


class Segmentor(Exportable):
    """A segmentor of mmseg, on the whole image: ``logits`` (B, classes, H, W)."""

    outputs = {'logits': VALUES}

    def compute(self, images: Tensor, height: int, width: int) -> Tensor:
        """Compute logits at the size of the images, without their padding."""
        size = images.shape[2:]
        meta = dict(ori_shape=size, img_shape=size, pad_shape=size)
        return self.model.encode_decode(images, [meta])[:, :, :height, :width]


class Labeller(Segmentor):
    """The same with ``labels`` (B, H, W) instead: the number of each pixel's best class."""

    outputs = {'labels': LABELS}

    def compute(self, images: Tensor, height: int, width: int) -> Tensor:
        """Compute the class of each pixel, as ``EncoderDecoder.postprocess_result`` does."""
        logits = super().compute(images, height, width)
        if logits.shape[1] > 1:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > self.model.decode_head.threshold).long()


class Detector(Exportable):
    """A one-stage detector of mmdet, before non-maximum suppression.

    Its outputs are ``boxes`` (B, N, 4), as x1, y1, x2, y2 in pixels of the images, and ``scores``
    (B, N, classes) from 0 to 1, of all N priors (anchors or points) of all levels. They are what
    ``BaseDenseHead.predict_by_feat`` computes before it drops any.
    """

    outputs = {'boxes': BOXES, 'scores': VALUES}

    def compute(self, images: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Compute boxes, no larger than the images without their padding, and scores."""
        from mmdet.structures.bbox import cat_boxes, get_box_tensor

        head = self.model.bbox_head
        levels = head(self.model.extract_feat(images))
        cls_scores, bbox_preds = levels[:2]
        batch = images.shape[0]
        priors = get_box_tensor(
            cat_boxes(
                head.prior_generator.grid_priors(
                    [scores.shape[2:] for scores in cls_scores], images.dtype, images.device
                )
            )
        )

        def flat(maps: list[Tensor], channels: int) -> Tensor:
            """The maps of all levels as (B, N, channels)."""
            return torch.cat(
                [
                    level.permute(0, 2, 3, 1).reshape(
                        batch, level.shape[2] * level.shape[3] * count, channels
                    )
                    for level, count in zip(maps, head.prior_generator.num_base_priors, strict=True)
                ],
                dim=1,
            )

        scores = flat(cls_scores, head.cls_out_channels)
        scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        if len(levels) > 2:
            scores = scores * flat(levels[2], 1).sigmoid()
        deltas = flat(bbox_preds, head.bbox_coder.encode_size)
        # The coders take one image; what they do not know of is a batch, not more priors.
        every = priors[None].expand(batch, -1, -1).reshape(-1, priors.shape[-1])
        boxes = get_box_tensor(
            head.bbox_coder.decode(every, deltas.reshape(-1, deltas.shape[-1]))
        ).reshape(batch, -1, 4)
        if getattr(head.bbox_coder, 'clip_border', True):
            x1, y1, x2, y2 = boxes.unbind(-1)
            boxes = torch.stack(
                [x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)],
                dim=-1,
            )
        return boxes, scores


def build_model(
    config: str | Path,
    checkpoint: str | None = None,
    head: bool = False,
    *,
    preprocess: bool = False,
    labels: bool = False,
) -> Exportable:
    """Build what is to be exported, with its weights.

    Args:
        config: A config of mmdet, mmseg or mmpretrain.
        checkpoint: A checkpoint of that model or, without the head, of its backbone alone. Without
            one the model starts as in training, from its ``init_cfg`` or from chance.
        head: Whether to build the whole model instead of its backbone: a classifier, a segmentor
            or a one-stage detector.
        preprocess: Whether the config's ``data_preprocessor`` is part of it.
        labels: Whether a segmentor gives the class of each pixel instead of logits.

    Returns:
        The model in evaluation mode.

    Raises:
        ExportError: If the config has no such part, or the checkpoint does not fit. Errors of the
            config itself are a :class:`mmlavit.engine.launch.LaunchError`.
    """
    scope = read_scope(Path(config))
    require_package(scope)
    # It needs mmcv, which is there with a toolbox alone.
    from ..inference.models import read_metainfo

    cfg = Config.fromfile(config)
    init_default_scope(scope)
    parts = cfg.get('model', {})
    if labels and not (head and scope == 'mmseg'):
        raise ExportError(
            'labels of pixels are what a whole segmentor gives: an mmseg config with --head'
        )
    if 'backbone' not in parts:
        raise ExportError(f'{config} has no model.backbone to export')
    if head and scope == 'mmpretrain' and 'head' not in parts:
        raise ExportError(f'{config} is no classifier with a head; export its backbone alone')
    metadata = {}
    # As the runner finds it.
    source = parts.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    preprocessing = None
    if preprocess:
        if not source:
            raise ExportError(f'{config} has no data_preprocessor to be part of the file')
        preprocessing = Preprocessing(MODELS.build({'type': _PREPROCESSORS[scope], **source}))
        # What the toolboxes load images as, if nobody says otherwise, is BGR.
        metadata['channels'] = 'RGB' if source.get('rgb_to_bgr') else 'BGR'
    model = MODELS.build(parts if head else parts.backbone)
    kind: type[Exportable] = Exportable
    if head:
        kind = {'mmpretrain': Classifier, 'mmseg': Segmentor, 'mmdet': Detector}[scope]
        if scope == 'mmdet':
            _check_detector(model, config)
        if scope == 'mmseg':
            _check_segmentor(model, config)
            kind = Labeller if labels else Segmentor
    said: Mapping[str, Any] = {}
    if checkpoint is None:
        model.init_weights()
    else:
        whole = read_anywhere(checkpoint)
        _load(model, weights_of(whole, checkpoint), checkpoint, '' if head else 'backbone.')
        said = dataset_meta_of(whole)
    # The data of a folder tree are not there to be asked; what was trained on them knows.
    if head and (classes := said.get('classes') or read_metainfo(cfg, scope).get('classes')):
        metadata['classes'] = json.dumps(list(classes))
    exportable = kind(model, preprocessing, metadata)
    exportable.eval()
    return exportable


def _check_detector(model: nn.Module, config: str | Path) -> None:
    """Refuse what does not compute boxes as the base of all dense heads does."""
    from mmdet.models import SingleStageDetector
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    head = getattr(model, 'bbox_head', None)
    steps = ('predict', 'predict_by_feat', '_predict_by_feat_single')
    if (
        not isinstance(model, SingleStageDetector)
        or not isinstance(head, BaseDenseHead)
        or any(getattr(type(head), step) is not getattr(BaseDenseHead, step) for step in steps)
        or getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False)
    ):
        name = type(model).__name__ + (f' with {type(head).__name__}' if head is not None else '')
        raise ExportError(
            f'{config}: {name} cannot be exported whole; of detectors that is for one stage with a '
            'head such as RetinaHead or FCOSHead; without --head its backbone can'
        )


def _check_segmentor(model: nn.Module, config: str | Path) -> None:
    from mmseg.models import EncoderDecoder

    if not isinstance(model, EncoderDecoder):
        raise ExportError(
            f'{config}: {type(model).__name__} cannot be exported whole; of segmentors that is for '
            'an EncoderDecoder; without --head its backbone can'
        )
    if (model.test_cfg or {}).get('mode', 'whole') != 'whole':
        raise ExportError(
            f'{config} has model.test_cfg.mode = {model.test_cfg.mode!r}, but a file sees the '
            "whole image; if that is what you want, set model.test_cfg = dict(mode='whole')"
        )


def _load(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: str, prefix: str) -> None:
    """Load all weights of a model, none missing; those of other parts are left out."""
    # A checkpoint of the backbone alone has no prefix.
    weights = strip_prefix(weights, prefix) or weights
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise ExportError(f'{checkpoint} does not fit the config: {reason}') from error
