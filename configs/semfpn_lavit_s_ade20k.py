# Semantic FPN on ADE20K, 80k iterations at 512 x 512, 8 GPUs x 4 images: mmseg's recipe for Twins.
_base_ = [
    'mmseg::twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 640]),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
