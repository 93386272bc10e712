# UPerNet on ADE20K, 160k iterations at 512 x 512, 8 GPUs x 2 images: mmseg's recipe for Swin.
_base_ = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
