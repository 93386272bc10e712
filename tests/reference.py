"""Two naive references of the LaViT backbone (arXiv 2406.00427), to judge the package by.

`lavit` loops over images, windows, heads and query tokens and names every token by its place in
the image. `lavit_whole_image` is the paper to the letter: no windows, every stage sees the whole
image. They are written in different styles on purpose and meet where windows cover whole grids.
Neither imports the package.

Names. A token is (row, col) in the grid of its stage. Window (i, j) of side w holds the tokens
i*w <= row < (i+1)*w and j*w <= col < (j+1)*w; those beyond the grid are padded tokens. Inside its
window a token has the place (row % w) * w + col % w, in 0 .. n-1 with n = w * w.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Token = tuple[int, int]
Window = tuple[int, int]
Weights = Mapping[str, Tensor]
Scores = dict[tuple[Window, int], Tensor]  # (window, head) -> (n, n), 0 where a token is padded

EPS = 1e-6


def sub(state_dict: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, named without it: sub(d, 'attn')['proj.bias']."""
    start = prefix + '.'
    return {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}


def count(state_dict: Weights, prefix: str) -> int:
    """How many numbered children `prefix` has."""
    return len({key.split('.')[0] for key in sub(state_dict, prefix)})


# ---- The looped reference: one image, tokens as (H, W, D) ---------------------------------------


def windows_of(height: int, width: int, window: int) -> Iterator[Window]:
    """The ceil(H/w) x ceil(W/w) windows that tile the grid from its top left."""
    for i in range(math.ceil(height / window)):
        for j in range(math.ceil(width / window)):
            yield (i, j)


def real_tokens(win: Window, height: int, width: int, window: int) -> list[Token]:
    """The tokens of one window that lie inside the grid, row-major."""
    tokens = []
    for row in range(win[0] * window, (win[0] + 1) * window):
        for col in range(win[1] * window, (win[1] + 1) * window):
            if row < height and col < width:
                tokens.append((row, col))
    return tokens


def place(token: Token, window: int) -> int:
    """The place of a token in its window, row-major."""
    return (token[0] % window) * window + token[1] % window


def attend(scores: Scores, v: Tensor, num_heads: int, window: int) -> Tensor:
    """Z = softmax(A) V, heads concatenated; softmax over the real keys of the query's window.

    v: (H, W, D). Returns (H, W, D).
    """
    height, width, dim = v.shape
    d = dim // num_heads
    z = torch.zeros_like(v)
    for win in windows_of(height, width, window):
        tokens = real_tokens(win, height, width, window)
        places = [place(token, window) for token in tokens]
        for head in range(num_heads):
            channels = slice(head * d, (head + 1) * d)
            values = torch.stack([v[row, col, channels] for row, col in tokens])
            for row, col in tokens:
                query_scores = scores[win, head][place((row, col), window)][places]
                z[row, col, channels] = torch.softmax(query_scores, dim=0) @ values
    return z


def vanilla_attention(
    x: Tensor, weights: Weights, num_heads: int, window: int, residual: Scores | None = None
) -> tuple[Tensor, Scores]:
    """Eq. 4: A = Q K^T / sqrt(d), Z = softmax(A) V; with eq. 7's A + LS(A_init) if given.

    x: (H, W, D). Returns the projected Z (H, W, D) and A, which includes the residual.
    """
    height, width, dim = x.shape
    d = dim // num_heads
    qkv = F.linear(x, weights['qkv.weight'], weights.get('qkv.bias'))
    q, k, v = qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :]

    scores = {}
    for win in windows_of(height, width, window):
        tokens = real_tokens(win, height, width, window)
        places = [place(token, window) for token in tokens]
        for head in range(num_heads):
            channels = slice(head * d, (head + 1) * d)
            keys = torch.stack([k[row, col, channels] for row, col in tokens])
            a = x.new_zeros(window**2, window**2)
            for row, col in tokens:
                i = place((row, col), window)
                a[i, places] = keys @ q[row, col, channels] / math.sqrt(d)
                if residual is not None:
                    a[i, places] += residual[win, head][i, places]
            scores[win, head] = a

    z = attend(scores, v, num_heads, window)
    return F.linear(z, weights['proj.weight'], weights['proj.bias']), scores


def less_attention(
    x: Tensor, prev_scores: Scores, weights: Weights, num_heads: int, window: int
) -> tuple[Tensor, Scores]:
    """Eq. 5: A_l = Psi A_{l-1} Theta^T, Z = softmax(A_l) V. Element by element,

    A_l[i, j] = sum over real k, m of psi[i, k] * A_{l-1}[k, m] * theta[j, m].

    x: (H, W, D). Returns the projected Z (H, W, D) and A_l.
    """
    height, width, _ = x.shape
    psi, theta = weights['psi'], weights['theta']
    v = F.linear(x, weights['v.weight'], weights.get('v.bias'))

    scores = {}
    for win in windows_of(height, width, window):
        tokens = real_tokens(win, height, width, window)
        places = [place(token, window) for token in tokens]
        for head in range(num_heads):
            prev = prev_scores[win, head][places][:, places]
            a = x.new_zeros(window**2, window**2)
            for i in places:
                psi_prev = psi[i, places] @ prev  # over m: sum over k
                a[i, places] = theta[places][:, places] @ psi_prev  # over j: sum over m
            scores[win, head] = a

    z = attend(scores, v, num_heads, window)
    return F.linear(z, weights['proj.weight'], weights['proj.bias']), scores


def attention_residual(
    prev_scores: Scores, weights: Weights, prev_window: int, window: int, grid: tuple[int, int]
) -> Scores:
    """Eq. 6 and 7: LS(Conv1x1(DWConv(A_last))), in the windows of the new stage.

    The new token (row, col) covers the old tokens (2 row + a, 2 col + b), a and b in {0, 1}.
    For a new query and a new key whose old tokens one old window held,

    DW[h_in] = sum over a, b, a', b' of dwconv[h_in, 0, 2a + b, 2a' + b'] * A[h_in][old q, old k]
    residual[h_out] = layer_scale[h_out] * sum over h_in of pwconv[h_out, h_in] * DW[h_in]

    and for every other pair 0.

    grid: (H, W) of the new stage. Raises ValueError where the windows do not nest.
    """
    if prev_window % 2 or 2 * window % prev_window:
        raise ValueError(f'windows do not nest: {prev_window} then {window}')
    dwconv, pwconv, scale = (weights[k] for k in ('dwconv.weight', 'pwconv.weight', 'layer_scale'))
    heads_out, heads_in = pwconv.shape[:2]
    block2x2 = [(a, b) for a in (0, 1) for b in (0, 1)]

    residual = {}
    for win in windows_of(*grid, window):
        for head in range(heads_out):
            residual[win, head] = pwconv.new_zeros(window**2, window**2)

        tokens = real_tokens(win, *grid, window)
        # prev_window is even, so the four old tokens of a new one share their old window.
        old_window = {(r, c): (2 * r // prev_window, 2 * c // prev_window) for r, c in tokens}
        for query in tokens:
            old_win = old_window[query]
            keys = [token for token in tokens if old_window[token] == old_win]

            dw = [pwconv.new_zeros(len(keys)) for _ in range(heads_in)]
            for a, b in block2x2:
                old_query = place((2 * query[0] + a, 2 * query[1] + b), prev_window)
                for a_, b_ in block2x2:
                    old_keys = [place((2 * r + a_, 2 * c + b_), prev_window) for r, c in keys]
                    for h in range(heads_in):
                        old_scores = prev_scores[old_win, h][old_query][old_keys]
                        dw[h] = dw[h] + dwconv[h, 0, 2 * a + b, 2 * a_ + b_] * old_scores

            places = [place(key, window) for key in keys]
            for head in range(heads_out):
                mixed = sum(pwconv[head, h, 0, 0] * dw[h] for h in range(heads_in))
                residual[win, head][place(query, window), places] = scale[head] * mixed
    return residual


def layer_norm(x: Tensor, weights: Weights) -> Tensor:
    """LayerNorm over the last axis."""
    return F.layer_norm(x, x.shape[-1:], weights['weight'], weights['bias'], EPS)


def conv(x: Tensor, weights: Weights, **options: int) -> Tensor:
    """A convolution of tokens: (H, W, D) -> (H', W', D')."""
    channels_first = x.permute(2, 0, 1)[None]
    out = F.conv2d(channels_first, weights['weight'], weights['bias'], **options)
    return out[0].permute(1, 2, 0)


def embed(x: Tensor, weights: Weights, stride: int) -> Tensor:
    """Every patch of stride x stride projected, then LayerNorm; whatever lies beyond x is 0.

    A kernel one larger than the stride also sees the row above its patch and the column to its
    left. x: (H, W, D). Returns (ceil(H / stride), ceil(W / stride), D').
    """
    height, width, dim = x.shape
    rows, cols = math.ceil(height / stride), math.ceil(width / stride)
    weight, bias = weights['proj.weight'], weights['proj.bias']
    kernel = weight.shape[-1]
    before = kernel - stride
    padded = x.new_zeros(before + rows * stride, before + cols * stride, dim)
    padded[before : before + height, before : before + width] = x

    tokens = []
    for top in range(0, rows * stride, stride):
        for left in range(0, cols * stride, stride):
            seen = padded[top : top + kernel, left : left + kernel].permute(2, 0, 1)
            tokens.append(F.linear(seen.flatten(), weight.flatten(1), bias))
    return layer_norm(torch.stack(tokens).unflatten(0, (rows, cols)), sub(weights, 'norm'))


def block(
    x: Tensor,
    prev_scores: Scores | None,
    weights: Weights,
    num_heads: int,
    window: int,
    residual: Scores | None = None,
) -> tuple[Tensor, Scores]:
    """x += DWConv3x3(x); x += Attn(LN(x)); x += MLP(LN(x)). x: (H, W, D).

    Vanilla attention where the weights hold attn.qkv.weight (it takes `residual`), less-attention
    otherwise (it takes `prev_scores`). Returns x and the scores of this block.
    """
    x = x + conv(x, sub(weights, 'pos_conv'), padding=1, groups=x.shape[-1])

    normed = layer_norm(x, sub(weights, 'norm1'))
    attn = sub(weights, 'attn')
    if 'qkv.weight' in attn:
        z, scores = vanilla_attention(normed, attn, num_heads, window, residual)
    else:
        z, scores = less_attention(normed, prev_scores, attn, num_heads, window)
    x = x + z

    mlp = sub(weights, 'mlp')
    hidden = layer_norm(x, sub(weights, 'norm2'))
    hidden = F.linear(hidden, mlp['fc1.weight'], mlp['fc1.bias'])
    if 'dwconv.weight' in mlp:
        hidden = conv(hidden, sub(mlp, 'dwconv'), padding=1, groups=hidden.shape[-1])
    return x + F.linear(F.gelu(hidden), mlp['fc2.weight'], mlp['fc2.bias']), scores


def lavit_one_image(
    image: Tensor, state_dict: Weights, num_heads: Sequence[int], window_sizes: Sequence[int]
) -> list[Tensor]:
    """The backbone on one image (C, H, W). Returns (D_m, H_m, W_m) for each stage m with a norm."""
    x = image.permute(1, 2, 0)
    if 'patch_embed.proj.weight' in state_dict:
        x = embed(x, sub(state_dict, 'patch_embed'), 4)
    else:
        x = F.gelu(embed(x, sub(state_dict, 'patch_embed.conv1'), 2))
        x = embed(x, sub(state_dict, 'patch_embed.conv2'), 2)

    outputs = []
    scores = None
    for m in range(count(state_dict, 'stages')):
        stage = sub(state_dict, f'stages.{m}')
        heads, window = num_heads[m], window_sizes[m]
        residual = None
        if m > 0:
            x = embed(x, sub(stage, 'downsample'), 2)
            to_residual = sub(stage, 'attention_residual')
            grid = (x.shape[0], x.shape[1])
            residual = attention_residual(scores, to_residual, window_sizes[m - 1], window, grid)

        for i in range(count(stage, 'blocks')):
            first = residual if i == 0 else None
            x, scores = block(x, scores, sub(stage, f'blocks.{i}'), heads, window, first)

        if f'norm{m}.weight' in state_dict:
            outputs.append(layer_norm(x, sub(state_dict, f'norm{m}')).permute(2, 0, 1))
    return outputs


def lavit(
    image: Tensor, state_dict: Weights, num_heads: Sequence[int], window_sizes: Sequence[int]
) -> list[Tensor]:
    """The backbone on (B, C, H, W), image by image; any H, W >= 1.

    Returns (B, D_m, H_m, W_m) for each stage m with `norm{m}.weight`; depths, the kind of each
    block, a stem and convolutions in MLPs are read from the names in `state_dict`, overlaps from
    the kernels.
    """
    per_image = [lavit_one_image(one, state_dict, num_heads, window_sizes) for one in image]
    return [torch.stack(maps) for maps in zip(*per_image, strict=True)]


# ---- The whole-image reference: the paper to the letter, tokens as (B, N, D) ---------------------


def whole_attention_residual(scores: Tensor, weights: Weights, grid: tuple[int, int]) -> Tensor:
    """Eq. 6 and 7 on (B, H_in, N, N).

    A depthwise conv, kernel 2 and stride 2 along query row, query column, key row and key column
    of the old grid; a 1x1 conv over heads; LayerScale. Returns (B, H_out, N / 4, N / 4).
    """
    batch, heads, n, _ = scores.shape
    h, w = grid[0] // 2, grid[1] // 2
    image = scores.reshape(batch, heads, h, 2, w, 2, h, 2, w, 2)
    kernel = weights['dwconv.weight'].reshape(heads, 2, 2, 2, 2)
    down = torch.einsum('nhyaxbYAXB,habAB->nhyxYX', image, kernel)
    mixed = torch.einsum('oh,nhyxYX->noyxYX', weights['pwconv.weight'][:, :, 0, 0], down)
    residual = mixed.reshape(batch, -1, n // 4, n // 4)
    return weights['layer_scale'][:, None, None] * residual


def whole_attention(
    x: Tensor, prev: Tensor | None, weights: Weights, num_heads: int, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 4 (with qkv.weight) or eq. 5: x (B, N, D) -> the projected Z and A (B, heads, N, N)."""
    if 'qkv.weight' in weights:
        qkv = F.linear(x, weights['qkv.weight'], weights.get('qkv.bias'))
        q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in qkv.chunk(3, dim=-1))
        a = torch.einsum('nihd,njhd->nhij', q, k) * q.shape[-1] ** -0.5
        if residual is not None:
            a = a + residual
    else:
        v = F.linear(x, weights['v.weight'], weights.get('v.bias')).unflatten(-1, (num_heads, -1))
        a = F.linear(F.linear(prev, weights['theta']).mT, weights['psi']).mT  # Psi(Theta(A)^T)^T
    z = torch.einsum('nhij,njhd->nihd', a.softmax(-1), v).flatten(2)
    return z @ weights['proj.weight'].T + weights['proj.bias'], a


def whole_norm(x: Tensor, weights: Weights) -> Tensor:
    """LayerNorm over the last axis, by its definition."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + EPS).sqrt() * weights['weight'] + weights['bias']


def whole_gelu(x: Tensor) -> Tensor:
    """GELU, exact."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def lavit_whole_image(image: Tensor, state_dict: Weights, num_heads: Sequence[int]) -> list[Tensor]:
    """The backbone on (B, C, H, W) without windows: Psi and Theta are (N, N), N = H_m * W_m.

    Returns what `lavit` returns for windows that cover the whole grids. Raises ValueError where
    a side is no multiple of 4, or a grid with a stage after it is odd: the paper has no padding.
    Only the 3x3 convolutions, which the paper has not, look one pixel beyond the image.
    """
    stages = count(state_dict, 'stages')
    multiple = 2 ** (stages + 1)
    if image.shape[-2] % multiple or image.shape[-1] % multiple:
        raise ValueError(f'{stages} stages need sides that {multiple} divides, got {image.shape}')

    def embed(maps: Tensor, prefix: str, stride: int) -> tuple[Tensor, tuple[int, int]]:
        proj = sub(state_dict, f'{prefix}.proj')
        beyond = proj['weight'].shape[-1] - stride
        maps = F.conv2d(maps, proj['weight'], proj['bias'], stride=stride, padding=beyond)
        tokens = maps.flatten(2).mT
        return whole_norm(tokens, sub(state_dict, f'{prefix}.norm')), maps.shape[-2:]

    outputs = []
    if 'patch_embed.conv1.proj.weight' in state_dict:
        x, grid = embed(image, 'patch_embed.conv1', 2)
        x, grid = embed(whole_gelu(x).mT.unflatten(-1, grid), 'patch_embed.conv2', 2)
    else:
        x, grid = embed(image, 'patch_embed', 4)
    a = None
    for m in range(stages):
        residual = None
        if m > 0:
            to_residual = sub(state_dict, f'stages.{m}.attention_residual')
            residual = whole_attention_residual(a, to_residual, grid)
            x, grid = embed(x.mT.unflatten(-1, grid), f'stages.{m}.downsample', 2)

        for i in range(count(state_dict, f'stages.{m}.blocks')):
            w = sub(state_dict, f'stages.{m}.blocks.{i}')
            maps = x.mT.unflatten(-1, grid)
            kernel, bias = w['pos_conv.weight'], w['pos_conv.bias']
            position = F.conv2d(maps, kernel, bias, padding=1, groups=maps.shape[1])
            x = x + position.flatten(2).mT

            normed = whole_norm(x, sub(w, 'norm1'))
            z, a = whole_attention(normed, a, sub(w, 'attn'), num_heads[m], residual)
            residual = None
            x = x + z

            hidden = whole_norm(x, sub(w, 'norm2')) @ w['mlp.fc1.weight'].T + w['mlp.fc1.bias']
            if 'mlp.dwconv.weight' in w:
                kernel, bias = w['mlp.dwconv.weight'], w['mlp.dwconv.bias']
                maps = hidden.mT.unflatten(-1, grid)
                hidden = F.conv2d(maps, kernel, bias, padding=1, groups=maps.shape[1])
                hidden = hidden.flatten(2).mT
            x = x + whole_gelu(hidden) @ w['mlp.fc2.weight'].T + w['mlp.fc2.bias']

        if f'norm{m}.weight' in state_dict:
            normed = whole_norm(x, sub(state_dict, f'norm{m}'))
            outputs.append(normed.mT.unflatten(-1, grid))
    return outputs
