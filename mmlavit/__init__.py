"""mmlavit: the Less-Attention Vision Transformer (LaViT) as a backbone for OpenMMLab.

Importing this package registers :class:`~mmlavit.backbone.LaViT`,
:class:`~mmlavit.diagonality.DiagonalityLossHook`,
:class:`~mmlavit.attention_health.AttentionHealthHook`,
:class:`~mmlavit.analysis.hook.AttentionVisualizationHook`,
:class:`~mmlavit.safe_checkpoint.SafeCheckpointHook`, :class:`~mmlavit.step_seed.StepSeedHook` and,
where MMEngine has FSDP, :class:`~mmlavit.fsdp.ResumableFSDPStrategy` and
:func:`~mmlavit.fsdp.wrap_lavit_blocks` in MMEngine, and lets configs inherit from ``mmlavit::...``
(and, where MMEngine knows mmseg by another name, from ``mmseg::...``).
"""

from .compat import repair_config_bases, require_mmengine, serve_config_bases

require_mmengine()

import mmengine._strategy  # noqa: E402

from .analysis.hook import AttentionVisualizationHook  # noqa: E402
from .arch import ARCHS  # noqa: E402
from .attention_health import AttentionHealthHook  # noqa: E402
from .backbone import LaViT  # noqa: E402
from .diagonality import DiagonalityLossHook, diagonality_preserving_loss  # noqa: E402
from .safe_checkpoint import SafeCheckpointHook  # noqa: E402
from .step_seed import StepSeedHook  # noqa: E402

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
    from .fsdp import ResumableFSDPStrategy, wrap_lavit_blocks

    __all__ += ['ResumableFSDPStrategy', 'wrap_lavit_blocks']
