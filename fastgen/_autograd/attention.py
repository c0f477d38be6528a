"""Derivatives of attention. The first is the operator's; a derivative of a derivative takes the reference
formulas, which are right to any order and use memory proportional to N x M."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen import reference
from fastgen._autograd.common import apply, choose, must_be_differentiable, only_wanted
from fastgen._library import operator
from fastgen.ops.attention import Options


def _keep(seed: Tensor | None, dropout_p: float, query: Tensor, key: Tensor) -> Tensor | None:
    """The whole dropout mask over its probability, (B, H, N, M)."""
    if seed is None:
        return None
    batch, heads, length, _ = query.shape
    keys, count = key.size(2), batch * heads * length
    groups = reference.groups_per_row(keys)
    rows = torch.arange(count, device=seed.device)
    uniform = reference.uniform_rows(seed, rows, max(count // seed.numel(), 1), groups, 0, groups)
    keep = (uniform[:, :keys] >= dropout_p).to(query.dtype) / (1 - dropout_p)
    return keep.reshape(batch, heads, length, keys)


def _run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``rest``: the options, one by one, and the namespace."""
    *options, namespace = rest
    result = operator(namespace, "attention_forward")(query, key, value, mask, seed, *options)
    return result[0], result[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.save_for_forward(*inputs[:5])
    ctx.options, ctx.namespace = Options(*inputs[5:-1]), inputs[-1]
    ctx.set_materialize_grads(False)


def _formula_options(ctx: Any) -> tuple[int, int, float]:
    """What the reference formulas take of the options."""
    return ctx.options.window_left, ctx.options.window_right, ctx.options.scale


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, mask, seed, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_mask: Tensor | None
        if must_be_differentiable():
            grad_lse = None if grad_lse is None else grad_lse.to(query.dtype)
            keep = _keep(seed, ctx.options.dropout_p, query, key)
            grad_query, grad_key, grad_value, grad_mask = reference.attention_backward(
                grad_out, grad_lse, query, key, value, mask, keep, *_formula_options(ctx)
            )
        else:
            mask_grad = mask is not None and ctx.needs_input_grad[3]
            grad_query, grad_key, grad_value, grad_mask = operator(ctx.namespace, "attention_backward")(
                grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(),
                grad_lse, query, key, value, out, lse, mask, seed, *ctx.options, mask_grad,
            )  # fmt: skip
        return (
            *only_wanted(ctx, 0, grad_query, grad_key, grad_value, grad_mask),
            *(None,) * (len(ctx.needs_input_grad) - 4),
        )


class _TransformedAttention(Function):
    forward = staticmethod(_run)
    setup_context = staticmethod(_save)
    backward = _Attention.backward
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        query, key, value, mask, seed = ctx.saved_tensors[:5]
        keep = _keep(seed, ctx.options.dropout_p, query, key)
        t_query, t_key, t_value, t_mask = tangents[:4]
        out, lse = reference.attention_tangent(
            query, key, value, mask, t_query, t_key, t_value, t_mask, keep, *_formula_options(ctx)
        )
        return out, lse.to(torch.promote_types(query.dtype, torch.float32))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    namespace: str,
) -> tuple[Tensor, Tensor]:
    """``attention_forward`` with derivatives of every order; straight to the operator where none is needed."""
    arguments = (query, key, value, mask, seed, *options, namespace)
    function = choose(_Attention, _TransformedAttention, query, key, value, mask)
    result = _run(*arguments) if function is None else apply(function, arguments)
    return result[0], result[1]
