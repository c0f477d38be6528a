"""The common call of a projection with kernels, on a GPU or of a forced backend: few checks, then the operator.

What is not common (epilogues, gates, feature maps, transforms, autocast, tensor subclasses) is left to ``autograd`` and
``merge_autograd``, which call the same operators, as are calls that PyTorch's linear map serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgen.backend import device_capability, may_use_tf32, select
from fastgen.ops._checks import FLOATS, STRIDED
from fastgen.ops._direct import PLAIN, is_watched
from fastgen.ops.autograd import is_wrapped
from fastgen.ops.projection import autograd, merge_autograd, plan
from fastgen.ops.projection.dispatch import has_kernel
from fastgen.ops.projection.layout import Layout

_OPTIONAL = PLAIN | {type(None)}
_SEQUENCES = frozenset((tuple, list))
_interpreter = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def _takes(x: Tensor, dims: int, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain tensors of one dtype and device, of these dims, outside of transforms."""
    if (
        type(x) not in PLAIN
        or type(weight) not in PLAIN
        or type(bias) not in _OPTIONAL
        or is_watched()
        or forward_ad._current_level >= 0
        or _interpreter() is not None
        or _is_tracing()
        or x.is_nested
        or weight.is_nested
    ):
        return False
    dtype, device = x.dtype, x.device
    if (
        dtype not in FLOATS
        or weight.dtype != dtype
        or weight.device != device
        or not x.layout == weight.layout == STRIDED
        or len(x.shape) != dims
        or len(weight.shape) != 2
        or is_wrapped(x)
        or is_wrapped(weight)
    ):
        return False
    return bias is None or (
        bias.dtype == dtype
        and bias.device == device
        and bias.layout == STRIDED
        and bias.shape == weight.shape[:1]
        and not is_wrapped(bias)
    )


@lru_cache(maxsize=4096)
def _choice_for_heads(
    tokens: int, inputs: int, heads: tuple[int, ...], head_dims: tuple[int, ...], dtype: torch.dtype, tf32: bool,
    major: int | None,
) -> tuple[str | None, bool]:  # fmt: skip
    """Why the kernels do not take the projection, and whether cuBLAS is expected to be faster."""
    refused = plan.refused(dtype, [inputs, *head_dims], len(heads))
    problem = plan.heads_problem(tokens, inputs, list(zip(heads, head_dims, strict=True)), 0, 0, dtype.itemsize, tf32)
    return refused, major is not None and plan.estimate(problem, major).takes_library


@lru_cache(maxsize=4096)
def _choice_for_merge(
    tokens: int, head_dim: int, inputs: int, outputs: int, dtype: torch.dtype, tf32: bool, major: int | None,
    bias: bool, residual: bool,
) -> tuple[str | None, bool]:  # fmt: skip
    """The same for heads to tokens."""
    refused = plan.refused(dtype, [head_dim, outputs])
    problem = plan.merge_problem(tokens, inputs, outputs, dtype.itemsize, tf32, bias=bias, residual=residual)
    return refused, major is not None and plan.estimate(problem, major).takes_library


def _major(tensor: Tensor) -> int | None:
    capability = device_capability(tensor.device) if tensor.is_cuda else None
    return None if capability is None else capability[0]


def to_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Sequence[int], head_dims: Sequence[int] | None
) -> tuple[Tensor, ...] | None:
    """(B, N, C) to one (B, H, N, D) for each part; None where the function's other path has to serve.

    Without ``head_dims`` there is one part, and D follows from the weight.
    """
    if not _takes(x, 3, weight, bias) or type(heads) not in _SEQUENCES or not heads:
        return None
    batch, length, inputs = x.shape
    rows = weight.shape[0]
    if head_dims is None:
        count = heads[0]
        if type(count) is not int or count < 1 or rows % count:
            return None
        head_dims = (rows // count,)
    elif type(head_dims) not in _SEQUENCES or len(head_dims) != len(heads):
        return None
    total = 0
    for count, dim in zip(heads, head_dims, strict=True):
        if type(count) is not int or type(dim) is not int or count < 1 or dim < 1:
            return None
        total += count * dim
    if total != rows or weight.shape[1] != inputs or not (batch and length and inputs):
        return None
    tf32 = may_use_tf32(x)
    if x.is_cpu:  # no choice between kernels and cuBLAS
        namespace = select("projection_forward", x)
    else:
        sizes = tuple(heads), tuple(head_dims)
        refused, slower = _choice_for_heads(batch * length, inputs, *sizes, x.dtype, tf32, _major(x))
        namespace = select("projection_forward", x, refused, slower=slower)
    if not has_kernel("projection_forward", namespace, x):
        return None
    return autograd.of_operator(x, weight, bias, Layout(list(heads), list(head_dims), False, tf32), namespace)


def from_heads(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """(B, H, N, D) to (B, N, E); None where the function's other path has to serve."""
    if not _takes(x, 4, weight, bias):
        return None
    batch, heads, length, dim = x.shape
    outputs, inputs = weight.shape
    if inputs != heads * dim or not (batch and length and inputs and outputs):
        return None
    if residual is not None and (
        type(residual) not in PLAIN
        or residual.dtype != x.dtype
        or residual.device != x.device
        or residual.layout != STRIDED
        or residual.shape != (batch, length, outputs)
        or is_wrapped(residual)
    ):
        return None
    tf32 = may_use_tf32(x)
    if x.is_cpu:
        namespace = select("merge_heads_forward", x)
    else:
        arguments = batch * length, dim, inputs, outputs, x.dtype, tf32, _major(x), bias is not None
        refused, slower = _choice_for_merge(*arguments, residual is not None)
        namespace = select("merge_heads_forward", x, refused, slower=slower)
    if not has_kernel("merge_heads_forward", namespace, x):
        return None
    return merge_autograd.of_operator(x, weight, bias, residual, tf32, namespace)
