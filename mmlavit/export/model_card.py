"""What is known of a published model: its card, and its entry in a model index."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.safetensors_file import SUFFIX
from .privacy import Privacy
from .publish import PublishError, Release, sha256


class _Toolbox(NamedTuple):
    name: str
    task: str  # as model indexes call it
    apis: str
    inferencer: str


_TOOLBOXES = {
    'mmdet': _Toolbox('MMDetection', 'Object Detection', 'mmdet.apis', 'DetInferencer'),
    'mmseg': _Toolbox('MMSegmentation', 'Semantic Segmentation', 'mmseg.apis', 'MMSegInferencer'),
    'mmpretrain': _Toolbox(
        'MMPretrain', 'Image Classification', 'mmpretrain', 'ImageClassificationInferencer'
    ),
}
# In a toolbox's figures, beside the metrics.
_NO_METRICS = {'data_time', 'time', 'step', 'epoch', 'iter', 'memory'}


@dataclass(frozen=True)
class Facts:
    """What a checkpoint does not know of itself.

    Attributes:
        data: What it was trained on, as a reader finds it.
        data_licence: On what terms that may be used.
        command: The command that trained it.
        hardware: What that ran on.
        metrics: Figures on the test set, by the toolbox's names.
        validation: Figures on the validation set, of this very checkpoint.
        validated_at: When those were measured, in words; empty where nothing was.
        seconds: How long the iterations of the training took.
        log: The file beside the weights that has the log; empty where there is none.
    """

    data: str = ''
    data_licence: str = ''
    command: str = ''
    hardware: str = ''
    metrics: Mapping[str, float] | None = None
    validation: Mapping[str, float] | None = None
    validated_at: str = ''
    seconds: float | None = None
    log: str = ''

    def check(self, privacy: Privacy) -> None:
        """Refuse what is not to be published.

        Args:
            privacy: What that is.

        Raises:
            PrivacyError: If a text has a private name or a path of a machine.
        """
        for name in ('data', 'data_licence', 'command', 'hardware'):
            privacy.check(getattr(self, name), name)
        for name in self.metrics or ():
            privacy.check(name, 'the name of a metric')


def read_test_log(file: str | Path) -> dict[str, float]:
    """Figures on the test set, from what a test writes.

    Args:
        file: ``WORK_DIR/TIME/TIME.json`` of ``tools/test.py``.

    Returns:
        The metrics by name.

    Raises:
        PublishError: If the file is not there or is none of a test.
    """
    lines = _read_lines(Path(file))
    if len(lines) != 1 or 'step' in lines[0] or not (found := _metrics(lines[0])):
        raise PublishError(
            f'{file} is no result of a test; tools/test.py writes WORK_DIR/TIME/TIME.json'
        )
    return found


def read_training_log(
    files: Sequence[str | Path], meta: Mapping[str, Any]
) -> tuple[dict[str, float], str, float | None]:
    """What the log of a training says of one of its checkpoints.

    Args:
        files: ``WORK_DIR/TIME/vis_data/TIME.json``, several in their order if it was resumed.
        meta: ``epoch`` and ``iter`` of the checkpoint.

    Returns:
        Metrics of the validation at that point, that point in words, and the seconds that the
        iterations up to it took: the logged time of one, times how many there were since the line
        before. Without such a validation there are no metrics, and without a line of training no
        seconds.

    Raises:
        PublishError: If a file is not there or is no such log.
    """
    epoch, iteration = meta.get('epoch') or 0, meta.get('iter') or 0
    point = f'epoch {epoch}' if epoch else f'iteration {iteration}'
    found: dict[str, float] = {}
    seconds, before = None, 0
    for line in (line for file in files for line in _read_lines(Path(file))):
        step = line.get('step')
        if not isinstance(step, int):
            raise PublishError(
                f'{files[0]} is no log of a training; tools/train.py writes '
                'WORK_DIR/TIME/vis_data/TIME.json'
            )
        if 'iter' in line:
            if step <= iteration and 'time' in line:
                seconds = (seconds or 0) + line['time'] * max(step - before, 0)
            before = step
        # Trainings without epochs may log each validation as of epoch 0.
        elif (step or before) == iteration or (epoch and step == epoch):
            found = _metrics(line)
    return found, point, seconds


def training_log(files: Sequence[str | Path]) -> bytes:
    """The log of a training as it is published: its numbers, a line of JSON each time.

    Args:
        files: As for :func:`read_training_log`.

    Returns:
        The content of one file.

    Raises:
        PublishError: If a file is not there or is no log.
    """
    lines = (line for file in files for line in _read_lines(Path(file)))
    numbers = (
        {name: value for name, value in line.items() if isinstance(value, int | float)}
        for line in lines
    )
    return ''.join(f'{json.dumps(line)}\n' for line in numbers).encode()


def _read_lines(file: Path) -> list[dict]:
    try:
        texts = file.expanduser().read_text(encoding='utf-8').splitlines()
        lines = [json.loads(text) for text in texts if text.strip()]
    except OSError as error:
        raise PublishError(f'cannot read {file}: {error.strerror}') from error
    except ValueError as error:
        raise PublishError(f'{file} is no log: {error}') from error
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise PublishError(f'{file} is no log of MMEngine: each line must be a dict in JSON')
    return lines


def _metrics(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(f'{value:.4g}')
        for name, value in line.items()
        if name not in _NO_METRICS and isinstance(value, int | float) and math.isfinite(value)
        # What COCO's tools say of sizes that no object has.
        if value != -1
    }


def metafile_entry(release: Release, files: Mapping[str, bytes], facts: Facts) -> dict:
    """The entry of a model in an index of OpenMMLab's format.

    Args:
        release: The model.
        files: Its files.
        facts: What else is known.

    Returns:
        The entry. Figures are those on the test set alone, by the toolbox's own names.
    """
    meta = release.meta
    config = read_literals(meta['cfg'])
    (weights,) = (name for name in files if name.endswith('.pth'))
    metadata = {
        'Trained': True,
        'Training Data': facts.data or _dataset_of(config),
        'Licence of the Data': facts.data_licence,
        'Epochs': meta.get('epoch'),
        'Iterations': meta.get('iter'),
        'Seed': meta.get('seed'),
        'Training Time': _duration(facts.seconds),
        'Training Resources': facts.hardware,
        'Training Command': facts.command,
        'Training Log': f'checkpoints/{facts.log}' if facts.log else '',
        'Parameters': _parameters(release),
        'Precision': meta.get('precision', 'float32'),
        'SHA256': sha256(files[weights]),
    }
    entry: dict[str, Any] = {
        'Name': release.name,
        'In Collection': 'LaViT',
        'Config': f'configs/{meta["name"]}.py',
        'Weights': f'checkpoints/{weights}',
        'Metadata': {key: value for key, value in metadata.items() if value not in (None, '')},
    }
    if facts.metrics and meta.get('part') != 'backbone':
        entry['Results'] = [
            {'Task': task, 'Dataset': facts.data or _dataset_of(config), 'Metrics': metrics}
            for task, metrics in _by_task(facts.metrics, _toolbox_of(config).task).items()
        ]
    return entry


def _by_task(metrics: Mapping[str, float], task: str) -> dict[str, dict[str, float]]:
    """Figures by what they are of, as mmdet's indexes have them: masks apart from boxes."""
    if not any('segm' in name for name in metrics):
        return {task: dict(metrics)}
    boxes = {name: value for name, value in metrics.items() if 'bbox' in name}
    masks = {name: value for name, value in metrics.items() if name not in boxes}
    tasks = {task: boxes, 'Instance Segmentation': masks}
    return {name: figures for name, figures in tasks.items() if figures}


def model_card(release: Release, files: Mapping[str, bytes], facts: Facts) -> str:
    """The card of a model, in Markdown.

    Args:
        release: The model.
        files: Its files.
        facts: What else is known.

    Returns:
        The text.
    """
    meta = release.meta
    config = read_literals(meta['cfg'])
    model = config.get('model') or {}
    backbone = model.get('backbone') or {}
    kind = f"{_toolbox_of(config).name}'s `{model.get('type')}` with a `{backbone.get('type')}`"
    if isinstance(backbone.get('arch'), str):
        kind += f' ({backbone["arch"]})'
    is_backbone = meta.get('part') == 'backbone'
    what = f'The backbone, alone, of {kind}' if is_backbone else kind
    trained_on = facts.data or _dataset_of(config)
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    rows = {
        'config': f'`{meta["name"]}.py`; all of it is in the checkpoint, as `meta.cfg`',
        'data': trained_on,
        'licence of the data': facts.data_licence or 'not stated: look before you rely on it',
        'classes': _classes(classes),
        'length': f'{meta.get("epoch") or 0} epochs, {meta.get("iter") or 0} iterations',
        'weights': {
            'ema': 'averages over the training (EMAHook)',
            'last step': 'those of the last step; there are averages (EMAHook), not published here',
        }.get(meta.get('weights', ''), ''),
        'precision': meta.get('precision', 'float32'),
        'parameters': f'{_parameters(release):,}',
        'seed': meta.get('seed'),
        'command': f'`{facts.command}`' if facts.command else 'not recorded',
        'time': _time(facts),
        'log': f'`{facts.log}`' if facts.log else '',
        'weights saved': f'{meta["time"][:4]}-{meta["time"][4:6]}-{meta["time"][6:8]}',
        'trained with': _trained_with(meta),
        'published with': f'mmlavit {meta["mmlavit_version"]}',
    }
    lines = [f'# {release.name}', '', f'{what}, trained on {trained_on}.', '']
    lines += _table(('file', 'bytes', 'SHA-256'), _file_rows(files))
    lines += ['## Figures', '', *_figures(facts, is_backbone), '## Training', '']
    known = [(name, value) for name, value in rows.items() if value not in (None, '')]
    lines += _table(('', ''), known)
    lines += ['## Use', '', *_use(release, files, config)]
    return '\n'.join(lines)


def _trained_with(meta: Mapping[str, Any]) -> str:
    """MMEngine's version, and the commit that it appends: of the folder the training began in."""
    found = re.fullmatch(r'(.+?)([0-9a-f]{40}|unknown)?', str(meta.get('mmengine_version') or ''))
    if not found:
        return 'MMEngine of an unknown version'
    version, commit = found.groups()
    known = commit and commit != 'unknown'
    return f'MMEngine {version}' + (f', in a repository at commit {commit[:8]}' if known else '')


def read_literals(config: str) -> dict[str, Any]:
    """The settings of a config that are plain values, without running it.

    Args:
        config: A config as MMEngine writes it.

    Returns:
        Values by name; None in the place of what is no plain value.
    """

    def value(node: ast.expr | None) -> Any:
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
            parts = {} if not node.args else value(node.args[0]) or {}
            return {**parts, **{k.arg: value(k.value) for k in node.keywords if k.arg}}
        if isinstance(node, ast.Dict):
            items = zip(node.keys, node.values, strict=True)
            return {value(k): value(v) for k, v in items if k is not None}
        if isinstance(node, ast.List | ast.Tuple):
            return [value(element) for element in node.elts]
        try:
            return ast.literal_eval(node) if node else None
        except ValueError:
            return None

    return {
        target.id: value(statement.value)
        for statement in ast.parse(config).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _toolbox_of(config: Mapping[str, Any]) -> _Toolbox:
    # Configs of pure Python name no scope, but the module of each type.
    kind = str((config.get('model') or {}).get('type'))
    scope = config.get('default_scope') or kind.partition('.')[0]
    if scope not in _TOOLBOXES:
        raise PublishError(
            f'the config has default_scope={scope!r}; it must be one of {list(_TOOLBOXES)}'
        )
    return _TOOLBOXES[scope]


def _dataset_of(config: Mapping[str, Any]) -> str:
    """Type and folder of the training data, inside wrappers that repeat or mix."""
    dataset = (config.get('train_dataloader') or {}).get('dataset') or {}
    while isinstance(inner := dataset.get('dataset'), dict):
        dataset = inner
    root = dataset.get('data_root')
    return f'{dataset.get("type")} in {root}' if root else str(dataset.get('type'))


def _parameters(release: Release) -> int:
    """Numbers in floating-point weights; statistics of norms are among them."""
    return sum(weight.numel() for weight in release.weights.values() if weight.is_floating_point())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ''
    minutes = round(seconds / 60)
    if minutes < 2:
        return f'{seconds:.0f} s'
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


def _time(facts: Facts) -> str:
    took = 'not recorded'
    if facts.seconds is not None:
        took = f'{_duration(facts.seconds)} of iterations; validation is not counted'
    return f'{took}; on {facts.hardware}' if facts.hardware else took


def _classes(names: Sequence) -> str:
    shown = ', '.join(map(str, names[:20]))
    return f'{len(names)}: {shown}{", ..." if len(names) > 20 else ""}' if names else ''


def _file_rows(files: Mapping[str, bytes]) -> list[tuple[str, str, str]]:
    return [(f'`{name}`', f'{len(c):,}', f'`{sha256(c)}`') for name, c in files.items()]


def _figures(facts: Facts, is_backbone: bool) -> list[str]:
    lines = ['Of the whole model that this backbone is from.', ''] if is_backbone else []
    if facts.metrics:
        lines += ['On the test set that the config names:', '']
        lines += _table(('metric', ''), list(facts.metrics.items()))
    if facts.validation:
        lines += [f'In the training, on its validation set, at {facts.validated_at}:', '']
        lines += _table(('metric', ''), list(facts.validation.items()))
    elif facts.validated_at:
        lines += [f'The log of the training has no validation at {facts.validated_at}.', '']
    if not facts.metrics and not facts.validation:
        lines += ['None were given.', '']
    return lines


def _use(release: Release, files: Mapping[str, bytes], config: Mapping[str, Any]) -> list[str]:
    file = next(name for name in files if name.endswith('.pth'))
    name = release.meta['name']
    start = f'`model.backbone.init_cfg.checkpoint={file}` starts the backbone of any detector'
    if release.meta.get('part') == 'backbone':
        lines = [f'{start}, segmentor or classifier of the same arch.']
    else:
        toolbox = _toolbox_of(config)
        lines = [
            '```python',
            'from mmlavit.compat import repair_torchvision',
            '',
            'repair_torchvision()',
            '',
            f'from {toolbox.apis} import {toolbox.inferencer}',
            '',
            # A line each, as a formatter wants it where names are long.
            f'inferencer = {toolbox.inferencer}(',
            f"    'configs/{name}.py',",
            f"    '{file}',",
            ')',
            '```',
            '',
            f'`load_from={file}` starts a training of the whole model. {start}, segmentor or '
            'classifier of the same arch.',
        ]
    return [*lines, '', f'Once mmlavit is imported, the `{SUFFIX}` file does the same.', '']


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown, and an empty line."""

    def line(cells: Sequence[object]) -> str:
        texts = (' '.join(str(cell).split()).replace('|', r'\|') for cell in cells)
        return f'| {" | ".join(texts)} |'

    return [line(head), '|' + '---|' * len(head), *map(line, rows), '']
