"""The model: LaViT, its layers, and the geometry of windows."""

from .arch import ARCHS
from .diagonality import diagonality_preserving_loss
from .lavit import LaViT
from .logit_adjusted_loss import LogitAdjustedLoss

__all__ = ['ARCHS', 'LaViT', 'LogitAdjustedLoss', 'diagonality_preserving_loss']
