"""The formula of attention and of its gradients in plain PyTorch, which autograd differentiates to any order; with
(B, H, N, M) in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_INFINITY = float("inf")


def scores_of(query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """(B, H, N, M), -inf where ``is_causal`` masks."""
    scores = (query * (query.size(3) ** -0.5 if scale is None else scale)) @ key.transpose(2, 3)
    if not is_causal:
        return scores
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill(later, -_INFINITY)


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    mask_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, with ``mask_grad``, of the mask. ``mask``: boolean or floating."""
    scores = scores_of(query, key, is_causal, scale)
    if mask is None:
        weights = scores.softmax(-1)
    else:  # fully masked rows have weights of 0
        scores = scores.masked_fill(~mask, -_INFINITY) if mask.dtype == torch.bool else scores + mask
        weights = torch._safe_softmax(scores, -1)  # type: ignore[attr-defined]
    products = weights * (grad @ value.transpose(2, 3))
    of_added = products - weights * products.sum(-1, keepdim=True)
    of_scores = of_added * scale
    of_mask = of_added.sum_to_size(mask.shape) if mask is not None and mask_grad else None
    return of_scores @ key, of_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad, of_mask
