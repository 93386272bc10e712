# Mask R-CNN with large-scale jitter, 100 epochs in mixed precision, 8 GPUs x 8 images: mmdet's
# recipe for ResNet, but AdamW at 1e-4 in the place of SGD at 8e-2. That is the rate of ViTDet
# (https://arxiv.org/abs/2203.16527) with this jitter and batch size.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_8xb8-amp-lsj-200e_coco.py',
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
