"""Arguments of attention, checked and brought to the four dims of the operators.

Leading dims broadcast as in torch's function: heads are the third dim from the end, everything before is the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import checks as check

WIDEST_WINDOW = 2**30
"""Wider windows have the same effect: no sequence is longer."""


class Arguments(NamedTuple):
    """query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), mask with each dim full or 1, and ``rows``, the
    shape of the logsumexp in the caller's dims, (..., N)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    rows: tuple[int, ...]


def window_bounds(window: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right), None for unbounded; causal bounds the right at 0."""
    left: int | None = None
    right: int | None = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window: expected a pair (left, right), got {window!r}")
        for side, size in zip(("left", "right"), window, strict=True):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
                raise ValueError(f"window: expected {side} to be an integer, or None for unbounded, got {size!r}")
        left, right = (None if size is None else max(-WIDEST_WINDOW, min(size, WIDEST_WINDOW)) for size in window)
    right = 0 if is_causal and (right is None or right > 0) else right
    return left, right


class Window(NamedTuple):
    """A call whose bounds are 0 or more, -1 for unbounded, without the ``dropped`` first queries, which attend to no
    key."""

    arguments: Arguments
    left: int
    right: int
    dropped: int


def without_negative_bounds(arguments: Arguments, left: int | None, right: int | None) -> Window:
    """The call without the queries and keys that a negative bound masks.

    Below a right bound of -r the first r queries attend to no key, and query r + i to what query i attends to with a
    right bound of 0. Above a left bound of -l no query attends to the first l keys.
    """
    query, key, value, mask, rows = arguments
    if left is not None and right is not None and left + right < 0:  # no query attends to a key
        left, right = None, -WIDEST_WINDOW
    dropped = 0
    if right is not None and right < 0:
        length = query.size(2)
        query = query[:, :, -right:]
        mask = mask if mask is None or mask.size(2) == 1 else mask[:, :, -right:]
        dropped, left, right = length - query.size(2), None if left is None else left + right, 0
    elif left is not None and left < 0:
        key, value = key[:, :, -left:], value[:, :, -left:]
        mask = mask if mask is None or mask.size(3) == 1 else mask[..., -left:]
        left, right = 0, None if right is None else right + left
    left, right = (-1 if bound is None else bound for bound in (left, right))
    return Window(Arguments(query, key, value, mask, rows), left, right, dropped)


def attention_arguments(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> Arguments:
    """The tensors of a call, checked, in four dims.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ.
        ValueError: shapes or devices that do not match.
    """
    plain = _plainly_fit(query, key, value)
    if not plain:
        _check(query, key, value)
    if mask is not None:
        mask = _checked_mask(mask, query, key)
    if plain and (mask is None or _mask_fits(mask, query, key)):
        return Arguments(_rows(query), _rows(key), _rows(value), mask, tuple(query.shape[:3]))
    return _broadcast(query, key, value, mask, enable_gqa)


def _plainly_fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether no further check is needed: the common case, in a few comparisons."""
    q, k, v = query.shape, key.shape, value.shape
    return (
        len(q) == len(k) == len(v) == 4
        and k[:3] == v[:3]
        and q[:2] == k[:2]
        and q[3] == k[3]
        and query.dtype == key.dtype == value.dtype
        and query.dtype in check.FLOATING
        and query.device == key.device == value.device
    )


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_floating(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected (..., length, head_dim), got {check.shape_of(tensor)}")
    check.require_alike("query", query, key=key, value=value)
    if key.size(-1) != query.size(-1):
        raise ValueError(f"key: expected query's head dim {query.size(-1)}, got {check.shape_of(key)}")
    if value.size(-2) != key.size(-2):
        raise ValueError(f"value: expected key's length {key.size(-2)}, got {check.shape_of(value)}")


def _mask_fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    return mask.dim() == 4 and all(
        m in (1, n) for m, n in zip(mask.shape, (*query.shape[:3], key.size(2)), strict=True)
    )


def _checked_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """In four dims or more, boolean or floating, its last two dims full or 1."""
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"attn_mask: expected a boolean (True = attend) or floating tensor, got {mask.dtype}")
        check.require_floating("attn_mask", mask)
    if mask.device != query.device:
        raise ValueError(f"attn_mask: expected the device of query, {query.device}, got {mask.device}")
    full = (query.size(-2), key.size(-2))
    own = (1,) * (2 - mask.dim()) + tuple(mask.shape[-2:])
    if any(m not in (1, n) for m, n in zip(own, full, strict=True)):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to (..., query length, key length) = (..., {full[0]},"
            f" {full[1]}), got {check.shape_of(mask)}"
        )
    if mask.dtype == torch.float64 and query.dtype != torch.float64:
        # Scores are float32. A finite mask stays finite: a row of finfo(float64).min is not a row of -inf.
        largest = torch.finfo(torch.float32).max
        mask = torch.where(mask.isinf(), mask, mask.clamp(-largest, largest)).float()
    return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask


def _broadcast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> Arguments:
    dims = max(query.dim(), key.dim(), value.dim())
    named = {"query": query, "key": key, "value": value}
    of_mask: tuple[int, ...] = ()
    if mask is not None:
        of_mask = tuple(mask.shape[:-2])
        while len(of_mask) > dims - 2 and of_mask[0] == 1:
            of_mask = of_mask[1:]
        dims = max(dims, len(of_mask) + 2)
    leading = {name: (1,) * (dims - t.dim()) + tuple(t.shape[:-2]) for name, t in named.items()}
    leading["attn_mask"] = (1,) * (dims - 2 - len(of_mask)) + of_mask
    if dims == 3 and not enable_gqa:
        # The only leading dim is the batch: operators work on few heads at a time.
        leading = {name: (*shape, 1) for name, shape in leading.items()}
    elif dims == 2:
        leading = dict.fromkeys(leading, (1,))
    grouped = _grouped_heads(leading, enable_gqa)
    heads = {"query", "attn_mask"} | (set() if grouped else {"key", "value"})
    full = _broadcast_shapes({n: s if n in heads else (*s[:-1], 1) for n, s in leading.items()}, enable_gqa)
    batch, total = math.prod(full[:-1]), full[-1]

    def four(name: str, tensor: Tensor) -> Tensor:
        own = leading[name][:-1]
        count = leading[name][-1]
        target = max(leading["key"][-1], leading["value"][-1]) if grouped and name in ("key", "value") else total
        tail = tuple(tensor.shape[-2:])
        if math.prod(own) == 1:  # shared by the batch: a view, for any number of batch dims
            return tensor.reshape(1, count, *tail).expand(batch, target, *tail)
        return tensor.reshape(*own, count, *tail).expand(*full[:-1], target, *tail).flatten(0, -4)

    q, k, v = (_rows(four(name, tensor)) for name, tensor in named.items())
    if mask is not None:
        own, count = leading["attn_mask"][:-1], leading["attn_mask"][-1]
        tail = tuple(mask.shape[-2:])
        if math.prod(own) == 1:
            mask = mask.reshape(1, count, *tail)
        else:
            mask = mask.reshape(*own, count, *tail).expand(*full[:-1], count, *tail).flatten(0, -4)
    rows = (*(full if dims > 3 or (dims == 3 and enable_gqa) else full[: dims - 2]), query.size(-2))
    return Arguments(q, k, v, mask, rows)


def _grouped_heads(leading: dict[str, tuple[int, ...]], enable_gqa: bool) -> bool:
    """Whether several query heads share one key and value head."""
    heads, key_heads, value_heads = (leading[name][-1] for name in ("query", "key", "value"))
    if not enable_gqa:
        return False
    for name, count in (("key", key_heads), ("value", value_heads)):
        if count != heads and (count == 0 or heads % count != 0):
            raise ValueError(f"{name}: expected a number of heads that divides query's {heads}, got {count}")
    if key_heads != value_heads and 1 not in (key_heads, value_heads):
        raise ValueError(f"value: expected key's number of heads, {key_heads}, got {value_heads}")
    return max(key_heads, value_heads) != heads


def _broadcast_shapes(leading: dict[str, tuple[int, ...]], enable_gqa: bool) -> tuple[int, ...]:
    full = leading["query"]
    for name, shape in leading.items():
        if any(a != b and 1 not in (a, b) for a, b in zip(full, shape, strict=True)):
            hint = "" if enable_gqa or name == "attn_mask" else " (grouped heads need enable_gqa=True)"
            raise ValueError(f"{name}: expected leading dims that broadcast with {full}, got {shape}{hint}")
        full = tuple(b if a == 1 else a for a, b in zip(full, shape, strict=True))
    return full


def _rows(tensor: Tensor) -> Tensor:
    """With the contiguous last dim that operators require."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def causal_bias(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> int:
    """The right bound of the window that a ``torch.nn.attention.bias.CausalBias`` is, without reading its memory.

    Raises:
        ValueError: ``is_causal`` is set too, or its lengths differ from those of query and key.
    """
    if is_causal:
        raise ValueError("is_causal: expected False beside an attn_mask of type CausalBias, got True")
    lengths, own = (query.size(-2), key.size(-2)), (bias.seq_len_q, bias.seq_len_kv)
    if own != lengths:
        raise ValueError(f"attn_mask: expected a CausalBias of the lengths of query and key, {lengths}, got {own}")
    return 0 if bias.variant.name == "UPPER_LEFT" else int(own[1] - own[0])


def checked_sinks(sinks: Tensor, query: Tensor, heads: int) -> Tensor:
    """A logit per head, (H, 1).

    Raises:
        TypeError: it is not floating.
        ValueError: another shape or device.
    """
    check.require_floating("sinks", sinks)
    if sinks.device != query.device:
        raise ValueError(f"sinks: expected the device of query, {query.device}, got {sinks.device}")
    if sinks.dim() > 1 or sinks.numel() not in (1, heads):
        raise ValueError(f"sinks: expected (heads,) = ({heads},), got {check.shape_of(sinks)}")
    return sinks.reshape(-1, 1)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N) with one more logit in each row's softmax, which has no value."""
    sinks = sinks.to(lse.dtype)
    share = torch.sigmoid(lse - sinks).unsqueeze(-1)
    masked = lse == -math.inf
    total = torch.where(masked, sinks, torch.logaddexp(lse.masked_fill(masked, 0), sinks))
    return (out * share).to(out.dtype), total
