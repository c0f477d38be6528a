"""Checks of the raw operators' arguments before any memory is read: dims, dtypes, devices, memory, options.

PyTorch's kernels do not check all of it (``_scaled_dot_product_flash_attention_for_cpu`` reads as many key heads as the
query has), and compiled kernels trust shapes and strides. The ``checks`` module of a family has a function for each
operator, with its arguments. A dtype raises ``TypeError``, anything else ``ValueError``, with the argument's name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.checks import shape_of

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
STRIDED = torch.strided


def require_operand(name: str, tensor: Tensor, dtype: torch.dtype | None, like: Tensor) -> None:
    """In memory, on the device of ``like``, of this dtype; None: of one of ``FLOATS``."""
    if tensor is None or like is None:  # the dispatcher lets None through for a tensor
        raise TypeError(f"{name}: expected a tensor, got None")
    if tensor.layout is not STRIDED or tensor.is_nested:
        raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    if tensor.dtype != dtype and not (dtype is None and tensor.dtype in FLOATS):
        expected = "float16, bfloat16, float32 or float64" if dtype is None else dtype
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")
    if tensor.data_ptr() == 0 and tensor.numel() > 0:
        raise ValueError(f"{name}: expected a tensor with memory, got one whose storage was resized to nothing")


def require_sizes(
    name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str, dtype: torch.dtype | None, like: Tensor
) -> None:
    """``require_operand``, and a shape."""
    require_operand(name, tensor, dtype, like)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {meaning} = {shape}, got {shape_of(tensor)}")


def require_dims(name: str, tensor: Tensor, dims: str, dtype: torch.dtype | None, like: Tensor) -> None:
    """``dims`` such as "(B, N, C)"."""
    require_operand(name, tensor, dtype, like)
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name}: expected {dims}, got {shape_of(tensor)}")


def require_rows(name: str, tensor: Tensor) -> None:
    """Requires a contiguous last dim, along which kernels read."""
    if tensor.stride(-1) != 1 and tensor.size(-1) > 1 and tensor.numel() > 0:
        raise ValueError(f"{name}: expected a contiguous last dim, got strides {tensor.stride()}")


def require_seed(seed: Tensor, batch: int, like: Tensor) -> None:
    require_operand("seed", seed, torch.int64, like)
    if seed.dim() != 1 or not seed.is_contiguous():
        raise ValueError(f"seed: expected one dim, contiguous, got {shape_of(seed)} with strides {seed.stride()}")
    if seed.numel() == 0 or batch % seed.numel() != 0:
        raise ValueError(f"seed: expected a number of seeds that divides the batch, {batch}, got {seed.numel()}")


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    spans = []
    for tensor in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        first = tensor.data_ptr()
        spans.append((first, first + (last + 1) * tensor.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def require_apart(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Requires that tensors that are written share no memory with each other or with the others."""
    done: list[tuple[str, Tensor]] = []
    for name, tensor in written.items():
        if tensor is None:
            continue
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name}: expected memory for each element, got strides {tensor.stride()}")
        others = [*done, *((other, t) for other, t in read.items() if t is not None)]
        for other, candidate in others:
            if _shares_memory(tensor, candidate):
                raise ValueError(f"{other}: expected memory of its own, got some that {name} is written to")
        done.append((name, tensor))
