"""Attention of a few thousand multiply-adds on CPU, without derivatives: one call by ctypes, which costs less than
PyTorch's dispatcher.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import library_for

MOST = 2**12
"""Of batch * heads * queries * keys * head dim: PyTorch's kernel is faster with more."""

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_MASK, _BOOLEAN, _ADDED = range(3)
_MOST_PLANS = 1024


class _Params(ctypes.Structure):
    """SmallParams of csrc/attention/cpu/small.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "batch", "heads", "queries", "keys", "dim", "causal", "mask")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value", "out")),
        ("mask_strides", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
    )


_kernel: Callable[..., int] | None = None
_dropout_kernel: Callable[..., int] | None = None
_limit = 0
_Plan = tuple[_Params, int]
_plans: dict[Any, _Plan | None] = {}
"""The parameters and their address, for each combination of shapes, strides, dtypes and options; None where the kernel
does not serve."""


def use_compiled() -> None:
    """Takes the function of the compiled library, which is loaded after the operators are defined."""
    global _kernel, _dropout_kernel, _limit
    library = library_for("cpu")
    if not library.loaded:
        return
    functions = ctypes.PyDLL(str(library.path))  # keeps the interpreter's lock: releasing it takes as long as the call
    functions.fastgen_small_attention_limit.restype = ctypes.c_int64
    _limit = functions.fastgen_small_attention_limit()
    kernel = functions.fastgen_small_attention
    kernel.restype, kernel.argtypes = ctypes.c_int, [ctypes.c_void_p] * 6
    _kernel = kernel
    kernel = functions.fastgen_small_attention_dropout
    kernel.restype, kernel.argtypes = ctypes.c_int, [*[ctypes.c_void_p] * 7, ctypes.c_double]
    _dropout_kernel = kernel


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    shape: torch.Size,
    of_keys: torch.Size,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | None:
    """out, (B, H, N, D) in the layout of query; None where another implementation has to serve.

    The caller has checked what ``direct.attend`` checks of query, key and value, and that no derivative is wanted.
    ``shape`` and ``of_keys``: those of query, and of key and value. ``seed``: of dropout, or None.
    """
    kernel, dropout_kernel = _kernel, _dropout_kernel
    if kernel is None or dropout_kernel is None or not (key.is_cpu and value.is_cpu):
        return None
    try:
        options: Any = (is_causal, scale)
        if mask is not None:
            if not mask.is_cpu or mask.is_neg():
                return None
            options = (scale, mask.dtype, mask.shape, mask.stride())
        arguments = (
            shape, of_keys, query.dtype, key.dtype, value.dtype, query.stride(), key.stride(), value.stride(), options
        )  # fmt: skip
        if arguments in _plans:
            plan = _plans[arguments]
        else:
            plan = _remember(arguments, _plan(query, key, value, mask, is_causal, scale))
        if plan is None or query.is_neg() or key.is_neg() or value.is_neg():
            return None
        out = torch.empty_like(query)
        pointers = (
            plan[1],
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            None if mask is None else mask.data_ptr(),
            out.data_ptr(),
        )
        refused = kernel(*pointers) if seed is None else dropout_kernel(*pointers, seed.data_ptr(), dropout_p)
    except RuntimeError:  # tensors without strides or memory of their own
        return None
    return None if refused else out


def _remember(arguments: Any, params: _Params | None) -> _Plan | None:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    plan = _plans[arguments] = None if params is None else (params, ctypes.addressof(params))
    return plan


def _plan(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> _Params | None:
    batch, heads, queries, dim = query.shape
    keys = key.size(2)
    if (
        not query.dtype == key.dtype == value.dtype
        or query.dtype not in _DTYPES
        or max(keys, dim) > _limit
        or not query.stride(3) == key.stride(3) == value.stride(3) == 1
    ):
        return None
    params = _Params(_DTYPES[query.dtype], batch, heads, queries, keys, dim, is_causal, _NO_MASK)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", torch.empty_like(query))):
        setattr(params, f"{name}_strides", (ctypes.c_int64 * 3)(*tensor.stride()[:3]))
    params.scale = dim**-0.5 if scale is None else scale
    if mask is not None:
        full = batch, heads, queries, keys
        if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
            return None
        if mask.dtype == torch.bool:
            params.mask = _BOOLEAN
        elif mask.dtype == query.dtype == torch.float32:
            params.mask = _ADDED
        else:
            return None
        steps = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        params.mask_strides = (ctypes.c_int64 * 4)(*steps)
    return params
