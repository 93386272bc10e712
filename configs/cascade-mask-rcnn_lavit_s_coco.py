# Cascade Mask R-CNN, FPN, 1x schedule (12 epochs), 8 GPUs x 2 images: mmdet's recipe for ResNet,
# but AdamW at 1e-4 in the place of SGD at 2e-2, as in maskrcnn_lavit_s_coco.py.
_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
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
