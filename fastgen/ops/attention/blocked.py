"""Attention in plain PyTorch, one tile of scores at a time: O(N) memory, every feature, any device.

Arithmetic is float32 (float64 for float64), whatever the data are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen import random
from fastgen.backend import helper
from fastgen.ops.attention.masking import window_mask
from fastgen.ops.attention.problem import Problem, Saved
from fastgen.ops.attention.sequences import Span, bounds, spans

TILE_BYTES = 4 * 2**20
"""Approximate size of one tile of scores, so that it stays in cache. Four or five live at a time."""


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_first(like: Tensor) -> bool:
    """Whether (B, H, N, D) lies in memory as (B, N, H, D)."""
    return like.size(1) > 1 and like.stride(1) < like.stride(2)


def allocate(like: Tensor, dim: int, in_rows: bool) -> Tensor:
    """(B, H, N, dim), in memory (B, N, H, dim) with ``in_rows``: merging the heads is then a view.

    Strided from the start: an output that is itself a view may not carry a forward-mode tangent.
    """
    shape = (*like.shape[:3], dim)
    return like.new_empty_strided(shape, strides(shape, in_rows))


def strides(shape: tuple[int, int, int, int], in_rows: bool) -> tuple[int, int, int, int]:
    _, heads, length, dim = shape
    tail = (dim, heads * dim, 1) if in_rows else (length * dim, dim, 1)
    return (heads * length * dim, *tail)


def allocate_out(query: Tensor, dim: int) -> Tensor:
    """The output, in the layout of the query."""
    return allocate(query, dim, rows_first(query))


def allocate_grad(like: Tensor) -> Tensor:
    """A gradient: in rows on CPU, as torch's fused kernel makes it, elsewhere in the layout of its tensor."""
    return allocate(like, like.size(-1), like.device.type == "cpu" or rows_first(like))


def allocate_lse(query: Tensor) -> Tensor:
    """(B, H, N); on CPU in memory (B, N, H), as torch's fused kernel makes it."""
    _, heads, length, _ = query.shape
    tail = (1, heads) if query.device.type == "cpu" else (length, 1)
    return query.new_empty_strided(query.shape[:3], (heads * length, *tail), dtype=wide(query.dtype))


class Tile:
    """Batches ``b0:b1``, query rows ``i0:i1`` of one sequence and the key range ``j0:j1`` within their window.

    Grouped heads are folded into the rows: scores are (b, Hk, G * rows, keys).
    """

    def __init__(self, problem: Problem | Saved, ranges: tuple[int, int, int, int], sequence: Span) -> None:
        self.b0, self.b1, self.i0, self.i1 = ranges
        self.query, self.key, self.mask, self.seed = problem.query, problem.key, problem.mask, problem.seed
        self.options, self.namespace = problem.options, problem.namespace
        self.left, self.right, shift = bounds(self.options)
        self.first_key, keys = sequence.k0, sequence.k1 - sequence.k0
        self.row = self.i0 - sequence.q0 + shift  # position of the first row among the keys of its sequence
        first = min(max(0, self.row - self.left), keys) if self.left >= 0 else 0
        end = min(keys, self.row + self.i1 - self.i0 + self.right) if self.right >= 0 else keys
        self.j0, self.j1 = self.first_key + first, self.first_key + max(first, end)
        self.groups = self.query.size(1) // self.key.size(1)
        self.capped: Tensor | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """(B, H, N, D) -> (b, Hk, G * rows, D), in the arithmetic type."""
        part = tensor[self.b0 : self.b1, :, self.i0 : self.i1].to(wide(tensor.dtype))
        folded: Tensor = part.unflatten(1, (-1, self.groups)).flatten(2, 3)
        return folded

    def keys(self, tensor: Tensor) -> Tensor:
        """(B, Hk, M, D) -> (b, Hk, keys, D), in the arithmetic type."""
        return tensor[self.b0 : self.b1, :, self.j0 : self.j1].to(wide(tensor.dtype))

    def row_vector(self, tensor: Tensor) -> Tensor:
        """(B, H, N) -> (b, Hk, G * rows, 1)."""
        return self.rows(tensor.unsqueeze(-1))

    def per_head(self, scores: Tensor) -> Tensor:
        """(b, Hk, G * rows, keys) -> a view (b, Hk, G, rows, keys)."""
        by_head: Tensor = scores.unflatten(2, (self.groups, self.i1 - self.i0))
        return by_head

    def mask_part(self, mask: Tensor) -> Tensor:
        """The mask's (1|b, 1|H, 1|rows, 1|keys) part for this tile, a view."""
        spans = ((self.b0, self.b1), (0, mask.size(1)), (self.i0, self.i1), (self.j0, self.j1))
        slices = tuple(slice(None) if n == 1 else slice(*s) for n, s in zip(mask.shape, spans, strict=True))
        return mask[slices]

    def add_mask(self, scores: Tensor, mask: Tensor) -> None:
        """Adds the mask's part; a boolean one puts -inf where it is False."""
        part, by_head = self.mask_part(mask), self.per_head(scores)
        part = part.unflatten(1, (-1, self.groups)) if part.size(1) > 1 else part.unsqueeze(1)
        by_head.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else by_head.add_(part)

    def add_mask_grad(self, grad_mask: Tensor, grad_scores: Tensor) -> None:
        """Adds the gradient of the scores to that of the mask, summed where the mask is broadcast."""
        target = self.mask_part(grad_mask)
        target += self.per_head(grad_scores).flatten(1, 2).sum_to_size(target.shape)

    def store(self, result: Tensor, part: Tensor) -> None:
        """Writes (b, Hk, G * rows, D) to its place in (B, H, N, D)."""
        target = result[self.b0 : self.b1, :, self.i0 : self.i1]
        target.copy_(part.unflatten(2, (self.groups, -1)).flatten(1, 2))

    def store_row(self, result: Tensor, part: Tensor) -> None:
        """Writes (b, Hk, G * rows, 1) to its place in (B, H, N)."""
        self.store(result.unsqueeze(-1), part)

    def scores(self) -> Tensor:
        """(b, Hk, G * rows, keys), masked. With a softcap, ``capped`` keeps their tanh for its derivatives."""
        scores = torch.matmul(self.rows(self.query) * self.options.scale, self.keys(self.key).transpose(-2, -1))
        if self.options.softcap != 0.0:
            self.capped = scores.div_(self.options.softcap).tanh_()
            scores = self.capped * self.options.softcap
        by_head = self.per_head(scores)
        if self.mask is not None:
            self.add_mask(scores, self.mask)
        device = scores.device
        rows = torch.arange(self.row, self.row + self.i1 - self.i0, device=device)
        cols = torch.arange(self.j0 - self.first_key, self.j1 - self.first_key, device=device)
        allowed = window_mask(rows, cols, self.left, self.right)
        if allowed is not None:
            by_head.masked_fill_(~allowed, -math.inf)
        return scores

    def derivative(self) -> Tensor | None:
        """The softcap's derivative, 1 - tanh^2, which overwrites ``capped``; None without a softcap."""
        return None if self.capped is None else self.capped.square_().neg_().add_(1)

    def curvature(self) -> Tensor | None:
        """The second derivative over the first, -2 tanh / softcap; None without a softcap."""
        return None if self.capped is None else self.capped * (-2 / self.options.softcap)

    def keep(self) -> Tensor | None:
        """The dropout mask over its probability, (b, Hk, G * rows, keys). The compiled helper gives the same bits."""
        if self.seed is None:
            return None
        batch, heads, length, _ = self.query.shape
        function = helper(self.namespace, "cpu_dropout_keep", self.seed.device) or keep_of_tile
        rows_per_seed = max(batch // self.seed.numel(), 1) * heads * length
        queries = self.i0, self.i1 - self.i0
        keys = self.key.size(2), self.j0 - self.first_key, self.j1 - self.first_key
        sizes = (rows_per_seed, self.b0, self.b1 - self.b0, heads, length, *queries, *keys)
        keep: Tensor = function(self.seed, *sizes, self.options.dropout_p)
        shape = (self.b1 - self.b0, self.key.size(1), self.groups * (self.i1 - self.i0), self.j1 - self.j0)
        if self.query.dtype == torch.float64:  # the factor too
            keep = keep.sign().double().div_(1 - self.options.dropout_p)
        return keep.reshape(shape)


def keep_of_tile(
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
) -> Tensor:
    """Dropout's factors for a range of the batch, of the queries and of the keys, over all heads, in float32."""
    device = seed.device
    b = torch.arange(first_batch, first_batch + batches, device=device).reshape(-1, 1, 1)
    h = torch.arange(heads, device=device).reshape(1, -1, 1)
    i = torch.arange(first_query, first_query + queries, device=device)
    rows = ((b * heads + h) * length + i).flatten()
    first, last = first_key // random.GROUP, random.groups_per_row(last_key)
    groups = random.groups_per_row(keys)
    uniform = random.uniform_rows(seed, rows, rows_per_seed, groups, first, last - first)
    start = first_key - first * random.GROUP
    keep = (uniform[:, start : start + last_key - first_key] >= p).to(torch.float32)
    return keep.div_(1 - p).reshape(batches, heads, queries, last_key - first_key)


def keep_fake(seed: Tensor, *sizes: Any) -> Tensor:
    _, _, batches, heads, _, _, queries, _, first_key, last_key, _ = sizes
    return seed.new_empty(batches, heads, queries, last_key - first_key, dtype=torch.float32)


def tiles(problem: Problem | Saved, tile_bytes: int) -> Iterator[Tile]:
    query = problem.query
    batch, heads, _, _ = query.shape
    if heads == 0:
        return
    for sequence in spans(problem):
        length, keys = sequence.q1 - sequence.q0, sequence.k1 - sequence.k0
        row_bytes = max(1, heads * keys * (8 if query.dtype == torch.float64 else 4))
        batches = max(1, min(batch, tile_bytes // (row_bytes * min(length, 64) or 1)))
        rows = max(1, min(length, max(16, tile_bytes // (row_bytes * batches))))
        for b0 in range(0, batch, batches):
            for i0 in range(sequence.q0, sequence.q1, rows):
                yield Tile(problem, (b0, min(b0 + batches, batch), i0, min(i0 + rows, sequence.q1)), sequence)


def _float32_helper(problem: Problem | Saved, name: str) -> Callable[..., Any] | None:
    """The compiled helper, which computes in float32."""
    return helper(problem.namespace, name, problem.query.device) if wide(problem.query.dtype) == torch.float32 else None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    query, value = problem.query, problem.value
    out, lse = allocate_out(query, value.size(-1)), allocate_lse(query)
    softmax = _float32_helper(problem, "cpu_attention_softmax") or softmax_of_tile
    for tile in tiles(problem, TILE_BYTES):
        weights = tile.scores()
        row_lse = weights.new_empty(weights.shape[:-1])
        softmax(weights, tile.keep(), row_lse)
        tile.store(out, torch.matmul(weights, tile.keys(value)))
        tile.store_row(lse, row_lse.unsqueeze(-1))
    return out, lse


def softmax_of_tile(scores: Tensor, keep: Tensor | None, lse: Tensor) -> None:
    """Scores (..., keys) become weights, times dropout's factors; their logsumexp goes to lse (...).

    A row of -inf gives weights of 0 and a logsumexp of -inf, never NaN.
    """
    if scores.size(-1) == 0:
        lse.fill_(-math.inf)
        return
    top = scores.amax(-1, keepdim=True)
    infinite = top == math.inf  # not where there is NaN beside it
    top.masked_fill_(top == -math.inf, 0)
    scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)
    empty = total == 0
    total.masked_fill_(empty, 1)
    scores.div_(total)
    if keep is not None:
        scores.mul_(keep)
    lse.copy_(top.add_(total.log_()).masked_fill_(empty, -math.inf).masked_fill_(infinite, math.inf).reshape(lse.shape))


def shift_of(lse: Tensor) -> Tensor:
    """What e^(S - shift) needs in place of lse: 0 for fully masked rows, whose weights are then 0 and not NaN, and NaN
    for rows with an infinite score, whose weights are NaN by the formula."""
    return lse.masked_fill(lse == -math.inf, 0).masked_fill_(lse == math.inf, math.nan)


COARSE_LSE = 256.0


def lse_is_coarse(lse: Tensor, mask: Tensor | None) -> bool:
    """Whether e^(S - lse) may be far from a weight: a float mask moved all scores of a row far from 0, and float32 has
    too few digits there for their logsumexp. A row masked by -1e9 is an example."""
    if mask is None or not mask.is_floating_point() or lse.device.type != "cpu" or lse.numel() == 0:
        return False
    return bool(lse.masked_fill(lse == -math.inf, 0).abs_().amax() > COARSE_LSE)


def _recentered(scores: Tensor) -> Tensor:
    """Moves the largest score of each row to 0, and returns the logsumexp of what they are now, (..., 1)."""
    if scores.size(-1) == 0:
        return scores.new_full((*scores.shape[:-1], 1), -math.inf)
    top = scores.amax(-1, keepdim=True)
    return scores.sub_(top.masked_fill_(top == -math.inf, 0)).logsumexp(-1, keepdim=True)


def softmax_backward_of_tile(scores: Tensor, grads: Tensor, keep: Tensor | None, lse: Tensor, delta: Tensor) -> None:
    """Scores become weights, times dropout's factors; grads, those of the weights, become those of the scores.

    lse and delta (..., 1): the logsumexp, and rowsum(dO * O) - dlse.
    """
    weights = scores.sub_(shift_of(lse)).exp_()
    if keep is not None:
        grads.mul_(keep)
    grads.sub_(delta).mul_(weights)
    if keep is not None:
        weights.mul_(keep)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, mask_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value, out, lse, mask, _, _, options, _ = saved
    softmax_backward = _float32_helper(saved, "cpu_attention_softmax_backward") or softmax_backward_of_tile
    dtype = wide(query.dtype)
    grad_query = allocate_grad(query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    grad_mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if mask is not None and mask_grad else None
    coarse = lse_is_coarse(lse, mask)
    for tile in tiles(saved, TILE_BYTES):
        batch, keys = slice(tile.b0, tile.b1), slice(tile.j0, tile.j1)
        upstream, weights = tile.rows(grad_out), tile.scores()
        grad_scores = torch.matmul(upstream, tile.keys(value).transpose(-2, -1))
        row = (upstream * tile.rows(out)).sum(-1, keepdim=True)
        if grad_lse is not None:
            row = row - tile.row_vector(grad_lse)
        tile_lse = _recentered(weights) if coarse else tile.row_vector(lse).contiguous()
        softmax_backward(weights, grad_scores, tile.keep(), tile_lse, row.contiguous())
        grad_value[batch, :, keys] += torch.matmul(weights.transpose(-2, -1), upstream)
        if grad_mask is not None:
            tile.add_mask_grad(grad_mask, grad_scores)
        derivative = tile.derivative()
        if derivative is not None:
            grad_scores.mul_(derivative)
        grad_key[batch, :, keys] += torch.matmul(grad_scores.transpose(-2, -1), tile.rows(query)) * options.scale
        tile.store(grad_query, torch.matmul(grad_scores, tile.keys(key)) * options.scale)
    grad_mask = None if grad_mask is None or mask is None else grad_mask.to(mask.dtype)
    return grad_query, grad_key, grad_value, grad_mask
