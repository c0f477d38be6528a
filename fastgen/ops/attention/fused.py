"""torch's fused attention kernel on CPU, made to take heads of two widths, grouped heads and a gradient of lse."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops._contents import NOT_FINITE, ZERO, contents
from fastgen.ops.attention.blocked import allocate, rows_first, shift_of, strides, wide
from fastgen.ops.attention.problem import Problem, Saved


def in_layout(tensor: Tensor, in_rows: bool) -> Tensor:
    """``tensor`` in the memory layout of the fake."""
    batch, heads, length, dim = tensor.shape
    if tensor.stride() == strides((batch, heads, length, dim), in_rows):
        return tensor
    return allocate(tensor, dim, in_rows).copy_(tensor)


def takes(problem: Problem | Saved) -> bool:
    """Whether the kernel computes this: no dropout or softcap, no window but causal, a mask or causal but not both.

    It multiplies masked scores of -inf by the scale, which gives NaN where that is 0 or negative.
    """
    query, options = problem.query, problem.options
    return (
        query.device.type == "cpu"
        and problem.seed is None
        and options.softcap == 0.0
        and options.window_left < 0
        and options.window_right <= 0
        and not (problem.mask is not None and options.window_right == 0)
        and not (options.scale <= 0 and options.window_right == 0)
        and min(query.numel(), problem.key.numel(), problem.value.numel()) > 0
    )


def _pad_heads(tensor: Tensor, dim: int, fill: float | Tensor = 0.0) -> Tensor:
    """Zero columns up to ``dim``; the first of them takes ``fill`` where one is given."""
    width = tensor.size(-1)
    if width == dim and tensor.stride(-1) == 1:
        return tensor
    padded = F.pad(tensor, (0, dim - width))
    if padded.stride(-1) != 1:  # the strides of a head dim of 1 may look like those of channels last
        padded = padded.contiguous()
    if isinstance(fill, Tensor) or fill != 0.0:
        padded[..., width] = fill
    return padded


def _expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated for grouped queries: (B, Hk, M, D) -> (B, H, M, D)."""
    return tensor if tensor.size(1) == heads else tensor.repeat_interleave(heads // tensor.size(1), dim=1)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that the kernel takes beside queries of ``dtype``: of that dtype, or float32 beside 16 bits.

    It also takes float32 beside float64, and reads it as float64, beyond its end. Before mid-2026 it could read the
    last dim as contiguous whatever its stride (pytorch/pytorch#187506).
    """
    if mask is None:
        return None
    if not mask.is_floating_point():
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    mask = mask if mask.dtype == dtype else mask.to(wide(dtype))
    return mask if mask.size(-1) == 1 or mask.stride(-1) in (0, 1) else mask.contiguous()


SHORTEST_VECTOR_FREE = 16
"""The kernel compares fewer keys than this one by one, and loses NaN: as wide as the widest vector."""


def _hides_nan(lse: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether a result may be 0 where the formula gives NaN, or lse NaN where it gives infinity.

    The kernel takes a row whose scores are all NaN for a fully masked one (out and lse 0) where a row has few keys,
    and in 16 bits a row with an infinite score. ``lse``: the kernel's, 0 for fully masked rows.
    """
    keys = min(query.size(2), key.size(2)) if is_causal else key.size(2)
    wanted = NOT_FINITE | (ZERO if mask is None and keys < SHORTEST_VECTOR_FREE else 0)
    return bool(contents(lse, wanted) & wanted)


FEW_ELEMENTS = 2**14
"""Of a query: copies of fewer cost more than they save."""

FEW_QUERIES = 512
"""The backward kernel multiplies 16-bit tiles of fewer queries no faster than float32 ones."""

MANY_QUERIES = 1024
"""Of fewer, the forward kernel multiplies float16 faster than the operands are converted."""


def widens(query: Tensor, backward: bool) -> bool:
    """Whether 16-bit operands go through the kernel in float32, a copy, because it is faster so.

    PyTorch's 16-bit products are fast only where the processor has instructions for them: without them its backward
    kernel takes 6 to 9 times as long as in float32, and the forward kernel up to 2 times in float16. Converting takes
    a tenth of what the products take, and more where keys are few.
    """
    dtype = query.dtype
    if dtype.itemsize != 2 or query.numel() < FEW_ELEMENTS:
        return False
    if has_products(dtype):
        return backward and query.size(2) < FEW_QUERIES
    return backward or (dtype == torch.float16 and query.size(2) >= MANY_QUERIES)


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which PyTorch calls for them, has instructions of this processor for 16-bit products."""
    if not torch.backends.mkldnn.is_available():
        return False
    supports = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return bool(supports())


def flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out, lse of torch's kernel for heads of one width; ``mask`` as ``additive`` gives it."""
    if widens(query, backward=False):
        mask = None if mask is None else mask.float()
        out, lse = flash(query.float(), key.float(), value.float(), mask, is_causal, scale)
        return out.to(query.dtype), lse
    results: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return results


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value by torch's kernel."""
    if contents(lse, NOT_FINITE) & NOT_FINITE:
        lse = shift_of(lse)
    tensors: Any = (grad_out, query, key, value, out)
    wide = widens(query, backward=True)
    if wide:
        tensors = tuple(tensor.float() for tensor in tensors)
        mask = None if mask is None else mask.float()
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    if wide:
        grads = tuple(grad.to(query.dtype) for grad in grads)
    first, second, third = grads
    return first, second, third


def forward(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """out and lse; None where the kernel may have lost a NaN."""
    query, key, value, mask, _, _, options, _ = problem
    dim, is_causal = max(query.size(-1), value.size(-1)), options.window_right == 0
    added = additive(mask, query.dtype)
    out, lse = flash(
        _pad_heads(query, dim),
        _expand_heads(_pad_heads(key, dim), query.size(1)),
        _expand_heads(_pad_heads(value, dim), query.size(1)),
        added,
        is_causal,
        options.scale,
    )
    if _hides_nan(lse, query, key, mask, is_causal):
        return None
    if added is not None:
        lse.masked_fill_(added.amax(-1) == -math.inf, -math.inf)
    return in_layout(out[..., : value.size(-1)], rows_first(query)), lse


def backward(grad_out: Tensor, grad_lse: Tensor | None, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    torch's kernel has no gradient of lse. It computes d = rowsum(dO O), and the d of the formula is that minus dl: one
    more padding column, with dl in dO and -1 in O, subtracts it, and V's zero column leaves the rest unchanged.
    """
    query, key, value, out, lse, mask, _, _, options, _ = saved
    key_dim, value_dim, heads, key_heads = query.size(-1), value.size(-1), query.size(1), key.size(1)
    dim = max(key_dim, value_dim + (grad_lse is not None))
    if dim > max(key_dim, value_dim):
        dim += -dim % 8
    grad_query, grad_key, grad_value = flash_backward(
        _pad_heads(grad_out, dim, 0.0 if grad_lse is None else grad_lse.to(grad_out.dtype)),
        _pad_heads(query, dim),
        _expand_heads(_pad_heads(key, dim), heads),
        _expand_heads(_pad_heads(value, dim), heads),
        _pad_heads(out, dim, 0.0 if grad_lse is None else -1.0),
        lse,
        additive(mask, query.dtype),
        options.window_right == 0,
        options.scale,
    )
    if key_heads != heads:
        grad_key = grad_key.unflatten(1, (key_heads, -1)).sum(2)
        grad_value = grad_value.unflatten(1, (key_heads, -1)).sum(2)
    grads = grad_query[..., :key_dim], grad_key[..., :key_dim], grad_value[..., :value_dim]
    return in_layout(grads[0], True), in_layout(grads[1], True), in_layout(grads[2], True)
