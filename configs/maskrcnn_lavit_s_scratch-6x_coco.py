# Mask R-CNN without a pretrained backbone, 6x schedule (73 epochs), with GroupNorm in neck and
# heads, 8 GPUs x 2 images: mmdet's recipe for ResNet from scratch
# (https://arxiv.org/abs/1811.08883), but AdamW at 1e-4 in the place of SGD at 2e-2.
_base_ = [
    'mmdet::scratch/mask-rcnn_r50-scratch_fpn_gn-all_6x_coco.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 640]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor={{_base_.lavit_optim.constructor}},
    paramwise_cfg={{_base_.lavit_optim.paramwise_cfg}},
)
default_hooks = {{_base_.lavit_hooks}}
