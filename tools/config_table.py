"""Prints the table of configs/README.md: what each config of the paper's is and costs."""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmlavit.compat import repair_torchvision

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
PAPERS = ' Reported by the Paper'
TRAINED = '[trained](../docs/real_images/README.md)'

# By the first word of a config's name: what it is.
HEADS = {
    'retinanet': 'RetinaNet',
    'maskrcnn': 'Mask R-CNN',
    'semfpn': 'Semantic FPN',
    'upernet': 'UPerNet',
    'cascade-mask-rcnn': 'Cascade Mask R-CNN',
    'mask2former': 'Mask2Former',
    'dino': 'DINO',
    'rtmdet': 'RTMDet',
}
# By a word between: what sets it apart from the config without.
VARIANTS = {
    'amp': 'mixed precision',
    'cp': 'gradient checkpointing',
    'lsj': 'large-scale jitter',
    'scratch-6x': 'from scratch',
}
# By the last: the data, and the image (height, width) at which FLOPs are counted, which is the
# paper's where it counts them.
DATA = {
    'imagenet': ('ImageNet-1k', (224, 224)),
    'coco': ('COCO', (800, 1280)),
    'ade20k': ('ADE20K', (512, 2048)),
    'tinyimagenet': ('Tiny ImageNet', (64, 64)),
    'camvid': ('CamVid', (360, 480)),
    'dsb2018': ('DSB 2018', (512, 512)),
    'bccd': ('BCCD', (360, 480)),
}


def build(cfg: Config) -> nn.Module:
    """The model of a config, if possible on PyTorch's meta device, where nothing is computed.

    Deformable attention reads the shapes of its maps from a tensor, which has to be a real one.
    """
    importlib.import_module(f'{cfg.default_scope}.models')
    models = importlib.import_module(f'{cfg.default_scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = models.build(cfg.model).eval()
    kinds = {type(module).__name__ for module in model.modules()}
    deformable = 'MultiScaleDeformableAttention' in kinds
    return model if deformable else model.to('meta')


def forward(model: nn.Module, images: Tensor) -> None:
    """Run a model as its toolbox counts it: without losses, post-processing and auxiliary heads.

    Mask R-CNN's second stage sees 1000 proposals, and 100 of them its mask head, as in mmdet; so
    does each of a cascade's.
    """
    if not hasattr(model, 'roi_head'):
        size = tuple(images.shape[2:])
        samples = [BaseDataElement(metainfo=dict(img_shape=size, batch_input_shape=size))]
        head = getattr(model, 'decode_head', None)
        if hasattr(head, 'pixel_decoder'):
            # Mask2Former's, to which mmseg hands no samples.
            head(model.extract_feat(images), samples)
        else:
            model(images, samples, mode='tensor')
        return
    maps = model.extract_feat(images)
    model.rpn_head(maps)
    heads = model.roi_head
    for head, extractor, count in (
        (heads.bbox_head, heads.bbox_roi_extractor, 1000),
        (heads.mask_head, heads.mask_roi_extractor, 100),
    ):
        for one, its in zip(stages(head), stages(extractor), strict=True):
            side = its.roi_layers[0].output_size
            one(torch.empty(count, maps[0].shape[1], *side, device='meta'))


def stages(part: nn.Module) -> list[nn.Module]:
    """What of a second stage is there once, or once in each stage of a cascade."""
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def gflops(model: nn.Module, image: tuple[int, int]) -> float:
    """GFLOPs of one image (a multiplication and an addition count as one)."""
    # With gradients, as in training. Without, padded tokens are not projected, and it is less.
    with FlopCounterMode(display=False) as counter:
        device = next(model.parameters()).device
        forward(model, torch.zeros(1, 3, *image, device=device))
    return counter.get_total_flops() / 2 / 1e9


def schedule(cfg: Config) -> str:
    """Length of the training."""
    if 'max_iters' in cfg.train_cfg:
        return f'{cfg.train_cfg.max_iters / 1000:g}k iterations'
    # mmdet's 3x schedule repeats the data set within an epoch.
    repeats = cfg.train_dataloader.dataset.get('times', 1)
    return f'{cfg.train_cfg.max_epochs * repeats} epochs'


def papers_accuracy(entry: dict) -> str:
    """What the paper reports, from an entry of metafile.yml."""
    metrics = [result['Metrics'] for result in entry.get('Results', [])]
    return ', '.join(f'{k.removesuffix(PAPERS)} {v}' for m in metrics for k, v in m.items()) or '–'


def row(entry: dict) -> str:
    """The line of one config, from its entry in metafile.yml."""
    path = CONFIGS.parent / entry['Config']
    cfg = Config.fromfile(path)
    first, *between, last = path.stem.split('_')
    data, image = DATA[last]
    task = f'{HEADS[first]} on {data}' if first in HEADS else f'{data} classification'
    task = ', '.join([task, *(VARIANTS[word] for word in between if word in VARIANTS)])
    model = build(cfg)
    cost = gflops(model, image)
    papers_cost = entry['Metadata'].get(f'FLOPs{PAPERS}', '–').removesuffix('G')
    cells = [
        f'`{path.name}`',
        task,
        schedule(cfg),
        f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}',
        '{} x {}'.format(*image),
        f'{cost:.{2 if cost < 10 else 0}f} / {papers_cost}',
        papers_accuracy(entry),
        TRAINED if entry['Metadata']['Trained'] else 'not trained',
    ]
    return f'| {" | ".join(cells)} |'


def table() -> str:
    """The table, in Markdown."""
    repair_torchvision()
    head = [
        '| config | task | schedule | params M | image | GFLOPs: ours / paper | accuracy: paper '
        '| accuracy: ours |',
        '|---|---|---|---|---|---|---|---|',
    ]
    models = yaml.safe_load((CONFIGS / 'metafile.yml').read_text(encoding='utf-8'))['Models']
    return '\n'.join([*head, *map(row, models)])


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    print(table())
