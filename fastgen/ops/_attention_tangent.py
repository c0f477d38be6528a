"""The tangent of attention and its gradient in plain PyTorch, one tile of scores at a time: O(N) memory, every feature,
any device. The formulas are those of ``reference.attention_tangent`` and ``reference.attention_second_order``.

A tile has all the keys that its rows see, so that the sums over a row are known before the products that want them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.ops._attention_blocked import (
    Options,
    Tile,
    allocate_grad,
    allocate_lse,
    allocate_out,
    tiles,
    wide,
)


class Tangents(NamedTuple):
    """The directions of query, key, value and mask; None is zero."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None


class Weights(NamedTuple):
    """A tile of weights and their derivatives, all (b, Hk, G * rows, keys), and w (b, Hk, G * rows, 1)."""

    tangent: Tensor  # P (W - w), with dropout
    dropped: Tensor | None  # P with dropout, where it was wanted
    lse: Tensor  # w
    first: Tensor | None  # dS, where gradients were given
    second: Tensor | None  # dS2, likewise


Combine = Callable[
    [Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None", bool], Weights
]


def combine(
    scores: Tensor,
    direction: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    grads: Tensor | None,
    delta: Tensor | None,
    cross: Tensor | None,
    want_dropped: bool,
) -> Weights:
    """Everything between the products of a tile; the tiles are overwritten.

    ``scores`` S, ``direction`` W, ``grads`` dO V^T and ``cross`` dO Gv^T are (b, Hk, R, keys), ``lse`` and ``delta`` d
    (b, Hk, R, 1).
    """
    weights = scores.sub_(lse).exp_()
    row = (weights * direction).sum(-1, keepdim=True)
    centred = direction.sub_(row)
    tangent = weights * centred
    if keep is not None:
        tangent.mul_(keep)
    dropped = None
    if want_dropped:
        dropped = weights if keep is None else weights * keep
    if grads is None or delta is None:
        return Weights(tangent, dropped, row, None, None)
    # r = rowsum(dO O') = rowsum((Pt keep) dO V^T + (P keep) dO Gv^T)
    second_row = (tangent * grads).sum(-1, keepdim=True)
    if keep is not None:
        grads.mul_(keep)
    first = grads.sub_(delta).mul_(weights)
    if cross is None:
        return Weights(tangent, dropped, row, first, centred.mul_(first).addcmul_(weights, second_row, value=-1))
    if keep is not None:
        cross.mul_(keep)
    second_row += (weights * cross).sum(-1, keepdim=True)
    second = cross.sub_(second_row).mul_(weights).addcmul_(centred, first)
    return Weights(tangent, dropped, row, first, second)


def _seen_lse(tile: Tile, lse: Tensor) -> Tensor:
    """The rows' logsumexp; 0 where they see nothing, so that their weights are 0 and not NaN."""
    of_rows = tile.row_vector(lse)
    return of_rows.masked_fill(of_rows == float("-inf"), 0)


def _direction(tile: Tile, tangents: Tangents) -> Tensor:
    """W = a (Gq K^T + Q Gk^T) + Gb, in one product."""
    left, right = [], []
    if tangents.query is not None:
        left.append(tile.rows(tangents.query)), right.append(tile.keys(tile.key))
    if tangents.key is not None:
        left.append(tile.rows(tile.query)), right.append(tile.keys(tangents.key))
    if left:
        direction = torch.matmul(torch.cat(left, -1) * tile.options.scale, torch.cat(right, -1).transpose(-2, -1))
    else:
        rows, keys = tile.rows(tile.query), tile.keys(tile.key)
        direction = rows.new_zeros(*rows.shape[:-1], keys.size(-2))
    if tangents.mask is not None:
        tile.add_mask(direction, tangents.mask)
    return direction


def tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    tangents: Tangents,
    options: Options,
    combine: Combine = combine,
) -> tuple[Tensor, Tensor]:
    tangent_out, tangent_lse = allocate_out(query, value.size(-1)), allocate_lse(query)
    for tile in tiles(query, key, mask, seed, options):
        weights = combine(
            tile.scores(), _direction(tile, tangents), _seen_lse(tile, lse), tile.keep(), None, None, None,
            tangents.value is not None,
        )  # fmt: skip
        tile.store(tangent_out, _out(tile, weights, value, tangents))
        tile.store_row(tangent_lse, weights.lse)
    return tangent_out, tangent_lse


def _out(tile: Tile, weights: Weights, value: Tensor, tangents: Tangents) -> Tensor:
    """O' = (Pt keep) V + (P keep) Gv."""
    out = torch.matmul(weights.tangent, tile.keys(value))
    if tangents.value is not None and weights.dropped is not None:
        out += torch.matmul(weights.dropped, tile.keys(tangents.value))
    return out


def second_order(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    tangents: Tangents,
    options: Options,
    mask_grad: bool,
    combine: Combine = combine,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    dtype, scale = wide(query.dtype), options.scale
    tangent_out, tangent_lse = allocate_out(query, value.size(-1)), allocate_lse(query)
    grad_query = allocate_grad(query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    grad_mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if mask is not None and mask_grad else None
    for tile in tiles(query, key, mask, seed, options):
        batch, keys = slice(tile.b0, tile.b1), slice(tile.j0, tile.j1)
        upstream = tile.rows(grad_out)
        delta = (upstream * tile.rows(out)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - tile.row_vector(grad_lse)
        cross = None
        if tangents.value is not None:
            cross = torch.matmul(upstream, tile.keys(tangents.value).transpose(-2, -1))
        weights = combine(
            tile.scores(),
            _direction(tile, tangents),
            _seen_lse(tile, lse),
            tile.keep(),
            torch.matmul(upstream, tile.keys(value).transpose(-2, -1)),
            delta,
            cross,
            tangents.value is not None,
        )
        first, second = weights.first, weights.second
        assert first is not None
        assert second is not None
        tile.store(tangent_out, _out(tile, weights, value, tangents))
        tile.store_row(tangent_lse, weights.lse)
        grad_value[batch, :, keys] += torch.matmul(weights.tangent.transpose(-2, -1), upstream)
        part = torch.matmul(second.transpose(-2, -1), tile.rows(query))
        if tangents.query is not None:
            part += torch.matmul(first.transpose(-2, -1), tile.rows(tangents.query))
        grad_key[batch, :, keys] += part.mul_(scale)
        part = torch.matmul(second, tile.keys(key))
        if tangents.key is not None:
            part += torch.matmul(first, tile.keys(tangents.key))
        tile.store(grad_query, part.mul_(scale))
        if grad_mask is not None:
            tile.add_mask_grad(grad_mask, second)
    grad_mask = None if grad_mask is None or mask is None else grad_mask.to(mask.dtype)
    return tangent_out, tangent_lse, grad_query, grad_key, grad_value, grad_mask
