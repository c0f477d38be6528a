"""Random sizes, layouts and contents, from one seed; tensors at the edge of memory that may not be touched."""

from __future__ import annotations

import ctypes
import math
import mmap
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PAGE = mmap.PAGESIZE
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    *FLOATS,
)
SIZES = (0, 1, 1, 2, 3, 4, 5, 8, 16, 17, 33)
LENGTHS = (0, 1, 2, 3, 5, 8, 17, 33, 97, 130)
NUMBERS = (-(2**63), -(2**31), -5, -2, -1, 0, 1, 2, 3, 7, 100, 2**45, 2**62, 2**63 - 1)
"""None that memory could be allocated for, and would be slow."""

REALS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 0.5, 0.999999, 1.0, 2.0, 1e30)
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(count: int, dtype: torch.dtype, at_end: bool = True) -> Tensor:
    """``count`` elements between two pages whose first touch ends the process: up against the second, or the first."""
    size = count * dtype.itemsize
    if size == 0:
        return torch.empty(0, dtype=dtype)
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(dtype)


class Draw:
    """What one call is made of."""

    def __init__(self, seed: int, guard: bool = True) -> None:
        """``guard``: most tensors end where memory ends; otherwise all are PyTorch's own."""
        self.random, self.guard = random.Random(seed), guard
        torch.manual_seed(seed)
        self.plain = True  # contents are normal numbers
        self.may_free = False  # storage of arguments: PyTorch's own operators read it all the same

    def one(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def maybe(self, value: T, probability: float = 0.5) -> T | None:
        return value if self.chance(probability) else None

    def dtype(self) -> torch.dtype:
        return torch.float32 if self.chance(0.6) else self.one(FLOATS)

    def _fill(self, flat: Tensor) -> None:
        if flat.dtype == torch.bool:
            flat.copy_(torch.rand(flat.shape) < 0.6)
        elif not flat.is_floating_point() and not flat.is_complex():
            flat.copy_(torch.randint(0, 100, flat.shape))
        else:
            values = torch.randn(flat.shape)
            kind = "plain" if self.chance(0.85) else self.one(("zeros", "huge", "tiny", "nan", "inf"))
            self.plain &= kind in ("plain", "zeros")
            if kind in ("zeros", "huge", "tiny"):
                values *= {"zeros": 0.0, "huge": 3e4, "tiny": 1e-38}[kind]
            elif kind in ("nan", "inf") and flat.numel():
                values[torch.rand(flat.shape) < 0.1] = math.nan if kind == "nan" else math.inf
            flat.copy_(values)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, rows: bool = False, own: bool = False) -> Tensor:
        """Any layout; ``rows``: with a contiguous last dim; ``own``: no two elements share memory."""
        dtype = self.dtype() if dtype is None else dtype
        dims = list(range(len(shape)))
        order = dims[:]
        if self.chance(0.35):
            order = dims[:-1] if rows else dims[:]
            self.random.shuffle(order)
            order += dims[-1:] if rows else []
        strides = [1] * len(shape)
        step = 1 if rows or self.chance(0.9) else self.random.randint(2, 3)
        for dim in reversed(order):
            strides[dim] = step if shape[dim] != 1 or self.chance(0.7) else self.random.randint(0, 50)
            step = step * max(shape[dim], 1) + (self.random.randint(1, 9) if self.chance(0.25) else 0)
        if rows and shape and shape[-1] != 1:
            strides[-1] = 1
        if not own and self.chance(0.12) and len(shape) > int(rows):
            strides[self.random.randrange(len(shape) - int(rows))] = 0
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        offset = self.one((0, 0, 0, 1, 3, 8)) if extent else 0
        at_end, guarded_too = self.chance(0.8), self.chance(0.7) and self.guard
        size = offset + extent
        flat = guarded(size, dtype, at_end) if guarded_too else torch.empty(size, dtype=dtype)
        self._fill(flat)
        return flat.as_strided(shape, strides, offset)

    def seeds(self, batch: int) -> Tensor:
        """(S,), S dividing the batch."""
        count = self.one([n for n in range(1, 5) if batch % n == 0])
        return torch.randint(-(2**62), 2**62, (count,))


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            return f"<{value.layout} {value.dtype}>"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"<{dtype} {tuple(value.shape)} strides {value.stride()} offset {value.storage_offset()} {value.device}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}={describe(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(describe(item) for item in value) + "]"
    return repr(value)


def _spoilt_tensor(draw: Draw, tensor: Tensor, others: list[Tensor]) -> Any:
    kind = draw.one(
        (
            "size",
            "size",
            "size",
            "drop",
            "add",
            "dtype",
            "expand",
            "mT",
            "meta",
            "sparse",
            "freed",
            "other",
            "none",
            "huge",
        )
    )
    shape = list(tensor.shape)
    if tensor.numel() > 2**22 or tensor.layout != torch.strided or (tensor.data_ptr() == 0 and tensor.numel() > 0):
        return tensor  # spoilt before
    if kind == "size" and shape:
        dim = draw.random.randrange(len(shape))
        shape[dim] = max(0, draw.one((shape[dim] + 1, shape[dim] - 1, 0, 1, 2 * shape[dim])))
        return draw.tensor(*shape, dtype=tensor.dtype, rows=draw.chance(0.7))
    if kind == "drop" and shape:
        return tensor.select(draw.random.randrange(len(shape)), 0) if 0 not in shape else tensor.flatten()
    if kind == "add":
        return tensor.unsqueeze(draw.random.randint(0, len(shape)))
    if kind == "dtype":
        return draw.tensor(*shape, dtype=draw.one(OTHERS), rows=True)
    if kind == "expand" and 0 not in shape and shape:
        return draw.tensor(*(1 for _ in shape), dtype=tensor.dtype).expand(shape)
    if kind == "mT" and len(shape) >= 2:
        return tensor.mT if tensor.numel() > 2**20 or draw.chance(0.5) else tensor.mT.contiguous().mT
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse" and tensor.dtype in (torch.float32, torch.float64) and 0 not in tensor.stride():
        return tensor.to_sparse()
    if kind == "freed" and draw.may_free:
        freed = torch.empty(shape, dtype=tensor.dtype)
        freed.untyped_storage().resize_(0)
        return freed
    if kind == "other" and others:
        return draw.one(others)
    if kind == "huge" and shape and 0 not in shape:
        one = draw.tensor(*(1 for _ in shape), dtype=tensor.dtype)
        shape[draw.random.randrange(len(shape))] = draw.one((2**45, 2**50))
        return one.expand(shape) if math.prod(shape) < 2**62 else one
    return draw.one((None, tensor, "text", 3))


def spoilt(draw: Draw, value: Any, others: list[Tensor]) -> Any:
    """Something that may no longer fit."""
    if isinstance(value, Tensor):
        try:
            return _spoilt_tensor(draw, value, others)
        except RuntimeError:  # PyTorch refuses to make it
            return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.one((*NUMBERS, value + 1, value - 1))
    if isinstance(value, float):
        return draw.one(REALS)
    if isinstance(value, (list, tuple)):
        items = list(value)
        if items and draw.chance(0.6):
            at = draw.random.randrange(len(items))
            items[at] = spoilt(draw, items[at], others)
        elif items and draw.chance(0.5):
            items.pop()
        else:
            items += [draw.one(items)] * draw.one((1, 1, 5)) if items else []
        return items if isinstance(value, list) else tuple(items)
    if value is None and others and draw.chance(0.6):
        return draw.one(others)
    return value
