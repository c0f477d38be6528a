"""Multi-head projections: tokens or a feature map to heads, and heads back.

``projection_forward`` takes x (B, N, C), or (B, C, N) with ``channels_first``, and a packed weight
(sum of heads * head_dims, C), and returns one (B, heads, N, head_dim) tensor for each packed part.
``merge_heads_forward`` takes x (B, H, N, D), weight (E, H * D), residual like the output, and a gate that
broadcasts to (B, N, E) as (1|B, 1, 1|E); it returns (B, N, E), or (B, E, N) with ``channels_first``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import reference
from fastgen._library import define
from fastgen.ops._batching import fold, map_slices, out_dims, unfold


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """tokens (B, N, C) in any layout, weight (E, C) -> (B, N, E), with no copy of the tokens."""
    if tokens.is_contiguous():
        return torch.nn.functional.linear(tokens, weight, bias)
    expanded = weight.t().expand(tokens.size(0), -1, -1)
    if bias is None:
        return torch.bmm(tokens, expanded)
    return torch.baddbmm(bias, tokens, expanded)


def _tokens(x: Tensor, channels_first: bool) -> Tensor:
    return x.transpose(1, 2) if channels_first else x


def _weight_grads(grad: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (E, C) and bias (E,) of a linear map, from (B, N, E) and (B, N, C)."""
    weight = torch.mm(grad.flatten(0, 1).t(), tokens.flatten(0, 1))
    return weight, grad.sum((0, 1))


# --------------------------------------------------------------------------------------------------
# Tokens to heads


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: list[int], head_dims: list[int], channels_first: bool
) -> list[Tensor]:
    # Outputs of an operator may not share memory, so each part has a product of its own.
    tokens = _tokens(x, channels_first)
    sizes = [h * d for h, d in zip(heads, head_dims, strict=True)]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    parts = [_linear(tokens, w, b) for w, b in zip(weight.split(sizes), biases, strict=True)]
    return [y.unflatten(-1, (h, d)).transpose(1, 2) for y, h, d in zip(parts, heads, head_dims, strict=True)]


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: list[int], head_dims: list[int], channels_first: bool
) -> list[Tensor]:
    batch, length = x.size(0), x.size(2 if channels_first else 1)
    return [x.new_empty(batch, length, h, d).transpose(1, 2) for h, d in zip(heads, head_dims, strict=True)]


def _backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, bias: bool, channels_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.cat([reference.join_heads(g) for g in grads], dim=-1)
    grad_weight, grad_bias = _weight_grads(grad, _tokens(x, channels_first))
    if channels_first:
        grad_x = torch.bmm(weight.t().expand(x.size(0), -1, -1), grad.transpose(1, 2))
    else:
        grad_x = torch.matmul(grad, weight)
    return grad_x, grad_weight, grad_bias if bias else grad_bias.new_empty(0)


def _backward_fake(
    grads: list[Tensor], x: Tensor, weight: Tensor, bias: bool, channels_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.size(0) if bias else 0)


# --------------------------------------------------------------------------------------------------
# Heads to tokens


def _merge_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None, channels_first: bool
) -> Tensor:
    tokens = reference.join_heads(x)
    if channels_first:
        y = torch.bmm(weight.expand(x.size(0), -1, -1), tokens.transpose(1, 2))
        y = y if bias is None else y.add_(bias.unsqueeze(1))
        gate = None if gate is None else gate.transpose(1, 2)
    else:
        y = _linear(tokens, weight, bias)
    y = y if gate is None else y.mul_(gate)
    return y if residual is None else y.add_(residual)


def _merge_forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None, channels_first: bool
) -> Tensor:
    batch, length, channels = x.size(0), x.size(2), weight.size(0)
    return x.new_empty((batch, channels, length) if channels_first else (batch, length, channels))


def _merge_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, channels_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gate's gradient needs the product before the gate, which is computed again rather than kept."""
    grad_tokens = _tokens(grad, channels_first)
    tokens = reference.join_heads(x)
    empty = weight.new_empty(0)
    gated = grad_tokens if gate is None else grad_tokens * gate
    grad_weight, grad_bias = _weight_grads(gated, tokens)
    grad_gate = empty.clone()
    if gate is not None:
        grad_gate = (grad_tokens * _linear(tokens, weight, bias)).sum_to_size(gate.shape)
    grad_x = torch.matmul(gated, weight).unflatten(-1, (x.size(1), x.size(3))).transpose(1, 2)
    return grad_x, grad_weight, empty if bias is None else grad_bias, grad_gate


def _merge_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, channels_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = x.shape
    return (
        x.new_empty(batch, length, heads, dim).transpose(1, 2),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else weight.size(0)),
        weight.new_empty((0,) if gate is None else gate.shape),
    )


# --------------------------------------------------------------------------------------------------
# vmap: the batch takes the mapped dim where the parameters are not mapped


def _vmap_forward(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    if any(dim is not None for dim in in_dims[1:3]):
        return map_slices(operator, info, in_dims, *args)
    outputs = unfold(operator(fold(args[0], in_dims[0], info.batch_size), *args[1:]), info.batch_size)
    return outputs, out_dims(outputs)


_PARTS = "int[] heads, int[] head_dims, bool channels_first"
define(
    "projection",
    f"projection_forward(Tensor x, Tensor weight, Tensor? bias, {_PARTS}) -> Tensor[]",
    _forward,
    _forward_fake,
    _vmap_forward,
)
define(
    "projection",
    "projection_backward(Tensor[] grads, Tensor x, Tensor weight, bool bias, bool channels_first)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    map_slices,
)
define(
    "projection",
    "merge_heads_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, bool channels_first)"
    " -> Tensor",
    _merge_forward,
    _merge_forward_fake,
    map_slices,
)
define(
    "projection",
    "merge_heads_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, bool channels_first)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _merge_backward,
    _merge_backward_fake,
    map_slices,
)
