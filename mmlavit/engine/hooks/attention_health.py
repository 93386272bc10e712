"""A hook that says when the attention of a stage no longer tells keys apart, or sees but itself."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ...models.arch import as_int
from ...models.attention import WindowAttention
from ...models.lavit import LaViT
from ...models.windows import WindowGrid
from ..lavits import lavits_of

# A stage is dead at more than _LIMIT of what is possible, _LOOKS times in a row.
_LIMIT = 0.999
_LOOKS = 3

# How many windows of a layer are looked at, at most, and how many pairs of tokens they may hold,
# over all heads, unless a single window has more.
_WINDOWS = 32
_PAIRS = 2**22

# What is the matter with a stage, by the measure that says so, in the order of `figures`.
_FINDINGS = {
    'entropy': (
        'has gone even: its entropy is {:.4f} of the largest possible, so each token gets the '
        'plain mean of its window, whatever Q, K, Psi and Theta compute'
    ),
    'diagonality': (
        'has gone onto the token itself alone: its diagonality is {:.4f}, so no token learns of '
        'another in its window'
    ),
}


@HOOKS.register_module()
class AttentionHealthHook(Hook):
    """Says in the log, once, that the attention of a stage of a LaViT has died.

    ``custom_hooks = [dict(type='AttentionHealthHook')]``, as in all our configs, turns it on. A
    model whose attention is a plain average, or looks at the token itself alone, trains all the
    same: losses fall, and nothing else tells. This hook looks every ``interval`` iterations at the
    training's own forward pass and warns, in one line with the stage (from 1) and the figure, of

    - attention that has gone even: its :func:`~mmlavit.analysis.measures.entropy` is over 0.999 of
      the largest possible;
    - attention of each token to itself alone: its :func:`~mmlavit.analysis.measures.diagonality` is
      over 0.999.

    A stage's figure is the mean over its layers, frozen ones among them; a layer's is the mean over
    at most 32 windows, spread over the batch, without padding. Early in a training attention may
    still be on its way. So the hook looks only when a tenth of the training is over and the
    learning rate is not higher than ``interval`` iterations before, and it speaks when 3 looks in a
    row agree. It says each of the two once for a stage, and again if the training is resumed.

    The training is the same with it as without, bit by bit. In distributed training the main
    process looks, at its own images, without talking to the others. Of several LaViTs in a model it
    looks at those in training mode, and names them. Layers that torch.compile has compiled cannot
    be heard, which the log then says.

    Args:
        interval: Iterations between two looks. Defaults to 100.

    Raises:
        TypeError: If ``interval`` is no integer.
        ValueError: If it is less than 1 or, when training starts, if the model's backbone is no
            LaViT.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = as_int('interval', interval, 1)
        self._backbones: dict[str, LaViT] = {}
        self._handles: list = []
        self._seen: dict[WindowAttention, tuple[str, Tensor]] = {}
        self._rate = -math.inf
        self._held: dict[tuple[str, str], int] = defaultdict(int)
        self._said: set[tuple[str, str]] = set()

    def before_train(self, runner: Runner) -> None:
        """Find the LaViTs."""
        self.after_train(runner)
        backbones = lavits_of(runner, type(self).__name__)
        self._backbones = backbones if is_main_process() else {}
        # The rate before is not known, so the first time that is due only notes it.
        self._rate = -math.inf
        self._held = defaultdict(int)
        self._said = set()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Listen to the layers, if it is time to look."""
        if not self._backbones or not self.every_n_train_iters(runner, self.interval):
            return
        before = self._rate
        self._rate = max(map(max, runner.optim_wrapper.get_lr().values()))
        if self._rate > before or runner.iter < runner.max_iters / 10:
            return
        for path, backbone in self._backbones.items():
            for i, stage in enumerate(backbone.stages, start=1):
                hear = partial(self._hear, backbone, f'stage {i} of {path}')
                self._handles += [
                    module.register_forward_hook(hear)
                    for module in stage.modules()
                    if isinstance(module, WindowAttention)
                ]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Judge what was heard."""
        if not self._handles:
            return
        seen = self._stop()
        if not seen:
            self._say(
                runner,
                ('', 'nothing'),
                f'heard no attention in iteration {runner.iter + 1}: the LaViT did not run, or ran '
                'compiled; it is not watched',
            )
            return
        stages = defaultdict(list)
        for stage, of_layer in seen:
            stages[stage].append(of_layer)
        means = torch.stack([torch.stack(of_stage).mean(dim=0) for of_stage in stages.values()])
        for stage, of_stage in zip(stages, means.tolist(), strict=True):
            for (measure, finding), figure in zip(_FINDINGS.items(), of_stage, strict=True):
                dead = stage, measure
                self._held[dead] = self._held[dead] + 1 if figure > _LIMIT else 0
                if self._held[dead] >= _LOOKS:
                    self._say(
                        runner,
                        dead,
                        f'attention in {stage} {finding.format(figure)}. Try another learning rate '
                        'or less of what pulls at the scores (loss_dp, weight decay); '
                        "'mmlavit saturation' shows each layer",
                    )

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        self._stop()
        self._backbones = {}

    def _hear(
        self, backbone: LaViT, stage: str, layer: WindowAttention, args: tuple, output: tuple
    ) -> None:
        # A layer runs again in the backward pass, under checkpointing, or for a model's next pass.
        if backbone.training and layer not in self._seen:
            self._seen[layer] = stage, figures(output[1], args[1])

    def _stop(self) -> list[tuple[str, Tensor]]:
        """Stop listening; the stage and the figures of each layer heard."""
        for handle in self._handles:
            handle.remove()
        seen, self._handles, self._seen = list(self._seen.values()), [], {}
        return seen

    def _say(self, runner: Runner, what: tuple[str, str], text: str) -> None:
        """Warn, the first time."""
        if what not in self._said:
            self._said.add(what)
            runner.logger.warning(f'AttentionHealthHook: {text}.')


@torch.no_grad()
def figures(scores: Tensor, grid: WindowGrid) -> Tensor:
    """How even, and how much onto itself alone, the attention of a layer is.

    Args:
        scores: ``A`` (windows of a batch, heads, n, n) before the softmax; computed in float32.
        grid: Grid of the windows.

    Returns:
        The entropy and the diagonality, each the mean over heads and some windows, (2,); NaN where
        no window has more than one real token.
    """
    # The tools of analysis are imported when the first look is due, not with mmlavit.
    from ...analysis.measures import diagonality, entropy

    count = min(len(scores), _WINDOWS, max(1, _PAIRS // scores[0].numel()))
    chosen = torch.linspace(0, len(scores) - 1, count, device=scores.device).long()
    scores, visible = scores[chosen].float(), None
    if grid.padded:
        valid = grid.valid(scores.device)
        valid = valid[chosen % len(valid)]
        visible = valid.unsqueeze(-1) & valid.unsqueeze(-2)
        scores = scores.masked_fill(~visible.unsqueeze(1), -math.inf)
    attn = scores.softmax(dim=-1)
    return torch.stack([entropy(attn, visible).nanmean(), diagonality(attn, visible).nanmean()])
