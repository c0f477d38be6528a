"""Packed sequences: where they lie among the rows of query and key, and runs of equal lengths as a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen.ops.attention.problem import Options, Problem, Saved


class Span(NamedTuple):
    """Queries q0:q1 and keys k0:k1 of a sequence, or of ``joined`` successive ones of the same lengths."""

    q0: int
    q1: int
    k0: int
    k1: int
    joined: int = 1

    def queries(self, tensor: Tensor) -> Tensor:
        """(1, H, N, ...) -> a view (joined, H, n, ...)."""
        return _rows(tensor, self.q0, self.q1, self.joined)

    def keys(self, tensor: Tensor) -> Tensor:
        """(1, Hk, M, ...) -> a view (joined, Hk, m, ...)."""
        return _rows(tensor, self.k0, self.k1, self.joined)


def _rows(tensor: Tensor, begin: int, end: int, count: int) -> Tensor:
    view: Tensor = tensor[0, :, begin:end].unflatten(1, (count, (end - begin) // count)).transpose(0, 1)
    return view


def spans(call: Problem | Saved) -> list[Span]:
    """One for each sequence; one over all rows without packed sequences. Reads the positions, which waits for a GPU.

    Raises:
        ValueError: positions that do not begin at 0, decrease, or do not end at the number of rows.
    """
    lengths = call.query.size(2), call.key.size(2)
    if call.sequences is None:
        return [Span(0, lengths[0], 0, lengths[1])]
    positions = call.sequences.tolist()
    for name, own, length in zip(("cu_seqlens_q", "cu_seqlens_k"), positions, lengths, strict=True):
        if own[0] != 0 or own[-1] != length:
            raise ValueError(f"{name}: expected positions from 0 to {length}, got {own[0]} to {own[-1]}")
        for begin, end in pairwise(own):
            if begin > end:
                raise ValueError(f"{name}: expected positions that do not decrease, got {begin} before {end}")
    queries, keys = positions
    return [Span(*q, *k) for q, k in zip(pairwise(queries), pairwise(keys), strict=True)]


def runs(call: Problem | Saved) -> list[Span]:
    """``spans``, with successive sequences of equal lengths joined."""
    found: list[Span] = []
    for span in spans(call):
        if found:
            q0, q1, k0, k1, count = found[-1]
            if (span.q1 - span.q0) * count == q1 - q0 and (span.k1 - span.k0) * count == k1 - k0:
                found[-1] = Span(q0, span.q1, k0, span.k1, count + 1)
                continue
        found.append(span)
    return found


class Order(NamedTuple):
    """An order of the rows in which sequences of equal lengths are successive: indices, and the new positions."""

    queries: Tensor
    keys: Tensor
    sequences: Tensor

    def of_queries(self, tensor: Tensor) -> Tensor:
        """(1, H, N, ...), in this order."""
        return _ordered(tensor, self.queries)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """(1, Hk, M, ...), in this order."""
        return _ordered(tensor, self.keys)

    def restore(self, result: Tensor, ordered: Tensor, of_keys: bool) -> None:
        """Copies rows in this order to their places in ``result``."""
        index = self.keys if of_keys else self.queries
        result[0].transpose(0, 1).index_copy_(0, index, ordered[0].transpose(0, 1))


def _ordered(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of (1, H, N, ...), copied to memory (N, H, ...)."""
    return tensor[0].transpose(0, 1).index_select(0, index).transpose(0, 1)[None]


def order(call: Problem | Saved) -> Order | None:
    """None where it would save less than half of the calls."""
    found = spans(call)
    by_lengths: dict[tuple[int, int], list[int]] = {}
    for i, span in enumerate(found):
        by_lengths.setdefault((span.q1 - span.q0, span.k1 - span.k0), []).append(i)
    if not found or 2 * len(by_lengths) > len(runs(call)) or call.sequences is None:
        return None
    chosen = torch.tensor([i for group in by_lengths.values() for i in group])
    begins = call.sequences.long().cpu()
    lengths = begins.diff()[:, chosen]
    new = pad(lengths.cumsum(1), (1, 0))
    rows = [
        torch.arange(int(own[-1])) + (old[chosen] - own[:-1]).repeat_interleave(count)
        for old, own, count in zip(begins, new, lengths, strict=True)
    ]
    device = call.query.device
    return Order(rows[0].to(device), rows[1].to(device), new.to(device, torch.int32))


class Bounds(NamedTuple):
    """Query i attends to keys i + shift - left <= j <= i + shift + right; -1 is unbounded."""

    left: int
    right: int
    shift: int


def bounds(options: Options) -> Bounds:
    """The window, whose bounds may be negative beside packed sequences."""
    left, right = options.window_left, options.window_right
    if right < -1:
        shift = right + 1
        return Bounds(left if left == -1 else left + shift, 0, shift)
    if left < -1:
        shift = -(left + 1)
        return Bounds(0, right if right == -1 else right - shift, shift)
    return Bounds(left, right, 0)


def may_split(call: Problem | Saved) -> bool:
    """Whether each sequence is a call of its own: not with dropout, whose random bits depend on the rows of the whole,
    nor with a negative bound."""
    return call.seed is None and min(call.options.window_left, call.options.window_right) >= -1
