"""Multi-head projections. Shapes: B batch, H heads, N tokens, C and E channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen._dynamo import is_dynamo_compiling
from fastgen.backend import may_use_tf32, select
from fastgen.backend.selection import selection
from fastgen.functional._autocast import autocast_dtype, lower
from fastgen.functional._overrides import handle_torch_function, items, overridden, overridden_heads, relevant
from fastgen.functional._projection_arguments import (
    check_linear,
    check_rotary,
    gate_of,
    head_epilogue,
    tokens_of,
    upcast_tables,
)
from fastgen.ops.projection import direct, epilogue, operator_path, plan
from fastgen.ops.projection.autograd import projection
from fastgen.ops.projection.epilogue import HeadEpilogue
from fastgen.ops.projection.layout import Layout
from fastgen.ops.projection.merge_autograd import merge_heads


def multi_head_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    channels_first: bool = False,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """A linear map whose output is split into heads: ``x @ weight^T + bias``.

    Differentiable to any order in reverse mode, with forward-mode AD.

    Args:
        x: (B, N, C), or (B, C, *spatial) with ``channels_first``; N is then the number of positions.
        weight: (H * D, C), H = ``num_heads``.
        bias: (H * D,).
        num_heads: number of heads H.
        channels_first: x is a feature map.
        norm: RMS normalization weight (D,) of the heads (QK-norm); see ``qkv_projection``.
        norm_eps: number added to the mean square, >= 0.
        rotary: tables (cos, sin) of a rotary embedding (RoPE), applied after the norm; see ``rotary_embedding``.
        interleaved: pairs of channels of the rotary embedding are (2 i, 2 i + 1).

    Returns:
        (B, H, N, D), with a contiguous last dim.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not match, or a number of heads that does not divide the weight's rows.

    Example:
        >>> multi_head_projection(torch.randn(2, 5, 6), torch.randn(8, 6), num_heads=4).shape
        torch.Size([2, 4, 5, 2])
    """
    if (
        norm is None
        and rotary is None
        and channels_first is False
        and not overridden(x, weight, bias)
        and _may_be_direct(x)
    ):
        common = direct.to_one_part(x, weight, bias, num_heads)
        if common is not None:
            return common
    norms = () if norm is None else (norm,)
    if overridden_heads(x, weight, bias, norms, rotary) and (own := relevant(x, weight, bias, norm, *items(rotary))):
        return handle_torch_function(  # type: ignore[no-any-return]
            multi_head_projection, own, x, weight, bias, num_heads=num_heads, channels_first=channels_first, norm=norm,
            norm_eps=norm_eps, rotary=rotary, interleaved=interleaved,
        )  # fmt: skip
    if norm is None and rotary is None and channels_first is False and _may_be_an_operator(x):
        parts = operator_path.to_heads(x, weight, bias, (num_heads,), None)
        if parts is not None:
            return parts[0]
    check.require_positive("num_heads", num_heads)
    check.require_tensor("weight", weight)
    if weight.dim() != 2 or weight.size(0) == 0:
        raise ValueError(f"weight: expected (num_heads * head_dim, C), got {check.shape_of(weight)}")
    if weight.size(0) % num_heads != 0:
        raise ValueError(f"num_heads: expected a divisor of weight's {weight.size(0)} rows, got {num_heads}")
    head_dim = weight.size(0) // num_heads
    if isinstance(head_dim, Tensor):  # as sizes are while torch.jit.trace records
        head_dim = int(head_dim)
    return qkv_projection(
        x,
        weight,
        bias,
        heads=(num_heads,),
        head_dims=(head_dim,),
        channels_first=channels_first,
        norms=norms,
        norm_eps=norm_eps,
        rotary=rotary,
        rotated=1,
        interleaved=interleaved,
    )[0]


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (RoPE): a pair of channels (a, b) becomes ``(a cos - b sin, b cos + a sin)``.

    Su et al., "RoFormer: Enhanced Transformer with rotary position embedding" (2021), section 3.2.2. Differentiable to
    any order, also in the tables.

    Args:
        x: (B, H, N, D).
        cos: cosines of the angles, (N, R / 2) or (B, N, R / 2), R <= D. Channels from R on are unchanged.
        sin: sines of the angles, same shape as cos.
        interleaved: pairs are channels (2 i, 2 i + 1), as in the paper; otherwise (i, i + R / 2), as in Llama.

    Returns:
        A tensor with the shape and dtype of x, computed in float32, or in float64 where x or a table is float64.

    Raises:
        TypeError: integer tensors.
        ValueError: shapes or devices that do not match.

    Example:
        >>> angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.01])
        >>> rotary_embedding(torch.randn(2, 3, 5, 4), angles.cos(), angles.sin()).shape
        torch.Size([2, 3, 5, 4])
    """
    if overridden(x, cos, sin) and (own := relevant(x, cos, sin)):
        return handle_torch_function(  # type: ignore[no-any-return]
            rotary_embedding, own, x, cos, sin, interleaved=interleaved
        )
    check.require_tensor("x", x)
    check.require_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, H, N, D), got {check.shape_of(x)}")
    check.require_flag("interleaved", interleaved)
    check_rotary((cos, sin), x, x.size(0), x.size(2), (x.size(3),))
    return epilogue.rotary(x, *upcast_tables((cos, sin), x), interleaved).to(x.dtype)


def qkv_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: Sequence[int],
    head_dims: Sequence[int],
    channels_first: bool = False,
    norms: Sequence[Tensor] = (),
    norm_eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotated: int = 2,
    interleaved: bool = False,
) -> tuple[Tensor, ...]:
    """Query, key and value from one packed weight, with QK-norm and rotary embedding as its epilogue.

    Differentiable to any order in reverse mode, with forward-mode AD.

    Args:
        x: (B, N, C), or (B, C, *spatial) with ``channels_first``.
        weight: (Hq * Dk + Hk * Dk + Hv * Dv, C), the rows of q, then k, then v.
        bias: (Hq * Dk + Hk * Dk + Hv * Dv,).
        heads: numbers of heads (Hq, Hk, Hv). Any number of parts is accepted.
        head_dims: head dims (Dk, Dk, Dv).
        channels_first: x is a feature map.
        norms: weights (Dk,) of q, or of q and k, in general of the first parts, whose heads are normalized:
            ``y / sqrt(mean(y^2) + norm_eps) * weight`` (Zhang and Sennrich, "Root mean square layer normalization",
            2019). Autocast lowers them with the weight.
        norm_eps: number added to the mean square, >= 0.
        rotary: tables (cos, sin) of a rotary embedding (RoPE) of the first ``rotated`` parts, applied after the norms;
            see ``rotary_embedding``.
        rotated: number of parts with rotary embedding.
        interleaved: pairs of channels of the rotary embedding are (2 i, 2 i + 1).

    Returns:
        q (B, Hq, N, Dk), k (B, Hk, N, Dk), v (B, Hv, N, Dv), each with a contiguous last dim.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not match, heads or head dims that are not positive integers, a negative
            ``norm_eps``.

    Example:
        >>> q, k, v = qkv_projection(torch.randn(2, 5, 6), torch.randn(24, 6), heads=(4, 1, 1), head_dims=(4, 4, 4))
        >>> q.shape, v.shape
        (torch.Size([2, 4, 5, 4]), torch.Size([2, 1, 5, 4]))
    """
    plain = rotary is None and channels_first is False and type(norms) is tuple and not norms
    if plain and not overridden(x, weight, bias) and _may_be_direct(x):
        common = direct.to_heads(x, weight, bias, heads, head_dims)
        if common is not None:
            return common
    if overridden_heads(x, weight, bias, norms, rotary) and (own := relevant(x, weight, bias, *items(norms, rotary))):
        return handle_torch_function(  # type: ignore[no-any-return]
            qkv_projection, own, x, weight, bias, heads=heads, head_dims=head_dims, channels_first=channels_first,
            norms=norms, norm_eps=norm_eps, rotary=rotary, rotated=rotated, interleaved=interleaved,
        )  # fmt: skip
    if plain and _may_be_an_operator(x):
        common = operator_path.to_heads(x, weight, bias, heads, head_dims)
        if common is not None:
            return common
    tokens = tokens_of(x, channels_first)
    for name, counts in (("heads", heads), ("head_dims", head_dims)):
        if not isinstance(counts, (tuple, list)) or not counts:
            raise ValueError(f"{name}: expected a sequence of positive integers, got {counts!r}")
        for count in counts:
            check.require_positive(name, count)
    if len(heads) != len(head_dims):
        raise ValueError(f"head_dims: expected as many as heads {tuple(heads)}, got {tuple(head_dims)}")
    rows = sum(h * d for h, d in zip(heads, head_dims, strict=True))
    check.require_tensor("weight", weight)
    if weight.dim() != 2 or weight.size(0) != rows:
        raise ValueError(f"weight: expected {rows} rows, the sum of heads * head_dims, got {check.shape_of(weight)}")
    check.require_tensor("bias", bias, optional=True)
    low = autocast_dtype(x)
    tokens, weight, bias = lower(tokens, low), lower(weight, low), None if bias is None else lower(bias, low)
    check_linear(tokens, tokens.size(1 if channels_first else 2), weight, bias, rows)
    after = HeadEpilogue()
    norms = () if norms is None else norms
    if not isinstance(norms, (tuple, list)):
        raise TypeError(f"norms: expected a tuple or list of weights, one for each part, got {type(norms).__name__}")
    if norms or rotary is not None:
        length = tokens.size(2 if channels_first else 1)
        after = head_epilogue(tokens, length, head_dims, norms, norm_eps, rotary, rotated, interleaved, low)
    layout = Layout(list(heads), list(head_dims), channels_first, may_use_tf32(tokens))
    namespace = _select_for_heads(tokens, layout, after)
    if after.cos is not None and (
        _may_be_differentiated(after.cos, after.sin) or after.cos.dtype.itemsize > max(tokens.dtype.itemsize, 4)
    ):
        # The fused operators treat tables as constants, in float32 where x is not float64.
        parts = projection(tokens, weight, bias, HeadEpilogue(), layout, namespace)
        return tuple(epilogue.apply(list(parts), after))
    return projection(tokens, weight, bias, after, layout, namespace)


def _may_be_direct(x: Tensor) -> bool:
    """Whether ``direct`` may serve a common call: no backend is forced, on CPU, not traced by Dynamo."""
    return selection.backend == "auto" and getattr(x, "is_cpu", False) and not is_dynamo_compiling()


def _may_be_an_operator(x: Tensor) -> bool:
    """Whether ``operator_path`` may serve a common call: that of a GPU, or of a forced backend."""
    return (selection.backend != "auto" or not getattr(x, "is_cpu", True)) and not is_dynamo_compiling()


def _select_for_heads(tokens: Tensor, layout: Layout, after: HeadEpilogue) -> str:
    if tokens.device.type == "cpu":  # no choice between kernels and cuBLAS
        return select("projection_forward", tokens)
    sizes = list(zip(layout.heads, layout.head_dims, strict=True))
    inputs = tokens.size(1 if layout.channels_first else 2)
    normed, rotated = len(after.norms), after.rotated
    whole = layout.head_dims[: max(normed, rotated)]
    refused = plan.refused(tokens.dtype, [inputs, *layout.head_dims], len(sizes), whole)
    rows = tokens.numel() // max(inputs, 1)
    problem = plan.heads_problem(rows, inputs, sizes, normed, rotated, tokens.dtype.itemsize, layout.allow_tf32)
    return select("projection_forward", tokens, refused, slower=plan.slower(problem, tokens))


def _may_be_differentiated(*tables: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in tables)


def merge_heads_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    channels_first: bool = False,
) -> Tensor:
    """Heads concatenated and mapped to channels: ``residual + gate * (concat(x) @ weight^T + bias)``.

    Differentiable to any order in reverse mode, with forward-mode AD.

    Args:
        x: (B, H, N, D).
        weight: (E, H * D).
        bias: (E,).
        residual: added to the result; same shape as the output.
        gate: factor of the result: one element (SAGAN's gamma), (E,), or (B, E) (adaptive gates of diffusion
            Transformers).
        channels_first: return a feature map.

    Returns:
        (B, N, E); with ``channels_first`` (B, E, *spatial), the residual's shape, or (B, E, N) without one.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not match.

    Example:
        >>> merge_heads_projection(torch.randn(2, 4, 5, 2), torch.randn(6, 8)).shape
        torch.Size([2, 5, 6])
    """
    if overridden(x, weight, bias, residual, gate) and (own := relevant(x, weight, bias, residual, gate)):
        return handle_torch_function(  # type: ignore[no-any-return]
            merge_heads_projection, own, x, weight, bias, residual=residual, gate=gate, channels_first=channels_first
        )
    if gate is None and channels_first is False:
        common: Tensor | None = None
        if _may_be_direct(x):
            common = direct.from_heads(x, weight, bias, residual)
        elif _may_be_an_operator(x):
            common = operator_path.from_heads(x, weight, bias, residual)
        if common is not None:
            return common
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for name, tensor in tensors.items():
        check.require_tensor(name, tensor, optional=name in ("bias", "residual"))
    check.require_flag("channels_first", channels_first)
    check.require_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, H, N, D), got {check.shape_of(x)}")
    low = autocast_dtype(x)
    x, weight, bias = lower(x, low), lower(weight, low), None if bias is None else lower(bias, low)
    check_linear(x, x.size(1) * x.size(3), weight, bias, "E")
    batch, length, channels = x.size(0), x.size(2), weight.size(0)
    full_gate = gate_of(gate, batch, channels)
    flat: Tensor | None = None
    shape: tuple[int, ...] = (batch, channels, length) if channels_first else (batch, length, channels)
    if residual is not None:
        # In this order: comparing a length with channels would be a guard of torch.export.
        of_map = channels_first and residual.dim() >= 3 and residual.shape[:2] == (batch, channels)
        if of_map and math.prod(residual.shape[2:]) == length:
            flat, shape = residual.flatten(2), tuple(residual.shape)
        else:
            meaning = "(B, E, *spatial)" if channels_first else "(B, N, E)"
            check.require_shape("residual", residual, shape, meaning)
            flat = residual
    namespace = select("merge_heads_forward", x)
    if x.device.type != "cpu":
        refused = plan.refused(x.dtype, [x.size(3), channels])
        problem = plan.merge_problem(
            batch * length,
            x.size(1) * x.size(3),
            channels,
            x.dtype.itemsize,
            may_use_tf32(x),
            bias=bias is not None,
            residual=flat is not None,
            gate=full_gate is not None,
            channels_first=channels_first,
        )
        namespace = select("merge_heads_forward", x, refused, slower=plan.slower(problem, x))
    if low is not None and any(t is not None and t.dtype != x.dtype for t in (flat, full_gate)):
        # A residual stream in float32 stays float32, as under torch's type promotion.
        for name, tensor in (("residual", flat), ("gate", full_gate)):
            if tensor is not None:
                check.require_floating(name, tensor)
                check.require_device(name, tensor, "x", x)
        y = merge_heads(x, weight, bias, None, None, channels_first, may_use_tf32(x), namespace)
        if full_gate is not None:
            y = y * (full_gate.transpose(1, 2) if channels_first else full_gate)
        return (y if flat is None else flat + y).reshape(shape)
    check.require_alike("x", x, residual=residual, gate=gate)
    y = merge_heads(x, weight, bias, flat, full_gate, channels_first, may_use_tf32(x), namespace)
    return y.reshape(shape)
