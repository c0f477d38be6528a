"""Attention as a few PyTorch operators, for exporters that do not know fastgen's, such as ``torch.onnx.export``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.ops.attention.masking import window_mask
from fastgen.ops.attention.problem import Problem


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """out and lse of ``attention_forward``, with N x M scores. Sizes may be symbolic.

    Raises:
        NotImplementedError: dropout, whose random bits depend on a seed; or packed sequences.
    """
    problem = Problem.of((*args, ""))
    query, key, value, mask, seed, sequences, options, _ = problem
    if seed is not None:
        raise NotImplementedError(
            f"dropout_p: expected 0 in a model that is exported (model.eval()), got {options.dropout_p}"
        )
    if sequences is not None:
        raise NotImplementedError("cu_seqlens_q: expected a model without packed sequences for this export")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, cols = (torch.arange(t.size(-2), device=query.device) for t in (query, key))
    allowed = window_mask(rows, cols, options.window_left, options.window_right)
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else mask & allowed
    bias = None if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    if bias is not None:
        finite = bias != -math.inf
        allowed = finite if allowed is None else finite & allowed
    if allowed is not None:  # a weight of zero times NaN is NaN: masked keys become zero
        used = allowed.expand(-1, -1, query.size(-2), key.size(-2)) if allowed.dim() == 4 else allowed[None, None]
        used = used.any(-2)
        if used.size(1) > key.size(1):
            used = used.unflatten(1, (key.size(1), -1)).any(2)
        key, value = (t.masked_fill(~used.unsqueeze(-1), 0) for t in (key, value))
    key, value = (_expand_heads(t, query.size(1)) for t in (key, value))
    scores = options.scale * (query.to(dtype) @ key.to(dtype).transpose(-2, -1))
    if options.softcap != 0.0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    weights, lse = softmax_lse(scores)
    out = weights @ value.to(dtype)
    return out.to(query.dtype), lse


def softmax_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the last dim; 0 and -inf for a row of -inf. Differentiable any number of times."""
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (top + total.log()).masked_fill(empty, -math.inf).masked_fill(top == math.inf, math.inf)
    return weights / total, lse.squeeze(-1)


def _expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated for grouped queries: (B, Hk, M, D) -> (B, H, M, D)."""
    groups = heads // tensor.size(1)
    return tensor if groups == 1 else tensor.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)
