"""Argument checks. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def require_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{name}: expected a tensor{' or None' if optional else ''}, got {type(value).__name__}")


def require_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def require_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(expected)}, got {shape_of(tensor)}")


def require_alike(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Same dtype and device as the first argument."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {tensor.device}")


def require_broadcast(name: str, tensor: Tensor, target: tuple[int, ...], meaning: str) -> None:
    padded = (1,) * (len(target) - tensor.dim()) + tuple(tensor.shape)
    if len(padded) != len(target) or any(a not in (1, b) for a, b in zip(padded, target, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {meaning} = {target}, got {shape_of(tensor)}")


def require_probability(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")


def require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def require_count(name: str, value: int, least: int, meaning: str = "an integer") -> None:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected {meaning} >= {least}, got {value!r}")


def require_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_not_negative(**values: float) -> None:
    """Numbers >= 0, neither infinite nor NaN."""
    for name, value in values.items():
        if not _is_number(value) or value < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}")


def require_positive_number(**values: float) -> None:
    """Numbers > 0, neither infinite nor NaN."""
    for name, value in values.items():
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
