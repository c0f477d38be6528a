"""The tangent of attention and its gradient in plain PyTorch, one tile of scores at a time: O(N) memory, every feature,
any device. ``fastgen.reference.attention_tangent`` and ``attention_second_order`` state the formulas.

A tile has all keys that its rows attend to: the sums over a row are complete before the products that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import helper
from fastgen.ops.attention.blocked import Tile, allocate_grad, allocate_lse, allocate_out, shift_of, tiles, wide
from fastgen.ops.attention.problem import Saved, Tangents

TILE_BYTES = 2**21
"""Approximate size of one of a tile's four matrices."""


def weigh(
    scores: Tensor,
    direction: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    grads: Tensor | None,
    delta: Tensor | None,
    cross: Tensor | None,
) -> Tensor:
    """Everything between the products of a tile. Returns w, (..., 1), and overwrites, all (..., keys):

    ``scores`` S with Pt keep; ``grads`` dO V^T, if given, with dS; ``cross`` dO Gv^T, if given, with dS2; ``direction``
    W with dS2 where there are grads and no cross, otherwise with P keep. ``lse`` and ``delta`` d are (..., 1).
    """
    weights = scores.sub_(lse).exp_()
    # A logsumexp of half precision scores is not that of these ones, so the weights are made to sum to 1.
    total = weights.sum(-1, keepdim=True)
    weights.div_(total.masked_fill_(total == 0, 1))
    row = (weights * direction).sum(-1, keepdim=True)
    centered = direction.sub_(row)
    dropped = weights.clone() if keep is None else weights * keep
    tangent = dropped * centered
    if grads is not None:
        assert delta is not None
        # r = rowsum(dO O') = rowsum(Pt keep dO V^T + P keep dO Gv^T)
        second_row = (tangent * grads).sum(-1, keepdim=True)
        if keep is not None:
            grads.mul_(keep)
        grads.sub_(delta).mul_(weights)
        if cross is None:
            centered.mul_(grads).addcmul_(weights, second_row, value=-1)
        else:
            second_row += (dropped * cross).sum(-1, keepdim=True)
            if keep is not None:
                cross.mul_(keep)
            cross.sub_(second_row).mul_(weights).addcmul_(centered, grads)
    if grads is None or cross is not None:
        direction.copy_(dropped)
    scores.copy_(tangent)
    return row


def _weigh(saved: Saved) -> Callable[..., Any]:
    """``weigh``, or the compiled helper that computes it in one pass over memory, in float32."""
    if wide(saved.query.dtype) != torch.float32:
        return weigh
    return helper(saved.namespace, "cpu_attention_weights", saved.query.device) or weigh


def _finite_lse(tile: Tile, lse: Tensor) -> Tensor:
    """The rows' logsumexp, as ``shift_of`` gives it."""
    return shift_of(tile.row_vector(lse)).contiguous()


def _direction(tile: Tile, tangents: Tangents, derivative: Tensor | None, curvature: Tensor | None = None) -> Tensor:
    """W = a (Gq K^T + Q Gk^T) + Gb, in one product. With a softcap its derivative multiplies the first term, and the
    result of that is multiplied into ``curvature``."""
    left, right = [], []
    if tangents.query is not None:
        left.append(tile.rows(tangents.query))
        right.append(tile.keys(tile.key))
    if tangents.key is not None:
        left.append(tile.rows(tile.query))
        right.append(tile.keys(tangents.key))
    if left:
        direction = torch.matmul(torch.cat(left, -1) * tile.options.scale, torch.cat(right, -1).transpose(-2, -1))
    else:
        rows, keys = tile.rows(tile.query), tile.keys(tile.key)
        direction = rows.new_zeros(*rows.shape[:-1], keys.size(-2))
    if derivative is not None:
        direction.mul_(derivative)
    if curvature is not None:
        curvature.mul_(direction)
    if tangents.mask is not None:
        tile.add_mask(direction, tangents.mask)
    return direction


def tangent(saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """O' and l'."""
    query, value, lse, weigh = saved.query, saved.value, saved.lse, _weigh(saved)
    tangent_out, tangent_lse = allocate_out(query, value.size(-1)), allocate_lse(query)
    for tile in tiles(saved, TILE_BYTES):
        scores = tile.scores()
        direction = _direction(tile, tangents, tile.derivative())
        row = weigh(scores, direction, _finite_lse(tile, lse), tile.keep(), None, None, None)
        out = torch.matmul(scores, tile.keys(value))
        if tangents.value is not None:
            out += torch.matmul(direction, tile.keys(tangents.value))
        tile.store(tangent_out, out)
        tile.store_row(tangent_lse, row)
    return tangent_out, tangent_lse


def second_order(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, tangents: Tangents, mask_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """O', l' and the gradients of query, key, value and mask."""
    query, key, value, out, lse, mask, _, _, options, _ = saved
    dtype, scale, weigh = wide(query.dtype), options.scale, _weigh(saved)
    tangent_out, tangent_lse = allocate_out(query, value.size(-1)), allocate_lse(query)
    grad_query = allocate_grad(query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    grad_mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if mask is not None and mask_grad else None
    for tile in tiles(saved, TILE_BYTES):
        batch, keys = slice(tile.b0, tile.b1), slice(tile.j0, tile.j1)
        upstream, of_query, of_key = tile.rows(grad_out), tile.rows(query), tile.keys(key)
        delta = (upstream * tile.rows(out)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - tile.row_vector(grad_lse)
        scores, curvature = tile.scores(), tile.curvature()
        derivative = tile.derivative()
        direction = _direction(tile, tangents, derivative, curvature)
        first, second = torch.matmul(upstream, tile.keys(value).transpose(-2, -1)), direction
        cross = None
        if tangents.value is not None:
            second = cross = torch.matmul(upstream, tile.keys(tangents.value).transpose(-2, -1))
        row = weigh(scores, direction, _finite_lse(tile, lse), tile.keep(), first, delta, cross)

        tangent = torch.matmul(scores, tile.keys(value))
        if tangents.value is not None:
            tangent += torch.matmul(direction, tile.keys(tangents.value))
        tile.store(tangent_out, tangent)
        tile.store_row(tangent_lse, row)
        grad_value[batch, :, keys] += torch.matmul(scores.transpose(-2, -1), upstream)
        if grad_mask is not None:
            tile.add_mask_grad(grad_mask, second)
        if derivative is not None and curvature is not None:  # gradients of the scores before the softcap
            second.mul_(derivative).addcmul_(first, curvature)
            first.mul_(derivative)
        part = torch.matmul(second.transpose(-2, -1), of_query)
        if tangents.query is not None:
            part += torch.matmul(first.transpose(-2, -1), tile.rows(tangents.query))
        grad_key[batch, :, keys] += part.mul_(scale)
        part = torch.matmul(second, of_key)
        if tangents.key is not None:
            part += torch.matmul(first, tile.keys(tangents.key))
        tile.store(grad_query, part.mul_(scale))
    grad_mask = None if grad_mask is None or mask is None else grad_mask.to(mask.dtype)
    return tangent_out, tangent_lse, grad_query, grad_key, grad_value, grad_mask
