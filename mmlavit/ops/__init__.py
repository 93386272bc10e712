"""Operations of the model: each is its equation, with fast forms beside it.

The models call what is here and know nothing of the fast forms: :mod:`.lean` (training keeps
little), :mod:`.fused_attention` (one Triton kernel), :mod:`.inference` (pieces that stay in the
cache of a CPU).
"""

from .attend import attend
from .halve_pairs import halve_pairs
from .layers import layers
from .lean import lean
from .less_attention import less_attention
from .saturate import saturate
from .scores import scaled_product, two_sided_linear

__all__ = [
    'attend',
    'halve_pairs',
    'layers',
    'lean',
    'less_attention',
    'saturate',
    'scaled_product',
    'two_sided_linear',
]
