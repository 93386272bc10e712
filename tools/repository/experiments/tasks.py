"""On what variants are compared: shapes, a task of long-range relations, and photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmlavit.datasets.shapes import GENERATOR, ShapesRecipe, make_shapes

from .matching import CLASSES, IGNORED, VERSION, MatchingRecipe, make_matching
from .photographs import unpack_photographs
from .variants import ARCH, Variant

DATA = Path('data/experiments')
POINTS = 5  # of a learning curve
SIZE = 64  # of the images, in pixels: a training takes half the time that it takes at 96
SHAPES = ShapesRecipe(num_train=3000, num_val=500, size=SIZE)
MATCHING = MatchingRecipe(size=SIZE)


@dataclass(frozen=True)
class Task:
    """A data set, a model around the backbone, a budget and a measure.

    Args:
        title: What a reader calls it.
        config: The config that the task shortens.
        iterations: The budget: optimizer steps.
        metric: What counts, by its name in MMEngine's log.
        scale: What the metric has to be multiplied with to be in percent.
        chance: The metric, in percent, of a model that has learnt nothing; None for about 0.
        out_indices: Stages that the model uses.
        changes: Makes the changes to the config, as for ``Config.merge_from_dict``.
        make_data: Writes the data.
        data: Version of what writes it.
        drop_path_rate: Stochastic depth of backbones that have it.
    """

    title: str
    config: Path
    iterations: int
    metric: str
    scale: float
    chance: float | None
    out_indices: tuple[int, ...]
    changes: Callable[[], dict[str, Any]]
    make_data: Callable[[], object]
    data: int
    drop_path_rate: float = 0.0


def _shapes_data() -> object:
    return make_shapes(DATA / 'shapes', SHAPES)


def _matching_data() -> object:
    return make_matching(DATA / 'matching', MATCHING)


def _photographs_data() -> object:
    return unpack_photographs(DATA / 'photographs')


def _crops(padding: int) -> list[dict[str, Any]]:
    """Crops from reflected borders, and flips."""
    crop = dict(type='RandomCrop', crop_size=SIZE, padding=padding, padding_mode='reflect')
    flip = dict(type='RandomFlip', prob=0.5, direction='horizontal')
    return [dict(type='LoadImageFromFile'), crop, flip, dict(type='PackInputs')]


def _classifier() -> dict[str, Any]:
    root = str(DATA / 'shapes/imagenet')
    crops = _crops(padding=4)
    return dict(
        model=dict(head=dict(in_channels=ARCH['embed_dims'][-1])),
        train_dataloader=dict(batch_size=16, dataset=dict(data_root=root, pipeline=crops)),
        val_dataloader=dict(dataset=dict(data_root=root)),
    )


def _photographer() -> dict[str, Any]:
    """Twenty classes of Tiny ImageNet, ten epochs."""
    root = str(DATA / 'photographs')
    crops = _crops(padding=6)
    return dict(
        data_preprocessor=dict(num_classes=20),
        model=dict(head=dict(in_channels=ARCH['embed_dims'][-1], num_classes=20)),
        train_dataloader=dict(batch_size=32, dataset=dict(data_root=root, pipeline=crops)),
        val_dataloader=dict(dataset=dict(data_root=root)),
    )


def _detector() -> dict[str, Any]:
    root = DATA / 'shapes/coco'

    def loader(resize: int, **more: Any) -> dict[str, Any]:
        pipeline = {str(resize): dict(scale=(SIZE, SIZE))}
        return dict(dataset=dict(data_root=f'{root}/', pipeline=pipeline), **more)

    return dict(
        model=dict(
            neck=dict(in_channels=list(ARCH['embed_dims'][1:])),
            # Shapes are two thirds as large as in the 96 x 96 images that the config is for.
            bbox_head=dict(anchor_generator=dict(octave_base_scale=2.67)),
        ),
        train_dataloader=loader(2, batch_size=16),
        val_dataloader=loader(1, batch_size=50),
        val_evaluator=dict(ann_file=str(root / 'annotations/instances_val2017.json')),
    )


def _segmentor() -> dict[str, Any]:
    loader = dict(dataset=dict(data_root=str(DATA / 'shapes/ade')))
    dims = list(ARCH['embed_dims'])
    return dict(
        model=dict(
            data_preprocessor=dict(size=(SIZE, SIZE)),
            decode_head=dict(in_channels=dims, channels=48),
            auxiliary_head=dict(in_channels=dims[2], channels=24),
        ),
        train_dataloader=dict(batch_size=16, **loader),
        val_dataloader=dict(batch_size=50, **loader),
    )


def _matcher() -> dict[str, Any]:
    """A head that only puts the four maps together, so that the backbone has to find relations."""
    loss = dict(type='CrossEntropyLoss', avg_non_ignore=True)
    common = dict(
        data_root=str(DATA / 'matching'),
        metainfo=dict(classes=CLASSES, palette=[[60, 170, 60], [230, 60, 60]]),
        reduce_zero_label=False,
        img_suffix='.png',
    )
    load = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', reduce_zero_label=False),
    ]

    def loader(split: str, pipeline: list[dict], **more: Any) -> dict[str, Any]:
        prefix = dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}')
        return dict(dataset=dict(data_prefix=prefix, pipeline=pipeline, **common), **more)

    flips = [dict(type='RandomFlip', prob=0.5)]
    pack = [dict(type='PackSegInputs')]
    return dict(
        model=dict(
            data_preprocessor=dict(size=(SIZE, SIZE)),
            decode_head=dict(
                _delete_=True,
                type='FCNHead',
                in_channels=list(ARCH['embed_dims']),
                in_index=[0, 1, 2, 3],
                input_transform='resize_concat',
                channels=64,
                num_convs=1,
                kernel_size=1,
                concat_input=False,
                dropout_ratio=0.0,
                num_classes=len(CLASSES),
                norm_cfg=dict(type='BN', requires_grad=True),
                align_corners=False,
                ignore_index=IGNORED,
                loss_decode=loss,
            ),
            auxiliary_head=None,
        ),
        train_dataloader=loader('train', load + flips + pack, batch_size=16),
        val_dataloader=loader('val', load + pack, batch_size=50),
    )


_CONFIGS = Path('configs')
#: By name, on what variants are compared.
TASKS = {
    'cls': Task(
        title='classification',
        config=_CONFIGS / 'lavit_n_shapes.py',
        iterations=800,
        metric='accuracy/top1',
        scale=1.0,
        chance=100 / 3,
        out_indices=(3,),
        changes=_classifier,
        make_data=_shapes_data,
        data=GENERATOR['version'],
    ),
    'det': Task(
        title='detection (RetinaNet)',
        config=_CONFIGS / 'retinanet_lavit_n_shapes.py',
        iterations=400,
        metric='coco/bbox_mAP_50',
        scale=100.0,
        chance=None,
        out_indices=(1, 2, 3),
        changes=_detector,
        make_data=_shapes_data,
        data=GENERATOR['version'],
    ),
    'seg': Task(
        title='segmentation (UPerNet)',
        config=_CONFIGS / 'upernet_lavit_n_shapes.py',
        iterations=500,
        metric='mIoU',
        scale=1.0,
        chance=None,
        out_indices=(0, 1, 2, 3),
        changes=_segmentor,
        make_data=_shapes_data,
        data=GENERATOR['version'],
    ),
    'match': Task(
        title='matching (long-range)',
        config=_CONFIGS / 'upernet_lavit_n_shapes.py',
        iterations=1000,
        metric='aAcc',
        scale=1.0,
        chance=50.0,
        out_indices=(0, 1, 2, 3),
        changes=_matcher,
        make_data=_matching_data,
        data=VERSION,
    ),
    'photo': Task(
        title='photographs (20 classes)',
        config=_CONFIGS / 'lavit_n_shapes.py',
        iterations=3125,
        metric='accuracy/top1',
        scale=1.0,
        chance=5.0,
        out_indices=(3,),
        changes=_photographer,
        make_data=_photographs_data,
        data=1,
        drop_path_rate=0.05,
    ),
}


def build_config(task: Task, variant: Variant, seed: int, rate: float, work_dir: Path) -> Config:
    """The config of one training.

    Args:
        task: What to train for.
        variant: The backbone.
        seed: Seed of weights, shuffling and augmentation.
        rate: The largest learning rate.
        work_dir: Where MMEngine writes its logs.

    Returns:
        A config for MMEngine's Runner: the task's own, shortened to its budget, with a learning
        rate that warms up and goes to 0 linearly, alike for all variants.
    """
    cfg = Config.fromfile(task.config)
    cfg.merge_from_dict(task.changes())
    backbone = dict(variant.backbone, out_indices=task.out_indices)
    if 'drop_path_rate' in backbone:
        backbone['drop_path_rate'] = task.drop_path_rate
    steps = task.iterations
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        # One process a training: images are small, and more processes would fight for the cores.
        loader.update(num_workers=0, persistent_workers=False)
    # An unending sampler suits a budget in steps, whatever the sampler of the config's epochs.
    cfg.train_dataloader.pop('batch_sampler', None)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    optim = cfg.lavit_optim
    # Swin's: no weight decay on it either.
    optim.paramwise_cfg.custom_keys = {'relative_position_bias_table': dict(decay_mult=0.0)}
    cfg.merge_from_dict(
        dict(
            model=dict(backbone=dict(_delete_=True, **backbone)),
            train_cfg=dict(
                _delete_=True,
                type='IterBasedTrainLoop',
                max_iters=steps,
                val_interval=steps // POINTS,
            ),
            optim_wrapper=dict(
                _delete_=True,
                type='OptimWrapper',
                optimizer=dict(type='AdamW', lr=rate, weight_decay=0.05),
                clip_grad=dict(max_norm=5.0),
                **optim,
            ),
            randomness=dict(seed=seed),
            work_dir=str(work_dir),
            test_cfg=None,
            test_dataloader=None,
            test_evaluator=None,
        )
    )
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=steps // 10),
        dict(type='LinearLR', start_factor=1.0, end_factor=0.01, by_epoch=False)
        | dict(begin=steps // 10, end=steps),
    ]
    cfg.custom_hooks = [dict(hook) for hook in variant.hooks]
    # Nothing is kept but the log: what a training comes to is a line of results.
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=-1, save_last=False, by_epoch=False
    )
    cfg.log_processor = dict(by_epoch=False)
    cfg.visualizer = None
    cfg.vis_backends = None
    return cfg
