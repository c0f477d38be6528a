"""The common call of a projection on CPU at the cost of ``torch.nn.functional.linear``: few checks, then views.

No library has a CPU kernel for projections without an epilogue: PyTorch's linear map serves, with its derivatives of
any order. What is not common is left to the functions, whose checks name the argument that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from fastgen.checks import FLOATING
from fastgen.ops._direct import PLAIN, _autocast, _dispatch_modes, is_common, is_transformed

_OPTIONAL = PLAIN | {type(None)}
_SEQUENCES, _INTEGERS = frozenset((tuple, list)), frozenset((int,))
_DTYPES = frozenset(FLOATING)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """On CPU, plain tensors. PyTorch checks that their dtypes agree, and their devices, but for ``meta``: with a weight
    there, its linear map returns memory that was never written."""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in _OPTIONAL
        and x.is_cpu
        and weight.is_cpu
        and not x.is_nested
        and not weight.is_nested
        and x.dtype in _DTYPES
        and is_common()
    )


def to_one_part(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor | None:
    """(B, N, C) to (B, H, N, D); None where the function's other path has to serve.

    In one function, as ``to_heads`` is, because a call of Python takes a tenth of what the linear map takes.
    """
    if (
        type(x) not in PLAIN
        or type(weight) not in PLAIN
        or type(bias) not in _OPTIONAL
        or type(heads) is not int
        or heads < 1
        or _dispatch_modes()
        or _autocast()
        or x.dtype not in _DTYPES
        or not x.is_cpu
        or not weight.is_cpu
        or not x.is_contiguous()
    ):
        return None
    try:
        batch, length, channels = x.shape
        rows, inputs = weight.shape
        if type(rows) is not int:  # as sizes are while torch.jit.trace records
            return None
        if inputs != channels or rows < 1 or rows % heads or (bias is not None and bias.shape != (rows,)):
            return None
        y = linear(x, weight, bias)
    except (RuntimeError, ValueError):  # two dtypes or devices, nested tensors; other numbers of dims
        return None
    dim = rows // heads
    if y.requires_grad or is_transformed():
        return y.view(batch, length, heads, dim).transpose(1, 2)
    return y.as_strided((batch, heads, length, dim), (length * rows, dim, rows, 1))


def to_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Sequence[int], head_dims: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """(B, N, C) to one (B, H, N, D) for each part; None where the function's other path has to serve, which is where
    the parts differ in size."""
    if (
        type(x) not in PLAIN
        or type(weight) not in PLAIN
        or type(bias) not in _OPTIONAL
        or type(heads) not in _SEQUENCES
        or type(head_dims) not in _SEQUENCES
        or not heads
        or not head_dims
        or _dispatch_modes()
        or _autocast()
        or x.dtype not in _DTYPES
        or not x.is_cpu
        or not weight.is_cpu
        or not x.is_contiguous()
    ):
        return None
    count, dim, parts = heads[0], head_dims[0], len(heads)
    if (
        type(count) is not int
        or type(dim) is not int
        or count < 1
        or dim < 1
        or heads.count(count) != parts
        or len(head_dims) != parts
        or head_dims.count(dim) != parts
        or not _INTEGERS.issuperset(map(type, heads))  # 1 == True == 1.0
        or not _INTEGERS.issuperset(map(type, head_dims))
    ):
        return None
    try:
        batch, length, channels = x.shape
        rows = parts * count * dim
        if weight.shape != (rows, channels) or (bias is not None and bias.shape != (rows,)):
            return None
        y = linear(x, weight, bias)
    except (RuntimeError, ValueError):  # two dtypes or devices, nested tensors; other numbers of dims
        return None
    if y.requires_grad or is_transformed():
        return y.view(batch, length, parts, count, dim).permute(2, 0, 3, 1, 4).unbind(0)
    sizes, strides = (parts, batch, count, length, dim), (count * dim, length * rows, dim, rows, 1)
    return y.as_strided(sizes, strides).unbind(0)


def from_heads(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """(B, H, N, D) to (B, N, E); None where the function's other path has to serve."""
    if not _takes(x, weight, bias) or type(residual) not in _OPTIONAL or x.dim() != 4:
        return None
    batch, heads, length, dim = x.shape
    rows = weight.shape
    if (
        not batch
        or not length
        or len(rows) != 2
        or rows[1] != heads * dim
        or (bias is not None and bias.shape != rows[:1])
    ):
        return None
    if residual is not None and (
        residual.dtype != x.dtype or residual.shape != (batch, length, rows[0]) or not residual.is_cpu
    ):
        return None
    tokens = x.transpose(1, 2).reshape(batch, length, heads * dim)
    if not tokens.is_contiguous():
        return None
    try:
        y = linear(tokens, weight, bias)
    except RuntimeError:  # two dtypes or devices
        return None
    return y if residual is None else residual + y
