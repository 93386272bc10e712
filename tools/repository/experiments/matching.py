"""Made-up data whose labels need long-range relations: is a disc like the marked one far away?

Each image holds one disc in a white ring and, at least half an image away from it, some discs
without. A pixel of those is labelled by whether its disc has the colour of the marked one, so what
is to be said of a place depends on another place, which may be anywhere else. All other pixels are
not labelled. The discs of an image have two of six colours, and the marked one has either: without
looking at it nothing is better than chance, 50 %::

    images/{train,val}/00000.png ...
    labels/{train,val}/00000.png ...     0 same, 1 different, 255 not labelled
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

CLASSES = ('same', 'different')
IGNORED = 255
COLOURS = (  # BGR; the background is grey
    (60, 60, 210),  # red
    (60, 210, 210),  # yellow
    (60, 210, 60),  # green
    (210, 210, 60),  # cyan
    (210, 60, 60),  # blue
    (210, 60, 210),  # magenta
)
JITTER = 25.0  # of each channel of a disc's colour
RADIUS = (0.08, 0.11)  # of a disc, as a share of the image side
MARKED = (0.12, 0.15)  # of the marked disc, likewise
RING = 0.03  # width of the ring, likewise
DISTANCE = 0.5  # between the centres of the marked disc and of any other, likewise
TRIES = 100  # places tried for a disc before the image counts as full
_SPLITS = ('train', 'val')
# To be raised whenever the same recipe gives other files. Results of the old ones are then void.
VERSION = 2


@dataclass(frozen=True)
class MatchingRecipe:
    """All that determines the data set; image ``i`` of a split depends on ``seed`` and ``size``.

    Args:
        num_train: Training images, >= 1.
        num_val: Validation images, >= 1.
        size: Side of the images in pixels, >= 48.
        seed: Any integer >= 0.

    Raises:
        TypeError: If a value is not an int.
        ValueError: If a value is too small.
    """

    num_train: int = 4000
    num_val: int = 500
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (('num_train', 1), ('num_val', 1), ('size', 48), ('seed', 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f'{name} must be an int >= {least}, got {value!r}')
            if value < least:
                raise ValueError(f'{name} must be >= {least}, got {value}')


def draw_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        rng: The only source of chance.
        size: Side of the image in pixels.

    Returns:
        The image (size, size, 3), uint8, BGR, and its labels (size, size), uint8.
    """
    noise = cv2.resize(rng.normal(0, 20, (8, 8)), (size, size), interpolation=cv2.INTER_CUBIC)
    image = np.repeat((rng.uniform(90, 160) + noise)[..., None], 3, axis=2)
    labels = np.full((size, size), IGNORED, np.uint8)
    y, x = np.mgrid[:size, :size] + 0.5
    marked_colour, other_colour = rng.permutation(len(COLOURS))[:2]
    # From a corner's quarter there is always room half an image away.
    radii = [size * rng.uniform(*MARKED)]
    centres = [_corner(rng, size, radii[0] + RING * size)]
    for _ in range(int(rng.integers(2, 5))):
        radius = size * rng.uniform(*RADIUS)
        for _ in range(TRIES):
            centre = rng.uniform(radius, size - radius, 2)
            gaps = np.linalg.norm(np.array(centres) - centre, axis=1)
            if gaps[0] >= DISTANCE * size and (gaps[1:] > radius + np.array(radii[1:]) + 2).all():
                centres.append(centre)
                radii.append(radius)
                break
    for i, (centre, radius) in enumerate(zip(centres, radii, strict=True)):
        distance = np.hypot(x - centre[0], y - centre[1])
        same = i == 0 or rng.random() < 0.5
        colour = np.array(COLOURS[marked_colour if same else other_colour])
        colour = colour + rng.uniform(-JITTER, JITTER, 3)
        if i == 0:
            image = _painted(image, np.full(3, 250.0), radius + RING * size - distance)
        else:
            labels[distance < radius] = CLASSES.index('same' if same else 'different')
        image = _painted(image, colour, radius - distance)
    image = image + rng.normal(0, 6, image.shape)
    return np.clip(image.round(), 0, 255).astype(np.uint8), labels


def _corner(rng: np.random.Generator, size: int, edge: float) -> np.ndarray:
    """A place in the quarter of the image next to one of its corners."""
    near = rng.uniform(edge, size * 0.35, 2)
    return np.where(rng.random(2) < 0.5, near, size - near)


def _painted(image: np.ndarray, colour: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The image with a colour where ``inside`` (pixels from the edge inwards) is positive."""
    alpha = np.clip(inside + 0.5, 0, 1)[..., None]
    return image * (1 - alpha) + colour * alpha


def make_matching(root: Path, recipe: MatchingRecipe) -> None:
    """Write the data set, or nothing where it is complete.

    Args:
        root: Folder to write; must not exist, or be this very data set.
        recipe: What to draw.

    Raises:
        FileExistsError: If ``root`` holds something else.
    """
    recipe_file = root / 'recipe.txt'
    identity = f'{recipe}, version {VERSION}\n'
    if root.exists():
        if recipe_file.is_file() and recipe_file.read_text() == identity:
            return
        raise FileExistsError(
            f'{root} holds something else than {identity.strip()}: '
            'move it away or choose another directory'
        )
    scratch = root.with_name(f'{root.name}.{os.getpid()}')
    try:
        for key, (split, count) in enumerate(
            zip(_SPLITS, (recipe.num_train, recipe.num_val), strict=True)
        ):
            for folder in ('images', 'labels'):
                (scratch / folder / split).mkdir(parents=True)
            for i in tqdm(range(count), desc=f'{root} {split}', unit='image'):
                pictures = draw_pair(np.random.default_rng([recipe.seed, key, i]), recipe.size)
                for folder, pixels in zip(('images', 'labels'), pictures, strict=True):
                    # OpenCV's own writing says nothing of a disk that is full.
                    encoded = cv2.imencode('.png', pixels)[1].tobytes()
                    (scratch / folder / split / f'{i:05d}.png').write_bytes(encoded)
        (scratch / recipe_file.name).write_text(identity)
        scratch.rename(root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
