# Mask R-CNN, FPN, 1x schedule (12 epochs), 8 GPUs x 2 images; everything else is mmdet's.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/lavit.py',
]

model = dict(
    # To start from a pretrained classifier: --cfg-options model.backbone.init_cfg.checkpoint=PATH
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 640]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor={{_base_.lavit_optim.constructor}},
    paramwise_cfg={{_base_.lavit_optim.paramwise_cfg}},
)
default_hooks = {{_base_.lavit_hooks}}
