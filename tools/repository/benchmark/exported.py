"""Exported backbones in onnxruntime on a CPU: float32, and INT8 by its dynamic quantization."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from mmlavit.export.onnx import export_onnx

from .models import BACKBONES
from .suites import Comparison, Row, count_flops, in_one_line
from .timing import interleave
from .workload import Task

#: What is quantized, and the options for it. onnxruntime advises the first for transformers. Its
#: convolutions in INT8 are often slower than in float32, and with signed weights slower still.
QUANTIZED = {
    'linear': dict(op_types_to_quantize=['MatMul', 'Gemm']),
    'linear, conv': dict(unsigned=True),
}


def exported(
    names: Sequence[str], tasks: Sequence[Task], threads: Sequence[int], rounds: int
) -> Iterator[Comparison]:
    """Compare backbones that :func:`mmlavit.export.onnx.export_onnx` has written.

    Args:
        names: Of :data:`~repository.benchmark.models.BACKBONES`.
        tasks: What to time; each file is for the images of one, and training is left out.
        threads: Numbers of threads, one after the other.
        rounds: Rounds of each.

    Yields:
        Two comparisons for each task and number of threads, float32 and INT8, timed together: all
        models take turns in both.
    """
    # It reports each operator that it does not fold.
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    for task in tasks:
        if task.name != 'inference':
            continue
        with tempfile.TemporaryDirectory(prefix='benchmark.') as folder:
            files: dict[str, dict[str, Path]] = {}
            absent: dict[str, dict[str, str]] = {'fp32': {}, 'INT8': {}}
            params = {}
            for i, name in enumerate(names):
                torch.manual_seed(0)
                model = BACKBONES[name](task)
                model.eval()
                params[name] = sum(p.numel() for p in model.parameters())
                file = Path(folder, f'{i}.onnx')
                size = (task.shape[2], task.shape[3])
                try:
                    export_onnx(model, file, size, dynamic=False, batch=task.shape[0])
                except Exception as error:  # of whatever kind somebody else's model raises
                    absent['fp32'][name] = absent['INT8'][name] = in_one_line(error)
                    continue
                files[name] = {'fp32': file}
                try:
                    files[name] |= quantize(file)
                except Exception as error:  # whatever onnxruntime raises
                    absent['INT8'][name] = in_one_line(error)
            for number in threads:
                yield from _time(task, files, absent, params, number, rounds)


def quantize(file: Path) -> dict[str, Path]:
    """Quantize a file dynamically, weights to INT8.

    Args:
        file: The ONNX file. The others are written beside it.

    Returns:
        The files by what of them is quantized, of :data:`QUANTIZED`; without those that have
        nothing of the kind.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # As onnxruntime advises: it folds constants first, among them weights that are split.
    prepared = file.with_suffix('.prepared.onnx')
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    found = {}
    for label, options in QUANTIZED.items():
        options = dict(options)
        kind = QuantType.QUInt8 if options.pop('unsigned', False) else QuantType.QInt8
        made = file.with_suffix(f'.{len(found)}.onnx')
        quantize_dynamic(prepared, made, weight_type=kind, **options)
        nodes = onnx.load(made).graph.node
        if any(node.op_type in ('MatMulInteger', 'ConvInteger') for node in nodes):
            found[label] = made
    return found


def run_by_onnxruntime(file: Path, images: torch.Tensor, threads: int) -> Callable[[], list]:
    """A function that runs a file on images.

    Args:
        file: The ONNX file, on a CPU.
        images: What it is run on.
        threads: Threads of onnxruntime, which has its own.

    Returns:
        The function; it returns the maps as arrays.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails raises, too
    # Threads that wait for more to do would take the processor from the model whose turn it is.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    feed = {'image': images.numpy()}
    return lambda: session.run(None, feed)


def _time(
    task: Task,
    files: Mapping[str, Mapping[str, Path]],
    absent: Mapping[str, dict[str, str]],
    params: Mapping[str, int],
    threads: int,
    rounds: int,
) -> Iterator[Comparison]:
    import onnxruntime

    shape = ' x '.join(map(str, task.shape))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(task.shape, generator=generator)
    steps = {
        (name, kind): run_by_onnxruntime(file, images, threads)
        for name, kinds in files.items()
        for kind, file in kinds.items()
    }
    for key in _slower_ones(interleave(steps, 2, description=f'onnxruntime {shape}: INT8')):
        del steps[key]
    seconds = interleave(steps, rounds, description=f'onnxruntime {shape}')
    words = f'onnxruntime {onnxruntime.__version__}, {threads} thread{"s" * (threads > 1)}'
    for precision in ('fp32', 'INT8'):
        rows = []
        for (name, kind), times in seconds.items():
            if (kind == 'fp32') == (precision == 'fp32'):
                flops = count_flops(BACKBONES[name], task)
                rows.append(Row(name, times, format=kind, params=params[name], gflops=flops / 2e9))
        missing = dict(absent[precision])
        if precision == 'INT8':
            missing |= {
                name: 'it has no products of weights that are quantized'
                for name, kinds in files.items()
                if len(kinds) == 1 and name not in missing
            }
        conditions = f'{precision}, {words}'
        yield Comparison('inference', shape, task.shape[0], conditions, rows, missing)


def _slower_ones(
    seconds: Mapping[tuple[str, str], Sequence[float]],
) -> list[tuple[str, str]]:
    """The quantized forms of each model but its fastest."""
    slower = []
    for name in dict.fromkeys(name for name, _ in seconds):
        kinds = [key for key in seconds if key[0] == name and key[1] != 'fp32']
        slower += sorted(kinds, key=lambda key: min(seconds[key]))[1:]
    return slower
