"""mmlavit: the Less-Attention Vision Transformer (LaViT) as a backbone for OpenMMLab.

Importing this package registers what :data:`__all__` names in MMEngine, and lets configs inherit
from ``mmlavit::...`` (and, where MMEngine knows mmseg by another name, from ``mmseg::...``).
"""

from .compat import repair_config_bases, require_mmengine, serve_config_bases

require_mmengine()

import mmengine._strategy  # noqa: E402

from .engine.hooks.attention_health import AttentionHealthHook  # noqa: E402
from .engine.hooks.attention_visualization import AttentionVisualizationHook  # noqa: E402
from .engine.hooks.diagonality import DiagonalityLossHook, diagonality_preserving_loss  # noqa: E402
from .engine.hooks.safe_checkpoint import SafeCheckpointHook  # noqa: E402
from .engine.hooks.step_seed import StepSeedHook  # noqa: E402
from .models.arch import ARCHS  # noqa: E402
from .models.lavit import LaViT  # noqa: E402

repair_config_bases()
serve_config_bases()

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'AttentionHealthHook',
    'AttentionVisualizationHook',
    'DiagonalityLossHook',
    'LaViT',
    'SafeCheckpointHook',
    'StepSeedHook',
    'diagonality_preserving_loss',
]

if hasattr(mmengine._strategy, 'FSDPStrategy'):
    # MMEngine leaves it out where importing FSDP fails.
    from .engine.fsdp import ResumableFSDPStrategy, wrap_lavit_blocks

    __all__ += ['ResumableFSDPStrategy', 'wrap_lavit_blocks']
