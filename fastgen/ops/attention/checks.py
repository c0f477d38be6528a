"""Argument checks of the operators of attention, and of their helpers; see ``fastgen.ops._checks``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.checks import SOFTCAP, require_probability, shape_of
from fastgen.ops._checks import (
    FLOATS,
    STRIDED,
    require_apart,
    require_operand,
    require_rows,
    require_seed,
    require_sizes,
)


def _plainly_fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether nothing is left to check: the common case, in a few comparisons."""
    if query is None or key is None or value is None:
        return False
    q, k, v, dtype, device = query.shape, key.shape, value.shape, query.dtype, query.device
    return (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and q[1] == k[1] == v[1]
        and k[2] == v[2]
        and q[3] == k[3]
        and dtype in FLOATS
        and dtype == key.dtype == value.dtype
        and query.layout is key.layout is value.layout is STRIDED
        and device == key.device == value.device
        and (query.is_contiguous() or query.stride()[3] == 1)
        and (key.is_contiguous() or key.stride()[3] == 1)
        and (value.is_contiguous() or value.stride()[3] == 1)
        and query.data_ptr() != 0
        and key.data_ptr() != 0
        and value.data_ptr() != 0
    )


def _require_problem(query: Tensor, key: Tensor, value: Tensor) -> None:
    if _plainly_fit(query, key, value):
        return
    require_operand("query", query, None, query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_operand(name, tensor, query.dtype, query)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected four dims (batch, heads, length, head dim), got {shape_of(tensor)}")
        require_rows(name, tensor)
    batch, heads, _, dim = query.shape
    key_heads, length = key.size(1), key.size(2)
    if key_heads != heads and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"key: expected a number of heads that divides query's {heads}, got {key_heads}")
    require_sizes("key", key, (batch, key_heads, length, dim), "(B, Hk, M, Dk)", query.dtype, query)
    require_sizes("value", value, (batch, key_heads, length, value.size(3)), "(B, Hk, M, Dv)", query.dtype, query)


def _require_mask(name: str, mask: Tensor, query: Tensor, key: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected a boolean or floating tensor, got {mask.dtype}")
    require_operand(name, mask, mask.dtype, query)
    full = (*query.shape[:3], key.size(2))
    if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        raise ValueError(f"{name}: expected (B, H, N, M) = {full}, each of them full or 1, got {shape_of(mask)}")


def _require_sequences(sequences: Tensor, query: Tensor, mask: Tensor | None) -> None:
    """Shape and dtype; ``sequences.spans`` checks the values, where it reads them."""
    require_operand("sequences", sequences, torch.int32, query)
    if sequences.dim() != 2 or sequences.size(0) != 2 or sequences.size(1) < 1:
        raise ValueError(f"sequences: expected (2, sequences + 1), got {shape_of(sequences)}")
    if query.size(0) != 1:
        raise ValueError(f"query: expected a batch of 1 beside sequences, got {shape_of(query)}")
    if mask is not None:
        raise ValueError("mask: expected None beside sequences, got a tensor")


def _require_options(
    query: Tensor, seed: Tensor | None, dropout_p: float, window_left: int, window_right: int, softcap: float
) -> None:
    if seed is not None:
        require_seed(seed, query.size(0), query)
    elif dropout_p > 0.0:
        raise ValueError(f"seed: expected one, because dropout_p is {dropout_p}")
    require_probability("dropout_p", dropout_p)
    if window_left < -1 or window_right < -1:
        name = "window_left" if window_left < -1 else "window_right"
        raise ValueError(f"{name}: expected >= 0, or -1 for unbounded, got {min(window_left, window_right)}")
    if softcap != 0.0 and not SOFTCAP[0] <= softcap <= SOFTCAP[1]:
        raise ValueError(f"softcap: expected 0, or a number from 1e-30 to 1e30, got {softcap}")


def _require_results(query: Tensor, value: Tensor, lse: Tensor, grad_lse: Tensor | None, **like_out: Tensor) -> None:
    """The output and its gradient, like the query but of the value's head dim; the logsumexp and its gradient."""
    shape, dtype = (*query.shape[:3], value.size(3)), query.dtype
    for name, tensor in like_out.items():
        require_sizes(name, tensor, shape, "(B, H, N, Dv)", dtype, query)
        require_rows(name, tensor)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    require_sizes("lse", lse, shape[:3], "(B, H, N)", wide, query)
    if grad_lse is not None:
        require_sizes("grad_lse", grad_lse, shape[:3], "(B, H, N)", None, query)


def _require_tangents(query: Tensor, key: Tensor, value: Tensor, tangents: tuple[Tensor | None, ...]) -> None:
    for name, primal, tangent in zip(("query", "key", "value"), (query, key, value), tangents, strict=False):
        if tangent is not None:
            require_sizes(f"tangent_{name}", tangent, tuple(primal.shape), f"of {name}", primal.dtype, query)
            require_rows(f"tangent_{name}", tangent)
    tangent = tangents[3]
    if tangent is not None:
        _require_mask("tangent_mask", tangent, query, key)
        if tangent.dtype == torch.bool:
            raise TypeError(f"tangent_mask: expected a floating tensor, got {tangent.dtype}")


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sequences: Tensor | None,
    dropout_p: float,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    *rest: Any,
) -> None:
    plain = (
        mask is seed is sequences is None and dropout_p == softcap == 0.0 and window_left >= -1 and window_right >= -1
    )
    if plain and _plainly_fit(query, key, value):
        return
    _require_problem(query, key, value)
    if mask is not None:
        _require_mask("mask", mask, query, key)
    if sequences is not None:
        _require_sequences(sequences, query, mask)
        window_left, window_right = max(window_left, -1), max(window_right, -1)
    _require_options(query, seed, dropout_p, window_left, window_right, softcap)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> None:
    attention_forward(query, key, value, *rest)
    _require_results(query, value, lse, grad_lse, grad_out=grad_out, out=out)
    mask, mask_grad = rest[0], rest[-1]
    if mask_grad and mask is not None and mask.dtype == torch.bool:
        raise TypeError("mask_grad: expected False for a boolean mask, which has no gradient")


def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sequences: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    *options: Any,
) -> None:
    attention_forward(query, key, value, mask, seed, sequences, *options)
    _require_results(query, value, lse, None, out=out)
    _require_tangents(query, key, value, (tangent_query, tangent_key, tangent_value, tangent_mask))


def attention_forward_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sequences: Tensor | None,
    *rest: Any,
) -> None:
    attention_forward(query, key, value, mask, seed, sequences, *rest[4:])
    _require_tangents(query, key, value, rest[:4])


def attention_second_order(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sequences: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    *options: Any,
) -> None:
    attention_backward(grad_out, grad_lse, query, key, value, out, lse, mask, seed, sequences, *options)
    _require_tangents(query, key, value, (tangent_query, tangent_key, tangent_value, tangent_mask))


def cpu_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Tensor | None, *options: Any
) -> None:
    attention_forward(query, key, value, mask, seed, None, *options, 0.0)


def cpu_attention_backward(
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
) -> None:
    *numbers, mask_grad = options
    attention_backward(grad_out, grad_lse, query, key, value, out, lse, mask, seed, None, *numbers, 0.0, mask_grad)


def cpu_attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    *options: Any,
) -> None:
    attention_forward(query, key, value, mask, seed, None, *options, 0.0)
    _require_results(query, value, lse, None, out=out)
    _require_tangents(query, key, value, (tangent_query, tangent_key, tangent_value, tangent_mask))


def cpu_attention_second_order(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    *options: Any,
) -> None:
    attention_backward(grad_out, grad_lse, query, key, value, out, lse, mask, seed, None, *options, 0.0, False)
    _require_tangents(query, key, value, (tangent_query, tangent_key, tangent_value, tangent_mask))


# --------------------------------------------------------------------------------------------------
# A tile of scores


def _require_tile(
    scores: Tensor, others: dict[str, Tensor | None], rows: dict[str, Tensor | None], optional: set[str]
) -> None:
    """``others`` of the scores' shape; ``rows`` with an element for each of the scores' rows."""
    require_operand("scores", scores, None, scores)
    for name, tensor in (*others.items(), *rows.items()):
        if tensor is None and name not in optional:
            raise TypeError(f"{name}: expected a tensor, got None")
    if scores.dim() == 0:
        raise ValueError("scores: expected at least one dim, got ()")
    for name, tensor in others.items():
        if tensor is not None:
            require_sizes(name, tensor, tuple(scores.shape), "of scores", scores.dtype, scores)
    count = scores.shape[:-1].numel()
    for name, tensor in rows.items():
        if tensor is not None:
            require_operand(name, tensor, scores.dtype, scores)
            if tensor.numel() != count:
                raise ValueError(f"{name}: expected an element for each of the {count} rows, got {shape_of(tensor)}")


def cpu_attention_weights(
    scores: Tensor,
    direction: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    grads: Tensor | None,
    delta: Tensor | None,
    cross: Tensor | None,
) -> None:
    if (grads is None) != (delta is None) or (grads is None and cross is not None):
        raise ValueError("grads: expected together with delta, and wherever cross is")
    others: dict[str, Tensor | None] = {"direction": direction, "grads": grads, "cross": cross}
    optional = {"grads", "cross", "keep", "delta"}
    _require_tile(scores, others | {"keep": keep}, {"lse": lse, "delta": delta}, optional)
    require_apart({"scores": scores, **others}, {"keep": keep, "lse": lse, "delta": delta})


def cpu_attention_softmax(scores: Tensor, keep: Tensor | None, lse: Tensor) -> None:
    _require_tile(scores, {"keep": keep}, {"lse": lse}, {"keep"})
    require_apart({"scores": scores, "lse": lse}, {"keep": keep})


def cpu_attention_softmax_backward(
    scores: Tensor, grads: Tensor, keep: Tensor | None, lse: Tensor, delta: Tensor
) -> None:
    _require_tile(scores, {"grads": grads, "keep": keep}, {"lse": lse, "delta": delta}, {"keep"})
    require_apart({"scores": scores, "grads": grads}, {"keep": keep, "lse": lse, "delta": delta})


def _require_range(name: str, first: int, count: int, size: int) -> None:
    if first < 0 or count < 0 or first + count > size:
        raise ValueError(f"{name}: expected ranges within the problem, 0 to {size}, got {count} from {first} on")


def cpu_dropout_keep(
    seed: Tensor,
    rows_per_seed: int,
    first_batch: int,
    batches: int,
    heads: int,
    length: int,
    first_query: int,
    queries: int,
    keys: int,
    first_key: int,
    last_key: int,
    p: float,
) -> None:
    require_seed(seed, 0, seed)
    require_probability("p", p)
    for name, size, least in (("rows_per_seed", rows_per_seed, 1), ("heads", heads, 0), ("length", length, 0)):
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    most = seed.numel() * rows_per_seed
    if most * (keys // 4 + 1) >= 2**63:
        raise ValueError(f"keys: expected sizes whose product has 63 bits, got {keys} keys of {most} rows")
    _require_range("first_batch, batches", first_batch, batches, most)
    _require_range("first_query, queries", first_query, queries, length)
    _require_range("first_key, last_key", first_key, last_key - first_key, keys)
    if (first_batch + batches) * heads * length > most:
        raise ValueError(f"batches: expected ranges within the problem, the {most} rows of all seeds")
