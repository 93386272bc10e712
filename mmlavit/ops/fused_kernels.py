"""Triton kernels of less attention (paper, equation 5), forward and backward.

Triton is imported here alone, and :mod:`mmlavit.ops.fused_attention` imports this module only when
a layer is about to run where Triton does.

A tile is one window of one head: ``n`` query places by ``n`` key places. Tensor cores want powers
of 2 from 16 on, so it is computed as ``N >= n`` places by ``N``, and a head's ``d`` channels as
``D >= d``. What is loaded from beyond ``n`` and ``d`` is 0, and nothing is stored there.

Products take operands of the input's type and add up in float32, in which all else is computed.
In float16 scores saturate before they are rounded, as :mod:`mmlavit.ops.saturate` says.
Scores and maps may hold more than 2^31 elements, so where a tile starts is counted in 64 bits.
"""

# No `from __future__ import annotations`: Triton 3.0 knows tl.constexpr only as itself.
import triton
import triton.language as tl

# These come with the image. Kernels made for one value of them (Triton would, for 1 and for
# multiples of 16) would gain nothing: how wide a load is depends on strides and channels.
SIZES = ('tiles', 'heads', 'height', 'width', 'map_height', 'map_width')


@triton.jit
def _locate(tile, heads, height, width, WINDOW: tl.constexpr):
    """Where a tile lies: its image, the top and left of its window in tokens, its head."""
    rows, cols = (height + WINDOW - 1) // WINDOW, (width + WINDOW - 1) // WINDOW
    window = tile // heads
    place = window % (rows * cols)
    return window // (rows * cols), place // cols * WINDOW, place % cols * WINDOW, tile % heads


@triton.jit
def _is_within(top, left, height, width, WINDOW: tl.constexpr, N: tl.constexpr):
    """Which places (N,) of a window hold tokens of a map of ``height`` by ``width``."""
    place = tl.arange(0, N)
    y, x = top + place // WINDOW, left + place % WINDOW
    return (place < WINDOW * WINDOW) & (y < height) & (x < width)


@triton.jit
def _tokens(
    image, top, left, head, heads, map_height, map_width,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Offsets (N, D) of a window's tokens and a head's channels in a map (B, H, W, heads * d)."""
    place, channel = tl.arange(0, N), tl.arange(0, D)
    first = (tl.cast(image, tl.int64) * map_height + top) * map_width + left
    token = first + place // WINDOW * map_width + place % WINDOW
    return token[:, None] * (heads * HEAD_DIM) + head * HEAD_DIM + channel[None, :]


@triton.jit
def _matrix(index, n: tl.constexpr, N: tl.constexpr):
    """Offsets (N, N) of the matrix of that index in a stack (matrices, n, n)."""
    place = tl.arange(0, N)
    return tl.cast(index, tl.int64) * n * n + place[:, None] * n + place[None, :]


@triton.jit
def _saturate(scores, HALF: tl.constexpr):
    """Scores in float32 within the range of float16, if that is what they will be stored as."""
    if HALF:
        scores = tl.minimum(tl.maximum(scores, -65504.0), 65504.0)
    return scores


@triton.jit
def _unless_saturated(grad, scores, HALF: tl.constexpr):
    """The gradient of :func:`_saturate`."""
    if HALF:
        grad = tl.where(tl.abs(scores) < 65504.0, grad, 0.0).to(grad.dtype)
    return grad


@triton.jit
def _softmax(scores, is_key):
    """``softmax(A)`` (N, N) over the keys (N,) that count."""
    scores = tl.where(is_key[None, :], scores, float('-inf'))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit(do_not_specialize=SIZES)
def forward(
    scores, psi, theta, v, new_scores, out,
    tiles, heads, height, width, map_height, map_width,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``A_l = Psi A_{l-1} Theta^T`` and ``Z = softmax(A_l) V``.

    A program takes several tiles, so that it loads ``Psi`` and ``Theta`` seldom.
    """
    n: tl.constexpr = WINDOW * WINDOW
    is_place = tl.arange(0, N) < n
    is_pair = is_place[:, None] & is_place[None, :]
    is_channel = tl.arange(0, D) < HEAD_DIM
    p = tl.load(psi + _matrix(0, n, N), mask=is_pair, other=0.0)
    t = tl.load(theta + _matrix(0, n, N), mask=is_pair, other=0.0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, top, left, head = _locate(tile, heads, height, width, WINDOW)
        is_real = _is_within(top, left, height, width, WINDOW, N)
        is_stored = _is_within(top, left, map_height, map_width, WINDOW, N)
        pairs = _matrix(tile, n, N)
        tokens = _tokens(
            image, top, left, head, heads, map_height, map_width, WINDOW, HEAD_DIM, N, D
        )

        a = tl.load(scores + pairs, mask=is_pair, other=0.0)
        values = tl.load(v + tokens, mask=is_real[:, None] & is_channel[None, :], other=0.0)

        mixed = _saturate(tl.dot(p, a, input_precision=PRECISION), HALF).to(a.dtype)
        a = _saturate(tl.dot(mixed, tl.trans(t), input_precision=PRECISION), HALF)
        a = tl.where(is_real[:, None] & is_real[None, :], a, 0.0)
        tl.store(new_scores + pairs, a, mask=is_pair)

        attn = _softmax(a, is_real).to(values.dtype)
        z = tl.dot(attn, values, input_precision=PRECISION)
        tl.store(out + tokens, z, mask=is_stored[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=SIZES)
def backward(
    scores, psi, theta, v, grad_out, grad_new,
    grad_scores, grad_psi, grad_theta, grad_v,
    tiles, heads, height, width, map_height, map_width,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradients of :func:`forward`, which is computed again.

    Those of ``Psi`` and ``Theta`` are (programs, n, n): what each program has summed up over its
    tiles.
    """
    n: tl.constexpr = WINDOW * WINDOW
    is_place = tl.arange(0, N) < n
    is_pair = is_place[:, None] & is_place[None, :]
    is_channel = tl.arange(0, D) < HEAD_DIM
    p = tl.load(psi + _matrix(0, n, N), mask=is_pair, other=0.0)
    t = tl.load(theta + _matrix(0, n, N), mask=is_pair, other=0.0)
    sum_psi = tl.zeros((N, N), tl.float32)
    sum_theta = tl.zeros((N, N), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, top, left, head = _locate(tile, heads, height, width, WINDOW)
        is_real = _is_within(top, left, height, width, WINDOW, N)
        is_stored = _is_within(top, left, map_height, map_width, WINDOW, N)
        pairs = _matrix(tile, n, N)
        tokens = _tokens(
            image, top, left, head, heads, map_height, map_width, WINDOW, HEAD_DIM, N, D
        )

        a = tl.load(scores + pairs, mask=is_pair, other=0.0)
        mixed = _saturate(tl.dot(p, a, input_precision=PRECISION), HALF).to(a.dtype)
        new_a = _saturate(tl.dot(mixed, tl.trans(t), input_precision=PRECISION), HALF)
        new_a = tl.where(is_real[:, None] & is_real[None, :], new_a, 0.0)

        # The gradient of A_l: what comes in as such, and what comes through the softmax.
        grad = tl.load(grad_new + pairs, mask=is_pair, other=0.0).to(tl.float32)
        is_value = is_real[:, None] & is_channel[None, :]
        is_output = is_stored[:, None] & is_channel[None, :]
        values = tl.load(v + tokens, mask=is_value, other=0.0)
        grad_z = tl.load(grad_out + tokens, mask=is_output, other=0.0)
        attn = _softmax(new_a, is_real)
        grad_values = tl.dot(tl.trans(attn.to(values.dtype)), grad_z, input_precision=PRECISION)
        tl.store(grad_v + tokens, grad_values, mask=is_output)
        grad_attn = tl.dot(grad_z, tl.trans(values), input_precision=PRECISION)
        grad += attn * (grad_attn - tl.sum(attn * grad_attn, axis=1)[:, None])
        grad = tl.where(is_real[:, None] & is_real[None, :], grad, 0.0)
        grad = _unless_saturated(grad, new_a, HALF).to(a.dtype)

        # A_l = Psi A_{l-1} Theta^T, so that A_{l-1} gets Psi^T grad Theta and so on.
        grad_mixed = tl.dot(grad, t, input_precision=PRECISION).to(a.dtype)
        grad_mixed = _unless_saturated(grad_mixed, mixed, HALF)
        sum_theta = tl.dot(tl.trans(grad), mixed, sum_theta, input_precision=PRECISION)
        sum_psi = tl.dot(grad_mixed, tl.trans(a), sum_psi, input_precision=PRECISION)
        grad_a = tl.dot(tl.trans(p), grad_mixed, input_precision=PRECISION)
        tl.store(grad_scores + pairs, grad_a, mask=is_pair)
    part = _matrix(tl.program_id(0), n, N)
    tl.store(grad_theta + part, sum_theta, mask=is_pair)
    tl.store(grad_psi + part, sum_psi, mask=is_pair)
