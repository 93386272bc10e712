"""Runs backbones over the images of a config and writes what was measured."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .backbones import load_backbone, load_images
from .loading import AnalysisError
from .peers import recording_any
from .saturation import MEASURES, SIMILARITIES, LayerNumbers, SaturationMeter


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Args:
        name: What to call it.
        config: Its config, see :func:`mmlavit.analysis.backbones.read_config`.
        checkpoint: Its weights; None for random ones.
    """

    name: str
    config: str
    checkpoint: str | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Args:
        model: Which.
        weights: Its checkpoint, or ``'random, seed ...'``.
        images: On how many images.
        layers: The numbers of each layer.
    """

    model: Model
    weights: str
    images: int
    layers: list[LayerNumbers]


def compare(
    models: Sequence[Model], images: int, *, seed: int = 0, device: str = 'cpu'
) -> list[Measured]:
    """Measure models on the same images, those of the first one's config.

    Args:
        models: The models.
        images: How many images.
        seed: Of random weights.
        device: Where the models run.

    Returns:
        What was measured of each.

    Raises:
        AnalysisError: If a model or its data cannot be built, has no attention to record, or two
            have one name; also as
            :func:`~mmlavit.analysis.backbones.load_backbone` and
            :func:`~mmlavit.analysis.backbones.load_images` raise.
        ValueError: If ``device`` is none.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise AnalysisError(f'models must have different names, got {names}; see --name, --model')
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'--device: cannot use {device!r}: {reason}') from error
    # All of them first, since measuring takes time.
    backbones = [load_backbone(m.config, m.checkpoint, seed).to(device) for m in models]
    meters = [SaturationMeter() for _ in models]
    count = 0
    for image in load_images(models[0].config, images):
        for model, backbone, meter in zip(models, backbones, meters, strict=True):
            try:
                with recording_any(backbone, meter.see, device=None), torch.no_grad():
                    backbone(image.to(device))
            except ValueError as error:
                raise AnalysisError(f'{model.config}: {error}') from error
            meter.end_batch()
        count += 1
    return [
        Measured(model, model.checkpoint or f'random, seed {seed}', count, meter.numbers())
        for model, meter in zip(models, meters, strict=True)
    ]


def output_files(out: Path, force: bool = False) -> list[Path]:
    """The files to write, after a look whether they can be: measuring takes time.

    Args:
        out: A folder; it need not be there.
        force: Whether files that are there may be replaced.

    Returns:
        saturation.png, saturation.csv and saturation.json in that folder.

    Raises:
        AnalysisError: If matplotlib is not installed.
        OSError: If ``out`` is a file, or a file is there and is not to be replaced.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise AnalysisError('matplotlib not installed; pip install matplotlib')
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f'{out} is a file; name a folder to write to')
    files = [out / f'saturation.{suffix}' for suffix in ('png', 'csv', 'json')]
    for file in files:
        if file.exists() and not force:
            raise FileExistsError(f'{file} is there already; name another folder, or use --force')
    return files


def write(measured: Sequence[Measured], files: Sequence[Path]) -> None:
    """Write the figure and the numbers.

    Args:
        measured: What was measured.
        files: Where to: a PNG, a CSV and a JSON file. Their folder is made if it is not there.

    Raises:
        OSError: If they cannot be written.
    """
    from .saturation_figures import draw

    files[0].parent.mkdir(parents=True, exist_ok=True)
    images = measured[0].images
    title = f'Attention of each layer, mean of {images} image{"s" if images > 1 else ""}'
    draw({label(m): m.layers for m in measured}, title).savefig(files[0], dpi=110)
    with files[1].open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        similar = [f'{name}_to_previous' for name in SIMILARITIES]
        writer.writerow(['model', 'weights', 'stage', 'layer', 'kind', *MEASURES, *similar])
        for m in measured:
            for layer in m.layers:
                values = [getattr(layer, name) for name in MEASURES]
                values += [layer.to_previous(name) for name in SIMILARITIES]
                place = (layer.stage + 1, layer.layer + 1, layer.kind)
                texts = ['' if value is None else f'{value:.6g}' for value in values]
                writer.writerow([m.model.name, m.weights, *place, *texts])
    files[2].write_text(json.dumps([_plain(m) for m in measured], indent=1), encoding='utf-8')


def label(measured: Measured) -> str:
    """Name of a model in the figure, with a word on weights that nobody trained."""
    return measured.model.name + (' (random weights)' if measured.model.checkpoint is None else '')


def _plain(measured: Measured) -> dict:
    """As JSON has it, with stages and layers counted from 1, as in the figure and the CSV."""
    layers = [
        {**asdict(layer), 'stage': layer.stage + 1, 'layer': layer.layer + 1}
        for layer in measured.layers
    ]
    about = {'weights': measured.weights, 'images': measured.images, 'layers': layers}
    return {**asdict(measured.model), **about}
