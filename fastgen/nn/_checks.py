"""Argument checks shared by layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen.checks import require_floating, require_positive, require_tensor, shape_of


def require_feature_map(x: Tensor, channels: int) -> None:
    require_tensor("x", x)
    require_floating("x", x)
    if x.dim() != 4 or x.size(1) != channels:
        raise ValueError(f"x: expected (B, C, H, W) with C = {channels}, got {shape_of(x)}")


def require_divisible(name: str, count: int, divisor_name: str, divisor: int) -> None:
    require_positive(name, count)
    require_positive(divisor_name, divisor)
    if count % divisor != 0:
        raise ValueError(f"{divisor_name}: expected a divisor of {name} = {count}, got {divisor}")


def require_nonnegative(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")


def require_base(base: float) -> None:
    """The base of the frequencies of sinusoidal and rotary embeddings."""
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not 1 < base < math.inf:
        raise ValueError(f"base: expected a finite number > 1, got {base!r}")


def require_positions(positions: Tensor, batch: int, length: int) -> None:
    require_tensor("positions", positions)
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"positions: expected an integer tensor, got {positions.dtype}")
    if tuple(positions.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"positions: expected (N,) = ({length},) or (B, N) = ({batch}, {length}), got {shape_of(positions)}"
        )
