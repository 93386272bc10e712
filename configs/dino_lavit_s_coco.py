# DINO, 4 scales, 12 epochs, 8 GPUs x 2 images: mmdet's recipe for ResNet. Its AdamW stays, with a
# tenth of the rate in the backbone; norms and biases of neck and head have no weight decay.
_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    './_base_/lavit.py',
]

model = dict(
    # The first stage feeds nothing here, so its output norm is not built.
    backbone=dict(
        _delete_=True, type='LaViT', arch='small', out_indices=(1, 2, 3), drop_path_rate=0.2
    ),
    neck=dict(in_channels=[128, 320, 640]),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
