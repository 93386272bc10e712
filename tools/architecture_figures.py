"""Draws the figures of docs/architecture.md from the code that they are about.

The data flow of a stage carries the shapes that a real forward pass has there. How the attention
residual nests windows is read off the scores that it returns for marked windows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn

from mmlavit import LaViT
from mmlavit.models.attention import LessAttention, VanillaAttention
from mmlavit.models.attention_residual import AttentionResidual
from mmlavit.models.windows import WindowGrid, ceil_div, nesting_ratio
from mmlavit.ops.scores import zero_padded_pairs

matplotlib.use('Agg')

TOKENS, SCORES, BRIDGE = '#dbe7f6', '#fde3cf', '#e3f1dd'
DPI = 130

# ---- How windows nest ----------------------------------------------------------------------------

# A map of the previous stage whose last windows are padded both ways.
PREV = WindowGrid(height=6, width=10, window=4)
NOTHING, PADDED = -1, -2
LETTERS = 'ABCDEF'
WINDOW_COLORS = ['#4c78a8', '#f58518', '#54a24b', '#e45756', '#9d6fb8', '#b8893b']
NOTE = """\
Each letter is a window: 4 x 4 tokens, whose scores are 16 x 16 pairs.
Hatched: padding, whose scores are 0.

The residual shrinks the map of each window to 4 x 4 pairs (2 x 2
queries by 2 x 2 keys at a time) and puts it where the same tokens
meet in the windows of the next stage.

Colours below are read off what AttentionResidual returns.
White: pairs that no previous window saw; the residual adds 0.\
"""


def on_map(numbers: Tensor, grid: WindowGrid) -> np.ndarray:
    """Numbers of the tokens of each window (windows, n), on the padded map."""
    w = grid.window
    whole = WindowGrid(grid.rows * w, grid.cols * w, w)
    return whole.merge(numbers[:, None, :, None])[0, :, :, 0].numpy()


def token_windows(grid: WindowGrid) -> np.ndarray:
    """Which window each token is in, on the padded map; PADDED where there is no token."""
    number = torch.arange(grid.rows * grid.cols)[:, None]
    return on_map(number.where(grid.valid(), torch.tensor(PADDED)), grid)


def nested_windows(prev: WindowGrid, grid: WindowGrid) -> np.ndarray:
    """From which previous window each score of the residual comes.

    A head for each previous window holds ones in that window and zeros in the others. What the
    residual makes of that head is not 0 where that window's scores have come.

    Args:
        prev: Grid of the previous stage.
        grid: Grid of this stage.

    Returns:
        Array (windows, n, n): the number of the previous window, NOTHING where the residual adds 0,
        PADDED where a token of the pair is padded.
    """
    count, n = prev.rows * prev.cols, prev.window**2
    marks = torch.eye(count).view(count, count, 1, 1).expand(count, count, n, n)
    residual = AttentionResidual(count, count, prev.window, grid.window, layer_scale_init=1.0)
    nn.init.ones_(residual.dwconv.weight)
    with torch.no_grad():
        residual.pwconv.weight.copy_(torch.eye(count).view(count, count, 1, 1))
        scores = residual(zero_padded_pairs(marks, prev), prev, grid)
    largest, came_from = scores.max(dim=1)
    came_from[largest == 0] = NOTHING
    valid = grid.valid()
    came_from[~(valid[:, :, None] & valid[:, None, :])] = PADDED
    return came_from.numpy()


def by_previous_window(came_from: np.ndarray, r: int) -> np.ndarray:
    """The same map of pairs with the tokens of each previous window one after the other."""
    side = int(came_from.shape[0] ** 0.5)
    places = np.arange(side**2).reshape(r, side // r, r, side // r).transpose(0, 2, 1, 3).ravel()
    return came_from[np.ix_(places, places)]


def paint(axes: Axes, numbers: np.ndarray, every: int, title: str) -> None:
    """Cells coloured by window, hatched where padded, with a heavy line every so many cells."""
    height, width = numbers.shape
    colors = ListedColormap([*WINDOW_COLORS, '#ffffff'])
    axes.imshow(
        np.where(numbers < 0, colors.N - 1, numbers), cmap=colors, vmin=0, vmax=colors.N - 1
    )
    for y, x in np.argwhere(numbers == PADDED):
        cell = Rectangle((x - 0.5, y - 0.5), 1, 1, fc='#e4e4e4', ec='#9a9a9a', hatch='///', lw=0)
        axes.add_patch(cell)
    for side, draw in ((height, axes.axhline), (width, axes.axvline)):
        for at in range(side + 1):
            heavy = at % every == 0
            draw(at - 0.5, color='black' if heavy else '#d9d9d9', lw=1.6 if heavy else 0.5)
    axes.set(xlim=(-0.56, width - 0.44), ylim=(height - 0.44, -0.56), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9.5)
    axes.set_frame_on(False)


def name_windows(axes: Axes, numbers: np.ndarray) -> None:
    """Write the letter of each window on its first token."""
    for number in range(numbers.max() + 1):
        y, x = np.argwhere(numbers == number)[0]
        style = dict(color='white', weight='bold', ha='center', va='center', fontsize=11)
        axes.text(x, y, LETTERS[number], **style)


def draw_nesting(out: Path) -> None:
    """Draw how the residual nests windows, for one and for two previous windows per axis."""
    figure = plt.figure(figsize=(10.6, 8.0), layout='constrained')
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    layout = figure.add_gridspec(3, 4, height_ratios=[1, 1, 1.25])

    axes = figure.add_subplot(layout[0, :2])
    before = token_windows(PREV)
    paint(axes, before, PREV.window, f'previous stage: {PREV.height} x {PREV.width} tokens, w = 4')
    name_windows(axes, before)
    axes = figure.add_subplot(layout[0, 2:])
    axes.axis('off')
    axes.text(0, 0.5, NOTE, va='center', fontsize=9.5, linespacing=1.35)

    for row, window in ((1, 2), (2, 4)):
        grid = WindowGrid(ceil_div(PREV.height, 2), ceil_div(PREV.width, 2), window)
        r = nesting_ratio(PREV.window, window)
        pairs = nested_windows(PREV, grid)
        axes = figure.add_subplot(layout[row, 0])
        # A token is on the diagonal of its window's map of pairs.
        tokens = on_map(torch.from_numpy(pairs).diagonal(dim1=1, dim2=2), grid)
        title = f'r = {r}: {grid.height} x {grid.width} tokens, w = {window}'
        paint(axes, tokens, window, title)
        name_windows(axes, tokens)
        if r == 1:
            panels = [
                (pairs[number], 4, f'the window {LETTERS[number]}:\nits 4 x 4 pairs')
                for number in (0, 2, 5)
            ]
        else:
            first, second = (by_previous_window(part, r) for part in pairs)
            panels = [
                (pairs[0], 16, 'the left window: 16 x 16 pairs,\ntokens row by row'),
                (first, 4, 'the same, its tokens sorted by\nprevious window: r x r places'),
                (second, 4, 'the right window,\nsorted in the same way'),
            ]
        for column, (numbers, every, title) in enumerate(panels, start=1):
            paint(figure.add_subplot(layout[row, column]), numbers, every, title)
    figure.savefig(out, dpi=DPI, metadata={'Software': None})
    plt.close(figure)


# ---- The data flow of a stage --------------------------------------------------------------------


def shapes_of_a_stage(model: LaViT, stage: int, side: int) -> dict[str, str]:
    """What goes through a stage for one square image, as a forward pass has it.

    Args:
        model: The model.
        stage: Index of the stage, from 1 on.
        side: Side of the image, in pixels.

    Returns:
        Name -> shape in words.
    """
    seen: dict[str, str] = {}

    def tokens(x: Tensor) -> str:
        return '{} x {} tokens of {} channels'.format(*x.shape[1:])

    def scores(maps: Tensor) -> str:
        windows, heads, n, _ = maps.shape
        return f'{windows} windows x {heads} heads x {n} x {n}'.replace(' 1 heads', ' 1 head')

    def hook(module: nn.Module, args: tuple, output: tuple) -> None:
        seen.update(tokens_in=tokens(args[0]), scores_in=scores(args[1]))
        seen.update(tokens_out=tokens(output[0]), scores_out=scores(output[1]))

    handle = model.stages[stage].register_forward_hook(hook)
    with torch.no_grad():
        maps = model.eval()(torch.zeros(1, 3, side, side))
    handle.remove()
    seen['map'] = 'map {} x {} x {}, NCHW-contiguous'.format(*maps[stage].shape[1:])
    return seen


def draw_stage(out: Path) -> None:
    """Draw the data flow of the second stage of LaViT-S at 224 x 224."""
    model, stage = LaViT('small'), 1
    shape = shapes_of_a_stage(model, stage, 224)
    kinds = [type(block.attn) for block in model.stages[stage].blocks]
    vanilla, less = kinds.count(VanillaAttention), kinds.count(LessAttention)

    figure, axes = plt.subplots(figsize=(10.6, 10.4), layout='constrained')
    axes.set(xlim=(0, 106), ylim=(104, 0))
    axes.axis('off')
    left, right, wide = 6, 59, 42

    def box(x: float, y: float, height: float, text: str, color: str) -> None:
        style = dict(boxstyle='round,pad=0,rounding_size=1', fc=color, ec='#555555', lw=1)
        axes.add_patch(FancyBboxPatch((x, y), wide, height, **style))
        axes.text(x + wide / 2, y + height / 2, text, ha='center', va='center', fontsize=9.5)

    def arrow(x0: float, y0: float, x1: float, y1: float, label: str = '') -> None:
        style = dict(arrowstyle='-|>', mutation_scale=13, color='#333333', lw=1.3)
        axes.add_patch(FancyArrowPatch((x0, y0), (x1, y1), shrinkA=0, shrinkB=0, **style))
        axes.text((x0 + x1) / 2, (y0 + y1) / 2 - 0.6, label, ha='center', va='bottom', fontsize=8.5)

    def frame(y: float, height: float, text: str) -> None:
        style = dict(fill=False, ec='#777777', lw=1.2, ls=(0, (4, 3)))
        axes.add_patch(Rectangle((2, y), 103, height, **style))
        axes.text(103.5, y + height - 1, text, ha='right', va='bottom', fontsize=9.5, weight='bold')

    def down(x: float, *between: tuple[float, float]) -> None:
        for y0, y1 in between:
            arrow(x + wide / 2, y0, x + wide / 2, y1)

    def layer(y: float, projected: str, scores: str) -> None:
        """The boxes of one layer from y on: tokens left, scores right."""
        box(left, y, 4.5, 'x + depthwise 3 x 3 convolution of x', TOKENS)
        box(left, y + 7.5, 4.5, projected, TOKENS)
        box(right, y + 7, 9, scores, SCORES)
        box(left, y + 15, 4.5, 'x + projection of softmax(A) V', TOKENS)
        box(left, y + 22.5, 4.5, 'x + MLP(LayerNorm(x))', TOKENS)
        down(left, (y + 4.5, y + 7.5), (y + 12, y + 15), (y + 19.5, y + 22.5))
        arrow(right, y + 14, left + wide, y + 17.25)
        axes.text(53.5, y + 18, 'softmax', ha='center', va='top', fontsize=8.5)

    for x, text in ((left, 'tokens'), (right, 'scores A, before the softmax')):
        axes.text(x + wide / 2, 1.5, text, ha='center', va='center', fontsize=12, weight='bold')
    box(left, 4, 5, f'out of stage {stage}\n{shape["tokens_in"]}', TOKENS)
    box(right, 4, 5, f'last scores of stage {stage}\n{shape["scores_in"]}', SCORES)
    box(
        left,
        13,
        7.5,
        'PatchEmbed: 2 x 2 convolution of stride 2,\nLayerNorm\n' + shape['tokens_out'],
        BRIDGE,
    )
    box(
        *(right, 12, 10),
        'AttentionResidual (equations 6, 7): depthwise, 2 x 2\n'
        'queries by 2 x 2 keys; 1 x 1 across heads; LayerScale\n'
        f'from 1e-2; nested in the windows of this stage\n{shape["scores_out"]}',
        BRIDGE,
    )
    down(left, (9, 13), (20.5, 27))
    down(right, (9, 12), (22, 34))
    axes.text(right + wide / 2 + 1, 29.5, 'A_init', va='center', fontsize=8.5)
    frame(25, 30.5, f'x {vanilla}: VanillaAttention')
    layer(
        27,
        'LayerNorm;  Q, K, V',
        'equation 4\nA = Q K$^T$ / sqrt(d) + A_init\n(A_init in the first layer alone)',
    )
    arrow(left + wide, 36.75, right, 36.75, 'Q, K')
    frame(58, 30.5, f'x {less}: LessAttention')
    layer(60, 'LayerNorm;  V alone', 'equation 5\nA = Psi A Theta$^T$\n(identity at the start)')
    down(left, (54, 60), (87, 93))
    down(right, (43, 67), (76, 93))
    axes.text(
        right + 1.5,
        80.5,
        'in training also: the diagonality\npreserving loss (equations 8, 9)',
        va='center',
        fontsize=8.5,
    )
    box(
        left,
        93,
        7.5,
        f'to stage {stage + 2}\nand, through LayerNorm, out of the backbone:\n{shape["map"]}',
        TOKENS,
    )
    box(right, 93, 7.5, f'to stage {stage + 2}\n{shape["scores_out"]}', SCORES)
    figure.savefig(out, dpi=DPI, metadata={'Software': None})
    plt.close(figure)


def main() -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('docs'), help='folder (default: docs)')
    out = parser.parse_args().out
    draw_stage(out / 'architecture_stage.png')
    draw_nesting(out / 'architecture_nesting.png')


if __name__ == '__main__':
    main()
