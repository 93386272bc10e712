# RetinaNet, FPN, 1x schedule (12 epochs), 8 GPUs x 2 images: mmdet's recipe for PVT.
_base_ = [
    'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py',
    './_base_/lavit.py',
]

model = dict(
    # The first stage feeds nothing here, so its output norm is not built.
    backbone=dict(
        _delete_=True, type='LaViT', arch='small', out_indices=(1, 2, 3), drop_path_rate=0.2
    ),
    neck=dict(in_channels=[128, 320, 640], start_level=0),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
