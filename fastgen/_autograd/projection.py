"""Derivatives of the multi-head projections, which are linear in each argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen import reference
from fastgen._autograd.common import choose, in_graph, must_be_differentiable, only_wanted, tangent_formula
from fastgen._library import operator


def _to_tokens(x: Tensor, channels_first: bool) -> Tensor:
    return x.transpose(1, 2) if channels_first else x


def _run_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    namespace: str,
) -> tuple[Tensor, ...]:
    return tuple(operator(namespace, "projection_forward")(x, weight, bias, heads, head_dims, channels_first))


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.save_for_forward(*inputs[:2])
    ctx.bias = inputs[2] is not None
    ctx.heads, ctx.head_dims, ctx.channels_first, ctx.namespace = inputs[3:]


class _Projection(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run_projection(*inputs)
        _save_projection(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_bias: Tensor | None
        if must_be_differentiable():
            grad = torch.cat([reference.join_heads(g) for g in grads], dim=-1)
            grad_x = _to_tokens(grad @ weight, ctx.channels_first)
            grad_weight = (grad.transpose(1, 2) @ _to_tokens(x, ctx.channels_first)).sum(0)
            grad_bias = grad.sum((0, 1)) if ctx.bias else None
        else:
            backward = operator(ctx.namespace, "projection_backward")
            grad_x, grad_weight, grad_bias = backward(list(grads), x, weight, ctx.bias, ctx.channels_first)
        return (*only_wanted(ctx, 0, grad_x, grad_weight, grad_bias), None, None, None, None)


class _TransformedProjection(Function):
    forward = staticmethod(_run_projection)
    setup_context = staticmethod(_save_projection)
    backward = _Projection.backward
    generate_vmap_rule = True

    @staticmethod
    @tangent_formula
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[Tensor, ...]:
        x, weight = saved
        t_x, t_weight, t_bias = tangents[:3]
        y = torch.zeros((), dtype=x.dtype, device=x.device)
        if t_x is not None:
            y = y + _to_tokens(t_x, ctx.channels_first) @ weight.t()
        if t_weight is not None:
            y = y + _to_tokens(x, ctx.channels_first) @ t_weight.t()
        if t_bias is not None:
            y = y + t_bias
        length = x.size(2 if ctx.channels_first else 1)
        parts = reference.split_heads(y.expand(x.size(0), length, -1), ctx.heads, ctx.head_dims)
        return tuple(part.clone() for part in parts)


def _run_merge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    namespace: str,
) -> Tensor:
    y: Tensor = operator(namespace, "merge_heads_forward")(x, weight, bias, residual, gate, channels_first)
    return y


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, gate, ctx.channels_first, ctx.namespace = inputs
    ctx.save_for_backward(x, weight, bias, gate)
    ctx.save_for_forward(x, weight, bias, gate)


class _MergeHeads(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run_merge(*inputs)
        _save_merge(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gate = ctx.saved_tensors
        grad_bias: Tensor | None
        grad_gate: Tensor | None
        if must_be_differentiable():
            tokens, upstream = reference.join_heads(x), _to_tokens(grad, ctx.channels_first)
            gated = upstream if gate is None else upstream * gate
            grad_x = (gated @ weight).unflatten(-1, (x.size(1), x.size(3))).transpose(1, 2)
            grad_weight = (gated.transpose(1, 2) @ tokens).sum(0)
            grad_bias = None if bias is None else gated.sum((0, 1))
            grad_gate = None
            if gate is not None:
                y = tokens @ weight.t()
                y = y if bias is None else y + bias
                grad_gate = (upstream * y).sum_to_size(gate.shape)
        else:
            backward = operator(ctx.namespace, "merge_heads_backward")
            grad_x, grad_weight, grad_bias, grad_gate = backward(grad, x, weight, bias, gate, ctx.channels_first)
        return (*only_wanted(ctx, 0, grad_x, grad_weight, grad_bias, grad, grad_gate), None, None)


class _TransformedMergeHeads(Function):
    forward = staticmethod(_run_merge)
    setup_context = staticmethod(_save_merge)
    backward = _MergeHeads.backward
    generate_vmap_rule = True

    @staticmethod
    @tangent_formula
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> Tensor:
        x, weight, bias, gate = saved
        t_x, t_weight, t_bias, t_residual, t_gate = tangents[:5]
        tokens = reference.join_heads(x)
        t_y = x.new_zeros(x.size(0), x.size(2), weight.size(0))
        if t_x is not None:
            t_y = t_y + reference.join_heads(t_x) @ weight.t()
        if t_weight is not None:
            t_y = t_y + tokens @ t_weight.t()
        if t_bias is not None:
            t_y = t_y + t_bias
        t_y = t_y if gate is None else gate * t_y
        if t_gate is not None:
            y = tokens @ weight.t()
            t_y = t_y + t_gate * (y if bias is None else y + bias)
        t_y = _to_tokens(t_y, ctx.channels_first)
        return t_y if t_residual is None else t_y + t_residual


@in_graph
def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    namespace: str,
) -> tuple[Tensor, ...]:
    """``projection_forward`` with derivatives of every order."""
    arguments = (x, weight, bias, heads, head_dims, channels_first, namespace)
    function = choose(_Projection, _TransformedProjection, x, weight, bias)
    if function is None:
        return _run_projection(*arguments)
    return tuple(function.apply(*arguments))


@in_graph
def merge_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    namespace: str,
) -> Tensor:
    """``merge_heads_forward`` with derivatives of every order."""
    arguments = (x, weight, bias, residual, gate, channels_first, namespace)
    function = choose(_MergeHeads, _TransformedMergeHeads, x, weight, bias, residual, gate)
    if function is None:
        return _run_merge(*arguments)
    result: Tensor = function.apply(*arguments)
    return result
