# RetinaNet, FPN, 3x schedule (12 epochs of COCO repeated three times) with images of 640 to 800
# pixels, 8 GPUs x 2 images.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::common/ms_3x_coco.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(
        _delete_=True, type='LaViT', arch='small', out_indices=(1, 2, 3), drop_path_rate=0.2
    ),
    neck=dict(in_channels=[128, 320, 640], start_level=0),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    constructor={{_base_.lavit_optim.constructor}},
    paramwise_cfg={{_base_.lavit_optim.paramwise_cfg}},
)
default_hooks = {{_base_.lavit_hooks}}
