"""Derivatives of the projection of heads to tokens, which is linear in each argument; see ``autograd``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen.backend import call, overload
from fastgen.ops.autograd import apply_of, choose, formula_of, in_graph, only_wanted, record, tangent_formula
from fastgen.ops.projection import merge_operators
from fastgen.ops.projection.dispatch import backward_operator, copies_nothing, has_kernel
from fastgen.ops.projection.layout import join_heads, length_first, to_tokens


def _run_merge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
    namespace: str,
) -> Tensor:
    y: Tensor = call(namespace, "merge_heads_forward", x, weight, bias, residual, gate, channels_first, allow_tf32)
    return y


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, gate, ctx.channels_first, ctx.allow_tf32, ctx.namespace = inputs
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
        grad_x, grad_weight, grad_bias, grad_gate = _merge_grads(ctx, grad, *ctx.saved_tensors)
        return (*only_wanted(ctx, 0, grad_x, grad_weight, grad_bias, grad, grad_gate), None, None, None)


def _merge_grads(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    options = (ctx.channels_first, ctx.allow_tf32)
    backward = backward_operator(ctx.namespace, "merge_heads_backward", merge_operators.backward, [grad])
    if gate is None or gate.size(0) == 1:
        grads: tuple[Tensor, Tensor, Tensor, Tensor] = backward(grad, x, weight, bias, gate, *options)
        return grads
    # Gates per batch entry: their gradient needs the product before the gate, which is recomputed.
    aligned = to_tokens(gate, ctx.channels_first)
    grad_x, grad_weight, grad_bias, _ = backward(grad * aligned, x, weight, bias, None, *options)
    if not ctx.needs_input_grad[4]:
        return grad_x, grad_weight, grad_bias, None
    y = merge_heads(x, weight, bias, None, None, *options, ctx.namespace)
    return grad_x, grad_weight, grad_bias, to_tokens((grad * y).sum_to_size(aligned.shape), ctx.channels_first)


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
        tokens = join_heads(x)
        t_y = x.new_zeros(x.size(0), x.size(2), weight.size(0))
        if t_x is not None:
            t_y = t_y + join_heads(t_x) @ weight.t()
        if t_weight is not None:
            t_y = t_y + tokens @ t_weight.t()
        if t_bias is not None:
            t_y = t_y + t_bias
        t_y = t_y if gate is None else gate * t_y
        if t_gate is not None:
            y = tokens @ weight.t()
            t_y = t_y + t_gate * (y if bias is None else y + bias)
        t_y = to_tokens(t_y, ctx.channels_first)
        return t_y if t_residual is None else t_y + t_residual


def _in_pytorch(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    if gate is not None and gate.size(0) == 1 and weight.dtype.itemsize >= 4:
        # A gate that the batch shares becomes part of the weight: no pass over the tokens, forward or backward. Its
        # gradient would lose accuracy where the weight's is rounded to 16 bits.
        rows = gate.reshape(-1)
        weight, bias, gate = weight * rows.unsqueeze(1), None if bias is None else bias * rows, None
    flipped = length_first(tokens)
    y = torch.nn.functional.linear(tokens.transpose(0, 1) if flipped else tokens, weight, bias)
    y = y.transpose(0, 1) if flipped else y
    y = y if gate is None else gate * y
    return y if residual is None else residual + y


@in_graph
def merge_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
    namespace: str,
) -> Tensor:
    """``merge_heads_forward`` with derivatives of every order."""
    if not channels_first and not has_kernel("merge_heads_forward", namespace, x):
        tokens = join_heads(x)
        if copies_nothing(tokens):
            return _in_pytorch(tokens, weight, bias, residual, gate)
    arguments = (x, weight, bias, residual, gate, channels_first, allow_tf32, namespace)
    function = choose(_MergeHeads, _TransformedMergeHeads, x, weight, bias, residual, gate)
    if function is None:
        return _run_merge(*arguments)
    result: Tensor = function.apply(*arguments)
    return result


_apply = apply_of(_MergeHeads)


def of_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, allow_tf32: bool, namespace: str
) -> Tensor:
    """``merge_heads`` of plain tensors outside of transforms, where the operator has a kernel."""
    arguments = (x, weight, bias, residual, None, False, allow_tf32, namespace)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(*arguments)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return overload(namespace, "merge_heads_forward")(*arguments[:-1])  # type: ignore[no-any-return]


def _recorded_merge(namespace: str, *args: Any) -> Tensor:
    x, weight, bias, residual, gate, channels_first, allow_tf32 = args
    return merge_heads(x, weight, bias, residual, gate, channels_first, allow_tf32, namespace)


record("merge_heads_forward", _recorded_merge)
record("merge_heads_backward", formula_of(merge_operators.backward))
