"""The common call of a projection on CPU at the cost of ``torch.nn.functional.linear``: few checks, then views.

No library has a CPU kernel for projections without an epilogue: PyTorch's linear map serves, with its derivatives of
any order. What is not common is left to the functions, whose checks name the argument that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from fastgen.checks import FLOATING
from fastgen.ops._direct import PLAIN, is_common

_OPTIONAL = PLAIN | {type(None)}
_SEQUENCES = frozenset((tuple, list))
_DTYPES = frozenset(FLOATING)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """On CPU, plain tensors; PyTorch checks that their dtypes and devices agree."""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in _OPTIONAL
        and x.is_cpu
        and not x.is_nested
        and not weight.is_nested
        and x.dtype in _DTYPES
        and is_common()
    )


def to_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Sequence[int], head_dims: Sequence[int] | None
) -> tuple[Tensor, ...] | None:
    """(B, N, C) to one (B, H, N, D) for each part; None where the function's other path has to serve.

    Without ``head_dims`` there is one part, and D follows from the weight.
    """
    if not _takes(x, weight, bias) or not x.is_contiguous() or type(heads) not in _SEQUENCES or not heads:
        return None
    shape, rows = x.shape, weight.shape
    count, parts = heads[0], len(heads)
    if type(count) is not int or len(rows) != 2:
        return None
    if head_dims is None:
        dim = rows[0] // max(count, 1)
    elif type(head_dims) not in _SEQUENCES or len(head_dims) != parts:
        return None
    else:
        dim = head_dims[0]
        if parts > 1 and (any(h != count for h in heads) or any(d != dim for d in head_dims)):
            return None
    if (
        type(dim) is not int
        or count < 1
        or dim < 1
        or len(shape) != 3
        or rows != (parts * count * dim, shape[2])
        or (bias is not None and bias.shape != rows[:1])
    ):
        return None
    try:
        y = linear(x, weight, bias)
    except RuntimeError:  # two dtypes or devices
        return None
    if parts == 1:
        return (y.view(shape[0], shape[1], count, dim).transpose(1, 2),)
    return y.view(shape[0], shape[1], parts, count, dim).permute(2, 0, 3, 1, 4).unbind(0)


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
