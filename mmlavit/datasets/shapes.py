"""A small made-up data set: circles, squares and triangles on textured backgrounds.

The same images are written three times, as COCO instances, as ADE20K segmentation and as an
ImageNet folder tree, so that a detector, a segmentor and a classifier can each be trained and
tested for real in minutes, without a download::

    coco/annotations/instances_{train,val}2017.json
    coco/{train,val}2017/000000000001.jpg ...
    ade/images/{training,validation}/000000000001.jpg ...
    ade/annotations/{training,validation}/000000000001.png ...   0 unused, 1 background, 2.. CLASSES
    imagenet/{train,val}/{circle,square,triangle}/000000000001.jpg ...
    dataset.json                                                 the recipe, and whether it is done

From front to back: ``draw_image`` makes one image, ``make_shapes`` writes them all. This module
needs numpy, OpenCV and tqdm only, and ``import mmlavit`` does not load it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

CLASSES = ('circle', 'square', 'triangle')

# Raise it whenever the same recipe would give other files: it is part of the data set's identity.
GENERATOR = {'name': 'mmlavit.shapes', 'version': 4}

MIN_SIZE = 32  # below it the smallest triangle is a few pixels that look like anything
# Radius of the disc of equal area, as a share of the image side: of the first shape, which nearly
# always stays the largest and names the image, and of the others. From shapes all of one range a
# classifier learns next to nothing in the time of a demo: image labels alone tell too little.
LEADER = (0.26, 0.31)
OTHERS = (0.12, 0.17)
MIN_VISIBLE = 0.85  # of every shape, after the shapes drawn over it
MIN_LEAD = 1.25  # of the largest shape's area over every other class's, as it names the image
MIN_PART = 6  # pixels; a smaller visible fragment is no fair target for a detector
MIN_CONTRAST = 90.0  # distance in BGR between a shape and what it must stand out from
TRIES = 40  # places tried for a shape before the image counts as full
SUPERSAMPLE = 4  # sub-pixels per axis from which the coverage of edge pixels is measured
JPEG_QUALITY = 95

_CORNERS = {'circle': 64, 'square': 4, 'triangle': 3}
# Radians. A square stands on a side and a triangle too, give or take TURN: fully turned, a small
# square is so close to a circle that a model needs longer to tell them than a demo should take.
_UPRIGHT = {'circle': 0.0, 'square': np.pi / 4, 'triangle': -np.pi / 2}
TURN = np.pi / 9
_MANIFEST = 'dataset.json'
_SCRATCH = '.partial'


# ---------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapesRecipe:
    """All that determines the data set.

    Image ``i`` of a split depends on ``seed``, ``size`` and ``max_shapes`` alone, so a larger data
    set begins with the images of the smaller one.

    Args:
        num_train: Training images, >= 1.
        num_val: Validation images, >= 1.
        size: Side of the square images in pixels, >= 32.
        max_shapes: Most shapes in one image, >= 1. Fewer where no more find room.
        seed: Any integer >= 0.

    Raises:
        TypeError: If a value is not an int.
        ValueError: If a value is too small.
    """

    num_train: int = 3000
    num_val: int = 200
    size: int = 96
    max_shapes: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int('num_train', self.num_train, 1)
        _check_int('num_val', self.num_val, 1)
        _check_int('size', self.size, MIN_SIZE)
        _check_int('max_shapes', self.max_shapes, 1)
        _check_int('seed', self.seed, 0)


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int >= {least}, got {value!r}')
    if value < least:
        raise ValueError(f'{name} must be >= {least}, got {value}')


# ---------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Instance:
    """One shape as it can be seen.

    Args:
        label: Index into ``CLASSES``.
        mask: ``(H, W)`` bool, the visible pixels: in one or more parts, without holes.
    """

    label: int
    mask: np.ndarray

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @property
    def bbox(self) -> list[int]:
        """``[x, y, width, height]`` of the visible pixels, whole pixels as COCO counts them."""
        ys, xs = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        x, y = int(xs[0]), int(ys[0])
        return [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y]

    @property
    def polygons(self) -> list[list[int]]:
        """COCO polygons ``[x0, y0, x1, y1, ...]`` along the pixel edges, one for each part.

        They enclose exactly the pixels of ``mask``, with (0, 0) the image's top left corner.
        """
        return [part.ravel().tolist() for part in _outlines(self.mask)]


def draw_image(
    rng: np.random.Generator, size: int, max_shapes: int
) -> tuple[np.ndarray, list[Instance]]:
    """Draws one image.

    Class, colour and area are drawn independently of each other, so only the outline tells a
    circle from a square from a triangle.

    Args:
        rng: The only source of chance.
        size: Side of the image in pixels, >= 32.
        max_shapes: Most shapes in the image, >= 1.

    Returns:
        The image, ``(size, size, 3)`` uint8 in BGR order, and its 1 to ``max_shapes`` instances,
        the lowest first. Every one lies within the image and shows ``MIN_VISIBLE`` of itself, and
        which class the largest is of is plain to see.

    Raises:
        TypeError: If ``size`` or ``max_shapes`` is not an int.
        ValueError: If one of them is too small.
    """
    _check_int('size', size, MIN_SIZE)
    _check_int('max_shapes', max_shapes, 1)
    background = canvas = _background(rng, size)
    instances, coverages = _place_shapes(rng, size, int(rng.integers(1, max_shapes + 1)))
    colours: list[np.ndarray] = []
    for coverage in coverages:
        behind = background[coverage > 0].mean(0)
        colours.append(_contrasting_colour(rng, [behind, *colours]))
        shade = _texture(rng, size, amplitude=rng.uniform(4, 14))
        alpha = coverage[..., None]
        canvas = canvas * (1 - alpha) + (colours[-1] + shade) * alpha
    canvas = canvas + rng.normal(0, rng.uniform(2, 8), canvas.shape)
    return np.clip(canvas.round(), 0, 255).astype(np.uint8), instances


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """``(size, size, 3)``: a colour, a gradient, stripes, and strong and faint smooth noise."""
    gradient = _wave(rng, size, cycles=0.25)
    stripes = _wave(rng, size, cycles=rng.uniform(2, 10))
    return (
        rng.uniform(40, 215, 3)
        + gradient[..., None] * rng.uniform(-30, 30, 3)
        + stripes[..., None] * rng.uniform(-18, 18, 3)
        + _texture(rng, size, amplitude=rng.uniform(8, 25))
        + _texture(rng, size, amplitude=rng.uniform(4, 14))
    )


def _wave(rng: np.random.Generator, size: int, cycles: float) -> np.ndarray:
    """``(size, size)`` in [-1, 1]: a sine across the image at a random angle and phase."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    y, x = np.mgrid[:size, :size] / size
    return np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)


def _texture(rng: np.random.Generator, size: int, amplitude: float) -> np.ndarray:
    """``(size, size, 3)`` smooth noise around 0, of blobs 1/12 to 1/3 of the image wide."""
    cells = int(rng.integers(3, 13))
    noise = rng.normal(0, 1, (cells, cells, 1)) * rng.uniform(-1, 1, 3)
    return amplitude * cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _place_shapes(
    rng: np.random.Generator, size: int, count: int
) -> tuple[list[Instance], list[np.ndarray]]:
    """Finds places for ``count`` shapes, or for as many as fit.

    Returns:
        The instances with their visible masks, and for each the ``(size, size)`` share of every
        pixel that the whole shape covers.
    """
    instances: list[Instance] = []
    coverages: list[np.ndarray] = []
    areas: list[int] = []
    for index in range(count):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(TRIES):
            radius = size * rng.uniform(*(OTHERS if index else LEADER))
            coverage = _random_shape(rng, size, CLASSES[label], radius)
            mask = coverage >= 0.5
            below = [Instance(i.label, i.mask & ~mask) for i in instances]
            visible = all(_well_visible(i.mask, area) for i, area in zip(below, areas, strict=True))
            if visible and _has_largest([*below, Instance(label, mask)]):
                break
        else:
            break
        instances = [*below, Instance(label, mask)]
        coverages.append(coverage)
        areas.append(instances[-1].area)
    return instances, coverages


def _random_shape(rng: np.random.Generator, size: int, name: str, radius: float) -> np.ndarray:
    """``(size, size)`` share of every pixel covered by a shape of random turn and place.

    Its area is that of a disc of ``radius`` pixels: with one range of corner distances for all
    classes a circle would have 2.4 times the area of a triangle, and be the largest nearly always.
    """
    corners = _CORNERS[name]
    area = np.pi * radius**2
    reach = np.sqrt(2 * area / (corners * np.sin(2 * np.pi / corners)))
    turn = _UPRIGHT[name] + rng.uniform(-TURN, TURN)
    angles = 2 * np.pi * np.arange(corners) / corners + turn
    outline = reach * np.stack([np.cos(angles), np.sin(angles)], 1)
    outline += rng.uniform(reach, size - reach, 2)
    # In OpenCV whole numbers are pixel centres, and 4 fractional bits are enough for a smooth turn.
    points = np.round((outline * SUPERSAMPLE - 0.5) * 16).astype(np.int32)
    fine = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), np.float32)
    cv2.fillConvexPoly(fine, points, 1.0, shift=4)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)


def _well_visible(visible: np.ndarray, whole_area: int) -> bool:
    """Whether what is left of a shape is enough, has no crumbs, and can be written as polygons."""
    if visible.sum() < MIN_VISIBLE * whole_area:
        return False
    parts = _outlines(visible)
    # Polygons cannot have holes: where a shape has one, its polygons enclose too much.
    enclosed = [cv2.contourArea(part.astype(np.int32)) for part in parts]
    return sum(enclosed) == visible.sum() and min(enclosed) >= MIN_PART


def _has_largest(instances: list[Instance]) -> bool:
    """Whether nobody could take a shape of another class for the largest one."""
    largest = max(instances, key=lambda instance: instance.area)
    others = [i.area for i in instances if i.label != largest.label]
    return not others or largest.area >= MIN_LEAD * max(others)


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The ``(P, 2)`` corners ``(x, y)`` of the pixel edges around every part of a mask."""
    # OpenCV's contours run through pixel centres and so lose half a pixel all round, a tenth of a
    # small shape. In the mask at twice the size pixel x is the columns 2x and 2x + 1, and rounding
    # the contour to even numbers, 2x and 2x + 2, puts it on the edges of the pixel.
    double = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = [(contour[:, 0] + 1) // 2 for contour in contours]
    # Both ends of the short cut through an inner corner land on that corner: keep one.
    return [part[(part != np.roll(part, 1, 0)).any(1)] for part in corners]


def _contrasting_colour(rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """A random BGR colour far from all others, or the farthest of 64 where none is far enough."""
    colours = rng.uniform(10, 245, (64, 3))
    distance = np.min([np.linalg.norm(colours - other, axis=1) for other in others], 0)
    # argmax takes the first of equals, that is the first colour with contrast enough.
    return colours[np.argmax(np.minimum(distance, MIN_CONTRAST))]


# ---------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """Where one split is kept. ``key`` separates its random streams from the other split's."""

    key: int
    name: str
    ade: str

    def count(self, recipe: ShapesRecipe) -> int:
        return recipe.num_train if self.name == 'train' else recipe.num_val

    @property
    def coco_json(self) -> Path:
        return Path('coco', 'annotations', f'instances_{self.name}2017.json')

    @property
    def coco_images(self) -> Path:
        return Path('coco', f'{self.name}2017')

    @property
    def ade_images(self) -> Path:
        return Path('ade', 'images', self.ade)

    @property
    def ade_labels(self) -> Path:
        return Path('ade', 'annotations', self.ade)

    @property
    def imagenet(self) -> list[Path]:
        return [Path('imagenet', self.name, label) for label in CLASSES]

    @property
    def folders(self) -> list[Path]:
        folders = [self.coco_json.parent, self.coco_images, self.ade_images, self.ade_labels]
        return folders + self.imagenet


_SPLITS = (_Split(0, 'train', 'training'), _Split(1, 'val', 'validation'))


def make_shapes(
    root: str | Path, recipe: ShapesRecipe, progress: bool = True, overwrite: bool = False
) -> bool:
    """Writes the data set, or what is missing of it.

    Every file appears whole or not at all and ``dataset.json`` says when all are there, so after
    an interruption, or when files were lost, the same call again completes the set. The same
    recipe gives the same bytes on the same versions of numpy and OpenCV.

    Args:
        root: Output folder; made if it does not exist.
        recipe: What to draw.
        progress: Whether to show a progress bar.
        overwrite: Whether to replace another data set of this generator found in ``root``. Only
            the files that the generator wrote are removed.

    Returns:
        True when something was written, False when this very data set was already complete.

    Raises:
        FileExistsError: If ``root`` is a file, holds another data set and ``overwrite`` is off, or
            holds anything that this generator did not write, whatever ``overwrite`` says.
    """
    root = Path(root)
    manifest = _check_root(root, recipe, overwrite)
    if overwrite and manifest:
        _remove(root, ShapesRecipe(**manifest['recipe']))
    elif manifest and manifest['complete'] and _is_whole(root, recipe):
        return False
    # First of all, so that a run killed from here on is known as ours and finished by the next.
    _write_manifest(root, recipe, complete=False)
    for folder in [path for split in _SPLITS for path in split.folders]:
        (root / folder).mkdir(parents=True, exist_ok=True)
    total = recipe.num_train + recipe.num_val
    with tqdm(total=total, desc=str(root), unit='image', disable=not progress) as bar:
        counts = {split.name: _write_split(root, recipe, split, bar) for split in _SPLITS}
    _write_manifest(root, recipe, complete=True, counts=counts)
    shutil.rmtree(root / _SCRATCH, ignore_errors=True)
    return True


def read_manifest(root: str | Path) -> dict[str, Any] | None:
    """The contents of ``dataset.json``, or None where this generator has written none.

    Args:
        root: Output folder of ``make_shapes``.

    Returns:
        ``generator``, ``recipe`` and ``complete``; when complete also ``counts``, by split:
        ``instances`` of each class and ``images`` whose largest shape is of that class.
    """
    try:
        manifest = json.loads((Path(root) / _MANIFEST).read_text(encoding='utf-8'))
        ours = manifest['generator']['name'] == GENERATOR['name']
        ShapesRecipe(**manifest['recipe'])
        ours = ours and 'complete' in manifest
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return manifest if ours else None


def _check_root(root: Path, recipe: ShapesRecipe, overwrite: bool) -> dict[str, Any] | None:
    """Returns what ``read_manifest`` does, once ``root`` is known to be safe to write in."""
    if not root.is_dir():
        if root.exists() or root.is_symlink():
            raise FileExistsError(f'{root} is not a directory; choose another one (--out)')
        return None
    manifest = read_manifest(root)
    if manifest is None:
        # A run killed before its first file leaves only the scratch folder.
        foreign = sorted(path.name for path in root.iterdir() if path.name != _SCRATCH)
        if foreign:
            raise FileExistsError(
                f'{root} holds {foreign[0]!r} and no {_MANIFEST} of {GENERATOR["name"]}, so '
                'something else wrote it: choose another directory (--out) or empty it by hand'
            )
        return None
    for folder in [path for split in _SPLITS for path in split.folders]:
        if not (root / folder).resolve().is_relative_to(root.resolve()):
            raise FileExistsError(
                f'{root / folder} leads out of {root}: choose another directory (--out) or remove '
                'the link by hand'
            )
    found, asked = _identity(manifest), _identity(_describe(recipe))
    differences = [
        f'{name} is {found.get(name)!r} there and {asked.get(name)!r} here'
        for name in asked
        if found.get(name) != asked.get(name)
    ]
    if differences and not overwrite:
        raise FileExistsError(
            f'{root} holds another data set ({", ".join(differences)}): choose another directory '
            '(--out), remove this one by hand, or replace it (--overwrite)'
        )
    return manifest


def _describe(recipe: ShapesRecipe) -> dict[str, Any]:
    return {'generator': GENERATOR, 'recipe': asdict(recipe)}


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two data sets to be the same."""
    return {'generator version': manifest['generator'].get('version'), **manifest['recipe']}


def _write_manifest(root: Path, recipe: ShapesRecipe, complete: bool, **more: Any) -> None:
    manifest = {**_describe(recipe), 'complete': complete, **more}
    _write(root, Path(_MANIFEST), (json.dumps(manifest, indent=2) + '\n').encode())


def _write_split(
    root: Path, recipe: ShapesRecipe, split: _Split, bar: tqdm
) -> dict[str, dict[str, int]]:
    """Writes one split in its three forms and returns how often each class occurs in it."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    labels: Counter[int] = Counter()
    for index in range(split.count(recipe)):
        rng = np.random.default_rng([recipe.seed, split.key, index])
        image, instances = draw_image(rng, recipe.size, recipe.max_shapes)
        name = _name(index)
        largest = max(instances, key=lambda instance: instance.area).label
        labels[largest] += 1
        original = split.coco_images / f'{name}.jpg'
        _write_missing(root, original, image)
        _link(root, original, split.ade_images / f'{name}.jpg')
        _link(root, original, split.imagenet[largest] / f'{name}.jpg')
        _write_missing(root, split.ade_labels / f'{name}.png', _ade_label(instances, recipe.size))
        images.append(
            {
                'id': index + 1,
                'file_name': f'{name}.jpg',
                'width': recipe.size,
                'height': recipe.size,
            }
        )
        for instance in instances:
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': index + 1,
                    'category_id': instance.label + 1,
                    'segmentation': instance.polygons,
                    'area': instance.area,
                    'bbox': instance.bbox,
                    'iscrowd': 0,
                }
            )
        bar.update()
    coco = {
        'info': dict(description='Made-up shapes', **_describe(recipe)),
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)],
    }
    _write(root, split.coco_json, json.dumps(coco).encode())
    instances_of = Counter(annotation['category_id'] - 1 for annotation in annotations)
    return {
        'instances': {name: instances_of[i] for i, name in enumerate(CLASSES)},
        'images': {name: labels[i] for i, name in enumerate(CLASSES)},
    }


def _name(index: int) -> str:
    return f'{index + 1:012d}'


def _ade_label(instances: list[Instance], size: int) -> np.ndarray:
    """``(size, size)`` uint8: 1 is background and 2.. are ``CLASSES``; ADE20K ignores 0."""
    label = np.ones((size, size), np.uint8)
    for instance in instances:
        label[instance.mask] = instance.label + 2
    return label


def _write_missing(root: Path, path: Path, pixels: np.ndarray) -> None:
    if not (root / path).exists():
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == '.jpg' else []
        _write(root, path, cv2.imencode(path.suffix, pixels, options)[1].tobytes())


def _link(root: Path, original: Path, copy: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    try:
        os.link(root / original, root / copy)
    except FileExistsError:
        return
    except OSError:
        _write(root, copy, (root / original).read_bytes())


def _write(root: Path, path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, so that a file that exists is a file that is right."""
    scratch = root / _SCRATCH / str(os.getpid())
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        os.replace(scratch, root / path)
    except FileNotFoundError:
        # Another process that writes the same data set was done and cleared the scratch folder.
        if not (root / path).exists():
            raise


def _files(split: _Split, count: int) -> Iterator[list[Path]]:
    """For every file of a split the places where it can be: one, or a folder for each class."""
    yield [split.coco_json]
    for index in range(count):
        name = _name(index)
        yield [split.coco_images / f'{name}.jpg']
        yield [split.ade_images / f'{name}.jpg']
        yield [split.ade_labels / f'{name}.png']
        yield [folder / f'{name}.jpg' for folder in split.imagenet]


def _is_whole(root: Path, recipe: ShapesRecipe) -> bool:
    """Whether every file of the data set is there."""
    return all(
        any((root / path).exists() for path in places)
        for split in _SPLITS
        for places in _files(split, split.count(recipe))
    )


def _remove(root: Path, recipe: ShapesRecipe) -> None:
    """Removes all files of a data set but ``dataset.json``, which says whose the folder is."""
    for split in _SPLITS:
        for places in _files(split, split.count(recipe)):
            for path in places:
                (root / path).unlink(missing_ok=True)
