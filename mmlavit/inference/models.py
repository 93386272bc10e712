"""One way to run a model of each toolbox, through its own inferencer and visualizer."""

from __future__ import annotations

import importlib
import io
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from ..analysis.loading import one_line
from ..engine.checkpoint_file import dataset_meta_of, read_anywhere
from ..engine.launch import read_scope, require_package
from ..errors import MMLaViTError
from .colours import class_colours
from .sources import Image

# How many classes are kept of an image that is classified.
_TOP = 5


class InferenceError(MMLaViTError, ValueError):
    """A model cannot be run; the text is one line for the user."""


class Predictor(ABC):
    """A model, which finds something in images, draws it and keeps it for a file.

    Args:
        cfg: Config of the model.
        device: Where it runs.
        threshold: The least score of what is drawn and counted.
    """

    #: Module and class of the toolbox's inferencer, and of the visualizer.
    inferencer: tuple[str, str]
    visualizer: tuple[str, str]

    def __init__(self, cfg: Config, device: str, threshold: float) -> None:
        build, visualizer = (
            getattr(importlib.import_module(module), name)
            for module, name in (self.inferencer, self.visualizer)
        )
        # Drawings go to files here, not to where a training logs.
        cfg.visualizer = dict(type=visualizer)
        with warnings.catch_warnings():
            # Of missing weights and class names, which come after this.
            warnings.simplefilter('ignore')
            self.by = build(cfg, None, device=device)
        self.model = self.by.model
        self.threshold = threshold
        self.classes: Sequence[str] = ()
        self.images: list[dict] = []

    def name_classes(self, meta: Mapping[str, Any]) -> None:
        """Take the names of classes, and their colours, from a data set's ``metainfo``."""
        self.classes = list(meta.get('classes') or ())

    def predict(self, images: Sequence[Image]) -> list[Any]:
        """Run the model on a batch of images.

        Returns:
            What the toolbox has for each: its data sample.
        """
        (batch,) = self.by.preprocess([image.data for image in images], len(images))
        return list(self.by.forward(batch))

    def call(self, label: int) -> str:
        """The name of a class."""
        return self.classes[label] if label < len(self.classes) else f'class {label}'

    @abstractmethod
    def draw(self, pixels: np.ndarray, sample: Any) -> np.ndarray:
        """Draw what was found in an image; both are RGB (H, W, 3), uint8."""

    @abstractmethod
    def keep(self, image: dict, sample: Any, labels: Path) -> str:
        """Keep what was found for the file.

        Args:
            image: What the file says of the image: at least ``id`` and ``file_name``.
            sample: What was found.
            labels: The file for the labels of its pixels.

        Returns:
            A few words on it.

        Raises:
            InferenceError: If nothing of the kind was looked for.
        """

    @abstractmethod
    def content(self) -> dict:
        """What the JSON file has to say, from all that was kept."""


class Detector(Predictor):
    """A detector of mmdet: boxes and masks, as COCO has them."""

    inferencer = 'mmdet.apis', 'DetInferencer'
    visualizer = 'mmlavit.inference.drawing', 'ClassColourVisualizer'

    def __init__(self, cfg: Config, device: str, threshold: float) -> None:
        super().__init__(cfg, device, threshold)
        self.annotations: list[dict] = []

    def name_classes(self, meta: Mapping[str, Any]) -> None:
        """Take the names of classes; colours that the config has go first."""
        super().name_classes(meta)
        palette = self.model.dataset_meta.get('palette')
        self.model.dataset_meta = {'classes': self.classes or None, 'palette': palette}
        self.by.visualizer.dataset_meta = self.model.dataset_meta

    def predict(self, images: Sequence[Image]) -> list[Any]:
        """Run the model on a batch of images, which mmdet puts beside what it makes of them."""
        ((_, batch),) = self.by.preprocess([image.data for image in images], len(images))
        return list(self.by.forward(batch))

    def draw(self, pixels: np.ndarray, sample: Any) -> np.ndarray:
        """Draw boxes, masks, names and scores."""
        self.by.visualizer.add_datasample(
            'image', pixels, sample, draw_gt=False, pred_score_thr=self.threshold
        )
        return self.by.visualizer.get_image()

    def keep(self, image: dict, sample: Any, labels: Path) -> str:
        """Keep all boxes and masks, also those with a low score."""
        from pycocotools import mask

        if 'pred_instances' not in sample:
            raise InferenceError(
                f'{type(self.model).__name__} finds no boxes; boxes and masks are written'
            )
        found = self.by.pred2dict(sample)
        self.images.append(image)
        masks = found.get('masks') or [None] * len(found['labels'])
        for label, score, box, rle in zip(
            found['labels'], found['scores'], found['bboxes'], masks, strict=True
        ):
            left, top, right, bottom = box
            annotation = dict(
                id=len(self.annotations) + 1,
                image_id=image['id'],
                category_id=label + 1,
                bbox=[left, top, right - left, bottom - top],
                area=(right - left) * (bottom - top),
                iscrowd=0,
                score=score,
            )
            if rle is not None:
                annotation.update(segmentation=rle, area=float(mask.area(rle)))
            self.annotations.append(annotation)
        shown = [
            label
            for label, score in zip(found['labels'], found['scores'], strict=True)
            if score > self.threshold
        ]
        counts = ', '.join(f'{n} {self.call(label)}' for label, n in sorted(Counter(shown).items()))
        return counts or f'nothing with a score over {self.threshold:g}'

    def content(self) -> dict:
        """A whole data set in COCO's format, whose annotations have a score besides."""
        most = max((a['category_id'] for a in self.annotations), default=0)
        categories = [
            dict(id=label + 1, name=self.call(label), supercategory='')
            for label in range(max(most, len(self.classes)))
        ]
        return dict(images=self.images, categories=categories, annotations=self.annotations)


class Segmentor(Predictor):
    """A segmentor of mmseg: an image of labels."""

    inferencer = 'mmseg.apis', 'MMSegInferencer'
    visualizer = 'mmseg.visualization', 'SegLocalVisualizer'

    def __init__(self, cfg: Config, device: str, threshold: float) -> None:
        super().__init__(cfg, device, threshold)
        self.palette: list = []

    def name_classes(self, meta: Mapping[str, Any]) -> None:
        """Take the names of classes and their colours."""
        super().name_classes(meta)
        number = self.model.num_classes
        names = [self.call(label) for label in range(number)]
        self.palette = [list(rgb) for rgb in class_colours(number, meta.get('palette'))]
        self.by.visualizer.set_dataset_meta(names, self.palette)

    def draw(self, pixels: np.ndarray, sample: Any) -> np.ndarray:
        """Draw the classes over the image."""
        self.by.visualizer.add_datasample('image', pixels, sample, draw_gt=False)
        return self.by.visualizer.get_image()

    def keep(self, image: dict, sample: Any, labels: Path) -> str:
        """Write the labels: grey values are the numbers of classes."""
        if 'pred_sem_seg' not in sample:
            raise InferenceError(
                f'{type(self.model).__name__} finds no labels of pixels; those are written'
            )
        found = sample.pred_sem_seg.data[0].cpu().numpy()
        found = found.astype(np.uint8 if found.max() < 256 else np.uint16)
        mmcv.imwrite(found, str(labels))
        self.images.append({**image, 'labels': f'{labels.parent.name}/{labels.name}'})
        shares = Counter(dict(zip(*np.unique(found, return_counts=True), strict=True)))
        return ', '.join(
            f'{self.call(int(label))} {n / found.size:.0%}' for label, n in shares.most_common(_TOP)
        )

    def content(self) -> dict:
        """Which file has the labels of which image, and what the labels are."""
        return dict(classes=self.classes, palette=self.palette, images=self.images)


class Classifier(Predictor):
    """A classifier of mmpretrain: classes and scores."""

    inferencer = 'mmpretrain.apis', 'ImageClassificationInferencer'
    visualizer = 'mmpretrain.visualization', 'UniversalVisualizer'

    def __init__(self, cfg: Config, device: str, threshold: float) -> None:
        super().__init__(cfg, device, threshold)
        self.drawer: Any = None

    def draw(self, pixels: np.ndarray, sample: Any) -> np.ndarray:
        """Write the class and its score onto the image."""
        if self.drawer is None:
            from mmpretrain.visualization import UniversalVisualizer

            self.drawer = UniversalVisualizer()
        return self.drawer.visualize_cls(
            pixels, sample, classes=self.classes or None, draw_gt=False
        )

    def keep(self, image: dict, sample: Any, labels: Path) -> str:
        """Keep the five classes with the best scores."""
        if 'pred_score' not in sample:
            raise InferenceError(
                f'{type(self.model).__name__} finds no classes with scores; those are written'
            )
        best = sample.pred_score.cpu().topk(min(_TOP, len(sample.pred_score)))
        found = [
            {'label': label, 'class': self.call(label), 'score': score}
            for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        self.images.append({**image, 'predictions': found})
        return f'{found[0]["class"]} {found[0]["score"]:.2f}'

    def content(self) -> dict:
        """The classes, and those of each image."""
        return dict(classes=self.classes, images=self.images)


_KINDS: dict[str, Callable[[Config, str, float], Predictor]] = {
    'mmdet': Detector,
    'mmseg': Segmentor,
    'mmpretrain': Classifier,
}


def load_predictor(
    config: Path,
    checkpoint: str | None,
    *,
    device: str | None = None,
    threshold: float = 0.3,
    options: Mapping[str, Any] | None = None,
) -> Predictor:
    """Build the model of a config, with its weights.

    Args:
        config: A config of mmdet, mmseg or mmpretrain.
        checkpoint: Its weights: a file or an URL. None for a model as a training starts, from its
            ``init_cfg`` or from chance with the seed 0.
        device: Where it runs; None for a GPU where there is one.
        threshold: The least score of boxes that are drawn.
        options: What to change in the config, as ``--cfg-options`` has it.

    Returns:
        The model.

    Raises:
        InferenceError: If the model cannot be built, or the checkpoint does not fit.
        FileNotFoundError: If the checkpoint is not there.
        mmlavit.engine.launch.LaunchError: If the config is missing or unreadable.
        mmlavit.engine.checkpoint_file.CheckpointError: If the checkpoint cannot be read.
    """
    scope = read_scope(config)
    require_package(scope)
    device = device or get_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InferenceError(f'device {device!r} cannot be used: {one_line(error)}') from error
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(options or {}))
    init_default_scope(scope)
    weights = None if checkpoint is None else read_anywhere(checkpoint)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        try:
            predictor = _KINDS[scope](cfg, device, threshold)
        except Exception as error:
            # What is wrong with a config shows as almost any error.
            raise InferenceError(f'{config}: {one_line(error)}') from error
        if weights is None:
            predictor.model.init_weights()
    meta: Mapping[str, Any] = {}
    if weights is not None:
        _load(predictor.model, weights.get('state_dict', weights), str(checkpoint), config)
        meta = dataset_meta_of(weights)
    predictor.name_classes(meta or read_metainfo(cfg, scope))
    predictor.model.to(device).eval()
    return predictor


def _load(model: torch.nn.Module, weights: Mapping, checkpoint: str, config: Path) -> None:
    """Load weights; all that the model has must be there."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, ValueError) as error:
        raise InferenceError(f'{checkpoint} does not fit {config}: {one_line(error)}') from error
    if missing:
        raise InferenceError(
            f'{checkpoint} does not fit {config}: it lacks {len(missing)} weights of the model, '
            f'the first is {missing[0]!r}'
        )
    if unexpected:
        warnings.warn(
            f'{checkpoint} has {len(unexpected)} weights that {config} has no place for, the first '
            f'is {unexpected[0]!r}',
            stacklevel=2,
        )


def read_metainfo(cfg: Config, scope: str) -> Mapping[str, Any]:
    """What a config's test data say of their classes, without reading them.

    Args:
        cfg: The config.
        scope: The toolbox that it is for.

    Returns:
        The ``metainfo`` of the data set; nothing if it cannot be built.
    """
    datasets = importlib.import_module(f'{scope}.registry').DATASETS
    try:
        # On import the toolboxes print which optional packages are not there.
        with redirect_stdout(io.StringIO()):
            return datasets.build({**cfg.test_dataloader.dataset, 'lazy_init': True}).metainfo
    except Exception:
        # Names are a comfort; without them classes have numbers.
        return {}
