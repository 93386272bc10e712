# Mask2Former, instances, 50 epochs (369k iterations) with large-scale jitter, 8 GPUs x 2 images:
# mmdet's recipe for ResNet. Its AdamW stays, with a tenth of the rate in the backbone; the head's
# biases have no weight decay.
_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    panoptic_head=dict(in_channels=[64, 128, 320, 640]),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
