"""Autocast of the arguments of fastgen's functions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None where it is disabled, and for meta tensors."""
    device = tensor.device.type
    if device == "meta":  # has no autocast; torch raises
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager that disables autocast on the device, if it is enabled. Meta tensors have none; torch raises for
    them."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def lower(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Autocast of an argument of a matrix product: float64 and integers stay."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
