"""The colours of classes in drawings."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps

# Of a turn: hues so far apart stay apart, however many there are.
_GOLDEN = (5**0.5 - 1) / 2


def class_colours(
    number: int, palette: Sequence[Sequence[int]] | None = None
) -> list[tuple[int, int, int]]:
    """A colour for each class, which one can tell from the others.

    Args:
        number: How many classes there are.
        palette: What the data set says. It counts only if it has a colour for each class: a config
            that names classes of its own inherits the palette of the data set class, COCO's
            eighty colours for one.

    Returns:
        RGB from 0 to 255: of the palette, or matplotlib's ten and then hues.
    """
    if palette and len(palette) == number:
        return [(int(red), int(green), int(blue)) for red, green, blue in palette]
    ten, hues = colormaps['tab10'], colormaps['hsv']
    chosen = [ten(i) if i < ten.N else hues(i * _GOLDEN % 1) for i in range(number)]
    return [
        (round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue, _ in chosen
    ]
