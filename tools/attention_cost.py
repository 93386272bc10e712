"""Prints the tables of docs/architecture.md: what vanilla and less attention cost, layer by layer.

A multiplication and an addition count as one. Projections are of real tokens; inside windows padded
ones count too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mmlavit.models.arch import ARCHS, NUM_STAGES
from mmlavit.models.windows import WindowGrid, ceil_div

WINDOW = 8
IMAGES = {'224': (224, 224), '800 x 1280': (800, 1280)}
# Base has the layers of small, in other numbers.
NAMES = {'tiny': 'tiny', 'small': 'small, base'}


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the attention of one layer of an image.

    Args:
        real: Tokens of the image.
        tokens: ``N``, tokens in all windows together, the padded ones among them.
        places: ``n``, tokens in a window.
        dims: ``D``, channels.
        heads: ``H``.
    """

    real: int
    tokens: int
    places: int
    dims: int
    heads: int

    @classmethod
    def of(cls, arch: str, stage: int, image: tuple[int, int], window: int) -> Cost:
        """The cost in a stage of an arch, for an image (height, width) and a window's side."""
        sizes = ARCHS[arch]
        grid = WindowGrid(*(ceil_div(side, 4 << stage) for side in image), window)
        places = window**2
        tokens = grid.rows * grid.cols * places
        real = grid.height * grid.width
        return cls(real, tokens, places, sizes.embed_dims[stage], sizes.num_heads[stage])

    @property
    def vanilla_scores(self) -> int:
        """Q and K, then ``Q K^T``: ``n`` keys of ``D`` channels, over all heads, for each query."""
        return 2 * self.real * self.dims**2 + self.tokens * self.places * self.dims

    @property
    def values(self) -> int:
        """What both kinds compute beside scores: V and the output projection, ``softmax(A) V``."""
        return self.vanilla_scores  # the same number of products of the same sizes

    @property
    def less_scores(self) -> int:
        """``Psi A Theta^T``: two products of ``n x n`` matrices for each head of each window."""
        windows = self.tokens // self.places
        return windows * self.heads * 2 * self.places**3


def less_is_cheaper(dims: int, heads: int, places: int) -> bool:
    """Whether ``Psi A Theta^T`` takes less than Q, K and ``Q K^T``."""
    return 2 * places**2 * heads < 2 * dims**2 + places * dims


def largest_window(dims: int, heads: int) -> int:
    """Side of the largest window in which less attention is the cheaper one."""
    side = 1
    while less_is_cheaper(dims, heads, (side + 1) ** 2):
        side += 1
    return side


def short(value: float) -> str:
    """Three digits and their unit."""
    for factor, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
        if value >= factor:
            return f'{value / factor:.3g} {unit}'
    return f'{value / 1e3:.3g} k'


def line(*cells: object) -> str:
    """A line of a table."""
    return f'| {" | ".join(map(str, cells))} |'


def window_table() -> list[str]:
    """Both kinds of layers, in windows of the default size."""
    head = ('arch', 'image', 'stage', 'D, H', 'VA: Q, K, `Q K^T`', 'LA: `Psi A Theta^T`', 'VA / LA')
    head += ('with the values, VA / LA', 'LA is cheaper up to')
    lines = [line(*head), '|---' * len(head) + '|']
    for arch, name in NAMES.items():
        for image, sides in IMAGES.items():
            for stage in range(NUM_STAGES):
                cost = Cost.of(arch, stage, sides, WINDOW)
                vanilla, less, values = cost.vanilla_scores, cost.less_scores, cost.values
                side = largest_window(cost.dims, cost.heads)
                cells = [name, image, stage + 1, f'{cost.dims}, {cost.heads}']
                cells += [short(vanilla), short(less), f'{vanilla / less:.2f}']
                cells += [f'{(vanilla + values) / (less + values):.2f}', f'{side} x {side}']
                lines.append(line(*cells))
    return lines


def whole_table() -> list[str]:
    """What layers of small and base would cost if one window were the whole image."""
    head = ('image', 'stage', 'tokens N', 'VA: `2 N D² + N² D`', 'LA: `2 N³ H`', '`N² H`')
    head += ('weights of Psi and Theta', 'LA in 8 x 8 windows')
    lines = [line(*head), '|---' * len(head) + '|']
    for image, sides in IMAGES.items():
        for stage in range(NUM_STAGES):
            windows = Cost.of('small', stage, sides, WINDOW)
            tokens = ceil_div(sides[0], 4 << stage) * ceil_div(sides[1], 4 << stage)
            whole = Cost(tokens, tokens, tokens, windows.dims, windows.heads)
            cells = [image, stage + 1, tokens, short(whole.vanilla_scores)]
            cells += [short(whole.less_scores), short(tokens**2 * whole.heads)]
            cells += [short(2 * tokens**2), short(windows.less_scores)]
            lines.append(line(*cells))
    return lines


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    print('\n'.join([*window_table(), '', *whole_table()]))
