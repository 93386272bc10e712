"""One thing to time: a model (or a layer), its input, and what a step of it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AMP = {'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclass(frozen=True)
class Settings:
    """What holds for every model of a run.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        amp: Autocast to ``'bf16'`` or ``'fp16'``; None computes in float32.
        compile: Whether to run models through ``torch.compile``.

    Raises:
        ValueError: If a value is not one of these, or the device is not there.
    """

    device: str = 'cpu'
    amp: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.device not in ('cpu', 'cuda'):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but PyTorch finds no GPU here: use 'cpu'")
        if self.amp is not None and self.amp not in AMP:
            raise ValueError(f'amp must be one of {list(AMP)} or None, got {self.amp!r}')

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return AMP.get(self.amp, torch.float32)

    def autocast(self) -> AbstractContextManager:
        """The autocast context of a forward pass."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


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
        build: Makes the backbone; it returns a sequence of maps.
        task: What a step does.
        settings: How it is computed.
        memory_format: Of model and images; a format that is not its best makes a model look slow.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        task: Task,
        settings: Settings,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        torch.manual_seed(0)
        self.task, self.settings = task, settings
        # On their own lines: mmdet's Swin returns nothing from train().
        self.model = build().to(settings.device)
        self.model.train(task.name == 'training')
        self.use(memory_format)
        self.forward = torch.compile(self.model) if settings.compile else self.model

    def use(self, memory_format: torch.memory_format) -> None:
        """Change the memory format of model and images."""
        self.model.to(memory_format=memory_format)
        self.images = torch.randn(self.task.shape, device=self.settings.device)
        self.images = self.images.to(memory_format=memory_format)

    def step(self) -> None:
        """Run once."""
        if self.task.name == 'inference':
            with torch.no_grad(), self.settings.autocast():
                self.forward(self.images)
            return
        with self.settings.autocast():
            loss = sum(map(_mean, self.forward(self.images)))
        loss.backward()
        self.model.zero_grad()


def _mean(x: Tensor) -> Tensor:
    # In float32: the mean of a large map overflows in float16.
    return x.float().mean()
