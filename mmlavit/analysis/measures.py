"""What attention maps look like, in numbers, and how alike those of two layers are.

Attention is that after the softmax, ``A`` (maps, heads, n, m): windows of one or more images, ``n``
queries and ``m`` keys in each. ``visible`` (maps, n, m) tells which pairs of a query and a key
count; all others, such as pairs with a padded token, may hold anything. Rows are scaled to a sum of
1 over the visible keys first (those of LaViT have it already). What is not defined, such as the
symmetry of a window with one token in it, is NaN, so that it can be left out of a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Features whose variation is less than this of their size are constant but for rounding.
_ROUNDING = 1e-6


def visible_attention(attn: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention with 0 at the pairs that do not count, and rows that sum to 1.

    Args:
        attn: Attention (maps, heads, n, m).
        visible: Bool mask (maps, n, m) of the pairs that count; None for all.

    Returns:
        Tensor (maps, heads, n, m); rows without attention to a visible key are 0.

    Raises:
        TypeError: If ``attn`` is not floating point or ``visible`` not bool.
        ValueError: If a shape is wrong.
    """
    _check(attn, visible)
    attn = attn.float() if attn.dtype in (torch.float16, torch.bfloat16) else attn
    if visible is not None:
        attn = attn.masked_fill(~visible.unsqueeze(1), 0)
    total = attn.sum(dim=-1, keepdim=True)
    return attn / total.masked_fill(total == 0, 1)


def diagonality(attn: Tensor, visible: Tensor | None = None) -> Tensor:
    """How much more a query attends to its own place than evenly: ``(A_ii - 1/k) / (1 - 1/k)``.

    With ``k`` the number of keys that query i sees. Whatever the size of the windows, it is 1 where
    everybody looks at nothing but itself, 0 for attention that is even, and ``-1 / (k - 1)`` where
    nobody looks at itself. It is what the diagonality preserving loss (paper, equation 9) keeps up,
    in units of attention instead of scores.

    Args:
        attn: Attention (maps, heads, n, n).
        visible: Bool mask (maps, n, n) of the pairs that count; None for all.

    Returns:
        Tensor (maps, heads) in [-1, 1], the mean over the queries that see more than one key; NaN
        where there is none.

    Raises:
        TypeError: As :func:`visible_attention`.
        ValueError: As :func:`visible_attention`; or if maps are not square.
    """
    _check_square(attn)
    own = visible_attention(attn, visible).diagonal(dim1=-2, dim2=-1)
    choice, count = _choices(attn, visible)
    above = (own - 1 / count) / (1 - 1 / count)
    return above.mul(choice).sum(dim=-1) / choice.sum(dim=-1)


def symmetry(attn: Tensor, visible: Tensor | None = None) -> Tensor:
    """How mutual attention is: ``1 - sum |A_ij - A_ji| / sum (A_ij + A_ji)`` over pairs j != i.

    It is 1 where each token attends to another as much as that one to it (paper, equation 8), and 0
    where all attention between two tokens goes one way. The diagonal, which is symmetric whatever
    it holds, is left out.

    Args:
        attn: Attention (maps, heads, n, n).
        visible: Bool mask (maps, n, n) of the pairs that count, symmetric; None for all.

    Returns:
        Tensor (maps, heads) in [0, 1]; 1 for a map with nothing beside its diagonal, NaN for one
        where no token sees another.

    Raises:
        TypeError: As :func:`visible_attention`.
        ValueError: As :func:`visible_attention`; or if maps are not square.
    """
    _check_square(attn)
    a = visible_attention(attn, visible)
    a = a - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1))
    total = 2 * a.sum(dim=(-2, -1))
    share = (a - a.mT).abs().sum(dim=(-2, -1)) / total.masked_fill(total == 0, 1)
    if visible is None:
        others = attn.new_full((1, 1), attn.shape[-1] - 1)
    else:
        seen = visible & ~torch.eye(attn.shape[-1], dtype=torch.bool, device=attn.device)
        others = seen.sum(dim=(-2, -1)).unsqueeze(1)
    return (1 - share).masked_fill(others == 0, torch.nan)


def entropy(attn: Tensor, visible: Tensor | None = None) -> Tensor:
    """How evenly a query spreads its attention: ``-sum_j A_ij log A_ij / log(visible keys of i)``.

    It is 0 where each query attends to one key, and 1 where it attends to all that it sees alike,
    whatever their number.

    Args:
        attn: Attention (maps, heads, n, m).
        visible: Bool mask (maps, n, m) of the pairs that count; None for all.

    Returns:
        Tensor (maps, heads) in [0, 1], the mean over the queries that see more than one key; NaN
        where there is none.

    Raises:
        TypeError: As :func:`visible_attention`.
        ValueError: As :func:`visible_attention`.
    """
    a = visible_attention(attn, visible)
    bits = torch.special.entr(a).sum(dim=-1)
    choice, count = _choices(attn, visible)
    return (bits / count.log()).mul(choice).sum(dim=-1) / choice.sum(dim=-1)


def cosine_similarity(a: Tensor, b: Tensor, visible: Tensor | None = None) -> Tensor:
    """Cosine of the angle between the maps of two layers, head by head.

    Each map of a head is one vector of ``n m`` values, and head h of one layer meets head h of the
    other. No value is negative, so maps that are nearly even have a cosine near 1 whatever they
    tell: read it beside :func:`entropy` and :func:`cka`.

    Args:
        a: Attention (maps, heads, n, m) of a layer.
        b: Attention of another, of the same shape, for the same queries and keys.
        visible: Bool mask (maps, n, m) of the pairs that count in both; None for all.

    Returns:
        Tensor (maps, heads) in [0, 1]; NaN where no pair counts.

    Raises:
        TypeError: As :func:`visible_attention`.
        ValueError: As :func:`visible_attention`; or if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f'a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}')
    a, b = visible_attention(a, visible).flatten(2), visible_attention(b, visible).flatten(2)
    cosine = (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return cosine.clamp(max=1)  # but for rounding


def centred_gram(x: Tensor) -> Tensor:
    """Products ``X X^T`` of examples, their mean taken off, in float64.

    Args:
        x: (examples, features).

    Returns:
        Tensor (examples, examples), float64; 0 where the examples are all alike but for the
        rounding of float32.

    Raises:
        ValueError: If ``x`` is no matrix.
    """
    if x.ndim != 2:
        raise ValueError(f'x must be (examples, features), got {tuple(x.shape)}')
    x = x.double()
    centred = x - x.mean(dim=0)
    if centred.norm() <= _ROUNDING * x.norm():
        centred = torch.zeros_like(centred)
    return centred @ centred.mT


def hsic(k: Tensor, g: Tensor) -> Tensor:
    """Hilbert-Schmidt independence criterion of two Gram matrices, without bias.

    The estimator of Song et al. (Feature Selection via Dependence Maximization, JMLR 2012, equation
    5). Its mean over small sets of examples is the value for very many, which the usual
    ``tr(K H G H) / (n - 1)^2`` is not: that one is far from 0 for features that have nothing to do
    with each other, when they outnumber the examples.

    Args:
        k: Gram matrix (examples, examples) of the features of one layer.
        g: That of another, for the same examples.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ, or there are fewer than 4 examples.
    """
    if k.shape != g.shape or k.ndim != 2 or k.shape[0] != k.shape[1]:
        raise ValueError(
            f'k and g must be square and of one shape, got {tuple(k.shape)} and {tuple(g.shape)}'
        )
    n = k.shape[0]
    if n < 4:
        raise ValueError(f'k and g must have at least 4 examples, got {n}')
    k, g = k - k.diagonal().diag(), g - g.diagonal().diag()
    rows_k, rows_g = k.sum(dim=0), g.sum(dim=0)
    product = (k * g).sum() + rows_k.sum() * rows_g.sum() / ((n - 1) * (n - 2))
    return (product - 2 / (n - 2) * (rows_k @ rows_g)) / (n * (n - 3))


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of two layers (Kornblith et al., ICML 2019).

    ``HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))`` of linear kernels, with the unbiased :func:`hsic`
    as in Nguyen et al. (ICLR 2021). It asks whether two examples that are alike in one layer are
    alike in the other, and does not change when features are scaled, rotated or put in another
    order; their number may differ.

    For attention, here, an example is a query (a token of an image), and its features are what it
    pays to each key of its window in every head, above even attention. So heads need not
    correspond, and neither do the windows of the two layers.

    Args:
        x: (examples, features) of one layer.
        y: (examples, features) of another, for the same examples.

    Returns:
        A scalar, float64: 1 for features that are alike up to scale and rotation, about 0 (also a
        little less) for unrelated ones; NaN where examples do not differ in a layer.

    Raises:
        ValueError: If a shape is wrong, or there are fewer than 4 examples.
    """
    k, g = centred_gram(x), centred_gram(y)
    return alignment(hsic(k, g), hsic(k, k), hsic(g, g))


def alignment(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    """``HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))``; NaN where a layer does not vary."""
    scale = own_x.clamp(min=0).sqrt() * own_y.clamp(min=0).sqrt()
    return (cross / scale).masked_fill(scale == 0, torch.nan)


def _choices(attn: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which queries see more than one key, and how many keys these see, (maps or 1, 1, n)."""
    if visible is None:
        count = torch.full((1, 1, attn.shape[-2]), attn.shape[-1], device=attn.device)
    else:
        count = visible.sum(dim=-1).unsqueeze(1)
    dtype = torch.float64 if attn.dtype == torch.float64 else torch.float32
    # With one key there is no more and no less, and 0 below the line: those are left out.
    return count > 1, count.clamp(min=2).to(dtype)


def _check(attn: Tensor, visible: Tensor | None) -> None:
    if not isinstance(attn, Tensor) or not attn.is_floating_point():
        kind = attn.dtype if isinstance(attn, Tensor) else type(attn).__name__
        raise TypeError(f'attn must be a floating-point tensor, got {kind}')
    if attn.ndim != 4 or 0 in attn.shape:
        raise ValueError(f'attn must be (maps, heads, n, m), got {tuple(attn.shape)}')
    if visible is None:
        return
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        kind = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        raise TypeError(f'visible must be a bool tensor, got {kind}')
    expected = (attn.shape[0], *attn.shape[2:])
    if visible.shape != expected:
        raise ValueError(
            f'visible must be (maps, n, m) = {tuple(expected)} like attn, got '
            f'{tuple(visible.shape)}'
        )


def _check_square(attn: Tensor) -> None:
    if isinstance(attn, Tensor) and attn.ndim == 4 and attn.shape[2] != attn.shape[3]:
        raise ValueError(f'attn must have as many queries as keys, got {tuple(attn.shape)}')
