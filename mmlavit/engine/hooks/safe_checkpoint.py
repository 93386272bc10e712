"""Checkpoints that outlive a kill, a full disk and a power cut, and a look at them on resuming.

MMEngine's CheckpointHook deletes old checkpoints before it writes the new one, and writes under the
final name. Here a checkpoint gets its name when all of it is on the disk, and only then do older
ones go.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner, find_latest_checkpoint

from ..checkpoint_file import CheckpointError, read_checkpoint, write_whole

_BACKEND = 'mmlavit_safe_local'
# In the message hub, which MMEngine saves and restores. What starts with val is logged as a metric.
_VALIDATED = 'last_validated_iter'


class SafeLocalBackend(LocalBackend):
    """Local files that are whole or not there, and that go when :meth:`flush` says so."""

    def __init__(self) -> None:
        super().__init__()
        self._doomed: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file that bears its name only when all of it is on the disk.

        Args:
            obj: Content.
            filepath: Where to. Until it is whole the content is in a file beside it, with ``.tmp``
                added to the name, and what was there stays.

        Raises:
            CheckpointError: If it cannot be written, as when the disk is full.
        """
        try:
            write_whole(Path(filepath), obj)
        except OSError as error:
            raise CheckpointError(
                f'cannot write {filepath}: {error.strerror}; it takes {len(obj) / 2**20:.1f} MiB. '
                'What was saved before is untouched; make room and go on with --resume'
            ) from error

    def remove(self, filepath: str | Path) -> None:
        """Remove a file at the next :meth:`flush`."""
        self._doomed.append(str(filepath))

    def flush(self) -> None:
        """Remove what is to be removed."""
        while self._doomed:
            Path(self._doomed.pop()).unlink(missing_ok=True)


register_backend(_BACKEND, SafeLocalBackend)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, for trainings that are killed and disks that are full.

    ``default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook'))`` puts it in the place of the
    original, whose options it has. It differs in this:

    - A checkpoint has its name when it is whole; older ones are deleted after that. So saving needs
      room for one checkpoint more than ``max_keep_ckpts``.
    - Resuming first reads all of the checkpoint against its checksums, which loading does not.
    - Where ``last_checkpoint`` is empty or missing, as after a kill in the instant when MMEngine
      writes it, the newest checkpoint that is whole is resumed from; where the work directory has
      been moved, the checkpoint of the same name in it.
    - A validation that the kill prevented is made up for, so the best checkpoint is not missed.
    - Gradients of an accumulation that the checkpoint falls into are saved and restored, in
      trainings of one process.

    MMEngine's FlexibleRunner writes checkpoints by its strategies' means and loads them before it
    asks hooks; with it, only the order of deletions is as above.

    Args:
        interval: Epochs or iterations between checkpoints, as MMEngine counts them.
        **options: The other options of :class:`mmengine.hooks.CheckpointHook`.

    Raises:
        ValueError: If ``backend_args``, ``file_client_args`` or ``out_dir`` name anything but local
            files.
        CheckpointError: In training, if a checkpoint cannot be written; on resuming, if the
            checkpoint is damaged or gone. The text names the file, and what to do.
    """

    def __init__(self, interval: int = -1, **options: object) -> None:
        for name in ('backend_args', 'file_client_args', 'out_dir'):
            value = options.get(name)
            if _is_remote(value) if name == 'out_dir' else value is not None:
                raise ValueError(
                    f'SafeCheckpointHook writes local files only, got {name}={value!r}; for other '
                    "storage use type='CheckpointHook'"
                )
        options['backend_args'] = dict(backend=_BACKEND)
        super().__init__(interval, **options)
        self._gradients: dict = {}

    def before_run(self, runner: Runner) -> None:
        """Look at the checkpoint that is about to be resumed from."""
        if not runner._resume or not isinstance(runner, Runner):
            return
        path = runner._load_from
        if path is None:
            path = self._latest(runner)
        if path is not None and not _is_remote(path):
            require_whole(Path(path), self.filename_tmpl)

    def before_train(self, runner: Runner) -> None:
        """Make up for what the kill prevented."""
        super().before_train(runner)
        if not runner._resume or runner.iter == 0:
            return
        # MMEngine saves this one again when a validation finds a better model.
        self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')
        parameters = dict(runner.model.named_parameters())
        for name, gradient in self._gradients.items():
            parameters[name].grad = gradient.to(parameters[name])
        self._gradients = {}
        if _owes_validation(runner):
            runner.logger.info('The training was stopped before it had validated; validating now.')
            runner.val_loop.run()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save gradients that await another batch before the optimizer takes its step."""
        if runner.distributed or 'optimizer' not in checkpoint:
            return
        checkpoint['gradients'] = {
            name: parameter.grad.cpu()
            for name, parameter in runner.model.named_parameters()
            if parameter.grad is not None
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the gradients until training starts."""
        if runner._resume:
            self._gradients = checkpoint.get('gradients', {})

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint."""
        runner.message_hub.update_info(_VALIDATED, runner.iter)
        super().after_val_epoch(runner, metrics)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        if self.save_best:
            self.file_backend.flush()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        except OSError as error:
            raise CheckpointError(
                f'cannot write {Path(runner.work_dir, "last_checkpoint")}: {error.strerror}; '
                f'{self.last_ckpt} is whole. Make room and go on with --resume'
            ) from error
        self.file_backend.flush()

    def _latest(self, runner: Runner) -> str | None:
        """What ``last_checkpoint`` names, after it is put right where it names nothing."""
        named = find_latest_checkpoint(runner.work_dir)
        if named and (_is_remote(named) or Path(named).exists()):
            return named
        folder = Path(runner.work_dir)
        if self.out_dir not in (None, runner.work_dir):
            folder = Path(self.out_dir) / folder.resolve().name
        if named:
            found = folder / Path(named).name
            if not found.exists():
                return named
        else:
            numbered = _numbered(folder, self.filename_tmpl).values()
            newest_first = sorted(numbered, key=lambda p: p.stat().st_mtime_ns, reverse=True)
            newest = _first_whole(newest_first)
            if newest is None:
                return None
            found = newest
        pointer = Path(runner.work_dir) / 'last_checkpoint'
        wrong = f'names {named}, which is not there' if named else 'is empty or missing'
        runner.logger.warning(f'{pointer} {wrong}; the newest checkpoint here is {found}.')
        barrier()  # nobody writes before everybody has read
        if is_main_process():
            SafeLocalBackend().put(str(found).encode(), pointer)
        barrier()
        return str(found)


def require_whole(path: Path, template: str) -> None:
    """Refuse a checkpoint that is damaged or gone.

    Args:
        path: The checkpoint.
        template: How checkpoints are named, with ``{}`` for the epoch or iteration.

    Raises:
        CheckpointError: If it is; names the newest good one of those before it.
    """
    # One process reads all of the file; the others are told.
    told = [damage(path) if is_main_process() else None]
    broadcast_object_list(told)
    (reason,) = told
    if reason is None:
        return
    found = _numbered(path.parent, template)
    number = _number(path.name, template)
    older = [found[n] for n in sorted(found, reverse=True) if number is None or n < number]
    good = _first_whole([other for other in older if other != path])
    if good is None:
        advice = (
            f'{path.parent} has no good one before it: restore it from a copy, or start again '
            'without --resume'
        )
    else:
        advice = f'the newest good one before it is {good}: go on from that with --resume {good}'
    raise CheckpointError(f'cannot resume from {path}: {reason}; {advice}. Nothing was deleted')


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, by its length, structure and checksums.

    ``torch.load`` does not compare checksums: it takes flipped bits for weights.

    Args:
        path: A file as ``torch.save`` writes it, or a folder, which is not looked into.

    Returns:
        The reason, or None if the file is whole.
    """
    if path.is_dir():
        return None
    if not path.is_file():
        return 'there is no such file'
    try:
        with path.open('rb') as file:
            if file.read(1) == b'\x80':
                # The format before torch 1.6: a bare pickle, which has no checksums.
                read_checkpoint(path)
                return None
        with zipfile.ZipFile(path) as archive:
            # Without checksums, as torch.serialization.set_crc32_options(False) saves, they are 0.
            has_checksums = any(entry.CRC for entry in archive.infolist())
            broken = archive.testzip() if has_checksums else None
    except Exception as error:  # damaged headers raise whatever the wrong numbers lead to
        return f'the file is truncated or damaged ({str(error) or type(error).__name__})'
    return broken and f'the file is damaged (wrong checksum of {broken})'


def _first_whole(paths: list[Path]) -> Path | None:
    return next((path for path in paths if damage(path) is None), None)


def _number(name: str, template: str) -> int | None:
    """The epoch or iteration in the name of a checkpoint."""
    match = re.fullmatch(re.escape(template).replace(re.escape('{}'), r'(\d+)'), name)
    return match and int(match[1])


def _numbered(folder: Path, template: str) -> dict[int, Path]:
    """The checkpoints in a folder by their epoch or iteration."""
    paths = folder.iterdir() if folder.is_dir() else ()
    numbered = ((_number(path.name, template), path) for path in paths)
    return {number: path for number, path in numbered if number is not None}


def _owes_validation(runner: Runner) -> bool:
    """Whether a resumed training stands where it should have validated, and has not."""
    loop = runner.train_loop
    if runner.val_loop is None or runner.message_hub.runtime_info.get(_VALIDATED) == runner.iter:
        return False
    if isinstance(loop, IterBasedTrainLoop):
        count, last = loop.iter, loop.max_iters
    elif loop.iter == loop.epoch * len(loop.dataloader):
        count, last = loop.epoch, loop.max_epochs
    else:
        return False
    loop._decide_current_val_interval()
    return count >= loop.val_begin and (count % loop.val_interval == 0 or count == last)


def _is_remote(path: object) -> bool:
    return path is not None and re.match(r'[\w+-]+:(//|s3:)|s3:', str(path)) is not None
