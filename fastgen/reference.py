"""The mathematics of every operator, in plain differentiable PyTorch.

This is the oracle: in float64 it decides whether a kernel is right, and nothing else rewrites
these formulas. It is written for clarity; it may use memory proportional to N x M.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

NOISE_STREAM = 0
DROPOUT_STREAM = 1
GROUP = 4
"""Elements that share one Philox counter. Every row starts on a group boundary."""

CHUNK = 2**16
"""Counters worked on at a time: the hundred or so int64 temporaries of Philox then stay in cache."""

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


# --------------------------------------------------------------------------------------------------
# Random numbers


def philox(seed: Tensor, index: Tensor, stream: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    ``seed`` is the 64-bit key, ``index`` and ``stream`` the low and high halves of the 128-bit
    counter; all int64, broadcast together. Returns four int64 tensors of values in [0, 2^32).
    """
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1 = index & _MASK32, (index >> 32) & _MASK32
    if isinstance(stream, int):  # filled on the device: a copy from the host would wait
        stream = torch.full((), stream, dtype=torch.int64, device=index.device)
    c2, c3 = stream & _MASK32, (stream >> 32) & _MASK32
    for _ in range(10):
        product0 = c0 * _PHILOX_MULTIPLIERS[0]  # wraps modulo 2^64: the bits are those of uint64
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0 = (key0 + _PHILOX_INCREMENTS[0]) & _MASK32
        key1 = (key1 + _PHILOX_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def to_uniform(bits: Tensor) -> Tensor:
    """u = (x + 0.5) 2^-32 in float32, in (0, 1]. The bits of u are the same on every backend."""
    return bits.to(torch.float32) * 2.0**-32 + 2.0**-33


def box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniforms (Box and Muller, 1958), in float32.

    The angle 2 pi u1 is reduced exactly, in half turns, before sine and cosine are taken, so that
    all backends agree to a few units in the last place also where the result is near zero.
    """
    radius = torch.sqrt(-2.0 * torch.log(u0))
    half_turns = 2.0 * u1
    quadrant = torch.round(2.0 * half_turns)
    rest = math.pi * (half_turns - 0.5 * quadrant)
    sine, cosine = torch.sin(rest), torch.cos(rest)
    quadrant = quadrant.to(torch.int32) & 3
    odd, flip_cos, flip_sin = (quadrant & 1) == 1, (quadrant == 1) | (quadrant == 2), quadrant >= 2
    cos_all, sin_all = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return (
        radius * torch.where(flip_cos, -cos_all, cos_all),
        radius * torch.where(flip_sin, -sin_all, sin_all),
    )


def groups_per_row(cols: int) -> int:
    return (cols + GROUP - 1) // GROUP


def _group_index(seed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Keys and counters of a (rows, cols) matrix: both broadcast to (S, rows / S * groups_per_row)."""
    groups = rows // max(seed.numel(), 1) * groups_per_row(cols)
    return seed.reshape(-1, 1), torch.arange(groups, dtype=torch.int64, device=seed.device).reshape(1, -1)


def standard_normal(seed: Tensor, rows: int, cols: int) -> Tensor:
    """Noise of shape (rows, cols), float32, a function of seed and position alone.

    ``seed`` is int64 of shape (S,); S divides ``rows``, and each seed serves rows / S successive rows
    whose positions count from zero (this is what a batched transform such as ``vmap`` needs).
    """
    key, index = _group_index(seed, rows, cols)
    parts = []
    for part in index.split(CHUNK, dim=1):
        x0, x1, x2, x3 = philox(key, part, NOISE_STREAM)
        n0, n1 = box_muller(to_uniform(x0), to_uniform(x1))
        n2, n3 = box_muller(to_uniform(x2), to_uniform(x3))
        parts.append(torch.stack((n0, n1, n2, n3), dim=-1))
    noise = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return noise.reshape(rows, groups_per_row(cols) * GROUP)[:, :cols]


def uniform_rows(
    seed: Tensor, rows: Tensor, rows_per_seed: int, row_groups: int, first_group: int, groups: int
) -> Tensor:
    """Uniforms of the dropout stream for the named rows: (len(rows), 4 * groups), float32.

    A row holds ``row_groups`` groups in all; those from ``first_group`` on are made.
    """
    key = seed[torch.div(rows, rows_per_seed, rounding_mode="floor")].reshape(-1, 1)
    columns = torch.arange(first_group, first_group + groups, dtype=torch.int64, device=seed.device)
    index = (rows % rows_per_seed).reshape(-1, 1) * row_groups + columns
    bits = torch.stack(philox(key, index, DROPOUT_STREAM), dim=-1)
    return to_uniform(bits).reshape(rows.numel(), groups * GROUP)


# --------------------------------------------------------------------------------------------------
# Gaussian latent


def expm1_excess(x: Tensor) -> Tensor:
    """e^x - 1 - x, right to the last digits also near 0, where its terms cancel: a Taylor series takes over there."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0)
    series = torch.full_like(near, 1 / math.factorial(18))
    for power in range(17, 1, -1):
        series = series * near + 1 / math.factorial(power)
    far = torch.where(small, 1, x)
    return torch.where(small, near.square() * series, far.expm1() - far)


def kl_divergence(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """KL( N(mu, e^logvar) || N(prior_mu, e^prior_logvar) ) in nats, summed over the last dim; never negative.

    Kingma and Welling, "Auto-encoding variational Bayes" (2014), appendix B. A missing prior is N(0, I).
    """
    difference = mu if prior_mu is None else mu - prior_mu
    if prior_logvar is None:
        return 0.5 * (difference.square() + expm1_excess(logvar)).sum(-1)
    scale = (-0.5 * prior_logvar).exp()
    scaled = torch.where((difference == 0) & (scale == math.inf), 0, difference * scale)
    return 0.5 * (scaled.square() + expm1_excess(logvar - prior_logvar)).sum(-1)


def gaussian_latent(
    mu: Tensor, logvar: Tensor, noise: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z = mu + noise * e^(logvar / 2), and the KL divergence of each row; (B, D) -> (B, D), (B,)."""
    return mu + noise * (0.5 * logvar).exp(), kl_divergence(mu, logvar, prior_mu, prior_logvar)


# --------------------------------------------------------------------------------------------------
# Softmax attention


def attended(rows: Tensor, cols: Tensor, window_left: int, window_right: int) -> Tensor | None:
    """Which keys ``cols`` each query of ``rows`` may see: i - left <= j <= i + right; -1 is unbounded."""
    if window_left < 0 and window_right < 0:
        return None
    offset = cols.unsqueeze(0) - rows.unsqueeze(1)
    allowed = torch.ones_like(offset, dtype=torch.bool)
    if window_left >= 0:
        allowed = allowed & (offset >= -window_left)
    if window_right >= 0:
        allowed = allowed & (offset <= window_right)
    return allowed


SEEN_ROWS = 256


def without_unseen_keys(
    query: Tensor, mask: Tensor | None, window_left: int, window_right: int, *of_keys: Tensor | None
) -> tuple[Any, ...]:
    """``of_keys``, such as key and value, each (B, Hk, M, *), with zeros where no query of the call sees the key:
    padding may hold anything, NaN too, and zero times that need not be zero. The first of them must be there."""
    key = of_keys[0]
    assert key is not None
    queries, keys, device = query.size(-2), key.size(-2), query.device
    if mask is None and (window_right < 0 or keys <= queries + window_right):
        return of_keys
    cols = torch.arange(keys, device=device)
    seen = torch.zeros((1, 1, keys), dtype=torch.bool, device=device)
    for first in range(0, queries, SEEN_ROWS):
        rows = torch.arange(first, min(first + SEEN_ROWS, queries), device=device)
        allowed = attended(rows, cols, window_left, window_right)
        part = torch.ones((rows.numel(), keys), dtype=torch.bool, device=device) if allowed is None else allowed
        if mask is not None:
            of_rows = mask if mask.size(-2) == 1 else mask[..., first : first + SEEN_ROWS, :]
            part = part & (of_rows if mask.dtype == torch.bool else of_rows != -math.inf)
        seen = seen | (part.any(-2) if part.dim() > 2 else part.any(-2)[None, None])
    if seen.size(1) > key.size(1):
        seen = seen.unflatten(1, (key.size(1), -1)).any(2)
    unseen = ~seen.unsqueeze(-1)
    return tuple(t if t is None else t.masked_fill(unseen, 0) for t in of_keys)


def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, window_left: int, window_right: int, scale: float
) -> Tensor:
    """S = scale Q K^T + b, -inf where masked. A boolean mask is True where attention is allowed."""
    scores = scale * (query @ key.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    device = query.device
    rows, cols = torch.arange(query.size(-2), device=device), torch.arange(key.size(-2), device=device)
    allowed = attended(rows, cols, window_left, window_right)
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def softmax_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """P = softmax(S) and l = logsumexp(S) over the last dim. A row of -inf gives P = 0 and l = -inf,
    and its derivatives are 0, never NaN."""
    if scores.size(-1) == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (top + total.log()).masked_fill(empty, -math.inf)
    return weights / total, lse.squeeze(-1)


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated for grouped queries: (B, Hk, M, D) -> (B, H, M, D)."""
    return tensor if tensor.size(1) == heads else tensor.repeat_interleave(heads // tensor.size(1), dim=1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """O = (softmax(S) * keep) V and l = logsumexp(S).

    query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), mask broadcast to (B, H, N, M), ``keep`` the
    dropout mask divided by its probability -> (B, H, N, Dv), (B, H, N).
    """
    key, value = without_unseen_keys(query, mask, window_left, window_right, key, value)
    key, value = expand_heads(key, query.size(1)), expand_heads(value, query.size(1))
    scale = query.size(-1) ** -0.5 if scale is None else scale
    weights, lse = softmax_lse(attention_scores(query, key, mask, window_left, window_right, scale))
    return (weights if keep is None else weights * keep) @ value, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and of a floating mask; itself differentiable, to any order.

    dP = (dO V^T) keep, d = rowsum(dP P) - dl, dS = P (dP - d), dQ = a dS K, dK = a dS^T Q, dV = (P keep)^T dO.
    """
    heads, key_heads = query.size(1), key.size(1)
    key, value = without_unseen_keys(query, mask, window_left, window_right, key, value)
    full_key, full_value = expand_heads(key, heads), expand_heads(value, heads)
    weights, _ = softmax_lse(attention_scores(query, full_key, mask, window_left, window_right, scale))
    grad_weights = grad_out @ full_value.transpose(-2, -1)
    dropped = weights
    if keep is not None:
        grad_weights, dropped = grad_weights * keep, weights * keep
    row = (grad_weights * weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        row = row - grad_lse.unsqueeze(-1)
    grad_scores = weights * (grad_weights - row)
    grad_query = scale * (grad_scores @ full_key)
    grad_key = scale * (grad_scores.transpose(-2, -1) @ query)
    grad_value = dropped.transpose(-2, -1) @ grad_out
    if key_heads != heads:
        grad_key = grad_key.unflatten(1, (key_heads, -1)).sum(2)
        grad_value = grad_value.unflatten(1, (key_heads, -1)).sum(2)
    grad_mask = None
    if mask is not None and mask.is_floating_point():
        grad_mask = grad_scores.sum_to_size(mask.shape)
    return grad_query, grad_key, grad_value, grad_mask


class _Tangent(NamedTuple):
    """What a step in the direction of the tangents does to P. ``key`` and ``value`` have every head."""

    key: Tensor
    value: Tensor
    tangent_key: Tensor | None
    tangent_value: Tensor | None
    weights: Tensor
    centred: Tensor  # W - w
    lse: Tensor  # w, the tangent of the logsumexp, (B, H, N, 1)


def _tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
) -> _Tangent:
    of_keys = without_unseen_keys(query, mask, window_left, window_right, key, value, tangent_key, tangent_value)
    full: list[Any] = [t if t is None else expand_heads(t, query.size(1)) for t in of_keys]
    key, value, tangent_key, tangent_value = full
    weights, _ = softmax_lse(attention_scores(query, key, mask, window_left, window_right, scale))
    direction = torch.zeros_like(weights)
    if tangent_query is not None:
        direction = direction + scale * (tangent_query @ key.transpose(-2, -1))
    if tangent_key is not None:
        direction = direction + scale * (query @ tangent_key.transpose(-2, -1))
    if tangent_mask is not None:
        direction = direction + tangent_mask
    lse = (weights * direction).sum(-1, keepdim=True)
    return _Tangent(key, value, tangent_key, tangent_value, weights, direction - lse, lse)


def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    keep: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Directional derivative of attention's output and logsumexp; itself differentiable.

    W = a (Gq K^T + Q Gk^T) + Gb, w = rowsum(P W), Pt = P (W - w), O' = (Pt keep) V + (P keep) Gv, l' = w.
    """
    tangents = (tangent_query, tangent_key, tangent_value, tangent_mask)
    t = _tangent(query, key, value, mask, *tangents, window_left, window_right, scale)
    keep = torch.ones_like(t.weights) if keep is None else keep
    out = (t.weights * t.centred * keep) @ t.value
    if t.tangent_value is not None:
        out = out + (t.weights * keep) @ t.tangent_value
    return out, t.lse.squeeze(-1)


def attention_second_order(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    keep: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of <dO, O'> + <dl, l'>, where (O', l') is ``attention_tangent``.

    The tangents being the gradients that come in for (dQ, dK, dV, db), that scalar is <Gq, dQ> + <Gk, dK> + <Gv, dV> +
    <Gb, db>: these are the gradients of grad_out, grad_lse, query, key, value and a floating mask through
    ``attention_backward``. The last four are those through ``attention_tangent``, too.

    dP = (dO V^T) keep, d = rowsum(dP P) - dl, dS = P (dP - d), C = (dO Gv^T) keep, r = rowsum(dO O'),
    dS2 = (W - w) dS + P (C - r): gradients O', w, a (dS2 K + dS Gk), a (dS2^T Q + dS^T Gq), (Pt keep)^T dO, dS2.
    """
    heads, key_heads = query.size(1), key.size(1)
    tangents = (tangent_query, tangent_key, tangent_value, tangent_mask)
    t = _tangent(query, key, value, mask, *tangents, window_left, window_right, scale)
    keep = torch.ones_like(t.weights) if keep is None else keep
    tangent_weights = t.weights * t.centred * keep
    tangent_out = tangent_weights @ t.value
    grad_weights = (grad_out @ t.value.transpose(-2, -1)) * keep
    row = (grad_weights * t.weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        row = row - grad_lse.unsqueeze(-1)
    grad_scores = t.weights * (grad_weights - row)
    cross = torch.zeros_like(t.weights)
    if t.tangent_value is not None:
        tangent_out = tangent_out + (t.weights * keep) @ t.tangent_value
        cross = (grad_out @ t.tangent_value.transpose(-2, -1)) * keep
    second_row = (grad_out * tangent_out).sum(-1, keepdim=True)
    second_scores = t.centred * grad_scores + t.weights * (cross - second_row)

    grad_query = second_scores @ t.key
    grad_key = second_scores.transpose(-2, -1) @ query
    if t.tangent_key is not None:
        grad_query = grad_query + grad_scores @ t.tangent_key
    if tangent_query is not None:
        grad_key = grad_key + grad_scores.transpose(-2, -1) @ tangent_query
    grad_value = tangent_weights.transpose(-2, -1) @ grad_out
    if key_heads != heads:
        grad_key = grad_key.unflatten(1, (key_heads, -1)).sum(2)
        grad_value = grad_value.unflatten(1, (key_heads, -1)).sum(2)
    grad_mask = None
    if mask is not None and mask.is_floating_point():
        grad_mask = second_scores.sum_to_size(mask.shape)
    return tangent_out, t.lse.squeeze(-1), scale * grad_query, scale * grad_key, grad_value, grad_mask


# --------------------------------------------------------------------------------------------------
# Multi-head projection


def split_heads(y: Tensor, heads: list[int], head_dims: list[int]) -> list[Tensor]:
    """(B, N, sum of heads * head_dims) -> one (B, heads, N, head_dim) view for each packed part."""
    parts = y.split([h * d for h, d in zip(heads, head_dims, strict=True)], dim=-1)
    return [part.unflatten(-1, (h, d)).transpose(1, 2) for part, h, d in zip(parts, heads, head_dims, strict=True)]


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), x.size(1) * x.size(3))


class HeadFinish(NamedTuple):
    """What happens to projected heads: the first ``len(norms)`` parts are normalised, then the first ``rotated``
    parts turned, where there are tables. Norms (D,); cos and sin (1|B, N, R / 2) with R <= D.
    """

    norms: tuple[Tensor, ...] = ()
    eps: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None
    rotated: int = 0
    interleaved: bool = False


def rms_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation of the last dim (Zhang and Sennrich 2019, equation 4)."""
    return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rms_norm_backward(grad: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of y (B, H, N, D) and of the weight (D,)."""
    rstd = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, scaled = y * rstd, grad * weight
    return rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True)), (grad * unit).sum((0, 1, 2))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns pairs of channels (Su et al. 2021, section 3.2.2): x (B, H, N, D), tables (1|B, N, R / 2).

    Of the first R channels, pairs are (i, i + R / 2), or (2 i, 2 i + 1) when ``interleaved``; the others stay. Linear
    in x, and the transposed map has -sin.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x.split([2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    shape = turned.shape
    turned = torch.stack(pair, dim=-1).reshape(shape) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned


def finish_heads(parts: list[Tensor], finish: HeadFinish) -> list[Tensor]:
    """Projected heads, normalised and turned. Each part (B, H, N, D)."""
    finished = list(parts)
    for i, weight in enumerate(finish.norms):
        finished[i] = rms_norm(finished[i], weight, finish.eps)
    if finish.cos is not None and finish.sin is not None:
        for i in range(finish.rotated):
            finished[i] = rotary(finished[i], finish.cos, finish.sin, finish.interleaved)
    return finished


def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    finish: HeadFinish | None = None,
) -> list[Tensor]:
    """x (B, N, C), or (B, C, N) with ``channels_first``; weight (sum of heads * head_dims, C)."""
    tokens = x.transpose(1, 2) if channels_first else x
    y = tokens @ weight.t()
    parts = split_heads(y if bias is None else y + bias, heads, head_dims)
    return parts if finish is None else finish_heads(parts, finish)


def merge_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
) -> Tensor:
    """residual + gate * (join_heads(x) weight^T + bias): x (B, H, N, D), weight (E, H * D) -> (B, N, E) or (B, E, N).

    ``gate`` broadcasts to (B, N, E), whatever the layout of the output.
    """
    y = join_heads(x) @ weight.t()
    y = y if bias is None else y + bias
    y = y if gate is None else gate * y
    y = y.transpose(1, 2) if channels_first else y
    return y if residual is None else residual + y
