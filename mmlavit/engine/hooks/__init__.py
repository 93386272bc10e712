"""Hooks for MMEngine, which importing this package registers."""

from .attention_health import AttentionHealthHook
from .attention_visualization import AttentionVisualizationHook
from .diagonality import DiagonalityLossHook
from .safe_checkpoint import SafeCheckpointHook
from .step_seed import StepSeedHook

__all__ = [
    'AttentionHealthHook',
    'AttentionVisualizationHook',
    'DiagonalityLossHook',
    'SafeCheckpointHook',
    'StepSeedHook',
]
