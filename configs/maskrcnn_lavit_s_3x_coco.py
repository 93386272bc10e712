# Mask R-CNN, FPN, 3x schedule (36 epochs) with multi-scale crops, 8 GPUs x 2 images: mmdet's recipe
# for Swin.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 640]),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
