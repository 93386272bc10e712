"""mmdet's drawings of boxes and masks, with one colour a class and labels that can be read."""

from __future__ import annotations

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

        Nothing is written where there are many, and the labels would hide them.
        """
        side = min(size)
        points = self.font_size or max(min(side / 15, 10), side / 70)
        pixels = points * self.dpi / 72
        height = 1.5 * pixels
        places: list[Box] = []
        for (left, top, right, _), text in zip(boxes, texts, strict=True):
            width = (_LETTER * len(text) + _AROUND) * pixels
            if (left + right) / 2 > size[1] / 2:
                left = right - width
            left = min(max(left, 0), max(size[1] - width, 0))
            # Above the box, if there is room.
            top = max(top - height, 0)
            while any(
                left < x1 and x0 < left + width and top < y1 and y0 < top + height
                for x0, y0, x1, y1 in places
            ):
                top += height
            places.append((left, top, left + width, top + height))
        if len(texts) > _MANY:
            objects = _covered(size, boxes)
            if (objects & _covered(size, places)).sum() > _SHARE * objects.sum():
                return
        for (left, top, _, _), text, color in zip(places, texts, colors, strict=True):
            self.draw_texts(
                text,
                np.array([left + 0.2 * pixels, min(top + 0.2 * pixels, size[0])]),
                font_sizes=points,
                colors='black' if _BRIGHTNESS @ color > 140 else 'white',
                bboxes=dict(
                    facecolor=tuple(value / 255 for value in color), pad=1.5, edgecolor='none'
                ),
            )


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
