"""Saying before the first step what of a training is unlikely to serve a LaViT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.optim import SGD, Optimizer

from ..models.attention import LessAttention
from ..models.lavit import LaViT
from .lavits import lavits, unwrapped

# The models that usually start from a pretrained classifier, by their base classes in mmdet and
# mmseg, which need not be installed.
_DOWNSTREAM = {'BaseDetector', 'BaseSegmentor'}


def check_training() -> None:
    """Make MMEngine's runners look, before the first step, at how a LaViT is trained.

    Whatever the config says of hooks: :class:`TrainingCheckHook` is added to each runner, unless
    its model is known to hold no LaViT.
    """
    for runner in (Runner, FlexibleRunner):
        if not hasattr(runner.register_hooks, '__wrapped__'):
            runner.register_hooks = _with_check(runner.register_hooks)


def _with_check(register: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(register)
    def register_hooks(self: Runner, *args: Any, **kwargs: Any) -> None:
        register(self, *args, **kwargs)
        # FlexibleRunner builds its model later.
        if not isinstance(self.model, nn.Module) or lavits(self.model):
            self.register_hook(TrainingCheckHook(), priority='VERY_LOW')

    return register_hooks


class TrainingCheckHook(Hook):
    """Says in the log, once, that a LaViT starts from scratch, or is trained in a poor way.

    - A line, if a detector or segmentor starts with a LaViT into which no checkpoint was loaded:
      none is in the ``init_cfg`` of the LaViT or of what it is part of, none was loaded or resumed,
      and its norms are as they start. A classifier is what one begins with.
    - A warning, if a LaViT is trained by SGD, with which transformers fall behind Adam
      (https://arxiv.org/abs/1912.03194), or if its ``Psi`` and ``Theta`` have weight decay: they
      start as the identity, and decay takes them to zero, where attention is even. It looks at the
      groups of the optimizer that was built. What is frozen, or has a learning rate of 0, is not
      trained.

    Only the main process speaks, and nothing of the training changes. With parameters that FSDP has
    flattened, decay is not seen.
    """

    def __init__(self) -> None:
        self._loaded = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note that the training does not start from scratch."""
        self._loaded = True

    def before_train(self, runner: Runner) -> None:
        """Look, and say what there is to say."""
        found = lavits(runner.model) if is_main_process() else {}
        model = unwrapped(runner.model)
        scratch = [path for path in found if not self._loaded and starts_from_scratch(model, path)]
        if scratch:
            runner.logger.info(
                f'The LaViT at {_names(scratch)} starts from scratch: no checkpoint was loaded. '
                'That takes a schedule several times as long as from a pretrained classifier, '
                f'which is given by {_option(scratch[0])}=PATH.'
            )
        if poor := list(poor_optimization(optimizers(runner.optim_wrapper), found.values())):
            runner.logger.warning(f'The LaViT at {_names(found)} {"; and ".join(poor)}.')


def starts_from_scratch(model: nn.Module, path: str) -> bool:
    """Whether the LaViT of a detector or segmentor is without any pretraining.

    Args:
        model: The model, without what wraps it.
        path: Path of the LaViT in it.
    """
    parts = path.split('.') if path else []
    above = [model.get_submodule('.'.join(parts[:i])) for i in range(len(parts) + 1)]
    kinds = {base.__name__ for module in above for base in type(module).__mro__}
    if not kinds & _DOWNSTREAM or any(_names_checkpoint(module) for module in above):
        return False
    # Weights may also have been loaded by hand.
    weights = [
        parameter
        for norm in above[-1].modules()
        if isinstance(norm, nn.LayerNorm)
        for own, parameter in norm.named_parameters(recurse=False)
        if own == 'weight'
    ]
    return all(bool((weight == 1).all()) for weight in weights)


def _names_checkpoint(module: nn.Module) -> bool:
    cfgs = getattr(module, 'init_cfg', None)
    cfgs = cfgs if isinstance(cfgs, list) else [cfgs]
    return any(isinstance(cfg, Mapping) and cfg.get('checkpoint') for cfg in cfgs)


def optimizers(optim_wrapper: Any) -> list[Optimizer]:
    """The optimizers of a training, of which there may be several."""
    several = isinstance(optim_wrapper, OptimWrapperDict)
    return [w.optimizer for w in (optim_wrapper.values() if several else [optim_wrapper])]


def poor_optimization(optimizers: Iterable[Optimizer], found: Iterable[LaViT]) -> Iterator[str]:
    """What is unlikely to serve in how LaViTs are optimized.

    Args:
        optimizers: The optimizers, as they were built.
        found: The LaViTs.

    Yields:
        What could follow the name of the LaViT in a sentence.
    """
    own: set[nn.Parameter] = set()
    mixing: set[nn.Parameter] = set()
    for lavit in found:
        own.update(lavit.parameters())
        for module in lavit.modules():
            if isinstance(module, LessAttention):
                mixing.update(module.parameters(recurse=False))
    by_sgd = False
    decays: set[float] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trained = {p for p in group['params'] if p.requires_grad} & own
            if trained and group.get('lr') != 0:
                by_sgd |= isinstance(optimizer, SGD)
                if trained & mixing and group.get('weight_decay'):
                    decays.add(group['weight_decay'])
    if by_sgd:
        yield 'is trained by SGD, with which transformers fall behind; AdamW is the usual choice'
    if decays:
        yield (
            f'has a weight decay of {", ".join(f"{decay:g}" for decay in sorted(decays))} on psi '
            "and theta, which takes attention to a plain mean; constructor='LaViTOptimWrapper"
            "Constructor' in optim_wrapper leaves it out"
        )


def _names(paths: Iterable[str]) -> str:
    return ', '.join(path or 'the top of the model' for path in paths)


def _option(path: str) -> str:
    return '.'.join(filter(None, ('model', path, 'init_cfg.checkpoint')))
