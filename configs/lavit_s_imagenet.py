# ImageNet-1k at 224 x 224: 300 epochs, 16 GPUs x 64 images = 1024, learning rate 1e-3, cosine after
# 20 epochs of warm-up, RandAugment, Mixup, CutMix, random erasing, label smoothing: mmpretrain's
# recipe for Swin (which has no EMA). For another batch size, --auto-scale-lr.
_base_ = [
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    './_base_/lavit.py',
]

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', out_indices=(3,), drop_path_rate=0.2),
    head=dict(in_channels=640),
)

optim_wrapper = {{_base_.lavit_optim}}
default_hooks = {{_base_.lavit_hooks}}
