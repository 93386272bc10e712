"""The family: what makes one LaViT different from another, as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TypeGuard

NUM_STAGES = 4
#: Fields of :class:`Arch` that are no sizes, and that an argument of LaViT may overrule.
OPTIONS = ('conv_stem', 'overlap_downsample', 'mix_ffn')


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python's or NumPy's; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def as_int(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """An integer of Python's or NumPy's, as one of Python's.

    Args:
        name: The argument, for the message.
        value: What the user gave.
        minimum: Smallest allowed value, or None.
        maximum: Largest allowed value beside a minimum, or None.

    Raises:
        TypeError: If it is none; True and False are none.
        ValueError: If it is out of bounds.
    """
    if not is_int(value):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    value = int(value)
    if minimum is not None and (value < minimum or (maximum is not None and value > maximum)):
        limits = f'at least {minimum}' if maximum is None else f'in {minimum}..{maximum}'
        raise ValueError(f'{name} must be {limits}, got {value}')
    return value


def as_ints(name: str, values: object) -> list[int]:
    """A sequence or an array of integers as a list.

    Args:
        name: The argument, for the message.
        values: What the user gave.

    Raises:
        TypeError: If it is none.
    """
    # An array of NumPy is a collection, and no Sequence.
    if isinstance(values, (str, Set, Mapping)) or not isinstance(values, Collection):
        raise TypeError(f'{name} must be a sequence of integers, got {values!r}')
    try:
        return [as_int(name, value) for value in values]
    except TypeError:
        raise TypeError(f'{name} must hold integers, got {values!r}') from None


def per_stage_ints(name: str, values: object, minimum: int = 1) -> tuple[int, ...]:
    """Check one integer per stage.

    Args:
        name: The argument, for the message.
        values: What the user gave.
        minimum: Smallest allowed value.

    Returns:
        The values as a tuple.

    Raises:
        TypeError: If it is not a sequence of integers.
        ValueError: If there are not four, or one is under ``minimum``.
    """
    found = as_ints(name, values)
    if len(found) != NUM_STAGES:
        raise ValueError(
            f'{name} must have one value for each of the {NUM_STAGES} stages, got {len(found)}: '
            f'{values!r}'
        )
    if any(v < minimum for v in found):
        raise ValueError(f'{name} must be at least {minimum} in every stage, got {values!r}')
    return tuple(found)


@dataclass(frozen=True)
class Arch:
    """Sizes of a LaViT, one value per stage.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads; each divides its ``embed_dims``.
        depths: Layers.
        vanilla_depths: How many of them, from the first on, are vanilla attention (at least 1;
            the others are less attention).
        mlp_ratios: Hidden channels of the MLP over ``embed_dims``.
        conv_stem: What ``LaViT(conv_stem=None)`` means. Defaults to False, the paper's.
        overlap_downsample: What ``LaViT(overlap_downsample=None)`` means. Defaults to False, the
            paper's.
        mix_ffn: What ``LaViT(mix_ffn=None)`` means. Defaults to False, the paper's.

    Raises:
        TypeError: If a field is not a sequence of numbers, or an option not a bool.
        ValueError: If a field's values do not fit; the message names the field.
    """

    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    vanilla_depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    conv_stem: bool = False
    overlap_downsample: bool = False
    mix_ffn: bool = False

    def __post_init__(self) -> None:
        for name in ('embed_dims', 'num_heads', 'depths', 'vanilla_depths'):
            object.__setattr__(self, name, per_stage_ints(name, getattr(self, name)))
        object.__setattr__(self, 'mlp_ratios', _check_ratios(self.mlp_ratios))
        for name in OPTIONS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f'{name} must be True or False, got {getattr(self, name)!r}')
        for stage in range(NUM_STAGES):
            dims, heads = self.embed_dims[stage], self.num_heads[stage]
            if dims % heads:
                raise ValueError(
                    f'embed_dims[{stage}] = {dims} is not divisible by num_heads[{stage}] = {heads}'
                )
            if self.vanilla_depths[stage] > self.depths[stage]:
                raise ValueError(
                    f'vanilla_depths[{stage}] = {self.vanilla_depths[stage]} is more than '
                    f'depths[{stage}] = {self.depths[stage]}'
                )
            if int(dims * self.mlp_ratios[stage]) < 1:
                raise ValueError(
                    f'mlp_ratios[{stage}] = {self.mlp_ratios[stage]} leaves no hidden channel '
                    f'beside embed_dims[{stage}] = {dims}'
                )

    @classmethod
    def of(cls, arch: str | Mapping | Arch) -> Arch:
        """Look up a name or check a dict.

        Args:
            arch: A name in :data:`ARCHS`, or a mapping with the fields of this class, of which
                those that have a default may be missing.

        Returns:
            The checked sizes.

        Raises:
            TypeError: If ``arch`` is neither.
            ValueError: If the name is unknown, or fields are missing or unknown.
        """
        if isinstance(arch, Arch):
            return arch
        if isinstance(arch, str):
            if arch not in ARCHS:
                raise ValueError(f'arch must be one of {list(ARCHS)} or a dict, got {arch!r}')
            return ARCHS[arch]
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch must be one of {list(ARCHS)} or a dict, got {arch!r}')
        names = {f.name for f in fields(cls)}
        needed = names - set(OPTIONS)
        if missing := sorted(needed - set(arch)):
            raise ValueError(f'arch lacks {missing}; it needs {sorted(needed)}')
        if unknown := sorted(set(arch) - names):
            raise ValueError(f'arch has unknown keys {unknown}; it takes {sorted(names)}')
        return cls(**arch)

    @property
    def name(self) -> str:
        """The name in :data:`ARCHS`, or ``'custom'``."""
        return next((name for name, arch in ARCHS.items() if arch == self), 'custom')


def _check_ratios(values: object) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or any(
        not isinstance(v, (int, float)) or isinstance(v, bool) for v in values
    ):
        raise TypeError(f'mlp_ratios must be a sequence of {NUM_STAGES} numbers, got {values!r}')
    if len(values) != NUM_STAGES or any(not 0 < v < float('inf') for v in values):
        raise ValueError(f'mlp_ratios must be {NUM_STAGES} positive numbers, got {values!r}')
    return tuple(map(float, values))


#: The family, by name. Nano is ours, for demos and small data. The others land on the paper's
#: sizes; the paper prints no table of its own.
ARCHS: dict[str, Arch] = {
    'nano': Arch(
        embed_dims=(32, 64, 160, 320),
        num_heads=(1, 2, 5, 10),
        depths=(2, 2, 2, 2),
        vanilla_depths=(1, 1, 1, 1),
        mlp_ratios=(4, 4, 4, 4),
        conv_stem=True,
        mix_ffn=True,
    ),
    'tiny': Arch(
        embed_dims=(48, 96, 240, 480),
        num_heads=(1, 2, 5, 10),
        depths=(3, 3, 3, 3),
        vanilla_depths=(1, 1, 1, 1),
        mlp_ratios=(4, 4, 4, 4),
    ),
    'small': Arch(
        embed_dims=(64, 128, 320, 640),
        num_heads=(1, 2, 5, 10),
        depths=(3, 3, 6, 3),
        vanilla_depths=(1, 1, 2, 1),
        mlp_ratios=(4, 4, 4, 4),
    ),
    'base': Arch(
        embed_dims=(64, 128, 320, 640),
        num_heads=(1, 2, 5, 10),
        depths=(2, 3, 18, 4),
        vanilla_depths=(1, 1, 2, 1),
        mlp_ratios=(4, 4, 4, 4),
    ),
}
