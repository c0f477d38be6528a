"""Argument checks of the operators of the projections; see ``fastgen.ops._checks``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgen.checks import shape_of
from fastgen.ops._checks import require_dims, require_operand, require_sizes


def _require_tables(
    cos: Tensor | None, sin: Tensor | None, batch: int, length: int, dims: list[int], like: Tensor
) -> None:
    """(1|B, N, R / 2), R at most each of ``dims``."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("sin: expected together with cos")
        return
    require_dims("cos", cos, "(1|B, N, R / 2)", None, like)
    if cos.size(0) not in (1, batch) or cos.size(1) != length or any(2 * cos.size(2) > dim for dim in dims):
        raise ValueError(
            f"cos: expected (1|B, N, R / 2) with B = {batch}, N = {length} and R at most {min(dims, default=0)},"
            f" got {shape_of(cos)}"
        )
    require_sizes("sin", sin, tuple(cos.shape), "of cos", cos.dtype, like)


def _require_parts(norms: list[Tensor], heads: list[int], head_dims: list[int], rotated: int, x: Tensor) -> None:
    if len(heads) != len(head_dims) or not heads:
        raise ValueError(f"head_dims: expected as many as heads {tuple(heads)}, got {tuple(head_dims)}")
    if min(*heads, *head_dims) < 1:
        raise ValueError(f"heads, head_dims: expected positive numbers, got {tuple(heads)} and {tuple(head_dims)}")
    if not 0 <= rotated <= len(heads):
        raise ValueError(f"rotated: expected between 0 and the {len(heads)} parts, got {rotated}")
    if len(norms) > len(heads):
        raise ValueError(f"norms: expected at most one for each of the {len(heads)} parts, got {len(norms)}")
    for norm, dim in zip(norms, head_dims, strict=False):
        require_sizes("norms", norm, (dim,), "(head dim of the part,)", x.dtype, x)


def projection_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    eps: float,
    rotated: int,
    *rest: Any,
) -> None:
    require_dims("x", x, "(B, C, N)" if channels_first else "(B, N, C)", None, x)
    batch, length, channels = (x.size(0), x.size(2), x.size(1)) if channels_first else x.shape
    _require_parts(norms, heads, head_dims, rotated, x)
    rows = sum(h * d for h, d in zip(heads, head_dims, strict=True))
    require_sizes("weight", weight, (rows, channels), "(sum of heads * head_dims, C)", x.dtype, x)
    if bias is not None:
        require_sizes("bias", bias, (rows,), "(rows of weight,)", x.dtype, x)
    _require_tables(cos, sin, batch, length, head_dims[:rotated], x)


def projection_backward(
    grads: list[Tensor],
    kept: list[Tensor],
    x: Tensor,
    weight: Tensor,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    bias: bool,
    channels_first: bool,
    eps: float,
    rotated: int,
    *rest: Any,
) -> None:
    require_dims("x", x, "(B, C, N)" if channels_first else "(B, N, C)", None, x)
    batch, length, channels = (x.size(0), x.size(2), x.size(1)) if channels_first else x.shape
    for grad in grads:
        require_dims("grads", grad, "(B, H, N, D)", x.dtype, x)
        if grad.size(0) != batch or grad.size(2) != length:
            raise ValueError(f"grads: expected (B, H, N, D) with B = {batch}, N = {length}, got {shape_of(grad)}")
    heads, head_dims = [grad.size(1) for grad in grads], [grad.size(3) for grad in grads]
    _require_parts(norms, heads, head_dims, rotated, x)
    rows = sum(h * d for h, d in zip(heads, head_dims, strict=True))
    require_sizes("weight", weight, (rows, channels), "(sum of heads * head dims of grads, C)", x.dtype, x)
    if len(kept) < len(norms):
        raise ValueError(f"kept: expected one for each of the {len(norms)} norms, got {len(kept)}")
    for before, grad in zip(kept[: len(norms)], grads, strict=False):
        require_sizes("kept", before, tuple(grad.shape), "of the part's gradient", x.dtype, x)
    _require_tables(cos, sin, batch, length, head_dims[:rotated], x)


def _require_merge(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, name: str, flat: Tensor | None, first: bool
) -> None:
    """``flat``: what has the shape of the output, ``name``; ``first``: with its channels first."""
    require_dims("x", x, "(B, H, N, D)", None, x)
    batch, heads, length, dim = x.shape
    require_dims("weight", weight, "(E, H * D)", x.dtype, x)
    channels = weight.size(0)
    require_sizes("weight", weight, (channels, heads * dim), "(E, H * D)", x.dtype, x)
    if bias is not None:
        require_sizes("bias", bias, (channels,), "(E,)", x.dtype, x)
    if gate is not None:
        require_dims("gate", gate, "(1|B, 1, 1|E)", x.dtype, x)
        if gate.size(0) not in (1, batch) or gate.size(1) != 1 or gate.size(2) not in (1, channels):
            raise ValueError(f"gate: expected (1|B, 1, 1|E) with B = {batch} and E = {channels}, got {shape_of(gate)}")
    if flat is not None:
        shape = (batch, channels, length) if first else (batch, length, channels)
        require_sizes(name, flat, shape, "(B, E, N)" if first else "(B, N, E)", x.dtype, x)


def merge_heads_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    *rest: Any,
) -> None:
    _require_merge(x, weight, bias, gate, "residual", residual, channels_first)


def merge_heads_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    *rest: Any,
) -> None:
    require_operand("grad", grad, None, x)
    _require_merge(x, weight, bias, gate, "grad", grad, channels_first)
    if gate is not None and gate.size(0) != 1:
        raise ValueError(f"gate: expected one that the batch shares, (1, 1, 1|E), got {shape_of(gate)}")


def cpu_finish_heads(part: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, *options: Any) -> None:
    require_dims("part", part, "(B, H, N, D)", None, part)
    if norm is not None:
        require_sizes("norm", norm, (part.size(3),), "(D,)", None, part)
    _require_tables(cos, sin, part.size(0), part.size(2), [part.size(3)], part)


def cpu_finish_heads_backward(grad: Tensor, part: Tensor, *rest: Any) -> None:
    cpu_finish_heads(part, *rest)
    require_sizes("grad", grad, tuple(part.shape), "of part", part.dtype, part)
