"""A small LaViT with weights far from their start, and what tests need around it."""

import torch
from torch import Tensor

from mmlavit import LaViT

ARCH = dict(
    embed_dims=(16, 32, 48, 64),
    num_heads=(1, 2, 3, 4),
    depths=(2, 2, 3, 2),
    vanilla_depths=(1, 1, 2, 1),
    mlp_ratios=(2, 2, 2, 2),
)


def seeded(seed: int) -> torch.Generator:
    """A generator whose seed is printed, so that a failure can be repeated."""
    print(f'seed {seed}')
    return torch.Generator().manual_seed(seed)


def small_lavit(seed: int = 0, scale: float = 0.1, **options: object) -> LaViT:
    """A float64 LaViT of :data:`ARCH` whose every weight is moved by noise.

    So Psi and Theta are not the identity, LayerScale is not small and norms are not trivial.
    """
    generator = seeded(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LaViT(**{'arch': ARCH, 'drop_path_rate': 0.0, **options}).double().eval()
    return move_weights(model, generator, scale)


@torch.no_grad()
def move_weights(model: LaViT, generator: torch.Generator, scale: float = 0.1) -> LaViT:
    """Add normal noise to every weight of ``model``, in place."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter += scale * noise
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    """Normal float64 noise."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
