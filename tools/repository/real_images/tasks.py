"""On what backbones are compared: the committed configs on four sets of real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .backbones import BACKBONES

CONFIGS = Path('configs')
Dims = tuple[int, int, int, int]


@dataclass(frozen=True)
class Measure:
    """What a test says.

    Args:
        title: What a reader calls it.
        name: Its name in MMEngine's log.
        scale: What it is multiplied with to be shown.
        digits: After the point, as it is shown.
    """

    title: str
    name: str
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Task:
    """A committed config and how its trainings are compared.

    Args:
        title: What a reader calls it.
        config: The config.
        measures: Of the test. The first is what counts: learning rates are chosen by its value in
            validation, and curves show it.
        best: Whether the checkpoint that is tested is the best in validation; if not, the last.
        held_out: Whether validation has images of its own, which are not those of the test.
        widths: The parts of the config that say the channels of the backbone's maps, by them.
        out_indices: Of the backbone.
        swin_window: Side of Swin's windows: LaViT's, but where its later maps are smaller.
        image: Height and width at which a test image reaches the model: the most frequent one.
        peers: Backbones beside LaViT and its twin.
        pretrained: Whether LaViT is trained from the classifier of Tiny ImageNet as well.
        rates: Learning rates to choose from for each backbone.
        published: Figures of others on the same test images: who, and what by title of the measure.
    """

    title: str
    config: Path
    measures: tuple[Measure, ...]
    best: bool
    held_out: bool
    widths: Callable[[Dims], dict[str, Any]] = field(compare=False)
    out_indices: tuple[int, ...]
    swin_window: int
    image: tuple[int, int]
    peers: tuple[str, ...]
    pretrained: bool = True
    rates: tuple[float, float] = (1e-3, 5e-4)
    published: tuple[tuple[str, dict[str, str]], ...] = ()

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names in :data:`~repository.real_images.backbones.BACKBONES`, LaViT's first."""
        ours = ('lavit', 'pretrained', 'vanilla') if self.pretrained else ('lavit', 'vanilla')
        return tuple(name for name in BACKBONES if name in (*ours, *self.peers))


#: By name. The classifier comes first: others start from it.
TASKS = {
    'tinyimagenet': Task(
        title='Tiny ImageNet, 20 classes',
        config=CONFIGS / 'lavit_n_tinyimagenet.py',
        measures=(Measure('top-1', 'accuracy/top1'), Measure('top-5', 'accuracy/top5')),
        best=False,
        held_out=False,
        widths=lambda dims: dict(head=dict(in_channels=dims[3])),
        out_indices=(3,),
        swin_window=4,
        image=(64, 64),
        peers=('swin', 'pvt', 'convnext', 'resnet'),
        pretrained=False,
    ),
    'camvid': Task(
        title='CamVid, UPerNet',
        config=CONFIGS / 'upernet_lavit_n_camvid.py',
        measures=(Measure('mIoU', 'mIoU'), Measure('mAcc', 'mAcc'), Measure('aAcc', 'aAcc')),
        best=True,
        held_out=True,
        widths=lambda dims: dict(
            decode_head=dict(in_channels=list(dims)), auxiliary_head=dict(in_channels=dims[2])
        ),
        out_indices=(0, 1, 2, 3),
        swin_window=8,
        image=(360, 480),
        peers=('swin', 'pvt', 'convnext', 'resnet'),
        published=(
            ('FC-DenseNet103, from scratch', {'mIoU': '66.9'}),
            ('ENet, re-implementations, from scratch', {'mIoU': '51 to 53'}),
        ),
    ),
    'dsb2018': Task(
        title='DSB 2018, Mask R-CNN',
        config=CONFIGS / 'maskrcnn_lavit_n_dsb2018.py',
        measures=(
            Measure('contest score', 'dsb2018/score', digits=3),
            Measure('mask AP', 'coco/nucleus_precision', 100),
            Measure('mask AP50', 'coco/segm_mAP_50', 100),
            Measure('mask AP75', 'coco/segm_mAP_75', 100),
            Measure('box AP50', 'coco/bbox_mAP_50', 100),
        ),
        best=False,
        held_out=False,
        widths=lambda dims: dict(neck=dict(in_channels=list(dims))),
        out_indices=(0, 1, 2, 3),
        swin_window=8,
        image=(512, 512),
        peers=('swin', 'resnet'),
        published=(
            (
                'Mask R-CNN pretrained on COCO, three public repositories',
                {'contest score': '0.456, 0.458, about 0.490'},
            ),
        ),
    ),
    'bccd': Task(
        title='BCCD, RetinaNet',
        config=CONFIGS / 'retinanet_lavit_n_bccd.py',
        measures=(
            Measure('AP50', 'coco/bbox_mAP_50', 100),
            Measure('AP', 'coco/bbox_mAP', 100),
            Measure('AP of red cells', 'coco/RBC_precision', 100),
            Measure('of white cells', 'coco/WBC_precision', 100),
            Measure('of platelets', 'coco/Platelets_precision', 100),
        ),
        best=True,
        held_out=True,
        widths=lambda dims: dict(neck=dict(in_channels=list(dims[1:]))),
        out_indices=(1, 2, 3),
        swin_window=8,
        image=(360, 480),
        peers=('swin', 'resnet'),
        published=(('detectors on other splits of the images', {'AP50': '85 to 86'}),),
    ),
}
