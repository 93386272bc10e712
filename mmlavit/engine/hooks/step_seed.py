"""Random numbers that depend on the place in a training, not on what came before it.

MMEngine seeds a training once, and its data workers once; a resumed training starts these sequences
again, so it draws other crops and drops other paths than the one that was stopped would have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import DistSamplerSeedHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import Dataset

# Steps and data draw from different sequences.
_STEP, _DATA = 0, 1


@HOOKS.register_module()
class StepSeedHook(DistSamplerSeedHook):
    """Makes a resumed training draw what the undisturbed one draws.

    ``default_hooks = dict(sampler_seed=dict(type='StepSeedHook'))`` puts it in the place of
    MMEngine's DistSamplerSeedHook, whose work it does too. Before every iteration the generators
    are seeded with the training's seed, the number of the iteration and the rank, so processes drop
    other paths; before every batch of data is loaded, in whatever process, with the seed, the rank,
    and the number of the batch. So augmentation does not depend on the number of workers, either.

    A training that is resumed inside an epoch goes on with the batches that the epoch had left,
    and in iteration-based loops nothing is loaded only to be skipped.

    Datasets that are iterable or loaded without batches keep MMEngine's order; a warning says so.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Number the batches of the training's data."""
        loop = runner.train_loop
        loader = loop.dataloader
        if loader.batch_sampler is None:
            runner.logger.warning(
                'StepSeedHook: the training data is not loaded by a batch sampler, so a resumed '
                'training will see other data than an undisturbed one.'
            )
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        batches = NumberedBatches(loader.batch_sampler, runner.seed, endless)
        self._restore_seed(runner, getattr(loader.batch_sampler, 'sampler', None))
        # DataLoader refuses a new batch sampler for the sake of iterators that have the old one.
        vars(loader).update(batch_sampler=batches, _iterator=None)
        loader.dataset.__getitems__ = partial(_fetch, loader.dataset)
        if endless:
            loop.dataloader_iterator = _Stream(loop, batches)
        else:
            batches.skip = self._trained_of_epoch(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Give the epoch its own order and numbers."""
        super().before_train_epoch(runner)
        batches = runner.train_loop.dataloader.batch_sampler
        if isinstance(batches, NumberedBatches):
            batches.epoch = runner.epoch

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Seed the iteration."""
        torch.manual_seed(seed_process(_STEP, runner.seed, runner.iter, get_rank()))

    @staticmethod
    def _restore_seed(runner: Runner, sampler: Any) -> None:
        """Shuffle as the training that is resumed did, if its seed was drawn, not given."""
        if hasattr(sampler, 'seed'):
            sampler.seed = runner.message_hub.runtime_info.get('sampler_seed', sampler.seed)
            runner.message_hub.update_info('sampler_seed', sampler.seed)

    @staticmethod
    def _trained_of_epoch(runner: Runner) -> int:
        """How many batches of the current epoch a resumed training has had."""
        length = len(runner.train_loop.dataloader)
        before = runner.message_hub.runtime_info.get('batches_per_epoch', length)
        runner.message_hub.update_info('batches_per_epoch', length)
        trained = runner.iter - runner.epoch * before
        if before == length and 0 <= trained <= length:
            return trained
        runner.logger.warning(
            f'StepSeedHook: an epoch had {before} batches when the checkpoint was saved and has '
            f'{length} now, so this training is not the one that was stopped.'
        )
        return 0


class NumberedBatches:
    """A batch sampler whose batches know their number.

    Args:
        batches: The batch sampler; its attributes can be read here.
        seed: Seed of the training.
        endless: Whether to start again, with the next epoch, after the last batch.

    Attributes:
        epoch: How often the data has been gone through.
        skip: How many batches to leave out next.
    """

    def __init__(self, batches: Any, seed: int, endless: bool) -> None:
        self.batches = batches
        self.seed = seed
        self.endless = endless
        self.epoch = 0
        self.skip = 0

    def __iter__(self) -> Iterator[NumberedBatch]:
        while True:
            number = -1
            for number, batch in enumerate(self.batches):
                if self.skip:
                    self.skip -= 1
                else:
                    yield NumberedBatch(batch, (self.seed, get_rank(), self.epoch, number))
            if not self.endless or number < 0:
                return
            self.epoch += 1
            sampler: Any = getattr(self.batches, 'sampler', None)
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(self.epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':  # not there yet, as while it is being copied
            raise AttributeError(name)
        return getattr(self.batches, name)


class NumberedBatch(list):
    """The indices of a batch, with what its random numbers depend on."""

    def __init__(self, indices: list[int], key: tuple[int, ...] = ()) -> None:
        super().__init__(indices)
        self.key = key


class _Stream:
    """The batches of an iteration-based loop; in place of MMEngine's iterator, which it imitates.

    MMEngine's loop skips what was trained on before: its newer releases by ``skip_iter``, the
    original ones by loading and dropping every batch.
    """

    def __init__(self, loop: IterBasedTrainLoop, batches: NumberedBatches) -> None:
        self._loader = loop.dataloader
        self._batches = batches
        self._iterator: Iterator | None = None
        self._to_drop = 0
        if not hasattr(loop.dataloader_iterator, 'skip_iter'):
            self._to_drop = batches.skip = loop.iter

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        if self._to_drop:
            self._to_drop -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Leave out the first batches."""
        self._batches.skip = num_iters


def seed_process(*key: int) -> int:
    """Seed Python's, NumPy's and torch's CPU generator of this process.

    Args:
        key: Whatever the random numbers are to depend on; not negative.

    Returns:
        The seed that torch got, for its generators on other devices.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    seed = int(words[2]) << 32 | int(words[3])
    # torch.manual_seed would prepare CUDA, too, which costs more than all of this.
    torch.default_generator.manual_seed(seed)
    return seed


def _fetch(dataset: Dataset, batch: list[int]) -> list:
    """What ``dataset.__getitems__`` is to do, by which torch asks for a batch."""
    if isinstance(batch, NumberedBatch):
        seed_process(_DATA, *batch.key)
    own = getattr(type(dataset), '__getitems__', None)
    return own(dataset, batch) if own else [dataset[index] for index in batch]
