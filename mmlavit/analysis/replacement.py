"""Something simple in the place of what a LaViT has learnt, to see what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import LessAttention, WindowAttention
from ..models.block import Block
from ..models.lavit import Stage
from ..models.windows import Slab, WindowGrid
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
        grid = self._grids.setdefault(layer.name, layer.grid)
        if layer.grid != grid:
            self.refusal = (
                'a mean over images needs images of one size: they came as maps of '
                f'{grid.height} x {grid.width} and of {layer.grid.height} x {layer.grid.width} '
                f'tokens to stage {layer.stage + 1}'
            )
            # They take as much memory as the attention of an image, for nothing.
            self._sums.clear()
            return
        # In float64, so that many images do not swamp what a single one adds.
        total = layer.attn.sum(dim=0, dtype=torch.float64)
        self._sums[layer.name] = self._sums.get(layer.name, 0) + total
        self._images[layer.name] = self._images.get(layer.name, 0) + layer.attn.shape[0]

    def scores(self, name: str) -> tuple[Tensor, WindowGrid]:
        """What a softmax makes the mean attention of.

        Args:
            name: Path of the attention module in the model.

        Returns:
            The logarithm of the mean (windows, heads, n, n), in float64, and the grid of the
            windows. It is very low instead of infinite where the mean is 0, as in rows of padded
            queries.

        Raises:
            ValueError: If there is no mean.
        """
        if self.refusal is not None:
            raise ValueError(self.refusal)
        if name not in self._sums:
            raise ValueError(f'mean must have seen every layer to replace, it has not seen {name}')
        mean = self._sums[name] / self._images[name]
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log(), self._grids[name]


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
    layers. They change what goes through the softmax, and not the scores that a layer hands on to
    the next one and to the next stage. The others take the place of what makes the scores, and so
    change those of the layers that follow, too.

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
    if mean is None:
        other = {'even': _even, 'identity': _identity}[how]
    else:
        other = _MeanScores(*mean.scores(name))
        undo.callback(block.register_forward_pre_hook(other.expect).remove)
    if isinstance(block.attn, LessAttention):
        # The fused kernel has the softmax inside.
        _set(undo, block.attn, 'fused', False)
    _set(undo, block.attn, 'attend', partial(_attend, block.attn, other))


def _attend(
    attn: WindowAttention,
    other: Callable[[Tensor], Tensor],
    scores: Tensor,
    v: Tensor,
    grid: WindowGrid,
) -> Tensor:
    """``attn.attend`` with other scores, which it may overwrite as it does its own."""
    return type(attn).attend(attn, other(scores), v, grid)


def _even(scores: Tensor) -> Tensor:
    return scores.new_zeros(scores.shape)


def _identity(scores: Tensor) -> Tensor:
    # Not minus infinity, with which padded queries, to whom no key is left, would become NaN and
    # spoil the gradients of the projection.
    lowest = torch.finfo(scores.dtype).min
    diagonal = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.new_full(scores.shape, lowest).masked_fill_(diagonal, 0)


class _MeanScores:
    """The part of a layer's mean scores that belongs to a slab.

    Args:
        scores: (windows, heads, n, n).
        grid: Grid of the windows.
    """

    def __init__(self, scores: Tensor, grid: WindowGrid) -> None:
        self.scores = scores
        self.grid = grid
        self.slabs: Iterator[Slab] = iter(())

    def expect(self, block: Block, args: tuple[Tensor, Sequence[Slab], Sequence]) -> None:
        """Note, before a layer runs, in which pieces it will attend."""
        x, slabs, _ = args
        grid = WindowGrid(*x.shape[1:3], self.grid.window)
        if grid != self.grid:
            raise ValueError(
                f'mean is of images that come to this layer as {self.grid.height} x '
                f'{self.grid.width} tokens, got {grid.height} x {grid.width}; all images must be '
                'of one size'
            )
        self.slabs = iter(slabs)

    def __call__(self, scores: Tensor) -> Tensor:
        slab = next(self.slabs)
        first = slab.row // self.grid.window * self.grid.cols
        windows = self.scores[first : first + slab.grid.rows * slab.grid.cols]
        return windows.to(scores).repeat(slab.images, 1, 1, 1)
