"""Argument checks. Every message has the form "name: expected ..., got ..."."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_data(tensor: Tensor) -> bool:
    """Whether values can be read: not of meta tensors, nor of fake ones, with which a model is traced."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def require_tensor(name: str, value: Any, *, optional: bool = False, nested: bool = False) -> None:
    """Requires a dense tensor whose memory holds its values; with ``nested`` also a nested tensor."""
    if not isinstance(value, Tensor):
        if optional and value is None:
            return
        raise TypeError(f"{name}: expected a tensor{' or None' if optional else ''}, got {type(value).__name__}")
    if nested and value.is_nested:
        return
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a {kind} one")


FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require_floating(name: str, tensor: Tensor) -> None:
    """Requires one of the ``FLOATING`` dtypes."""
    if tensor.dtype in FLOATING:
        return
    expected = "a floating-point tensor" if not tensor.is_floating_point() else "float32, float64, bfloat16 or float16"
    raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def require_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(expected)}, got {shape_of(tensor)}")


def require_alike(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Requires the dtype and device of the first argument."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
        require_device(name, tensor, first_name, first)


def require_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {tensor.device}")


def require_broadcast(name: str, tensor: Tensor, target: tuple[int, ...], meaning: str) -> None:
    padded = (1,) * (len(target) - tensor.dim()) + tuple(tensor.shape)
    if len(padded) != len(target) or any(a not in (1, b) for a, b in zip(padded, target, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {meaning} = {target}, got {shape_of(tensor)}")


def require_probability(name: str, value: float, *, certain: bool = False) -> None:
    """Requires a number in [0, 1), or in [0, 1] with ``certain``."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, got a tensor of shape {shape_of(value)}")
    if not 0.0 <= value <= 1.0 or (value == 1 and not certain):
        raise ValueError(f"{name}: expected a probability in [0, 1{']' if certain else ')'}, got {value}")


def require_finite(name: str, value: Any) -> float:
    """A finite number, as a float. A tensor is refused: its gradient would be lost."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a number, got a tensor of shape {shape_of(value)}, whose gradient would be lost;"
            " multiply query by it instead"
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


SOFTCAP = 1e-30, 1e30
"""Bounds of attention's softcap, within which float32 computes ``softcap * tanh(x / softcap)`` accurately."""


def require_softcap(name: str, value: Any) -> float:
    """A bound of attention's scores as a float, 0 for None: a positive number, within ``SOFTCAP``."""
    if value is None:
        return 0.0
    if isinstance(value, (bool, str, Tensor)):
        raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}") from None
    if not SOFTCAP[0] <= number <= SOFTCAP[1]:
        raise ValueError(f"{name}: expected a positive number from 1e-30 to 1e30, got {number}")
    return number


def require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def require_count(name: str, value: int, least: int, meaning: str = "an integer") -> None:
    """Requires an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected {meaning} >= {least}, got {value!r}")


def require_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_not_negative(**values: float) -> None:
    """Requires numbers >= 0, neither infinite nor NaN."""
    for name, value in values.items():
        if not _is_number(value) or value < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}")


def require_positive_number(**values: float) -> None:
    """Requires numbers > 0, neither infinite nor NaN."""
    for name, value in values.items():
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def require_flag(name: str, value: Any) -> None:
    """Requires True or False, 1 or 0: a string such as "no" would be truthy."""
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def require_eps(name: str, value: Any) -> float:
    """The eps of a norm, as a float: a number >= 0. A tensor is refused: its gradient would be lost."""
    if isinstance(value, (bool, str, Tensor)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}")
    return number
