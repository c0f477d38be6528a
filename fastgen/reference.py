"""The formulas of every operator in plain differentiable PyTorch: the oracle of tests and benchmarks.

Evaluated in float64, a formula here decides whether an implementation is correct. Nothing else in fastgen imports this
module. It is written for clarity and may use memory proportional to N x M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Gaussian latent


def kl_divergence(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """KL( N(mu, e^logvar) || N(prior_mu, e^prior_logvar) ) in nats, summed over the last dim.

    Kingma and Welling, "Auto-encoding variational Bayes" (2014), appendix B. A missing prior is N(0, I).
    """
    difference = mu if prior_mu is None else mu - prior_mu
    ratio = logvar if prior_logvar is None else logvar - prior_logvar
    if prior_logvar is None:
        square = difference.square()
    else:
        scale = (-0.5 * prior_logvar).exp()
        square = torch.where((difference == 0) & (scale == math.inf), 0, difference * scale).square()
    return 0.5 * (square + (ratio.expm1() - ratio)).sum(-1)


def gaussian_latent(
    mu: Tensor, logvar: Tensor, noise: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z = mu + noise * e^(logvar / 2), and the KL divergence of each row; (B, D) -> (B, D), (B,)."""
    return mu + noise * (0.5 * logvar).exp(), kl_divergence(mu, logvar, prior_mu, prior_logvar)


# --------------------------------------------------------------------------------------------------
# Softmax attention


def in_window(queries: int, keys: int, left: int, right: int, device: torch.device) -> Tensor:
    """(N, M), True where i - left <= j <= i + right for query i and key j; a bound of -1 is absent."""
    offset = torch.arange(keys, device=device) - torch.arange(queries, device=device).unsqueeze(1)
    allowed = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (offset >= -left)
    if right >= 0:
        allowed = allowed & (offset <= right)
    return allowed


def without_masked_keys(
    query: Tensor, mask: Tensor | None, window_left: int, window_right: int, *of_keys: Tensor | None
) -> tuple[Any, ...]:
    """``of_keys``, such as key and value, (B, Hk, M, *), with zeros for keys that every query masks.

    A weight of zero times NaN is NaN, and padding may contain anything.
    """
    key = of_keys[0]
    assert key is not None
    allowed = in_window(query.size(-2), key.size(-2), window_left, window_right, query.device)[None, None]
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -math.inf)
    used = allowed.any(-2)
    if used.size(1) > key.size(1):
        used = used.unflatten(1, (key.size(1), -1)).any(2)
    return tuple(t if t is None else t.masked_fill(~used.unsqueeze(-1), 0) for t in of_keys)


def attention_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """S = scale Q K^T + b, -inf where masked. A boolean mask is True where attention is allowed.

    A softcap c > 0 makes it c tanh(scale Q K^T / c) + b (Gemma Team, "Gemma 2", 2024, section 2).
    """
    scores = scale * (query @ key.transpose(-2, -1))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    allowed = in_window(query.size(-2), key.size(-2), window_left, window_right, query.device)
    return scores.masked_fill(~allowed, -math.inf)


def softcap_derivatives(query: Tensor, key: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """dy/dx and d2y/dx2 of y = c tanh(x / c) at x = scale Q K^T: 1 - (y / c)^2 and -2 (y / c) (dy/dx) / c; 1 and 0
    without a softcap."""
    scores = scale * (query @ key.transpose(-2, -1))
    if softcap == 0:
        return torch.ones_like(scores), torch.zeros_like(scores)
    tanh = torch.tanh(scores / softcap)
    derivative = 1 - tanh.square()
    return derivative, -2 / softcap * tanh * derivative


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
    infinite = top == math.inf  # without a NaN beside it: P is NaN, and l infinite
    lse = torch.where(infinite, scores.masked_fill(~infinite, 0).logsumexp(-1, keepdim=True), lse)
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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """O = (softmax(S) * keep) V and l = logsumexp(S).

    query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), mask broadcast to (B, H, N, M), ``keep`` the
    dropout mask divided by its probability -> (B, H, N, Dv), (B, H, N).
    """
    key, value = without_masked_keys(query, mask, window_left, window_right, key, value)
    key, value = expand_heads(key, query.size(1)), expand_heads(value, query.size(1))
    scale = query.size(-1) ** -0.5 if scale is None else scale
    weights, lse = softmax_lse(attention_scores(query, key, mask, window_left, window_right, scale, softcap))
    return (weights if keep is None else weights * keep) @ value, lse


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Sequence[int],
    cu_keys: Sequence[int],
    keep: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``attention`` of each sequence alone: s has queries ``cu_queries[s]`` to ``cu_queries[s + 1]``, keys alike.

    query (Tq, H, Dk), key (Tk, Hk, Dk), value (Tk, Hk, Dv), keep (H, Tq, Tk) at a key's position in its sequence ->
    (Tq, H, Dv), (H, Tq). A window's bounds may be negative; None is unbounded.
    """
    parts = []
    ends = zip(cu_queries, cu_queries[1:], cu_keys, cu_keys[1:], strict=False)
    for first_query, last_query, first_key, last_key in ends:
        queries, keys = last_query - first_query, last_key - first_key
        offset = torch.arange(keys, device=key.device) - torch.arange(queries, device=key.device).unsqueeze(1)
        mask = torch.ones_like(offset, dtype=torch.bool)
        mask = mask if window_left is None else mask & (offset >= -window_left)
        mask = mask if window_right is None else mask & (offset <= window_right)
        q = query[first_query:last_query].transpose(0, 1)[None]
        k, v = (t[first_key:last_key].transpose(0, 1)[None] for t in (key, value))
        kept = None if keep is None else keep[None, :, first_query:last_query, :keys]
        out, lse = attention(q, k, v, mask[None, None], kept, scale=scale, softcap=softcap)
        parts.append((out[0].transpose(0, 1), lse[0]))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], -1)


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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and of a floating mask; itself differentiable, to any order.

    dP = (dO V^T) keep, d = rowsum(dP P) - dl, dS = P (dP - d), dQ = a dS K, dK = a dS^T Q, dV = (P keep)^T dO.
    With a softcap, dQ and dK take dS times its derivative.
    """
    heads, key_heads = query.size(1), key.size(1)
    key, value = without_masked_keys(query, mask, window_left, window_right, key, value)
    full_key, full_value = expand_heads(key, heads), expand_heads(value, heads)
    weights, _ = softmax_lse(attention_scores(query, full_key, mask, window_left, window_right, scale, softcap))
    grad_weights = grad_out @ full_value.transpose(-2, -1)
    dropped = weights
    if keep is not None:
        grad_weights, dropped = grad_weights * keep, weights * keep
    row = (grad_weights * weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        row = row - grad_lse.unsqueeze(-1)
    grad_scores = weights * (grad_weights - row)
    grad_products = grad_scores * softcap_derivatives(query, full_key, scale, softcap)[0]
    grad_query = scale * (grad_products @ full_key)
    grad_key = scale * (grad_products.transpose(-2, -1) @ query)
    grad_value = dropped.transpose(-2, -1) @ grad_out
    if key_heads != heads:
        grad_key = grad_key.unflatten(1, (key_heads, -1)).sum(2)
        grad_value = grad_value.unflatten(1, (key_heads, -1)).sum(2)
    grad_mask = None
    if mask is not None and mask.is_floating_point():
        grad_mask = grad_scores.sum_to_size(mask.shape)
    return grad_query, grad_key, grad_value, grad_mask


class _Tangent(NamedTuple):
    """P and its change in the direction of the tangents. ``key`` and ``value`` have all H heads."""

    key: Tensor
    value: Tensor
    tangent_key: Tensor | None
    tangent_value: Tensor | None
    weights: Tensor
    centered: Tensor  # W - w
    lse: Tensor  # w, the tangent of the logsumexp, (B, H, N, 1)
    derivative: Tensor  # of the softcap
    curvature: Tensor  # the second derivative of the softcap times the tangent of a Q K^T


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
    softcap: float,
) -> _Tangent:
    of_keys = without_masked_keys(query, mask, window_left, window_right, key, value, tangent_key, tangent_value)
    full: list[Any] = [t if t is None else expand_heads(t, query.size(1)) for t in of_keys]
    key, value, tangent_key, tangent_value = full
    weights, _ = softmax_lse(attention_scores(query, key, mask, window_left, window_right, scale, softcap))
    direction = torch.zeros_like(weights)
    if tangent_query is not None:
        direction = direction + scale * (tangent_query @ key.transpose(-2, -1))
    if tangent_key is not None:
        direction = direction + scale * (query @ tangent_key.transpose(-2, -1))
    derivative, second_derivative = softcap_derivatives(query, key, scale, softcap)
    direction, curvature = derivative * direction, second_derivative * direction
    if tangent_mask is not None:
        direction = direction + tangent_mask
    lse = (weights * direction).sum(-1, keepdim=True)
    return _Tangent(key, value, tangent_key, tangent_value, weights, direction - lse, lse, derivative, curvature)


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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Directional derivative of attention's output and logsumexp; itself differentiable.

    W = a (Gq K^T + Q Gk^T) + Gb, w = rowsum(P W), Pt = P (W - w), O' = (Pt keep) V + (P keep) Gv, l' = w.
    With a softcap, the first term of W is multiplied by its derivative.
    """
    tangents = (tangent_query, tangent_key, tangent_value, tangent_mask)
    t = _tangent(query, key, value, mask, *tangents, window_left, window_right, scale, softcap)
    keep = torch.ones_like(t.weights) if keep is None else keep
    out = (t.weights * t.centered * keep) @ t.value
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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of <dO, O'> + <dl, l'>, where (O', l') is ``attention_tangent``.

    The tangents are the incoming gradients of (dQ, dK, dV, db), so that the scalar is <Gq, dQ> + <Gk, dK> + <Gv, dV> +
    <Gb, db>. Returned are the gradients of grad_out, grad_lse, query, key, value and a floating mask through
    ``attention_backward``. The last four are also the gradients through ``attention_tangent``.

    dP = (dO V^T) keep, d = rowsum(dP P) - dl, dS = P (dP - d), C = (dO Gv^T) keep, r = rowsum(dO O'),
    dS2 = (W - w) dS + P (C - r): gradients O', w, a (dS2 K + dS Gk), a (dS2^T Q + dS^T Gq), (Pt keep)^T dO, dS2.
    With a softcap, those of query and key take its derivative g times dS, and g dS2 plus dS times its second derivative
    times a (Gq K^T + Q Gk^T).
    """
    heads, key_heads = query.size(1), key.size(1)
    tangents = (tangent_query, tangent_key, tangent_value, tangent_mask)
    t = _tangent(query, key, value, mask, *tangents, window_left, window_right, scale, softcap)
    keep = torch.ones_like(t.weights) if keep is None else keep
    tangent_weights = t.weights * t.centered * keep
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
    second_scores = t.centered * grad_scores + t.weights * (cross - second_row)

    products, second_products = t.derivative * grad_scores, t.derivative * second_scores + t.curvature * grad_scores
    grad_query = second_products @ t.key
    grad_key = second_products.transpose(-2, -1) @ query
    if t.tangent_key is not None:
        grad_query = grad_query + products @ t.tangent_key
    if tangent_query is not None:
        grad_key = grad_key + products.transpose(-2, -1) @ tangent_query
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


def rms_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalization of the last dim (Zhang and Sennrich 2019, equation 4)."""
    return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, section 3.2.2): x (B, H, N, D), tables (1|B, N, R / 2).

    Of the first R channels, (i, i + R / 2) are a pair, or (2 i, 2 i + 1) when ``interleaved``; a pair (a, b) becomes
    (a cos - b sin, b cos + a sin). The other channels are unchanged.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, rest = x.split([2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((joined, rest), dim=-1)


def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    norms: Sequence[Tensor] = (),
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotated: int = 0,
    interleaved: bool = False,
) -> list[Tensor]:
    """x (B, N, C), or (B, C, N) with ``channels_first``; weight (sum of heads * head_dims, C) -> parts (B, H, N, D).

    The first ``len(norms)`` parts are normalized by weights (D,), then the first ``rotated`` parts are rotated by
    tables (1|B, N, R / 2), R <= D.
    """
    tokens = x.transpose(1, 2) if channels_first else x
    y = tokens @ weight.t()
    parts = split_heads(y if bias is None else y + bias, heads, head_dims)
    for i, norm in enumerate(norms):
        parts[i] = rms_norm(parts[i], norm, eps)
    if cos is not None and sin is not None:
        for i in range(rotated):
            parts[i] = rotary(parts[i], cos, sin, interleaved)
    return parts


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
