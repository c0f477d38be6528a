"""Attention of sequences of different lengths, packed one after the other, and of jagged nested tensors.

Shapes: T tokens of all sequences, S sequences, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen.backend import may_use_tf32, select
from fastgen.functional._attention_arguments import (
    WIDEST_WINDOW,
    attention_arguments,
    checked_sinks,
    window_bounds,
    with_sinks,
)
from fastgen.functional._autocast import autocast_dtype, lower
from fastgen.functional._overrides import handle_torch_function, overridden, relevant
from fastgen.functional._seeds import sample_seed
from fastgen.ops.attention.autograd import attention
from fastgen.ops.attention.problem import Options, Problem, refused_heads


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention within each of several sequences, packed one after the other without padding.

    Sequence s has the queries ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` (not included) and the keys
    ``cu_seqlens_k[s]`` to ``cu_seqlens_k[s + 1]``, and its result is what ``scaled_dot_product_attention`` returns for
    it alone. Tensors and arguments are in the order of ``flash_attn_varlen_func`` and of
    ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: (Tq, H, Dk), the queries of all sequences.
        key: (Tk, Hk, Dk); Hk is H, or divides it when ``enable_gqa``.
        value: (Tk, Hk, Dv). Dv need not be Dk.
        cu_seqlens_q: (S + 1,) int32 or int64, on the tensors' device: where sequences begin. The first one is 0, the
            last one Tq, and they do not decrease. A sequence may be empty.
        cu_seqlens_k: the same for keys, which end at Tk; default ``cu_seqlens_q``.
        max_seqlen_q: the longest sequence. Not needed, and not used: callers of other libraries have it at hand.
        max_seqlen_k: the same for keys.
        dropout_p: probability of dropping an attention weight, in [0, 1]; applied whenever it is above 0.
        is_causal: query i of a sequence attends to its keys j <= i, both counted from the sequence's start, as in
            ``scaled_dot_product_attention`` (FlashAttention counts from the end where the lengths differ).
        scale: factor of the scores, a finite number; default ``1 / sqrt(Dk)``.
        enable_gqa: let several query heads share one key and value head.
        window: (left, right): query i attends to keys i - left <= j <= i + right of its sequence; None is unbounded.
            Bounds may be negative.
        softcap: bound of the scores, as in ``scaled_dot_product_attention``.
        sinks: (H,), a learned logit per head that takes part in the softmax and has no value.
        generator: source of the dropout seed, on the tensors' device.
        return_lse: also return the logsumexp of each row of scores, which is differentiable.

    Returns:
        out (Tq, H, Dv) in query's dtype; with ``return_lse`` also lse (H, Tq), float32 (float64 for float64), in nats.
        A query without a key to attend to gives out 0, lse -inf (or the sink) and gradients 0.

    Raises:
        TypeError: dtypes that do not fit, or tensors that are not dense.
        ValueError: shapes or devices that do not match, a probability out of range, or on CPU ``cu_seqlens_q`` or
            ``cu_seqlens_k`` whose values do not fit. On CUDA their values are not checked, because that would
            synchronize: results for positions that decrease are then undefined, and rows after the last position are
            not written. No memory outside of the tensors is read.
        RuntimeError: the backend ``compiled`` is forced and has no kernel for these tensors; or a derivative is not
            supported.

    Differentiable as ``scaled_dot_product_attention``: twice in reverse mode, once in forward mode, and once in each.
    ``torch.func.vmap`` runs one call for each slice. CUDA kernels do not synchronize. On CUDA without a kernel for
    these tensors, PyTorch computes one sequence after the other, and the positions are copied to the host.

    Example:
        >>> q, k, v = (torch.randn(10, 4, d) for d in (8, 8, 32))
        >>> cu_seqlens = torch.tensor([0, 3, 3, 10])  # three sequences, of 3, 0 and 7 tokens
        >>> varlen_attention(q, k, v, cu_seqlens, is_causal=True).shape
        torch.Size([10, 4, 32])
    """
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, sinks)
    if overridden(*tensors) and (own := relevant(*tensors)):
        return handle_torch_function(  # type: ignore[no-any-return]
            varlen_attention, own, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, window=window,
            softcap=softcap, sinks=sinks, generator=generator, return_lse=return_lse,
        )  # fmt: skip
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected (tokens, heads, head_dim), got {check.shape_of(tensor)}")
    check.require_probability("dropout_p", dropout_p, certain=True)
    check.require_tensor("sinks", sinks, optional=True)
    sequences = _sequences(query, cu_seqlens_q, cu_seqlens_k)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length is not None and (isinstance(length, bool) or not isinstance(length, (int, torch.SymInt))):
            raise TypeError(f"{name}: expected an integer or None, got {type(length).__name__}")
    window_left, window_right = _packed_bounds(*window_bounds(window, is_causal))
    low = autocast_dtype(query)
    query, key, value = (lower(t, low).transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    if dropout_p == 1:  # every weight is dropped: the values become 0, with gradients of 0
        value, dropout_p = value * 0.0, 0.0
    query, key, value, _, _ = attention_arguments(query, key, value, None, enable_gqa)
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else check.require_finite("scale", scale)
    seed = sample_seed(query.device, generator) if dropout_p > 0 else None
    cap = check.require_softcap("softcap", softcap)
    options = Options(dropout_p, window_left, window_right, scale, cap, may_use_tf32(query))
    namespace = select("attention_forward", query, refused_heads(query, value))
    out, lse = attention(Problem(query, key, value, None, seed, sequences, options, namespace))
    if sinks is not None:
        out, lse = with_sinks(out, lse, checked_sinks(sinks, query, out.size(1)))
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def _sequences(query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """(2, S + 1) int32."""
    check.require_tensor("cu_seqlens_k", cu_seqlens_k, optional=True)
    both = (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
    for name, positions in zip(("cu_seqlens_q", "cu_seqlens_k"), both, strict=True):
        check.require_tensor(name, positions)
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {positions.dtype}")
        if positions.dim() != 1 or positions.numel() < 1:
            raise ValueError(f"{name}: expected (sequences + 1,), got {check.shape_of(positions)}")
        check.require_device(name, positions, "query", query)
    if both[0].shape != both[1].shape:
        expected, got = both[0].numel() - 1, both[1].numel() - 1
        raise ValueError(f"cu_seqlens_k: expected as many sequences as in cu_seqlens_q, {expected}, got {got}")
    if both[0] is both[1]:
        return both[0].to(torch.int32).contiguous().expand(2, -1)
    return torch.stack([positions.to(torch.int32) for positions in both])


def _packed_bounds(left: int | None, right: int | None) -> tuple[int, int]:
    """Window bounds of the operators, which take negative ones beside sequences: see ``Options``."""
    if left is not None and right is not None and left + right < 0:  # no query attends to a key
        left, right = None, -WIDEST_WINDOW
    if right is not None and right < 0:
        return -1 if left is None else left, right - 1
    left, right = (-1 if bound is None else bound - (bound < 0) for bound in (left, right))
    return left, right


def nested_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, return_lse: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """``varlen_attention`` of jagged nested tensors (B, H, j, D), as ``torch.nested`` lays them out.

    Raises:
        TypeError: a tensor that is not nested, or not jagged.
        ValueError: another shape, sequences with holes, or a mask.
    """
    if attn_mask is not None:
        raise ValueError("attn_mask: expected None beside nested tensors, whose lengths say what is padding")
    packed, offsets = [], []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_tensor(name, tensor, nested=True)
        if tensor.layout != torch.jagged:
            kind = "nested tensor of another layout" if tensor.is_nested else "dense one"
            raise TypeError(
                f"{name}: expected a jagged nested tensor, as query, key and value are together, got a {kind}"
            )
        nested: Any = tensor
        if nested.dim() != 4 or nested._ragged_idx != 2:
            raise ValueError(f"{name}: expected (batch, heads, jagged length, head_dim), got {check.shape_of(tensor)}")
        if nested.lengths() is not None:
            raise ValueError(f"{name}: expected sequences without holes, got one with lengths; call contiguous() on it")
        packed.append(nested.values().transpose(0, 1))
        offsets.append(nested.offsets())
    if offsets[2] is not offsets[1]:
        raise ValueError("value: expected key's jagged length, got another one, with offsets of its own")
    q, k, v = packed
    out, lse = varlen_attention(q, k, v, offsets[0], offsets[1], return_lse=True, **options)
    jagged = [
        torch.nested.nested_tensor_from_jagged(values, offsets[0], jagged_dim=2)
        for values in (out.transpose(0, 1), lse)
    ]
    return (jagged[0], jagged[1]) if return_lse else jagged[0]
