"""Attention in plain PyTorch, for what the fused operator does not compute: capped scores, and the weights themselves.

Memory is O(N M) for the output and every derivative. A fused softcap replaces the first use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: tuple[int | None, int | None],
    dropout_p: float,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``softmax(softcap * tanh(scale * query @ key^T / softcap) + mask) @ value``, in float32 or float64.

    Gemma Team, "Gemma 2" (2024), section 2: logit soft-capping. Differentiable any number of times.

    Args:
        query: (B, H, N, Dk).
        key: (B, Hk, M, Dk); Hk divides H.
        value: (B, Hk, M, Dv).
        mask: broadcasts to (B, H, N, M); boolean (True: the query attends to the key) or added to the scores.
        window: (left, right), as in ``fastgen.functional.scaled_dot_product_attention``.
        dropout_p: probability of dropping a weight.
        scale: factor of the scores.
        softcap: bound of the scores before the mask; None is unbounded.

    Returns:
        out (B, H, N, Dv) in query's dtype; the weights (B, H, N, M) after dropout in query's dtype; lse (B, H, N),
        float32 or float64. A fully masked row gives 0, 0 and -inf.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        allowed = _allowed(query.size(-2), key.size(-2), window, query.device)
        if mask is not None and mask.dtype == torch.bool:
            allowed = mask if allowed is None else allowed & mask
        elif mask is not None:
            scores = scores + mask.to(dtype)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        largest = scores.detach().amax(-1, keepdim=True)
        largest = largest.masked_fill(largest.isinf(), 0.0)
        exps = torch.exp(scores - largest)
        total = exps.sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        lse = (largest + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
        weights = F.dropout(exps / total, dropout_p)
        out = (weights @ value.to(dtype)).to(query.dtype)
    return out, weights.to(query.dtype), lse


def _allowed(queries: int, keys: int, window: tuple[int | None, int | None], device: torch.device) -> Tensor | None:
    """(N, M), True inside the window; None if it is unbounded."""
    left, right = window
    if left is None and right is None:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    inside = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        inside = inside & (distance >= -left)
    return inside if right is None else inside & (distance <= right)
