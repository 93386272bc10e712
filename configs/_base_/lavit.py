# What every training of a LaViT has in common.
custom_imports = dict(imports=['mmlavit'])
custom_hooks = [dict(type='DiagonalityLossHook'), dict(type='AttentionHealthHook')]

# For default_hooks: a killed training resumes as if nothing had happened.
lavit_hooks = dict(
    checkpoint=dict(type='SafeCheckpointHook'), sampler_seed=dict(type='StepSeedHook')
)

# For optim_wrapper.paramwise_cfg: no weight decay on norms, biases, LayerScale, Psi and Theta.
lavit_paramwise = dict(
    norm_decay_mult=0.0,
    bias_decay_mult=0.0,
    custom_keys={
        'layer_scale': dict(decay_mult=0.0),
        'psi': dict(decay_mult=0.0),
        'theta': dict(decay_mult=0.0),
    },
)
