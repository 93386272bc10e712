"""The model: LaViT, its layers, and the geometry of windows."""

from .arch import ARCHS
from .diagonality import diagonality_preserving_loss
from .lavit import LaViT

__all__ = ['ARCHS', 'LaViT', 'diagonality_preserving_loss']
