"""What ``torch.hub`` finds here: the backbone, in an environment that has torch alone.

    maps = torch.hub.load(REPOSITORY, 'lavit_small', source='local')(images)

There are no trained weights yet.
"""

# torch.hub takes every name without an underscore for an entry.
from mmlavit.models import LaViT as _LaViT

dependencies = ['torch']


def _lavit(arch: str, pretrained: bool, options: dict) -> _LaViT:
    if pretrained:
        raise ValueError(
            f'pretrained={pretrained!r}: lavit_{arch} has no trained weights yet; leave it out, '
            'and load weights of your own by load_state_dict'
        )
    return _LaViT(arch, **options)


def lavit_nano(pretrained: bool = False, **options: object) -> _LaViT:
    """LaViT-nano, a backbone: images (B, 3, H, W) to maps at strides 4, 8, 16 and 32.

    Args:
        pretrained: There are no trained weights yet, so True is refused.
        options: Those of :class:`mmlavit.models.LaViT`, such as ``out_indices``.

    Raises:
        ValueError: If ``pretrained`` is set, or an option does not fit.
    """
    return _lavit('nano', pretrained, options)


def lavit_tiny(pretrained: bool = False, **options: object) -> _LaViT:
    """LaViT-T of the paper; all else is as in ``lavit_nano``."""
    return _lavit('tiny', pretrained, options)


def lavit_small(pretrained: bool = False, **options: object) -> _LaViT:
    """LaViT-S of the paper; all else is as in ``lavit_nano``."""
    return _lavit('small', pretrained, options)


def lavit_base(pretrained: bool = False, **options: object) -> _LaViT:
    """LaViT-B of the paper; all else is as in ``lavit_nano``."""
    return _lavit('base', pretrained, options)
