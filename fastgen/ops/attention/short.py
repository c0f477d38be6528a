"""Attention with few keys on CPU, such as windows of images and short sentences, by fastgen's own kernels, which hold
whole rows of scores in L1 (csrc/attention/cpu/short.h). PyTorch's kernel runs at a quarter to half of the speed of its
products there.

The kernels ignore what keys hold that every query masks, so that results are not searched for NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen.backend import COMPILED, helper
from fastgen.ops._contents import may_overflow
from fastgen.ops.attention.autograd import backward as any_backward
from fastgen.ops.attention.formula import gradients
from fastgen.ops.attention.problem import Options, Saved
from fastgen.ops.autograd import apply_of, is_wrapped, must_be_differentiable, only_wanted, transforms_active

MOST_KEYS, MOST_DIM = 256, 64
"""With more keys, or wider heads, PyTorch's kernel can be the faster one."""

FEWEST_QUERIES = 16
"""Keys are packed for all queries of a head."""

FEWEST_HEADS = 32
"""Of all batches: a head is one task for a thread."""

LEAST_WORK = 2**21
"""Of batch * heads * queries * keys * head dim: with fewer the cost of a call counts."""

_grad_enabled = torch.is_grad_enabled


def takes(shape: torch.Size, of_keys: torch.Size) -> bool:
    """Whether the kernels are the faster ones for heads of one width. ``shape`` and ``of_keys``: (B, H, N, D) and
    (B, H, M, D)."""
    batch, heads, queries, dim = shape
    keys = of_keys[2]
    return (
        queries >= FEWEST_QUERIES
        and keys <= MOST_KEYS
        and dim <= MOST_DIM
        and batch * heads >= FEWEST_HEADS
        and batch * heads * queries * keys * dim >= LEAST_WORK
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor | None:
    """out, (B, H, N, D), of float32 arguments that ``direct.attend`` and ``takes`` accept, outside of transforms and
    traces; None where another implementation has to serve. Not causal."""
    run = helper(COMPILED, "cpu_attention_forward", query.device)
    if (
        run is None
        or not query.dtype == key.dtype == value.dtype
        or not (key.is_cpu and value.is_cpu)
        or not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        or is_wrapped(query)
        or is_wrapped(key)
        or is_wrapped(value)
    ):
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if _grad_enabled():
        mask_grad = mask is not None and mask.requires_grad
        if mask_grad and mask is not None and (is_wrapped(mask) or mask.shape[2:] != (query.shape[2], key.shape[2])):
            return None
        if mask_grad or query.requires_grad or key.requires_grad or value.requires_grad:
            return _apply(query, key, value, mask, scale)  # type: ignore[no-any-return]
    return run(query, key, value, mask, None, 0.0, -1, -1, scale)[0]  # type: ignore[no-any-return]


class _Short(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        run: Any = helper(COMPILED, "cpu_attention_forward", query.device)
        out, lse = run(query, key, value, mask, None, 0.0, -1, -1, scale)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, mask = ctx.saved_tensors
        mask_grad = ctx.needs_input_grad[3]
        grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
        if must_be_differentiable():
            grads = _differentiable(grad_out, query, key, value, out, lse, mask, ctx.scale, mask_grad)
        else:
            run: Any = helper(COMPILED, "cpu_attention_backward", query.device)
            grads = run(grad_out, None, query, key, value, out, lse, mask, None, 0.0, -1, -1, ctx.scale, mask_grad)
        return (*only_wanted(ctx, 0, *grads), None)


_apply = apply_of(_Short)


def _differentiable(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    mask_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and mask that autograd differentiates."""
    queries, keys, dim = query.shape[2], key.shape[2], query.shape[3]
    few = queries * keys <= 2 * (queries + keys) * dim
    if few and not transforms_active() and (mask is None or not may_overflow(key, value)):
        return gradients(grad_out, query, key, value, mask, False, scale, mask_grad)
    options = Options(dropout_p=0.0, window_left=-1, window_right=-1, scale=scale)
    return any_backward(
        grad_out, None, Saved(query, key, value, out, lse, mask, None, None, options, COMPILED), mask_grad
    )
