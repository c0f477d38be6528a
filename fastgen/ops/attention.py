"""Softmax attention on 4-d tensors: forward with logsumexp, and its backward.

query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), each with a contiguous last dim;
mask: boolean (True = attend) or floating, 4-d, each dim full or 1; seed (S,) int64, S dividing B, where
there is dropout. Query i sees keys i - window_left <= j <= i + window_right; -1 is unbounded, so
causal is (-1, 0). Outputs: out like query with Dv columns, lse (B, H, N) in float32 (float64 for float64).

On CPU, torch's fused kernel serves whatever it can, with heads padded to one size, and fastgen's own the
forward pass where query heads are much narrower than value heads. The rest takes a blocked implementation that
holds one tile of scores at a time, never N x M.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import reference
from fastgen._library import define, has_kernel
from fastgen.ops import _attention_blocked
from fastgen.ops._attention_blocked import Options as Options
from fastgen.ops._attention_blocked import (
    allocate,
    allocate_grad,
    allocate_lse,
    allocate_out,
    rows_first,
    strides,
)
from fastgen.ops._batching import fold, fold_seed, out_dims, unfold

WIDEST_HEAD = 512
"""The largest head dim that has a CUDA kernel (csrc/attention/config.h)."""


def refused_heads(query: Tensor, value: Tensor) -> str | None:
    """Why no CUDA kernel takes heads of this width; None where one does."""
    dims = query.size(-1), value.size(-1)
    if max(dims) <= WIDEST_HEAD:
        return None
    return f"attention has CUDA kernels for head dims up to {WIDEST_HEAD}, not for {dims[0]} and {dims[1]}"


def _settle(tensor: Tensor, in_rows: bool) -> Tensor:
    """``tensor`` in the layout that the fake promises."""
    batch, heads, length, dim = tensor.shape
    if tensor.stride() == strides((batch, heads, length, dim), in_rows):
        return tensor
    return allocate(tensor, dim, in_rows).copy_(tensor)


# --------------------------------------------------------------------------------------------------
# torch's fused CPU kernel


def _fused_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Tensor | None, options: Options
) -> bool:
    return (
        query.device.type == "cpu"
        and seed is None
        and options.window_left < 0
        and options.window_right <= 0
        and not (mask is not None and options.window_right == 0)
        and min(query.numel(), key.numel(), value.numel()) > 0
    )


def _pad_heads(tensor: Tensor, dim: int, fill: float | Tensor = 0.0) -> Tensor:
    """Zero columns up to ``dim``; the first of them takes ``fill`` where one is given."""
    width = tensor.size(-1)
    if width == dim and tensor.stride(-1) == 1:
        return tensor
    padded = F.pad(tensor, (0, dim - width))
    if isinstance(fill, Tensor) or fill != 0.0:
        padded[..., width] = fill
    return padded


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _fused_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dim = max(query.size(-1), value.size(-1))
    mask = _additive(mask, query.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _pad_heads(query, dim),
        reference.expand_heads(_pad_heads(key, dim), query.size(1)),
        reference.expand_heads(_pad_heads(value, dim), query.size(1)),
        0.0,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    if mask is not None:
        lse.masked_fill_(mask.amax(-1) == -math.inf, -math.inf)
    return _settle(out[..., : value.size(-1)], rows_first(query)), lse


def _fused_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's kernel knows no gradient of lse. It takes d = rowsum(dO O), and the wanted d is that minus
    dl: one padding column more, with dl in dO and -1 in O, subtracts it, and V's zero column keeps the
    rest as it was."""
    key_dim, value_dim, heads, key_heads = query.size(-1), value.size(-1), query.size(1), key.size(1)
    dim = max(key_dim, value_dim + (grad_lse is not None))
    if dim > max(key_dim, value_dim):
        dim += -dim % 8
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _pad_heads(grad_out, dim, 0.0 if grad_lse is None else grad_lse.to(grad_out.dtype)),
        _pad_heads(query, dim),
        reference.expand_heads(_pad_heads(key, dim), heads),
        reference.expand_heads(_pad_heads(value, dim), heads),
        _pad_heads(out, dim, 0.0 if grad_lse is None else -1.0),
        lse if mask is None else lse.masked_fill(lse == -math.inf, 0),
        0.0,
        is_causal,
        attn_mask=_additive(mask, query.dtype),
        scale=scale,
    )
    if key_heads != heads:
        grad_key = grad_key.unflatten(1, (key_heads, -1)).sum(2)
        grad_value = grad_value.unflatten(1, (key_heads, -1)).sum(2)
    return grad_query[..., :key_dim], grad_key[..., :key_dim], grad_value[..., :value_dim]


# --------------------------------------------------------------------------------------------------
# The operators


_Results = TypeVar("_Results", bound=tuple[Tensor, ...])


def _heedless(
    run: Callable[[Tensor, Tensor], _Results],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: Options,
) -> _Results:
    """``run(key, value)``, whatever the keys and values hold that no query sees.

    A weight of zero times NaN is NaN, so what nobody sees shows in every row of the first result. On CPU one row is
    looked at, and only then are those keys taken out; elsewhere a look would wait for the device.
    """
    if mask is None and options.window_right < 0:
        return run(key, value)
    if query.device.type == "cpu":
        results = run(key, value)
        last_row = results[0][:, :, -1:].sum()
        if not bool(last_row != last_row):
            return results
    return run(*reference.without_unseen_keys(query, key, value, mask, options.window_left, options.window_right))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    known = Options(*options)

    def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if _fused_on_cpu(query, key, value, mask, seed, known):
            return _fused_forward(query, key, value, mask, known.window_right == 0, known.scale)
        return _attention_blocked.forward(query, key, value, mask, seed, known)

    return _heedless(run, query, key, value, mask, known)


def _assisted_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The same, with fastgen's own CPU kernel where the head dims differ."""
    known = Options(*options)
    if (
        mask is None
        and _fused_on_cpu(query, key, value, mask, seed, known)
        and _narrow(query, value)
        and has_kernel("cpu_attention_forward", query.device)
    ):

        def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            is_causal = known.window_right == 0
            out, lse = torch.ops.fastgen.cpu_attention_forward(query, key, value, is_causal, known.scale)
            return out, lse

        return _heedless(run, query, key, value, mask, known)
    return _forward(query, key, value, mask, seed, *options)


def _narrow(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these head dims, and padding the queries to the values would cost more."""
    key_dim, value_dim = query.size(-1), value.size(-1)
    return (
        query.dtype == torch.float32 and key_dim <= min(64, value_dim // 2) and value_dim <= 256 and value_dim % 16 == 0
    )


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    options = Options(0.0, -1, 0 if is_causal else -1, scale)
    return _attention_blocked.forward(query, key, value, None, None, options)


def _cpu_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known, mask_grad = Options(*options[:-1]), options[-1]

    def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not mask_grad and _fused_on_cpu(query, key, value, mask, seed, known):
            causal = known.window_right == 0
            grads = _fused_backward(grad_out, grad_lse, query, key, value, out, lse, mask, causal, known.scale)
            grad_query, grad_key, grad_value = (_settle(grad, True) for grad in grads)
            return grad_query, grad_key, grad_value, query.new_empty(0)
        grad_query, grad_key, grad_value, grad_mask = _attention_blocked.backward(
            grad_out, grad_lse, query, key, value, out, lse, mask, seed, known, mask_grad
        )
        grad_key, grad_value = allocate_grad(key).copy_(grad_key), allocate_grad(value).copy_(grad_value)
        return grad_query, grad_key, grad_value, query.new_empty(0) if grad_mask is None else grad_mask

    return _heedless(run, query, key, value, mask, known)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_mask = mask.new_empty(mask.shape) if mask is not None and options[-1] else query.new_empty(0)
    return allocate_grad(query), allocate_grad(key), allocate_grad(value), grad_mask


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A mask that every batch entry shares stays shared; any other is folded with the batch."""
    if mask is None or (dim is None and mask.size(0) == 1):
        return mask
    front = mask.unsqueeze(0) if dim is None else mask.movedim(dim, 0)
    return front.expand(size, batch, *front.shape[2:]).flatten(0, 1)


def _vmap_forward(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    query, key, value = (fold(a, d, size) for a, d in zip(args[:3], in_dims[:3], strict=True))
    assert query is not None
    mask = _fold_mask(args[3], in_dims[3], size, query.size(0) // size)
    seed = fold_seed(args[4], in_dims[4], size)
    outputs = unfold(operator(query, key, value, mask, seed, *args[5:]), size)
    return outputs, out_dims(outputs)


def _vmap_backward(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    folded = [fold(a, d, size) for a, d in zip(args[:7], in_dims[:7], strict=True)]
    query = folded[2]
    assert query is not None
    batch = query.size(0) // size
    mask, seed = _fold_mask(args[7], in_dims[7], size, batch), fold_seed(args[8], in_dims[8], size)
    mask_grad = args[-1]
    if mask is not None and mask_grad and mask.size(0) == 1:
        mask = mask.expand(size * batch, *mask.shape[1:])  # each slice wants a gradient of its own
    *grads, grad_mask = operator(*folded, mask, seed, *args[9:])
    if mask is not None and mask_grad:
        own = args[7].size(0) if in_dims[7] is None else args[7].movedim(in_dims[7], 0).size(1)
        grad_mask = grad_mask.unflatten(0, (size, batch))
        grad_mask = grad_mask.sum(1, keepdim=True) if own == 1 else grad_mask
    else:
        grad_mask = grad_mask.reshape(size, 0)
    return (*(unfold(g, size) for g in grads), grad_mask), (0, 0, 0, 0)


_OPTIONS = "float dropout_p, int window_left, int window_right, float scale, bool allow_tf32"
define(
    "attention",
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? seed, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _vmap_forward,
    assisted=_assisted_forward,
)
define(
    "attention",
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, {_OPTIONS}, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _vmap_backward,
)
define(
    "helpers",
    "cpu_attention_forward(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> (Tensor, Tensor)",
    _cpu_forward,
    _cpu_forward_fake,
)
