"""mmlavit: the Less-Attention Vision Transformer (LaViT) as a backbone for OpenMMLab.

Importing this package registers :class:`LaViT`, :class:`DiagonalityLossHook`,
:class:`SafeCheckpointHook`, :class:`StepSeedHook` and, where MMEngine has FSDP,
:class:`ResumableFSDPStrategy` and :func:`wrap_lavit_blocks` in MMEngine, and lets configs inherit
from ``mmlavit::...`` (and, where MMEngine knows mmseg by another name, from ``mmseg::...``).
"""

from .compat import repair_config_bases, require_mmengine, serve_config_bases

require_mmengine()

import mmengine._strategy  # noqa: E402

from .arch import ARCHS  # noqa: E402
from .backbone import LaViT  # noqa: E402
from .diagonality import DiagonalityLossHook, diagonality_preserving_loss  # noqa: E402
from .safe_checkpoint import SafeCheckpointHook  # noqa: E402
from .step_seed import StepSeedHook  # noqa: E402

repair_config_bases()
serve_config_bases()

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'DiagonalityLossHook',
    'LaViT',
    'SafeCheckpointHook',
    'StepSeedHook',
    'diagonality_preserving_loss',
]

if hasattr(mmengine._strategy, 'FSDPStrategy'):
    # MMEngine leaves it out where importing FSDP fails.
    from .fsdp import ResumableFSDPStrategy, wrap_lavit_blocks

    __all__ += ['ResumableFSDPStrategy', 'wrap_lavit_blocks']
