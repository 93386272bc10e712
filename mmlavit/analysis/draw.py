"""From a config, a checkpoint and an image to the pictures of its attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..export.onnx import check_free
from .loading import AnalysisError, find_lavit, load_image, load_model
from .record import LayerAttention, check_stages, recording

PACKAGES = ('matplotlib', 'bokeh')


def draw_attention(
    config: str | Path,
    checkpoint: str | None,
    image: str | Path,
    out: str | Path,
    *,
    stages: Sequence[int] | None = None,
    points: Sequence[tuple[int, int]] | None = None,
    heads: int | str = 'mean',
    stretch: bool = False,
    device: str = 'cpu',
    force: bool = False,
) -> list[str]:
    """Draw a contact sheet and an interactive page of the attention over an image.

    Args:
        config: A config of mmdet, mmseg or mmpretrain whose model has a LaViT inside.
        checkpoint: Its weights; None for a model as a training starts.
        image: The image file.
        out: Folder for the files, named like the image; made where it is missing.
        stages: Stages to draw, from 0. None for all on the sheet and, in the page, those of
            :func:`mmlavit.analysis.interactive.choose_stages`.
        points: ``x, y`` in pixels of the image as the network gets it; None for two.
        heads: As in :func:`mmlavit.analysis.contact_sheet.draw_sheet`.
        stretch: As there.
        device: Where to run the model.
        force: Whether to replace files that are there.

    Returns:
        What to tell the user, line by line.

    Raises:
        FileExistsError: If a file is there and is not to be replaced.
        FileNotFoundError: If a file is missing.
        ValueError: If a stage, point, head or device is not there.
        AnalysisError: If config, checkpoint and image do not go together. Errors of the config
            itself are a :class:`mmlavit.engine.launch.LaunchError`.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise AnalysisError(
            f'{", ".join(missing)} not installed, which the pictures need; '
            f'pip install {" ".join(missing)}'
        )
    from .contact_sheet import draw_sheet
    from .interactive import choose_stages, draw_page

    image, out = Path(image), Path(out)
    if not image.is_file():
        raise FileNotFoundError(f'image not found: {image}')
    sheet, page = (out / f'{image.stem}{suffix}' for suffix in ('.png', '.html'))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'{out} is a file; name a folder to write to')
    if out.is_dir():
        check_free(sheet, force)
        check_free(page, force)
    _check_device(device)
    model, cfg = load_model(config, checkpoint)
    path, lavit = find_lavit(model)
    count = len(lavit.stages)
    if beyond := [m + 1 for m in stages or () if m >= count]:
        raise ValueError(f'stage {beyond[0]} is not there: the LaViT of {config} has {count}')
    chosen = check_stages(stages, count)
    given = load_image(cfg, model.to(device), image)
    height, width = given.picture.shape[:2]
    if points is None:
        points = [(width // 2, height // 2), (width // 4, height // 3)]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f'point {x},{y} is outside of the image, which is {width} x {height} pixels (width '
                'x height) as the network gets it'
            )
    with recording(lavit, _drawn_part, stages=chosen) as layers, torch.no_grad():
        lavit(given.inputs)

    weights = 'random weights' if checkpoint is None else Path(checkpoint).name
    title = f'{Path(config).stem}, {weights}: {image.name}, {width} x {height} pixels'
    figure = draw_sheet(
        given.picture,
        layers,
        points,
        heads,
        stretch=stretch,
        window_sizes=lavit.window_sizes,
        title=title,
    )
    in_page = chosen if stages is not None else choose_stages(layers)
    html = draw_page(given.picture, [x for x in layers if x.stage in in_page], points[0], title)
    # Nothing is left half written where drawing failed.
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(sheet, dpi=100)
    page.write_text(html, encoding='utf-8')
    lines = [
        f'LaViT at {path or "the top"} of {type(model).__name__}; image of {width} x {height} '
        'pixels',
        f'written: {sheet}',
        f'written: {page} ({page.stat().st_size / 1e6:.1f} MB)',
    ]
    if left_out := [m + 1 for m in chosen if m not in in_page]:
        lines.append(f'stages {left_out} are too large for the page; --stages puts them in')
    return lines


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch without CUDA asserts; only its first line is about the name.
        reason = str(error).splitlines()[0]
        raise ValueError(f'device {name!r} cannot be used: {reason}') from error


def _drawn_part(layer: LayerAttention) -> LayerAttention:
    """Of scores only those that are drawn beside a residual are kept."""
    return layer if layer.residual is not None else replace(layer, scores=None)
