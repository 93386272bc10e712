"""mmdet's drawings of boxes and masks, with one colour a class and labels that can be read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmdet.structures.mask import BaseInstanceMasks, bitmap_to_polygon
from mmdet.visualization import DetLocalVisualizer
from mmdet.visualization.palette import get_palette
from mmengine.structures import InstanceData

from .colours import class_colours

# Of an average letter, and of what is around a label, in heights of the font.
_LETTER, _AROUND = 0.62, 0.6
# Where there are more objects than this, labels must not hide more than this share of them.
_MANY, _SHARE = 10, 1 / 4
# Of RGB, how bright each looks (ITU-R BT.601).
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])

Box = tuple[float, float, float, float]


class ClassColourVisualizer(DetLocalVisualizer):
    """mmdet's visualizer, whose masks, boxes and labels of a class all have its colour.

    mmdet's own shifts the colour of each mask at random, so an object looks different wherever it
    is drawn, and writes on small objects in letters too small to read. Where there are more than
    ten objects, and labels would hide more than a quarter of what is in the boxes, there are none.

    Args:
        name: Of the visualizer.
        font_size: Of the labels, in points; None for one that suits the image.
        **kwargs: Of mmdet's visualizer.
    """

    def __init__(
        self, name: str = 'visualizer', *, font_size: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, **kwargs)
        self.font_size = font_size

    def _draw_instances(
        self,
        image: np.ndarray,
        instances: InstanceData,
        classes: Sequence[str] | None,
        palette: Sequence[tuple] | str | None,
    ) -> np.ndarray:
        self.set_image(image)
        labels = [int(label) for label in instances.labels]
        if not labels:
            return self.get_image()
        number = len(classes) if classes is not None else max(labels) + 1
        if palette is None or palette == 'random':
            all_colors = class_colours(number)
        elif isinstance(palette, list):
            all_colors = class_colours(number, palette)
        else:
            # A name, or one colour for all.
            all_colors = get_palette(palette, number)
        colors = [tuple(int(value) for value in all_colors[label]) for label in labels]
        # A model of masks alone has boxes of zeros.
        boxes = instances.bboxes if 'bboxes' in instances and instances.bboxes.any() else None
        if 'masks' in instances:
            masks = instances.masks
            if isinstance(masks, BaseInstanceMasks):
                masks = masks.to_ndarray()
            masks = np.asarray(masks, dtype=bool)
            self.draw_binary_masks(masks, colors=colors, alphas=self.alpha)
            for mask, color in zip(masks, colors, strict=True):
                if outline := bitmap_to_polygon(mask)[0]:
                    self.draw_polygons(outline, edge_colors=color, line_widths=self.line_width)
            if boxes is None:
                boxes = torch.stack([_around(mask) for mask in masks])
        if boxes is not None:
            # Where there is an outline, the box is second to it.
            width = 1 if 'masks' in instances else self.line_width
            self.draw_bboxes(boxes, edge_colors=colors, line_widths=width)
            texts = [classes[i] if classes is not None else f'class {i}' for i in labels]
            if 'label_names' in instances:
                texts = list(instances.label_names)
            if 'scores' in instances:
                scores = instances.scores.tolist()
                texts = [f'{t} {score:.2f}' for t, score in zip(texts, scores, strict=True)]
            self._label(image.shape[:2], boxes.tolist(), texts, colors)
        return self.get_image()

    def _label(
        self, size: tuple[int, int], boxes: Sequence[Box], texts: list[str], colors: list[tuple]
    ) -> None:
        """Write a line at each box, inside the image, and none over another.

        Nothing is written where there are many, and the labels would hide them. Where the image
        is full of labels, those that come last are left out.
        """
        side = min(size)
        points = self.font_size or max(min(side / 15, 10), side / 70)
        pixels = points * self.dpi / 72
        height = round(1.5 * pixels)
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        labels: list[tuple[Box, str, tuple]] = []
        taken: list[Box] = []
        for box, text, color in zip(boxes, texts, colors, strict=True):
            width = round((_LETTER * len(text) + _AROUND) * pixels)
            # Of a larger one, enough is to be seen.
            small = [b for b, area in zip(boxes, areas, strict=True) if area < height * width]
            place = _free_place(box, (height, width), size, taken, small)
            if place is not None:
                labels.append((place, text, color))
                taken.append(place)
        if len(texts) > _MANY:
            objects = _covered(size, boxes)
            if (objects & _covered(size, taken)).sum() > _SHARE * objects.sum():
                return
        for (left, top, _, _), text, color in labels:
            self.draw_texts(
                text,
                np.array([left + 0.2 * pixels, min(top + 0.2 * pixels, size[0])]),
                font_sizes=points,
                colors='black' if _BRIGHTNESS @ color > 140 else 'white',
                bboxes=dict(
                    facecolor=tuple(value / 255 for value in color), pad=1.5, edgecolor='none'
                ),
            )


def _free_place(
    box: Box,
    label: tuple[int, int],
    image: tuple[int, int],
    taken: Sequence[Box],
    objects: Sequence[Box],
) -> Box | None:
    """Where a label is in the image and over no other, as near above its box as can be.

    Args:
        box: Of the object; left, top, right, bottom.
        label: Its height and width.
        image: Its height and width.
        taken: Where other labels are.
        objects: What it should not hide, if there is room within three lines.

    Returns:
        The place; None where the image has none.
    """
    height, width = label
    left, top = (math.floor(side) for side in box[:2])
    right, bottom = (math.ceil(side) for side in box[2:])
    highest, furthest = (max(whole - part, 0) for whole, part in zip(image, label, strict=True))
    above = min(max(top - height, 0), highest)
    lines = [*range(above, -1, -height), *range(max(bottom, 0), highest + 1, height)]
    # Within large ones, where a label hides little.
    lines += range(max(top, 0), min(bottom, image[0]) - 2 * height, height)
    # From the left side of the box, or up to its right side; first what is nearer the middle.
    starts = [min(max(start, 0), furthest) for start in (left, right - width)]
    if left + right > image[1]:
        starts.reverse()
    around = list(itertools.product(starts, lines))
    middle = min(max((top + bottom - height) // 2, 0), highest)
    around += [(start, middle) for start in (right, left - width) if 0 <= start <= furthest]
    anywhere = itertools.product(range(0, furthest + 1, height), lines)
    for corners in (around, anywhere):
        corners = sorted(corners, key=lambda at: (abs(at[1] - above), abs(at[0] - starts[0])))
        places = np.array([(x, y, x + width, y + height) for x, y in corners])
        free = ~_over(places, taken)
        if free.any():
            near = abs(places[:, 1] - above) <= 3 * height
            best = free & near & ~_over(places, objects)
            return tuple(places[np.argmax(best if best.any() else free)].tolist())
    return None


def _over(places: np.ndarray, others: Sequence[Box]) -> np.ndarray:
    """(N,), which of (N, 4) places have a part of any of the others."""
    left, top, right, bottom = places.T[:, :, None]
    x0, y0, x1, y1 = np.array(others).reshape(-1, 4).T[:, None]
    return ((left < x1) & (x0 < right) & (top < y1) & (y0 < bottom)).any(1)


def _covered(size: tuple[int, int], boxes: Sequence[Box]) -> np.ndarray:
    """(height, width), which pixels of the image any of the boxes has."""
    covered = np.zeros(size, bool)
    for box in boxes:
        left, top, right, bottom = (max(round(side), 0) for side in box)
        covered[top:bottom, left:right] = True
    return covered


def _around(mask: np.ndarray) -> torch.Tensor:
    """The box around a mask; zeros for an empty one."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return torch.zeros(4)
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
