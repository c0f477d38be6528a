"""Attention in plain PyTorch, for what the fused operator does not return: the weights.

Memory is O(N M) for the output and every derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.functional._autocast import without_autocast
from fastgen.ops.attention.decomposition import softmax_lse
from fastgen.ops.attention.masking import window_mask


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
        window: (left, right), 0 or more, as in ``fastgen.functional.scaled_dot_product_attention``.
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
    with without_autocast(query.device):
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows, cols = (torch.arange(t.size(-2), device=query.device) for t in (query, key))
        left, right = (-1 if bound is None else bound for bound in window)
        allowed = window_mask(rows, cols, left, right)
        if mask is not None and mask.dtype == torch.bool:
            allowed = mask if allowed is None else allowed & mask
        elif mask is not None:
            scores = scores + mask.to(dtype)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights, lse = softmax_lse(scores)
        weights = F.dropout(weights, dropout_p)
        out = (weights @ value.to(dtype)).to(query.dtype)
    return out, weights.to(query.dtype), lse
