"""Whether results hold zeros or NaN, for small ones at a fifth of the cost of PyTorch's reductions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.backend import library_for

ZERO, NAN, NOT_FINITE, LARGE = 1, 2, 4, 8
"""Bits of ``contents``: an element is 0, is NaN, is infinite or NaN, is one of these or so large that products of two
such numbers, added up, may overflow."""

_LARGE = {torch.float32: 2.0**60, torch.bfloat16: 2.0**60, torch.float64: 2.0**500}
"""The smallest numbers that are large; none of float16 is, whose products are computed in float32."""

_FEW = 2**16
"""Elements, up to which a call keeps the interpreter's lock: releasing it takes as long as a small call."""


_scans: dict[torch.dtype, Callable[[int, int], int]] = {}
_long_scans: dict[torch.dtype, Callable[[int, int], int]] = {}


def use_compiled() -> None:
    """Takes the functions of the compiled library, which is loaded after the operators are defined."""
    library = library_for("cpu")
    if not library.loaded:
        return
    for scans, functions in (
        (_scans, ctypes.PyDLL(str(library.path))),  # keeps the lock
        (_long_scans, ctypes.CDLL(str(library.path))),
    ):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            scan = functions[f"fastgen_scan_{str(dtype).removeprefix('torch.')}"]
            scan.restype, scan.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]
            scans[dtype] = scan


def contents(tensor: Tensor, wanted: int) -> int:
    """Those bits of ``wanted`` that hold for a floating CPU tensor, (B, H, N, D) or (B, H, N); maybe others too."""
    count = tensor.numel()
    if _scans and type(tensor) is Tensor and (tensor.is_contiguous() or _is_dense(tensor)):
        pointer = tensor.data_ptr()
        if pointer:  # 0 without elements, and for tensors of zeros without memory
            return (_scans if count <= _FEW else _long_scans)[tensor.dtype](pointer, count)
    tensor, found = tensor.detach(), 0
    if wanted & ZERO and tensor.count_nonzero().item() < count:
        found = ZERO
    if wanted & (NAN | NOT_FINITE | LARGE) and count > 0:
        smallest, largest = (extreme.item() for extreme in tensor.aminmax())  # NaN if there is one
        if smallest - smallest != 0.0 or largest - largest != 0.0:
            found |= NOT_FINITE | LARGE
            if largest != largest:
                found |= NAN
        elif max(-smallest, largest) >= _LARGE.get(tensor.dtype, float("inf")):
            found |= LARGE
    return found


def may_overflow(key: Tensor, value: Tensor) -> bool:
    """Whether a key that every query masks, or its value, may turn gradients into NaN: a weight of 0 times infinity."""
    return bool((contents(key, LARGE) | contents(value, LARGE)) & LARGE)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, rows before heads, as PyTorch's kernels return them."""
    _, heads, rows, *dim = tensor.shape
    width = dim[0] if dim else 1
    return tensor.stride() == (heads * rows * width, width, heads * width, 1)[: tensor.dim()]
