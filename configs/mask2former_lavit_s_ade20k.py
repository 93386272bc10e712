# Mask2Former on ADE20K, 160k iterations at 512 x 512, 8 GPUs x 2 images: mmseg's recipe for ResNet.
# Its AdamW stays, with a tenth of the rate in the backbone; the head's biases have no weight decay.
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(_delete_=True, type='LaViT', arch='small', drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 320, 640]),
)

# What _base_/lavit.py says: it cannot be a base here, as the peer has imports of its own.
custom_imports = dict(imports=['mmdet.models', 'mmlavit'])
custom_hooks = [
    dict(type='DiagonalityLossHook', loss_weight=0.0),
    dict(type='AttentionHealthHook'),
]
optim_wrapper = dict(
    constructor='LaViTOptimWrapperConstructor', paramwise_cfg=dict(bias_decay_mult=0.0)
)
default_hooks = dict(
    checkpoint=dict(type='SafeCheckpointHook'), sampler_seed=dict(type='StepSeedHook')
)
