"""Something simple in the place of what a LaViT has learnt, to see what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import LessAttention, WindowAttention
from ..models.block import Block
from ..models.lavit import Stage
from ..models.windows import WindowGrid
from ..ops.attend import key_mask, masked_softmax
from .record import LayerAttention, attention_name, stages_of

# What takes the place of the attention maps, and of what makes the scores.
MAPS = ('even', 'identity', 'mean')
PARTS = ('ar', 'psi_theta')
HOWS = MAPS + PARTS


class MeanAttention:
    """The mean attention of every layer over images, for ``how='mean'`` of :func:`replaced`.

    ::

        mean = MeanAttention()
        with recording(model, mean.see, device=None), torch.no_grad():
            for images in batches:
                model(images)
        with replaced(model, 'mean', mean=mean):
            ...

    Each layer, place of a window in the map, and head has a mean of its own, so all images must be
    of one size. Where they are not, :attr:`refusal` says so.

    Attributes:
        refusal: Why there is no mean; None as long as there can be one.
    """

    def __init__(self) -> None:
        self.refusal: str | None = None
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, int] = {}
        self._grids: dict[str, WindowGrid] = {}

    def see(self, layer: LayerAttention) -> None:
        """Add the images of one forward pass of a layer."""
        if self.refusal is not None:
            return
        now = layer.window_grid
        grid = self._grids.setdefault(layer.name, now)
        if now != grid:
            self.refusal = (
                'a mean over images needs images of one size: they came as maps of '
                f'{grid.height} x {grid.width} and of {now.height} x {now.width} '
                f'tokens to stage {layer.stage + 1}'
            )
            # They take as much memory as the attention of an image, for nothing.
            self._sums.clear()
            return
        # In float64, so that many images do not swamp what a single one adds.
        total = layer.attn.sum(dim=0, dtype=torch.float64)
        self._sums[layer.name] = self._sums.get(layer.name, 0) + total
        self._images[layer.name] = self._images.get(layer.name, 0) + layer.attn.shape[0]

    def of(self, name: str) -> tuple[Tensor, WindowGrid]:
        """The mean attention of a layer.

        Args:
            name: Path of the attention module in the model.

        Returns:
            The mean (windows, heads, n, n), in float64, and the grid of the windows.

        Raises:
            ValueError: If there is no mean.
        """
        if self.refusal is not None:
            raise ValueError(self.refusal)
        if name not in self._sums:
            raise ValueError(f'mean must have seen every layer to replace, it has not seen {name}')
        return self._sums[name] / self._images[name], self._grids[name]


@contextmanager
def replaced(
    model: nn.Module,
    how: str,
    *,
    stages: Sequence[int] | None = None,
    mean: MeanAttention | None = None,
) -> Iterator[None]:
    """Put something simple in the place of what a LaViT has learnt, inside the ``with``.

    Of these, the first three take the place of the attention maps, in vanilla and less-attention
    layers, and not of the scores that a layer hands on to the next one and to the next stage. The
    others take the place of what makes the scores, and so change those of the layers that follow,
    too.

    - ``'even'``: every token attends to all real tokens of its window alike.
    - ``'identity'``: every token attends to itself alone, so ``Z = V``.
    - ``'mean'``: every image gets the mean attention over images of the same layer, window and
      head. What remains is all that does not depend on the image.
    - ``'ar'``: the stage gets no residual from the stage before it (equations 6 and 7).
    - ``'psi_theta'``: ``Psi`` and ``Theta`` are the identity (equation 5), so less-attention layers
      have the scores of the stage's last vanilla layer.

    The model is as it was afterwards, also after an error. With gradients and without, both work;
    there are none for what is replaced.

    Args:
        model: Any model with a LaViT inside, or a LaViT.
        how: One of the above.
        stages: Where, from 0; None for all stages that have what is replaced.
        mean: The mean attention, recorded in the same model; for ``'mean'`` alone.

    Raises:
        TypeError: If ``stages`` is no sequence of integers.
        ValueError: If ``how`` is none of the above; the model holds no LaViT, or its LaViT has no
            such stage, or nothing to replace there; ``mean`` is missing, superfluous or of another
            model. Also inside the ``with``, if images come in another size than those of ``mean``.
    """
    _check(how)
    if (how == 'mean') != (mean is not None):
        raise ValueError(
            f"mean must be a MeanAttention for how='mean' and None for any other, got {mean!r} for "
            f'{how!r}'
        )
    targets = [found for found in stages_of(model, stages) if _has(found[2], how)]
    empty = sorted(set(stages or ()) - {m for _, m, _ in targets})
    if empty or not targets:
        raise ValueError(
            f'stages must have what how={how!r} replaces, {empty or "all of the LaViT"} have not; '
            'see replaceable()'
        )
    with ExitStack() as undo:
        for path, _, stage in targets:
            if how == 'ar':
                _set(undo, stage, 'attention_residual', None)
                continue
            for i, block in enumerate(stage.blocks):
                if how == 'psi_theta':
                    _make_identity(undo, block.attn)
                else:
                    _replace_maps(undo, block, how, attention_name(path, i), mean)
        yield


def replaceable(model: nn.Module, how: str) -> list[int]:
    """The stages that have what :func:`replaced` would replace.

    Args:
        model: Any model with a LaViT inside, or a LaViT.
        how: See :func:`replaced`.

    Returns:
        Stages, from 0, ascending.

    Raises:
        ValueError: If ``how`` is unknown or the model holds no LaViT.
    """
    _check(how)
    return sorted({m for _, m, stage in stages_of(model) if _has(stage, how)})


def _check(how: str) -> None:
    if how not in HOWS:
        raise ValueError(f'how must be one of {list(HOWS)}, got {how!r}')


def _has(stage: Stage, how: str) -> bool:
    if how == 'ar':
        return stage.attention_residual is not None
    return how in MAPS or any(isinstance(block.attn, LessAttention) for block in stage.blocks)


def _set(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute until ``undo`` is closed."""
    if hasattr(type(module), name) and name not in vars(module):
        # What the class has comes back when the module has nothing of its own.
        undo.callback(delattr, module, name)
    else:
        undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def _make_identity(undo: ExitStack, attn: WindowAttention) -> None:
    if isinstance(attn, LessAttention):
        for name in ('psi', 'theta'):
            matrix = torch.eye(attn.psi.shape[0], dtype=attn.psi.dtype, device=attn.psi.device)
            _set(undo, attn, name, nn.Parameter(matrix, requires_grad=False))


def _replace_maps(
    undo: ExitStack, block: Block, how: str, name: str, mean: MeanAttention | None
) -> None:
    make = _Mean(*mean.of(name)) if mean else {'even': _even, 'identity': _identity}[how]
    drop = block.attn.attn_drop
    # Of one replacement inside another the inner one counts.
    other = _Other(drop.drop if isinstance(drop, _Other) else drop, make)
    undo.callback(block.register_forward_pre_hook(other.expect).remove)
    _set(undo, block.attn, 'attn_drop', other)


class _Other(nn.Module):
    """In the place of the dropout on the attention: other attention, and the dropout on that.

    Args:
        drop: The dropout.
        make: Makes the attention like (windows, heads, n, n), on a grid.
    """

    def __init__(self, drop: nn.Module, make: Callable[[Tensor, WindowGrid], Tensor]) -> None:
        super().__init__()
        self.drop = drop
        self.make = make
        self.grid: WindowGrid  # noted before each run

    def expect(self, block: Block, args: tuple[Tensor, WindowGrid, Tensor | None]) -> None:
        """Note, before a layer runs, on which grid it will attend."""
        self.grid = args[1]

    def forward(self, attn: Tensor) -> Tensor:
        """The other attention."""
        return self.drop(self.make(attn, self.grid).to(attn.dtype))


def _even(attn: Tensor, grid: WindowGrid) -> Tensor:
    mask = key_mask(grid, attn) if grid.padded else None
    return masked_softmax(attn.new_zeros(attn.shape), mask)


def _identity(attn: Tensor, grid: WindowGrid) -> Tensor:
    return torch.eye(attn.shape[-1], dtype=attn.dtype, device=attn.device).expand(attn.shape)


class _Mean:
    """A layer's mean attention.

    Args:
        attn: (windows of an image, heads, n, n).
        grid: Grid of the windows.
    """

    def __init__(self, attn: Tensor, grid: WindowGrid) -> None:
        self.attn = attn
        self.grid = grid

    def __call__(self, attn: Tensor, grid: WindowGrid) -> Tensor:
        if grid != self.grid:
            raise ValueError(
                f'mean is of images that come to this layer as {self.grid.height} x '
                f'{self.grid.width} tokens, got {grid.height} x {grid.width}; all images must be '
                'of one size'
            )
        return self.attn.to(attn).repeat(len(attn) // len(self.attn), 1, 1, 1)
