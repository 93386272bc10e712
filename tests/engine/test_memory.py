"""Memory over many passes and for a large image; each run is a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmlavit import DiagonalityLossHook, LaViT
from mmlavit.compat import repair_torchvision

GIB = 2**30
STATUS = Path('/proc/self/status')
GLIBC = sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'malloc_trim')

pytestmark = pytest.mark.skipif(not GLIBC, reason='reads /proc and calls malloc_trim of glibc')


def status_bytes(field: str) -> int:
    """A size in /proc/self/status: VmRSS is resident now, VmHWM the most there was.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith(f'{field}:')]
    return int(line.split()[1]) * 1024


class Held(NamedTuple):
    """What a process holds on to."""

    resident: int  # bytes
    tensors: int
    blocks: int  # that Python's allocator has given out

    @classmethod
    def now(cls) -> Held:
        """After everything that nobody needs has gone back to the system.

        glibc keeps freed memory for later; malloc_trim hands it back, so that what grows is in use.
        """
        gc.collect()
        tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        ctypes.CDLL(None).malloc_trim(0)
        return cls(status_bytes('VmRSS'), tensors, sys.getallocatedblocks())


def alone(function: Callable, *args: object) -> object:
    """What a function returns in a new process, whose memory is its own."""
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


def grown(early: Held, late: Held, passes: int) -> set[str]:
    """What grew: memory by 5 %, tensors by one, Python's blocks by one in two passes."""
    growth = late.resident / early.resident - 1
    print(f'{passes} passes: resident {early.resident / 2**20:.0f} MiB and {growth:+.2%},')
    print(f'tensors {early.tensors} then {late.tensors}, blocks {early.blocks} then {late.blocks}')
    found = {
        'resident': growth > 0.05,
        'tensors': late.tensors > early.tensors,
        'blocks': late.blocks - early.blocks > passes / 2,
    }
    return {what for what, is_so in found.items() if is_so}


def leak_maps(model: LaViT) -> None:
    """Keep the maps of every size, as a cache without bound does."""
    cache = {}
    model.register_forward_hook(
        lambda _, images, maps: cache.update({tuple(images[0].shape): maps})
    )


def leak_sizes(model: LaViT) -> None:
    """Keep every size and no tensor."""
    seen = []
    model.register_forward_hook(lambda _, images, __: seen.append(tuple(images[0].shape)))


def many_passes(
    early: int,
    late: int,
    largest: int,
    leak: Callable[[LaViT], None] | None = None,
    onednn: bool = True,
) -> list[Held]:
    """What is held after so many passes of images of any size up to ``largest``."""
    torch.backends.mkldnn.set_flags(onednn)
    torch.manual_seed(0)
    model = LaViT('nano').eval()
    if leak is not None:
        leak(model)
    sizes = random.Random(0)
    held = []
    with torch.no_grad():
        for i in range(1, late + 1):
            size = sizes.randint(1, largest), sizes.randint(1, largest)
            model(torch.randn(sizes.randint(1, 2), 3, *size))
            if i in (early, late):
                held.append(Held.now())
    return held


@pytest.mark.slow
def test_a_thousand_passes_over_changing_sizes_hold_on_to_nothing():
    """Where oneDNN, which keeps kernels for new shapes, cannot be what grows."""
    assert not grown(*alone(many_passes, 100, 1000, 100, None, False), passes=900)


@pytest.mark.slow
def test_a_thousand_passes_with_onednn():
    # In the first seven hundred, over sizes so large, oneDNN has made the kernels that it keeps.
    assert not grown(*alone(many_passes, 700, 1300, 300), passes=600)


@pytest.mark.slow
def test_a_leak_of_memory_is_caught():
    assert 'resident' in grown(*alone(many_passes, 100, 300, 200, leak_maps), passes=200)


def passes_with_leaks(leaks: list[Callable[[LaViT], None] | None]) -> list[list[Held]]:
    return [many_passes(100, 400, 40, leak) for leak in leaks]


@pytest.mark.slow
def test_a_leak_of_an_object_in_each_pass_is_caught():
    runs = alone(passes_with_leaks, [leak_maps, leak_sizes, None])
    maps, sizes, nothing = (grown(*held, passes=300) for held in runs)
    assert 'tensors' in maps
    assert 'blocks' in sizes
    assert not nothing & {'tensors', 'blocks'}


# ---- Training ------------------------------------------------------------------------------------


class Images(Dataset):
    """Noise: a size of its own for every batch of two, or ``sizes`` of them by turns."""

    def __init__(self, number: int, sizes: int | None) -> None:
        self.number = number
        self.sizes = sizes

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        batch = index // 2
        sizes = random.Random(batch if self.sizes is None else batch % self.sizes)
        size = sizes.randint(1, 64), sizes.randint(1, 64)
        return dict(inputs=torch.randn(3, *size, generator=generator))


class Regressor(BaseModel):
    """Wants every map to be 1."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = LaViT('nano')

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> dict[str, Tensor]:
        return dict(loss=sum((m - 1).square().mean() for m in self.backbone(inputs)))


class Watch(Hook):
    """Notes what is held after some of the iterations."""

    def __init__(self, when: Sequence[int]) -> None:
        self.when = when
        self.held: list[Held] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        if batch_idx + 1 in self.when:
            self.held.append(Held.now())


def many_iterations(
    work_dir: str, when: Sequence[int], sizes: int | None = None, onednn: bool = True
) -> list[Held]:
    """What is held after so many iterations of a training with the diagonality loss.

    Args:
        work_dir: Where the runner writes its log.
        when: The iterations after which to look, ascending; the last ends the training.
        sizes: How many sizes of images come back by turns; None for ever new ones.
        onednn: Whether PyTorch may use oneDNN.
    """
    torch.backends.mkldnn.set_flags(onednn)
    # The runner logs the version of torchvision, and so imports it.
    repair_torchvision()
    watch = Watch(when)
    Runner(
        Regressor(),
        work_dir,
        train_dataloader=DataLoader(Images(2 * when[-1], sizes), batch_size=2),
        train_cfg=dict(by_epoch=False, max_iters=when[-1]),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        custom_hooks=[DiagonalityLossHook(), watch],
        default_hooks=dict(checkpoint=None),
        randomness=dict(seed=0),
    ).train()
    return watch.held


@pytest.mark.slow
@pytest.mark.parametrize('sizes, onednn', [(None, False), (16, True)])
def test_five_hundred_iterations_do_not_drift(sizes, onednn, tmp_path):
    """Over ever new sizes without oneDNN, which keeps kernels for those; with it, over 16."""
    early, late = alone(many_iterations, str(tmp_path), (100, 500), sizes, onednn)
    # MMEngine's log buffers keep the losses of all iterations, so Python's blocks grow.
    assert not grown(early, late, passes=400) & {'resident', 'tensors'}


# ---- A large image -------------------------------------------------------------------------------


def large_image() -> tuple[int, list[tuple[int, ...]], float]:
    """The peak of the process, the maps' shapes, and how far a corner alone is off."""
    torch.manual_seed(0)
    model = LaViT('small').eval()
    images = torch.randn(1, 3, 2048, 4096)
    with torch.no_grad():
        maps = model(images)
        peak = status_bytes('VmHWM')
        corner = model(images[..., :512, :512])
    # A layer looks one window and one token further: 9 tokens, in each of three layers; the
    # second stage sees the first's 27 as 14.
    errors = [
        (whole[..., :seen, :seen] - part[..., :seen, :seen]).abs().max().item()
        for whole, part, seen in zip(maps, corner, (128 - 27, 64 - 14 - 27), strict=False)
    ]
    assert all(m.isfinite().all() for m in maps)
    return peak, [tuple(m.shape) for m in maps], max(errors)


@pytest.mark.slow
def test_a_large_image_fits_into_eight_gib():
    peak, shapes, error = alone(large_image)
    print(f'peak {peak / GIB:.2f} GiB; its corner {error:.1e} off')
    dims = (64, 128, 320, 640)
    assert shapes == [(1, d, 512 // 2**m, 1024 // 2**m) for m, d in enumerate(dims)]
    assert error < 1e-4
    assert peak < 8 * GIB
