"""Launch plans of the CUDA kernels. The CPU library computes them: they require neither a GPU nor CUDA."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any

from fastgen.backend import libraries

_INT, _INT64, _BOOL, _SIZES = ctypes.c_int, ctypes.c_int64, ctypes.c_bool, ctypes.POINTER(ctypes.c_int)

_ARGUMENTS: dict[str, list[Any]] = {
    "latent_plan": [_INT64, _INT64, _INT, _INT],
    "attention_tiles": [_BOOL],
    "attention_plan": [*[_INT64] * 5, *[_INT] * 5, _BOOL, _SIZES],
    "projection_plan": [_INT] * 7,
}


# Bytes of shared memory that a block may have, by architecture.
SHARED_LIMITS = {
    **dict.fromkeys(("sm_80", "sm_87"), 163 * 1024),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99 * 1024),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), 227 * 1024),
}


def why_not() -> str | None:
    """Why there are no launch plans; None where there are."""
    library = libraries.library_for("cpu")
    return library.problem if library.handle is None else None


def latent_plan(rows: int, cols: int, element_size: int, multiprocessors: int) -> dict[str, int]:
    """Launch plan of the latent kernels for a (rows, cols) latent.

    Raises:
        ValueError: a size is not a positive integer, in this and the other plans.
        RuntimeError: the CPU library is not loaded, in this and the other plans.
    """
    sizes = {"rows": rows, "cols": cols, "element_size": element_size, "multiprocessors": multiprocessors}
    found: dict[str, int] = _call("latent_plan", sizes)
    return found


def attention_tiles(second_order: bool = False) -> list[tuple[int, int]]:
    """Head dims (key, value) of the attention kernels; ``second_order``: of tangents and second derivatives."""
    return [(key, value) for key, value in _call("attention_tiles", {}, bool(second_order))]


def attention_plan(
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    key_dim: int,
    value_dim: int,
    element_size: int,
    multiprocessors: int,
    plain: bool = True,
    mask: Sequence[int] | None = None,
    shared_limit: int = SHARED_LIMITS["sm_90"],
) -> dict[str, dict[str, Any]]:
    """Launch plan of each attention kernel.

    "one tile" or "one head", where there is one, takes the place of "query" and "key_value", and "one tile mask" that
    of "mask" too.
    "decode" takes the place of "forward" where it is given, unless there is dropout; its slices are parts of the keys.
    "forward sm90" takes it on sm_90 with ``FASTGEN_SM90=1`` in the environment, and not otherwise: it has not been
    measured. It is given for head dims of keys and values both in 40 ... 64, 72 ... 128, 136 ... 192 or 200 ... 256, of
    16 bits; of windows only those of positions. Expanded tensors, with a stride of 0, which the plan does not know, are
    left to "forward". Windows and masks of keys take it too, some with smaller tiles.
    "forward wide sm90" takes the place of "forward" in the same way, with head dims both in 456 ... 512 and no mask of
    keys; it has as many parts of the keys ("splits").
    "query sm90" and "key_value sm90", where they are given, take the place of the other kernels of the backward pass in
    the same way, and "tangent sm90" that of "tangent" if query, key and value all have a tangent. "forward tangent
    sm90" takes the place of both "forward" and "tangent" where the two are one call.

    Args:
        shared_limit: maximum of shared memory of a block, in bytes: one of ``SHARED_LIMITS``. A multiprocessor has
            1 KiB more, and each of its blocks takes 1 KiB besides its own.
        plain: no mask, dropout or softcap.
        mask: sizes (B, H, N, M) of a mask that requires a gradient, 1 where it broadcasts.

    Raises:
        ValueError: head dims larger than every tile, a mask without four sizes, or a limit below 99 KiB.
    """
    sizes = {
        "batch": batch, "heads": heads, "key_heads": key_heads, "queries": queries, "keys": keys, "key_dim": key_dim,
        "value_dim": value_dim, "element_size": element_size, "multiprocessors": multiprocessors,
        "shared_limit": shared_limit,
    }  # fmt: skip
    of_mask = None
    if mask is not None:
        if len(mask) != 4:
            raise ValueError(f"mask: expected four sizes (B, H, N, M), got {tuple(mask)}")
        of_mask = (_INT * 4)(*(_checked("mask", size, _INT) for size in mask))
    return _with_tuples(_call("attention_plan", sizes, bool(plain), of_mask))


def projection_plan(
    batch: int, tokens: int, inputs: int, outputs: int, widest: int, element_size: int, multiprocessors: int
) -> dict[str, dict[str, Any]]:
    """Launch plan of each projection kernel.

    Args:
        batch: 1 if tokens are numbered across the batch.
        widest: largest head dim that must be in one tile.
    """
    sizes = {
        "batch": batch, "tokens": tokens, "inputs": inputs, "outputs": outputs, "widest": widest,
        "element_size": element_size, "multiprocessors": multiprocessors,
    }  # fmt: skip
    return _with_tuples(_call("projection_plan", sizes))


def _call(name: str, sizes: dict[str, int], *rest: Any) -> Any:
    handle = libraries.library_for("cpu").handle
    if handle is None:
        raise RuntimeError(f"{name}: launch plans require the compiled CPU library: {why_not()}")
    function = getattr(handle, f"fastgen_{name}")
    function.restype, function.argtypes = ctypes.c_char_p, _ARGUMENTS[name]
    checked = [_checked(key, size, kind) for (key, size), kind in zip(sizes.items(), _ARGUMENTS[name], strict=False)]
    found = json.loads(function(*checked, *rest))
    if isinstance(found, dict) and "error" in found:
        raise ValueError(found["error"])
    return found


def _checked(name: str, size: int, kind: Any) -> int:
    """The size as an int. C would wrap a larger one, and divide by zero."""
    limit = 2 ** (8 * ctypes.sizeof(kind) - 1)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < limit:
        raise ValueError(f"{name}: expected an integer from 1 to {limit - 1}, got {size!r}")
    return size


def _with_tuples(plans: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {kernel: {**plan, "tile": tuple(plan["tile"])} for kernel, plan in plans.items()}
