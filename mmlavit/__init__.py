"""mmlavit: the Less-Attention Vision Transformer (LaViT) as a backbone for OpenMMLab.

Where MMEngine is installed, importing this package registers what ``__all__`` names in it, and
lets configs inherit from ``mmlavit::...`` (and, where MMEngine knows mmseg by another name, from
``mmseg::...``). The hubs of MMEngine and mmpretrain then know its configs. Without MMEngine there
is the model alone, a plain ``torch.nn.Module``.
"""

from importlib import import_module
from importlib.util import find_spec

from .compat import (
    read_metafiles_once,
    repair_config_bases,
    require_mmengine,
    serve_config_bases,
)
from .models import ARCHS, LaViT, LogitAdjustedLoss, diagonality_preserving_loss
from .version import __version__ as __version__

__all__ = ['ARCHS', 'LaViT', 'LogitAdjustedLoss', 'diagonality_preserving_loss']

#: What needs MMEngine, by the module that has it; imported when it is asked for.
_OF_MMENGINE = {
    'AttentionHealthHook': 'engine.hooks.attention_health',
    'AttentionVisualizationHook': 'engine.hooks.attention_visualization',
    'DiagonalityLossHook': 'engine.hooks.diagonality',
    'SafeCheckpointHook': 'engine.hooks.safe_checkpoint',
    'StepSeedHook': 'engine.hooks.step_seed',
    'LaViTOptimWrapperConstructor': 'engine.optim',
    'BFloat16OptimWrapper': 'engine.bfloat16',
    'DSB2018Metric': 'evaluation.dsb2018',
    'ResumableFSDPStrategy': 'engine.fsdp',
    'wrap_lavit_blocks': 'engine.fsdp_policy',
}

if find_spec('mmengine') is not None:
    require_mmengine()
    from .engine import register_all
    from .hub import serve_mmengines_hub, serve_mmpretrains_hub

    if not register_all():
        del _OF_MMENGINE['ResumableFSDPStrategy'], _OF_MMENGINE['wrap_lavit_blocks']
    repair_config_bases()
    serve_config_bases()
    read_metafiles_once()
    serve_mmengines_hub()
    serve_mmpretrains_hub()
    __all__ += _OF_MMENGINE


def __getattr__(name: str) -> object:
    if name not in _OF_MMENGINE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    require_mmengine()
    return getattr(import_module(f'.{_OF_MMENGINE[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_MMENGINE})
