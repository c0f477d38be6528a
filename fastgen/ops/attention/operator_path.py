"""The common call of attention with kernels, on a GPU or of a forced backend: few checks, then the operator.

What a call costs before its kernel starts is counted in microseconds. What is not common (windows, packed sequences,
transforms, autocast, tensor subclasses, heads that no kernel takes) is left to ``autograd.attention``, which calls the
same operators; so are derivatives that are to be differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastgen.backend import may_use_tf32, overload, select
from fastgen.ops._checks import FLOATS, STRIDED
from fastgen.ops._direct import PLAIN, is_watched
from fastgen.ops.attention.autograd import backward as any_backward
from fastgen.ops.attention.problem import WIDEST_HEAD, Options, Saved
from fastgen.ops.autograd import apply_of, is_wrapped, must_be_differentiable, only_wanted

_interpreter = torch._C._functorch.peek_interpreter_stack
_grad_enabled = torch.is_grad_enabled
_is_tracing = torch._C._is_tracing
_BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView
_INFINITY = float("inf")


def namespace_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """The namespace whose operator takes the arguments as they are; None where ``autograd.attention`` has to serve, for
    any other arguments too.

    Raises:
        RuntimeError: the backend ``compiled`` is forced and has no kernel for these tensors.
    """
    if (
        type(query) not in PLAIN
        or type(key) not in PLAIN
        or type(value) not in PLAIN
        or (is_causal is not False and is_causal is not True)
        or not (scale is None or (type(scale) is float and -_INFINITY < scale < _INFINITY))
        or is_watched()
        or forward_ad._current_level >= 0
        or _interpreter() is not None
        or _is_tracing()
        or query.is_nested
        or key.is_nested
        or value.is_nested
    ):
        return None
    shape, dtype, device, of_values = query.shape, query.dtype, query.device, value.shape
    if (
        len(shape) != 4
        or len(of_values) != 4
        or dtype not in FLOATS
        or not dtype == key.dtype == value.dtype
        or not device == key.device == value.device
        or not query.layout == key.layout == value.layout == STRIDED
    ):
        return None
    batch, heads, queries, dim = shape
    value_batch, key_heads, keys, value_dim = of_values
    if (
        key.shape != (batch, key_heads, keys, dim)
        or value_batch != batch
        or not (heads == key_heads or (enable_gqa is True and key_heads and heads % key_heads == 0))
        or not (batch and heads and queries and keys)
        or not 0 < dim <= WIDEST_HEAD
        or not 0 < value_dim <= WIDEST_HEAD
        or not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
    ):
        return None
    if mask is not None and not (
        type(mask) in PLAIN
        and (mask.dtype == torch.bool or mask.dtype == dtype or mask.dtype == torch.float32)
        and mask.device == device
        and mask.layout == STRIDED
        and len(own := mask.shape) == 4
        and (own[3] == keys or own[3] == 1)
        and (own[2] == queries or own[2] == 1)
        and (own[1] == heads or own[1] == 1)
        and (own[0] == batch or own[0] == 1)
    ):
        return None
    return select("attention_forward", query)


def attend(
    namespace: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N) of arguments that ``namespace_for`` takes."""
    scale = query.size(3) ** -0.5 if scale is None else scale
    options = (dropout_p, -1, 0 if is_causal else -1, scale, 0.0, may_use_tf32(query))
    if _grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (mask is not None and mask.requires_grad)
    ):
        if is_wrapped(query) or is_wrapped(key) or is_wrapped(value):
            return _Attention.apply(query, key, value, mask, seed, options, namespace)  # type: ignore[no-untyped-call, no-any-return]
        return _apply(query, key, value, mask, seed, options, namespace)  # type: ignore[no-any-return]
    with _BelowAutograd():
        return overload(namespace, "attention_forward")(query, key, value, mask, seed, None, *options)  # type: ignore[no-any-return]


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        options: tuple[Any, ...],
        namespace: str,
    ) -> tuple[Tensor, Tensor]:
        with _BelowAutograd():
            out, lse = overload(namespace, "attention_forward")(query, key, value, mask, seed, None, *options)
        ctx.save_for_backward(query, key, value, out, lse, mask, seed)
        ctx.options, ctx.namespace = options, namespace
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        mask_grad = wanted[3]
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[3])
        elif grad_out.stride(3) != 1:
            grad_out = grad_out.contiguous()
        if must_be_differentiable() or grad_out.layout != STRIDED:
            saved = Saved._make((*tensors, None, Options._make(ctx.options), ctx.namespace))
            grads = any_backward(grad_out, grad_lse, saved, mask_grad)
        else:
            with _BelowAutograd():
                run = overload(ctx.namespace, "attention_backward")
                grads = run(grad_out, grad_lse, *tensors, None, *ctx.options, mask_grad)
            if wanted[0] and wanted[1] and wanted[2]:
                return (grads[0], grads[1], grads[2], grads[3] if mask_grad else None, None, None, None)
        return (*only_wanted(ctx, 0, *grads), None, None, None)


_apply = apply_of(_Attention)
