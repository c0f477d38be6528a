"""Random numbers as functions of a seed and a position: Philox4x32-10, uniforms and standard normals in PyTorch.

Every backend produces the same bits of the uniforms; normals agree to a few units in the last place. The counter of an
element is its logical position, so that results do not depend on tiles, threads, devices or the split of a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE_STREAM = 0
DROPOUT_STREAM = 1
GROUP = 4
"""Elements that share one Philox counter. Every row starts on a group boundary."""

CHUNK = 2**16
"""Counters worked on at a time: the hundred or so int64 temporaries of Philox then stay in cache."""

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, index: Tensor, stream: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    ``seed`` is the 64-bit key, ``index`` and ``stream`` the low and high halves of the 128-bit
    counter; all int64, broadcast together. Returns four int64 tensors of values in [0, 2^32).
    """
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1 = index & _MASK32, (index >> 32) & _MASK32
    if isinstance(stream, int):  # filled on the device: a copy from the host would wait
        stream = torch.full((), stream, dtype=torch.int64, device=index.device)
    c2, c3 = stream & _MASK32, (stream >> 32) & _MASK32
    for _ in range(10):
        product0 = c0 * _PHILOX_MULTIPLIERS[0]  # wraps modulo 2^64: the bits are those of uint64
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0 = (key0 + _PHILOX_INCREMENTS[0]) & _MASK32
        key1 = (key1 + _PHILOX_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def to_uniform(bits: Tensor) -> Tensor:
    """u = (x + 0.5) 2^-32 in float32, in (0, 1]. The bits of u are the same on every backend."""
    return bits.to(torch.float32) * 2.0**-32 + 2.0**-33


def box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniforms (Box and Muller, 1958), in float32.

    The angle 2 pi u1 is reduced exactly, in half turns, before sine and cosine are taken, so that
    all backends agree to a few units in the last place also where the result is near zero.
    """
    radius = torch.sqrt(-2.0 * torch.log(u0))
    half_turns = 2.0 * u1
    quadrant = torch.round(2.0 * half_turns)
    rest = math.pi * (half_turns - 0.5 * quadrant)
    sine, cosine = torch.sin(rest), torch.cos(rest)
    quadrant = quadrant.to(torch.int32) & 3
    odd, flip_cos, flip_sin = (quadrant & 1) == 1, (quadrant == 1) | (quadrant == 2), quadrant >= 2
    cos_all, sin_all = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return (
        radius * torch.where(flip_cos, -cos_all, cos_all),
        radius * torch.where(flip_sin, -sin_all, sin_all),
    )


def groups_per_row(cols: int) -> int:
    return (cols + GROUP - 1) // GROUP


def _group_index(seed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Keys and counters of a (rows, cols) matrix: both broadcast to (S, rows / S * groups_per_row)."""
    groups = rows // max(seed.numel(), 1) * groups_per_row(cols)
    return seed.reshape(-1, 1), torch.arange(groups, dtype=torch.int64, device=seed.device).reshape(1, -1)


def standard_normal(seed: Tensor, rows: int, cols: int) -> Tensor:
    """Noise of shape (rows, cols), float32, a function of seed and position alone.

    ``seed`` is int64 of shape (S,); S divides ``rows``, and each seed serves rows / S successive rows
    whose positions count from zero (this is what a batched transform such as ``vmap`` needs).
    """
    key, index = _group_index(seed, rows, cols)
    parts = []
    for part in index.split(CHUNK, dim=1):
        x0, x1, x2, x3 = philox(key, part, NOISE_STREAM)
        n0, n1 = box_muller(to_uniform(x0), to_uniform(x1))
        n2, n3 = box_muller(to_uniform(x2), to_uniform(x3))
        parts.append(torch.stack((n0, n1, n2, n3), dim=-1))
    noise = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return noise.reshape(rows, groups_per_row(cols) * GROUP)[:, :cols]


def uniform_rows(
    seed: Tensor, rows: Tensor, rows_per_seed: int, row_groups: int, first_group: int, groups: int
) -> Tensor:
    """Uniforms of the dropout stream for the named rows: (len(rows), 4 * groups), float32.

    A row holds ``row_groups`` groups in all; those from ``first_group`` on are made.
    """
    key = seed[torch.div(rows, rows_per_seed, rounding_mode="floor")].reshape(-1, 1)
    columns = torch.arange(first_group, first_group + groups, dtype=torch.int64, device=seed.device)
    index = (rows % rows_per_seed).reshape(-1, 1) * row_groups + columns
    bits = torch.stack(philox(key, index, DROPOUT_STREAM), dim=-1)
    return to_uniform(bits).reshape(rows.numel(), groups * GROUP)
