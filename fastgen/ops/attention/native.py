"""fastgen's own fused kernels on CPU (csrc/attention/cpu): which calls they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import COMPILED_DTYPES, helper
from fastgen.ops.attention import fused
from fastgen.ops.attention.problem import Problem, Saved

MOST_KEYS = 16384
"""The kernels copy the keys of a head into memory of each thread, and those of second order hold whole rows of scores:
with more keys these leave the caches, and other implementations are as fast."""

FEWEST_QUERIES = 8
"""With fewer queries the copy of the keys costs more than the products."""


def _fits(mask: Tensor | None) -> bool:
    """Whether the kernels read the mask: boolean or float32, a last dim that is contiguous or broadcast."""
    return mask is None or (mask.dtype in (torch.bool, torch.float32) and (mask.size(3) == 1 or mask.stride(3) == 1))


def takes(problem: Problem | Saved, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether the kernels compute this: float32 on CPU, no softcap, no packed sequences, windows as they are."""
    query, options = problem.query, problem.options
    return (
        query.device.type == "cpu"
        and query.dtype in dtypes
        and problem.sequences is None
        and options.softcap == 0.0
        and min(options.window_left, options.window_right) >= -1
        and min(query.numel(), problem.key.numel(), problem.value.numel()) > 0
        and _fits(problem.mask)
    )


def kernel(
    problem: Problem | Saved,
    name: str,
    tangent_mask: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Callable[..., Any] | None:
    """The compiled kernel ``name`` where it takes the call."""
    keys = problem.key.size(2)
    if not takes(problem, dtypes) or keys > MOST_KEYS or (tangent_mask is not None and not _fits(tangent_mask)):
        return None
    return helper(problem.namespace, name, problem.query.device)


def first_order_kernel(problem: Problem | Saved, name: str, mask_grad: bool = False) -> Callable[..., Any] | None:
    """The same, where torch's fused kernel does not take the call, or would pad the narrower heads: at equal head dims
    it is as fast. The caller converts 16 bits, which are taken where values are at least twice as wide as queries."""
    query, mask = problem.query, problem.mask
    dim, value_dim = query.size(3), problem.value.size(3)
    if query.size(2) < FEWEST_QUERIES or (dim == value_dim and not mask_grad and fused.takes(problem)):
        return None
    if mask_grad and mask is not None and mask.shape[2:] != (query.size(2), problem.key.size(2)):
        return None
    narrow = 2 * dim <= value_dim and mask is None and problem.seed is None
    return kernel(problem, name, dtypes=tuple(COMPILED_DTYPES) if narrow else (torch.float32,))


def as_float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)
