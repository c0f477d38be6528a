"""Linear maps of tokens in any memory layout, without copies of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops.projection.layout import length_first


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """tokens (B, N, C) in any layout, weight (E, C) -> (B, N, E), with no copy of the tokens."""
    if tokens.is_contiguous():
        return torch.nn.functional.linear(tokens, weight, bias)
    if length_first(tokens):
        return torch.nn.functional.linear(tokens.transpose(0, 1), weight, bias).transpose(0, 1)
    expanded = weight.t().expand(tokens.size(0), -1, -1)
    if bias is None:
        return torch.bmm(tokens, expanded)
    return torch.baddbmm(bias, tokens, expanded)


def weight_grads(grad: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (E, C) and bias (E,) of a linear map, from (B, N, E) and (B, N, C)."""
    of_map = not tokens.is_contiguous() and tokens.transpose(1, 2).is_contiguous()
    from_map = not grad.is_contiguous() and grad.transpose(1, 2).is_contiguous()
    if (of_map or from_map) and grad.dtype.itemsize >= 4 and grad.size(1) >= max(grad.size(2), tokens.size(2)):
        # A feature map on one side: a product for each entry of the batch copies nothing, and is smaller than a copy.
        # In 16 bits their sum would lose too much.
        if of_map:
            weight = torch.bmm(tokens.transpose(1, 2), grad).sum(0).t().contiguous()
        else:
            weight = torch.bmm(grad.transpose(1, 2), tokens).sum(0)
        return weight, grad.sum((0, 1))
    if length_first(tokens):
        grad, tokens = grad.transpose(0, 1), tokens.transpose(0, 1)
    count = grad.size(0) * grad.size(1)
    rows = grad.reshape(count, grad.size(2))
    return torch.mm(rows.t(), tokens.reshape(count, tokens.size(2))), rows.sum(0)
