# What every training of a LaViT has in common.
custom_imports = dict(imports=['mmlavit'])
custom_hooks = [
    # The paper's auxiliary loss, off since it cost accuracy in small trainings. To switch it on:
    # --cfg-options custom_hooks.0.loss_weight=0.01
    dict(type='DiagonalityLossHook', loss_weight=0.0),
    # Says in the log, once, if the attention of a stage has died.
    dict(type='AttentionHealthHook'),
]

# For default_hooks: a killed training resumes as if nothing had happened.
lavit_hooks = dict(
    checkpoint=dict(type='SafeCheckpointHook'), sampler_seed=dict(type='StepSeedHook')
)

# For optim_wrapper. LaViT's norms, biases, LayerScale, Psi and Theta have no weight decay by this
# constructor, the norms and biases of neck and heads by these options.
lavit_optim = dict(
    constructor='LaViTOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
