"""Conversions to COCO's format, of boxes and masks, and of copies that are in it already."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tqdm import tqdm

from .conversion import Conversion, ConversionError
from .reading import Download, check_size


class CocoFile:
    """An annotation file that is being put together.

    Args:
        description: What its ``info`` says.
        licence: Of the data set.
        classes: Names; their numbers start at 1.
    """

    def __init__(self, description: str, licence: str, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._info = {'description': description, 'licence': licence}
        self._empty = 0

    def add_image(self, name: str, size: Sequence[int]) -> None:
        """Add an image; the boxes and masks that are added after it are in it.

        Args:
            name: ``file_name``.
            size: Width and height.
        """
        image = {'id': len(self.images) + 1, 'file_name': name}
        self.images.append({**image, 'width': size[0], 'height': size[1]})

    def add_box(self, label: str, bbox: Sequence[float]) -> None:
        """Add a box, or count it as left out where it has no area.

        Args:
            label: One of the classes.
            bbox: ``[x, y, width, height]`` in pixels.
        """
        area = float(max(bbox[2], 0) * max(bbox[3], 0))
        self._add(label, [float(value) for value in bbox], area)

    def add_mask(self, label: str, rle: Mapping[str, Any]) -> None:
        """Add a mask with the box around it, or count it as left out where it has no pixel.

        Args:
            label: One of the classes.
            rle: The mask, run-length encoded by pycocotools.
        """
        counts = rle['counts']
        segmentation = {
            'size': [int(side) for side in rle['size']],
            'counts': counts.decode() if isinstance(counts, bytes) else counts,
        }
        bbox, area = coco_mask.toBbox(rle).tolist(), int(coco_mask.area(rle))
        self._add(label, bbox, area, segmentation=segmentation)

    def _add(self, label: str, bbox: list[float], area: float, **more: Any) -> None:
        if not area:
            self._empty += 1
            return
        annotation = {
            'id': len(self.annotations) + 1,
            'image_id': len(self.images),
            'category_id': self.classes.index(label) + 1,
            'bbox': bbox,
            'area': area,
            'iscrowd': 0,
        }
        self.annotations.append({**annotation, **more})

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of images, of annotations of each class, and of those that were left out."""
        labels = [annotation['category_id'] for annotation in self.annotations]
        each = {name: labels.count(i) for i, name in enumerate(self.classes, 1)}
        left_out = {'empty, left out': self._empty} if self._empty else {}
        return {'images': len(self.images), **each, **left_out}

    def to_bytes(self) -> bytes:
        """The file."""
        content = {
            'info': self._info,
            'images': self.images,
            'annotations': self.annotations,
            'categories': [{'id': i, 'name': name} for i, name in enumerate(self.classes, 1)],
        }
        return json.dumps(content).encode()


#: Adds a split to an annotation file, image by image, and yields each image's name and its path in
#: the download.
Reader = Callable[[CocoFile], Iterator[tuple[str, str]]]


def plan_coco(
    download: Download,
    readers: Mapping[str, Reader],
    progress: bool,
    *,
    name: str,
    version: int,
    licence: str,
    classes: Sequence[str],
    images: str,
) -> Conversion:
    """Read all splits of a download, for ``annotations/SPLIT.json`` and the images.

    Args:
        download: What is read.
        readers: What reads each split.
        progress: Whether to show progress bars.
        name: As of ``Conversion``, as the next two.
        version: As above.
        licence: As above.
        classes: Names.
        images: The folder of the images to write; ``{split}`` in it is replaced.

    Raises:
        ConversionError: If a reader does.
    """
    files: dict[str, Callable[[], bytes]] = {}
    counts = {}
    for split, read in readers.items():
        coco = CocoFile(f'{name} {split}', licence, classes)
        bar = tqdm(read(coco), f'checking {split}', unit=' images', disable=not progress)
        for file_name, path in bar:
            files[images.format(split=split) + file_name] = partial(download.read, path)
        if not coco.images:
            raise ConversionError(f'{download.path} has no image of {split}')
        files[f'annotations/{split}.json'] = coco.to_bytes
        counts[split] = coco.counts
    return Conversion(name, version, licence, download.used, files, counts)


def read_copy(
    download: Download, name: str, images: str, coco: CocoFile
) -> Iterator[tuple[str, str]]:
    """Take over an annotation file that is in COCO's format already, image by image.

    Args:
        download: What holds it.
        name: Its path.
        images: The folder of its images; the path ends with ``/``.
        coco: What its images and annotations are added to: masks where there are some, else boxes.

    Yields:
        The name and the path of each image.

    Raises:
        ConversionError: If the file or an image is missing or damaged, an image or a mask has
            another size than the file says, or a class is unknown.
    """
    place = download.place(name)
    found = COCO()
    content = download.json(name)
    try:
        found.dataset = {key: content[key] for key in ('images', 'annotations', 'categories')}
        with contextlib.redirect_stdout(io.StringIO()):
            found.createIndex()
        for image_id, image in found.imgs.items():
            path = images + image['file_name']
            size = image['width'], image['height']
            check_size(f'{place}: {image["file_name"]}', size, download.image(path).size)
            coco.add_image(image['file_name'], size)
            for annotation in found.imgToAnns[image_id]:
                what = f'{place}: annotation {annotation["id"]}'
                label = found.cats[annotation['category_id']]['name']
                if label not in coco.classes:
                    raise ConversionError(
                        f'{what} has the unknown class {label!r}; there are {list(coco.classes)}'
                    )
                if annotation.get('segmentation'):
                    rle = found.annToRLE(annotation)
                    check_size(what, rle['size'][::-1], size)
                    coco.add_mask(label, rle)
                else:
                    coco.add_box(label, annotation['bbox'])
            yield image['file_name'], path
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConversionError(
            f"{place} is not in COCO's format: {type(error).__name__}: {error}"
        ) from error
