"""ONNX files for images of any size, compared with PyTorch before they are kept."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops.mode import in_evaluation
from .agreement import VALUES, Agreement
from .exportable import Exportable, ExportError
from .plain import plain_operators

# Shape of the images -> unit -> largest difference.
Differences = dict[tuple[int, ...], dict[str, float]]

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
# A file of ONNX holds at most 2 GB; what a model computes with comes on top of its weights.
MAX_BYTES = 1.8e9


def require_exporter() -> None:
    """Make sure that this environment can export and compare.

    Raises:
        ExportError: If packages are missing, or torch has no exporter for dynamic sizes.
    """
    # torch 2.1 has no Dim at all.
    if not hasattr(getattr(torch.export, 'Dim', None), 'DYNAMIC'):
        raise ExportError(
            f'torch {torch.__version__} has no exporter for images of any size; it needs at least '
            'torch 2.6 (tried with 2.13)'
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f'{", ".join(missing)} not installed, which an export needs; '
            f'pip install {" ".join(missing)}'
        )


def export_onnx(
    model: nn.Module,
    file: str | Path,
    size: tuple[int, int] = (224, 320),
    *,
    opset: int | None = None,
    dynamic: bool = True,
    batch: int = 1,
    force: bool = False,
    seed: int = 0,
) -> Differences:
    """Export a model to ONNX, and compare the file with the model before it takes its place.

    The input of the file is ``image``, normalized as in training, or uint8 for a
    :class:`mmlavit.export.exportable.Exportable` with preprocessing. Its outputs have the names
    that such a model says; of others they are ``map0``, ``map1``, ..., or ``scores`` for one that
    returns a single tensor.

    Args:
        model: Takes images (B, C, H, W), with as many channels as its first convolution; returns a
            tensor or a sequence of tensors.
        file: Where the file goes. It comes to be there whole or not at all.
        size: Height and width that are recorded: all that a file of fixed size takes, and an
            example of what one with dynamic axes takes.
        opset: Version of ONNX's operators; None for what torch takes.
        dynamic: Whether batch, height and width may be any.
        batch: Images at a time that a file of fixed size takes; one with dynamic axes takes any.
        force: Whether to replace a file that is there.
        seed: Of the images to compare on, and of their sizes.

    Returns:
        Shape of the images -> unit -> largest difference from PyTorch of the outputs that are
        compared in it, see :mod:`mmlavit.export.agreement`. With dynamic axes no shape but the
        first has been seen by the exporter.

    Raises:
        FileExistsError: If the file is there and is not to be replaced.
        FileNotFoundError: If its folder is not.
        ValueError: If an argument does not fit.
        ExportError: If the model cannot be exported, or onnxruntime computes something else. Then
            nothing is written.
    """
    require_exporter()
    file = Path(file)
    _check(size, opset, batch)
    check_free(file, force)
    if sum(t.nbytes for t in model.state_dict().values()) > MAX_BYTES:
        raise ExportError('the weights do not fit a file of ONNX, which holds at most 2 GB')
    generator = torch.Generator().manual_seed(seed)
    # Two images, since exporters take an axis of 1 for one that is always 1.
    shapes: list[tuple[int, ...]] = [(2 if dynamic else batch, _channels(model), *size)]
    if dynamic:
        shapes += _other_shapes(shapes[0], generator)
    with in_evaluation(model), torch.no_grad():
        example = _images(model, shapes[0], generator)
        program = _record(model, example, list(_outputs(model, example)), opset, dynamic)
        if isinstance(model, Exportable):
            program.model.metadata_props.update(model.metadata)
        with tempfile.TemporaryDirectory(prefix=f'.{file.name}.', dir=file.parent) as folder:
            made = Path(folder, file.name)
            program.save(made, external_data=False)
            differences = compare(model, made, shapes, generator)
            # Exporting takes minutes, in which a file may have come to be there.
            check_free(file, force)
            os.replace(made, file)
    return differences


def _check(size: tuple[int, int], opset: int | None, batch: int) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f'size must be a height and a width of at least 1, got {size}')
    if opset is not None and opset < 18:
        raise ValueError(f'opset must be at least 18, which the exporter writes, got {opset}')
    if batch < 1:
        raise ValueError(f'batch must be at least 1, got {batch}')


def check_free(file: Path, force: bool) -> None:
    """Make sure that a file may be written.

    Args:
        file: Where it goes.
        force: Whether it may replace one that is there.

    Raises:
        FileExistsError: If the file is there and is not to be replaced.
        FileNotFoundError: If its folder is not.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f'{file.parent} is no folder; make it, or write elsewhere')
    if file.is_dir():
        raise FileExistsError(f'{file} is a folder; name a file')
    if file.exists() and not force:
        raise FileExistsError(f'{file} is there already; name another, or force its replacement')


def _images(model: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise that the model takes for images."""
    if isinstance(model, Exportable) and model.preprocessing is not None:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def _outputs(model: nn.Module, images: Tensor) -> dict[str, tuple[Agreement, Tensor]]:
    """What a model computes, by the names in its file, and how it is compared."""
    found = model(images)
    values = [found] if isinstance(found, Tensor) else found
    agreements = model.outputs if isinstance(model, Exportable) else {}
    if not agreements:
        names = ['scores'] if isinstance(found, Tensor) else [f'map{i}' for i in range(len(found))]
        agreements = dict.fromkeys(names, VALUES)
    pairs = zip(agreements.values(), values, strict=True)
    return dict(zip(agreements, pairs, strict=True))


def _name(model: nn.Module) -> str:
    return type(model.model if isinstance(model, Exportable) else model).__name__


def _channels(model: nn.Module) -> int:
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise ExportError(f'{_name(model)} has no convolution that says what images it takes')
    return convolution.in_channels


def _other_shapes(shape: tuple[int, ...], generator: torch.Generator) -> list[tuple[int, ...]]:
    """Four other shapes: one image, square; more, smaller and larger, mostly no round numbers."""
    channels, most = shape[1], 2 * max(shape[2:])
    others: list[tuple[int, ...]] = [(1, channels, 64, 64)]
    for batch, low in ((3, 1), (1, most // 2), (2, 1)):
        sides = torch.randint(low, most, (2,), generator=generator).add(32)
        others.append((batch, channels, *sides.tolist()))
    return others


def _record(
    model: nn.Module, example: Tensor, names: list[str], opset: int | None, dynamic: bool
) -> torch.onnx.ONNXProgram:
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    try:
        with warnings.catch_warnings(), plain_operators(model):
            # Of torch, about itself.
            warnings.simplefilter('ignore')
            # Never None with dynamo=True.
            return torch.onnx.export(  # type: ignore[return-value]
                model,
                (example,),
                dynamo=True,
                input_names=['image'],
                output_names=names,
                opset_version=opset,
                dynamic_shapes=(axes,) if dynamic else None,
                verbose=False,
            )
    except Exception as error:
        # The exporter wraps whatever went wrong, and explains at length.
        cause = error.__cause__ or error
        reason = next(filter(None, map(str.strip, str(cause).splitlines())), type(cause).__name__)
        raise ExportError(
            f'torch.onnx cannot export {_name(model)}'
            f'{" for images of any size" if dynamic else ""}: {reason}'
        ) from error


def compare(
    model: nn.Module,
    file: str | Path,
    shapes: list[tuple[int, ...]],
    generator: torch.Generator,
) -> Differences:
    """Run a file in onnxruntime, on a CPU, beside the model that it was made from.

    Args:
        model: The model, in evaluation mode.
        file: The ONNX file.
        shapes: Shapes (B, C, H, W) of the images, which are noise.
        generator: Makes the images.

    Returns:
        As :func:`export_onnx` does.

    Raises:
        ExportError: If onnxruntime fails, or a difference is more than rounding.
    """
    # From 1.29 on onnxruntime reports to its makers unless told before it is imported.
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails raises, too
    providers = ['CPUExecutionProvider']
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    differences: Differences = {}
    for shape in shapes:
        images = _images(model, shape, generator)
        with torch.no_grad():
            outputs = _outputs(model, images)
        at = 'images of ' + ' x '.join(map(str, shape))
        try:
            values = session.run(list(outputs), {'image': images.numpy()})
        except Exception as error:
            reason = ' '.join(str(error).split())
            raise ExportError(f'onnxruntime fails on {at}: {reason}') from error
        largest: dict[str, float] = {}
        for value, (name, (agreement, expected)) in zip(values, outputs.items(), strict=True):
            found = torch.from_numpy(value)
            if found.shape != expected.shape:
                raise ExportError(
                    f'onnxruntime gives {name} {tuple(found.shape)} for {at}, PyTorch '
                    f'{tuple(expected.shape)}'
                )
            difference = agreement.measure(found, expected)
            # This way round NaN is an error, too.
            if not difference <= agreement.tolerance:
                raise ExportError(
                    f'onnxruntime and PyTorch differ by {difference:.1e} {agreement.unit} on {at}, '
                    f'in {name}; at most {agreement.tolerance:.0e} is rounding'
                )
            largest[agreement.unit] = max(difference, largest.get(agreement.unit, 0.0))
        differences[shape] = largest
    return differences
