# RTMDet with the neck and head of its large model, 100 epochs, 4 GPUs x 32 images: mmdet's recipe
# for Swin. Its AdamW at 1e-3 stays.
_base_ = 'mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py'

model = dict(
    # The first stage feeds nothing here, so its output norm is not built.
    backbone=dict(
        _delete_=True, type='LaViT', arch='small', out_indices=(1, 2, 3), drop_path_rate=0.2
    ),
    neck=dict(in_channels=[128, 320, 640]),
)

# What _base_/lavit.py says: it cannot be a base here, as the peer has hooks of its own.
custom_imports = dict(imports=['mmlavit'])
custom_hooks = [
    dict(type='DiagonalityLossHook', loss_weight=0.0),
    dict(type='AttentionHealthHook'),
    *_base_.custom_hooks,
]
optim_wrapper = dict(constructor='LaViTOptimWrapperConstructor')
default_hooks = dict(
    checkpoint=dict(type='SafeCheckpointHook'), sampler_seed=dict(type='StepSeedHook')
)
# What --auto-scale-lr starts from; mmdet's 16 comes from a schedule that is replaced.
auto_scale_lr = dict(base_batch_size=128)
