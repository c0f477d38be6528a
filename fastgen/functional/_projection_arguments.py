"""Arguments of the projections, checked and brought to the shapes of the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen.functional._autocast import lower
from fastgen.ops.projection.epilogue import HeadEpilogue


def tokens_of(x: Tensor, channels_first: bool) -> Tensor:
    """(B, N, C), or (B, C, N) with ``channels_first``."""
    check.require_tensor("x", x)
    check.require_floating("x", x)
    check.require_flag("channels_first", channels_first)
    if channels_first:
        if x.dim() < 3:
            raise ValueError(f"x: expected (B, C, *spatial) with channels_first, got {check.shape_of(x)}")
        return x.flatten(2)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, N, C), got {check.shape_of(x)}")
    return x


def check_linear(x: Tensor, channels: int, weight: Tensor, bias: Tensor | None, rows: int | str) -> None:
    """Checks weight (rows, channels) and bias (rows,)."""
    check.require_tensor("weight", weight)
    check.require_tensor("bias", bias, optional=True)
    if weight.dim() != 2 or weight.size(1) != channels:
        raise ValueError(f"weight: expected ({rows}, {channels}), got {check.shape_of(weight)}")
    if bias is not None:
        check.require_shape("bias", bias, (weight.size(0),), "(rows of weight,)")
    check.require_alike("x", x, weight=weight, bias=bias)


def check_rotary(rotary: tuple[Tensor, Tensor], x: Tensor, batch: int, length: int, dims: Sequence[int]) -> None:
    """Checks tables for head dims ``dims``."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise ValueError(f"rotary: expected a pair of tables (cos, sin), got {type(rotary).__name__}")
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        check.require_tensor(name, table)
        check.require_floating(name, table)
        if table.shape[:-1] not in ((length,), (batch, length)) or not 1 <= 2 * table.size(-1) <= min(dims):
            raise ValueError(
                f"{name}: expected (N, R / 2) or (B, N, R / 2) with B = {batch}, N = {length} and R at most the head"
                f" dim {min(dims)}, got {check.shape_of(table)}"
            )
        if table.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {table.device}")
    check.require_shape("sin", rotary[1], tuple(rotary[0].shape), "that of cos")


def upcast_tables(rotary: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(1|B, N, R / 2), in float32, or float64 where x or a table is float64."""
    wide = any(t.dtype == torch.float64 for t in (x, *rotary))
    dtype = torch.float64 if wide else torch.float32
    cos, sin = (table.to(dtype) if table.dim() == 3 else table.to(dtype).unsqueeze(0) for table in rotary)
    return cos, sin


def head_epilogue(
    tokens: Tensor,
    length: int,
    head_dims: Sequence[int],
    norms: Sequence[Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    rotated: int,
    interleaved: bool,
    low: torch.dtype | None,
) -> HeadEpilogue:
    """``low``: the dtype of autocast, if any."""
    if len(norms) > len(head_dims):
        raise ValueError(f"norms: expected at most {len(head_dims)} weights, one for each part, got {len(norms)}")
    cast = []
    for norm, dim in zip(norms, head_dims, strict=False):
        check.require_tensor("norms", norm)
        check.require_shape("norms", norm, (dim,), "(head dim of the part,)")
        cast.append(lower(norm, low))
        check.require_alike("x", tokens, norms=cast[-1])
    after = HeadEpilogue(norms=tuple(cast), eps=check.require_eps("norm_eps", eps))
    if rotary is None:
        return after
    check.require_flag("interleaved", interleaved)
    if isinstance(rotated, bool) or not isinstance(rotated, int) or not 1 <= rotated <= len(head_dims):
        raise ValueError(f"rotated: expected between 1 and the {len(head_dims)} parts, got {rotated!r}")
    check_rotary(rotary, tokens, tokens.size(0), length, head_dims[:rotated])
    cos, sin = upcast_tables(rotary, tokens)
    return after._replace(cos=cos, sin=sin, rotated=rotated, interleaved=bool(interleaved))


def gate_of(gate: Tensor | None, batch: int, channels: int) -> Tensor | None:
    """The gate as (1|B, 1, 1|E)."""
    check.require_tensor("gate", gate, optional=True)
    if gate is None:
        return None
    shape = tuple(gate.shape)
    if shape in ((), (1,), (channels,)):
        return gate.reshape(1, 1, -1)
    if shape in ((batch, channels), (batch, 1, channels)):
        return gate.reshape(batch, 1, channels)
    raise ValueError(f"gate: expected one element, (E,) = ({channels},) or (B, E) = ({batch}, {channels}), got {shape}")
