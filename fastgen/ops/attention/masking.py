"""Which keys a query attends to: window bounds, and keys that every query masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def window_mask(rows: Tensor, cols: Tensor, left: int, right: int) -> Tensor | None:
    """(rows, cols), True where i - left <= j <= i + right; a bound of -1 is absent. None without bounds."""
    if left < 0 and right < 0:
        return None
    offset = cols.unsqueeze(0) - rows.unsqueeze(1)
    allowed = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (offset >= -left)
    if right >= 0:
        allowed = allowed & (offset <= right)
    return allowed


ROWS = 256
"""Queries whose masks are read at a time."""


def zero_masked_keys(
    query: Tensor, mask: Tensor | None, window_left: int, window_right: int, *of_keys: Tensor | None
) -> tuple[Any, ...]:
    """``of_keys``, such as key and value, (B, Hk, M, *), with zeros for keys that every query masks.

    Padding may hold anything, NaN too, and a weight of zero times NaN is NaN. The first of ``of_keys`` is not None.
    """
    key = of_keys[0]
    assert key is not None
    queries, keys, device = query.size(-2), key.size(-2), query.device
    if mask is None and (window_right < 0 or keys <= queries + window_right):
        return of_keys
    cols = torch.arange(keys, device=device)
    used = torch.zeros((1, 1, keys), dtype=torch.bool, device=device)
    for first in range(0, queries, ROWS):
        rows = torch.arange(first, min(first + ROWS, queries), device=device)
        allowed = window_mask(rows, cols, window_left, window_right)
        part = torch.ones((rows.numel(), keys), dtype=torch.bool, device=device) if allowed is None else allowed
        if mask is not None:
            of_rows = mask if mask.size(-2) == 1 else mask[..., first : first + ROWS, :]
            part = part & (of_rows if mask.dtype == torch.bool else of_rows != -math.inf)
        used = used | (part.any(-2) if part.dim() > 2 else part.any(-2)[None, None])
    if used.size(1) > key.size(1):
        used = used.unflatten(1, (key.size(1), -1)).any(2)
    unused = ~used.unsqueeze(-1)
    return tuple(t if t is None else t.masked_fill(unused, 0) for t in of_keys)
