"""Projection of heads to tokens or to a feature map.

``merge_heads_forward`` takes x (B, H, N, D), weight (E, H * D), residual like the output, and a gate that
broadcasts to (B, N, E) as (1|B, 1, 1|E); it returns (B, N, E), or (B, E, N) with ``channels_first``. Its backward takes
gates that the batch shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.backend import define
from fastgen.ops._batching import map_slices
from fastgen.ops.projection import checks
from fastgen.ops.projection.layout import join_heads, to_tokens
from fastgen.ops.projection.linear import linear, weight_grads


def _folded(weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A gate that the batch shares becomes part of the weight and the bias; any other is returned."""
    if gate is None or gate.size(0) != 1:
        return weight, bias, gate
    gate = gate.reshape(-1)
    return weight * gate.unsqueeze(1), None if bias is None else bias * gate, None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> Tensor:
    tokens = join_heads(x)
    weight, bias, gate = _folded(weight, bias, gate)
    if not channels_first:
        y = linear(tokens, weight, bias).contiguous()
        y = y if gate is None else y.mul_(gate)
        return y if residual is None else y.add_(residual)
    features, expanded = tokens.transpose(1, 2), weight.expand(x.size(0), -1, -1)
    base = None if bias is None else bias.unsqueeze(1)
    if gate is None and residual is not None:
        base = residual if base is None else residual + base
    y = torch.bmm(expanded, features) if base is None else torch.baddbmm(base, expanded, features)
    if gate is not None:
        y = y.mul_(gate.transpose(1, 2))
        y = y if residual is None else y.add_(residual)
    return y


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> Tensor:
    batch, length, channels = x.size(0), x.size(2), weight.size(0)
    return x.new_empty((batch, channels, length) if channels_first else (batch, length, channels))


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and of a gate that the batch shares.

    The gate's gradient needs the product before the gate, which is not saved. Its inner product with grad equals that
    of the weight and the weight's gradient, if that is not rounded to 16 bits; otherwise the product is recomputed.
    """
    upstream = to_tokens(grad, channels_first)
    tokens = join_heads(x)
    grad_gate = weight.new_empty(0)
    exact = weight.dtype.itemsize >= 4
    gated, factor = upstream, weight
    if gate is not None:
        gated, factor = (upstream, weight * gate.reshape(-1, 1)) if exact else (upstream * gate, weight)
    grad_weight, grad_bias = weight_grads(gated, tokens)
    if gate is not None and exact:
        of_rows = (grad_weight * weight).sum(1)
        of_rows = of_rows if bias is None else of_rows + grad_bias * bias
        grad_gate = of_rows.reshape(1, 1, -1).sum_to_size(gate.shape)
        grad_weight, grad_bias = grad_weight * gate.reshape(-1, 1), grad_bias * gate.reshape(-1)
    elif gate is not None:
        grad_gate = (upstream * linear(tokens, weight, bias)).sum_to_size(gate.shape)
    # In memory (B, N, H, D), for any layout of the gradient.
    by_heads = (x.size(0), x.size(2), x.size(1), x.size(3))
    grad_x = torch.matmul(gated, factor).contiguous().reshape(by_heads).transpose(1, 2)
    return grad_x, grad_weight, weight.new_empty(0) if bias is None else grad_bias, grad_gate


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = x.shape
    return (
        x.new_empty(batch, length, heads, dim).transpose(1, 2),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else weight.size(0)),
        weight.new_empty((0,) if gate is None else gate.shape),
    )


define(
    "projection",
    "merge_heads_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, bool channels_first,"
    " bool allow_tf32) -> Tensor",
    _forward,
    _forward_fake,
    map_slices,
    check=checks.merge_heads_forward,
    decomposition=_forward,
)
define(
    "projection",
    "merge_heads_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, bool channels_first,"
    " bool allow_tf32) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    map_slices,
    check=checks.merge_heads_backward,
)
