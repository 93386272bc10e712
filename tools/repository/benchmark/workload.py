"""One thing to time: a model (or a layer), its input, and what a step of it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

#: Name of a precision -> the type of products, and whether weights stay float32 and autocast
#: narrows them.
PRECISIONS = {
    'fp32': (torch.float32, False),
    'bf16-amp': (torch.bfloat16, True),
    'fp16-amp': (torch.float16, True),
    'bf16': (torch.bfloat16, False),
    'fp16': (torch.float16, False),
}


@dataclass(frozen=True)
class Settings:
    """What holds for every model of a comparison.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        precision: ``'fp32'``; ``'bf16-amp'`` or ``'fp16-amp'`` autocasts; ``'bf16'`` or ``'fp16'``
            makes weights and images narrow.
        compile: Whether to run models through ``torch.compile``.
        threads: Threads of the CPU. Whoever measures sets them, once for a comparison: OpenMP ends
            and starts threads at each change.

    Raises:
        ValueError: If a value is not one of these, or the device is not there.
    """

    device: str = 'cpu'
    precision: str = 'fp32'
    compile: bool = False
    threads: int = field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        if self.device not in ('cpu', 'cuda'):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but PyTorch finds no GPU here: use 'cpu'")
        if self.precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {list(PRECISIONS)}, got {self.precision!r}')
        if self.threads < 1:
            raise ValueError(f'threads must be at least 1, got {self.threads}')

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return PRECISIONS[self.precision][0]

    @property
    def weights(self) -> torch.dtype:
        """The type of weights and images."""
        return torch.float32 if PRECISIONS[self.precision][1] else self.dtype

    def autocast(self) -> AbstractContextManager:
        """The autocast context of a forward pass."""
        if not PRECISIONS[self.precision][1]:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)

    def __str__(self) -> str:
        mode = 'torch.compile' if self.compile else 'eager'
        return f'{self.precision}, {mode}, {self.threads} thread{"s" * (self.threads > 1)}'


@dataclass(frozen=True)
class Task:
    """What a step does.

    Args:
        name: ``'inference'`` or ``'training'`` (forward, backward and dropping the gradients).
        shape: Images (B, 3, H, W).

    Raises:
        ValueError: If the name is another or the shape is none of images.
    """

    name: str
    shape: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if self.name not in ('inference', 'training'):
            raise ValueError(f"task must be 'inference' or 'training', got {self.name!r}")
        if len(self.shape) != 4 or self.shape[1] != 3 or min(self.shape) < 1:
            raise ValueError(f'shape must be (B, 3, H, W) of at least 1, got {self.shape}')


class BackboneWorkload:
    """A backbone, its images and its step.

    Args:
        build: Makes the backbone for a task; it returns a sequence of maps.
        task: What a step does.
        settings: How it is computed.
        memory_format: Of model and images; a format that is not its best makes a model look slow.
        route: Makes the context of a forward pass, of
            :data:`~repository.benchmark.routes.ROUTES`.
    """

    def __init__(
        self,
        build: Callable[[Task], nn.Module],
        task: Task,
        settings: Settings,
        memory_format: torch.memory_format = torch.contiguous_format,
        route: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        torch.manual_seed(0)
        self.task, self.settings, self.route = task, settings, route
        # On their own lines: mmdet's Swin returns nothing from train().
        self.model = build(task).to(settings.device, settings.weights)
        self.model.train(task.name == 'training')
        self.use(memory_format)
        # For these sizes: for sizes that may change, which is what it would make after the first
        # comparison, it makes slower code.
        compiles = settings.compile
        self.forward = torch.compile(self.model, dynamic=False) if compiles else self.model

    def use(self, memory_format: torch.memory_format) -> None:
        """Change the memory format of model and images."""
        self.model.to(memory_format=memory_format)
        self.images = torch.randn(self.task.shape, device=self.settings.device)
        self.images = self.images.to(self.settings.weights, memory_format=memory_format)

    def step(self) -> None:
        """Run once."""
        if self.task.name == 'inference':
            with self.route(), torch.no_grad(), self.settings.autocast():
                self.forward(self.images)
            return
        with self.route(), self.settings.autocast():
            loss = sum(map(_mean, self.forward(self.images)))
        loss.backward()
        self.model.zero_grad()


def _mean(x: Tensor) -> Tensor:
    # In float32: the mean of a large map overflows in float16.
    return x.float().mean()
