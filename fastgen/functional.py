"""The user-facing functions. Shapes: B batch, H heads, N queries or tokens, M keys, C and E channels.

Each takes a compiled kernel where there is one, PyTorch elsewhere (``fastgen.info()`` says which,
``fastgen.use_backend`` chooses), honours autocast, ``torch.func`` transforms and ``torch.compile``, and is
differentiable twice and in forward mode; a derivative that is not there raises. Bad arguments raise ``TypeError``
(a dtype, not a tensor) or ``ValueError`` (a shape, a value, a device) with the argument's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import _autograd, reference
from fastgen import _checks as check
from fastgen._library import may_use_tf32, select
from fastgen.ops import _projection_plan as plan
from fastgen.ops.attention import Options, refused_heads
from fastgen.ops.projection import Layout, finish_parts
from fastgen.reference import HeadFinish

__all__ = [
    "merge_heads_projection",
    "multi_head_projection",
    "qkv_projection",
    "reparameterize",
    "reparameterize_kl",
    "rotary_embedding",
    "scaled_dot_product_attention",
]


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A one-element int64 seed on the device: no synchronisation, and a CUDA graph can replay it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    device = tensor.device.type
    if device == "meta":  # has no autocast, and torch raises when asked
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What autocast does to the arguments of a matrix product: float64 and integers stay."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


# --------------------------------------------------------------------------------------------------
# Attention


def _window_bounds(window: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for unbounded; causal bounds the right at 0."""
    left, right = -1, -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window: expected a pair (left, right), got {window!r}")
        for side, size in zip(("left", "right"), window, strict=True):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
                raise ValueError(f"window: expected {side} to be an integer >= 0, or None for unbounded, got {size!r}")
        left, right = (-1 if size is None else size for size in window)
    return left, 0 if is_causal else right


def _plainly_fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether nothing is left to check: the common case, in a few comparisons."""
    q, k, v = query.shape, key.shape, value.shape
    return (
        len(q) == len(k) == len(v) == 4
        and k[:3] == v[:3]
        and q[:2] == k[:2]
        and q[3] == k[3]
        and query.dtype == key.dtype == value.dtype
        and query.is_floating_point()
        and query.device == key.device == value.device
    )


def _checked_attention_inputs(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if _plainly_fit(query, key, value):
        return
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_tensor(name, tensor)
        check.require_floating(name, tensor)
        if tensor.dim() < 2 or tensor.dim() != query.dim():
            raise ValueError(
                f"{name}: expected (..., length, head_dim) with as many dims as query, {check.shape_of(query)},"
                f" and at least 2, got {check.shape_of(tensor)}"
            )
    check.require_alike("query", query, key=key, value=value)
    if key.size(-1) != query.size(-1):
        raise ValueError(f"key: expected query's head dim {query.size(-1)}, got {check.shape_of(key)}")
    if value.shape[:-1] != key.shape[:-1]:
        expected = tuple(key.shape[:-1])
        raise ValueError(f"value: expected key's dims {expected} before its own last, got {check.shape_of(value)}")
    leading = tuple(query.shape[:-2])
    if enable_gqa and query.dim() >= 3:
        heads, key_heads = query.size(-3), key.size(-3)
        if key_heads == 0 or heads % key_heads != 0:
            raise ValueError(f"key: expected a number of heads that divides query's {heads}, got {key_heads}")
        leading = (*query.shape[:-3], key_heads)
    if tuple(key.shape[:-2]) != leading:
        hint = "" if enable_gqa else " (grouped heads need enable_gqa=True)"
        raise ValueError(f"key: expected leading dims {leading}, got {tuple(key.shape[:-2])}{hint}")


def _four_dims(tensor: Tensor) -> Tensor:
    """(N, D), (B, N, D) and (..., H, N, D) to (B, H, N, D) with a contiguous last dim."""
    if tensor.dim() < 4:
        tensor = tensor.unsqueeze(-3) if tensor.dim() == 3 else tensor[None, None]
    elif tensor.dim() > 4:
        tensor = tensor.flatten(0, -4)
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def _checked_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as a 4-d tensor whose dims are full or 1."""
    check.require_tensor("attn_mask", attn_mask, optional=True)
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: expected a boolean (True = attend) or floating tensor, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: expected the device of query, {query.device}, got {attn_mask.device}")
    target = (*query.shape[:-1], key.size(-2))
    check.require_broadcast("attn_mask", attn_mask, target, "(..., query length, key length)")
    mask = attn_mask.reshape((1,) * (len(target) - attn_mask.dim()) + tuple(attn_mask.shape))
    if len(target) < 4:
        return mask.unsqueeze(-3) if len(target) == 3 else mask[None, None]
    if len(target) > 4:
        batch = mask.shape[:-3]
        shared = all(n == 1 for n in batch)
        return (mask if shared else mask.expand(*target[:-3], *mask.shape[-3:])).flatten(0, -4)
    return mask


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, ``softmax(scale * query @ key^T + mask) @ value``, in place of torch's function.

    Vaswani et al., "Attention is all you need" (2017), section 3.2.1.

    Args:
        query: (B, H, N, Dk). Other numbers of leading dims work as in torch: (N, Dk), (B, N, Dk), (..., H, N, Dk).
        key: (B, Hk, M, Dk); Hk is H, or divides it when ``enable_gqa``.
        value: (B, Hk, M, Dv). Dv need not be Dk.
        attn_mask: broadcasts to (B, H, N, M). Boolean: True where a query may see a key. Floating: added to the
            scores, and differentiable; its gradient has the mask's own shape.
        dropout_p: probability of dropping an attention weight, in [0, 1). Applied whenever it is above 0.
        is_causal: query i sees keys j <= i, as torch aligns it when N and M differ. May be combined with a mask.
        scale: factor of the scores; default ``1 / sqrt(Dk)``.
        enable_gqa: let several query heads share one key and value head.
        window: (left, right): query i sees keys i - left <= j <= i + right; None on a side is unbounded.
        generator: source of the dropout seed, on the tensors' device.
        return_lse: also return the logsumexp of each row of scores, differentiable.

    Returns:
        out (B, H, N, Dv) in query's dtype; with ``return_lse`` also lse (B, H, N), float32 (float64 for
        float64), in nats. A row that may see no key gives 0, with lse -inf and gradients 0, never NaN.

    Raises:
        TypeError: integer inputs, a mask that is neither boolean nor floating, dtypes that differ.
        ValueError: shapes that do not fit, a negative window, a probability out of range.
        RuntimeError: the backend ``compiled`` is forced and there is no kernel for these tensors; a derivative that
            is not there.

    On CUDA, float32 is multiplied at float32 accuracy unless ``torch.backends.cuda.matmul`` allows TF32, and kernels
    give the same bits in every run. A key that no query of the call sees counts for nothing, whatever it and its value
    hold.

    Derivatives: of first and second order in reverse mode (gradient penalties), of first order in forward mode
    (``torch.func.jvp``, dual numbers), and one of each in either order (the gradient of a tangent, the tangent of a
    gradient). Memory is O(N + M) per head for all of them. A third derivative, and forward over forward mode, raise
    ``RuntimeError``. The formulas are in ``fastgen.reference``.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 16, d) for d in (8, 8, 32))
        >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 16, 32])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_tensor(name, tensor)
    low = _autocast_dtype(query)
    query, key, value = _cast(query, low), _cast(key, low), _cast(value, low)
    _checked_attention_inputs(query, key, value, enable_gqa)
    check.require_probability("dropout_p", dropout_p)
    window_left, window_right = _window_bounds(window, is_causal)
    mask = _checked_mask(attn_mask, query, key)
    scale = query.size(-1) ** -0.5 if scale is None else float(scale)
    seed = _draw_seed(query.device, generator) if dropout_p > 0 else None
    options = Options(dropout_p, window_left, window_right, scale, may_use_tf32(query))
    namespace = select("attention_forward", query, refused_heads(query, value))
    out, lse = _autograd.attention(
        _four_dims(query), _four_dims(key), _four_dims(value), mask, seed, options, namespace
    )
    if query.dim() != 4:
        out = out.reshape(*query.shape[:-1], value.size(-1))
        lse = lse.reshape(query.shape[:-1])
    return (out, lse) if return_lse else out


# --------------------------------------------------------------------------------------------------
# Multi-head projection


def _projection_input(x: Tensor, channels_first: bool) -> Tensor:
    check.require_tensor("x", x)
    check.require_floating("x", x)
    if channels_first:
        if x.dim() < 3:
            raise ValueError(f"x: expected (B, C, *spatial) with channels_first, got {check.shape_of(x)}")
        return x.flatten(2)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, N, C), got {check.shape_of(x)}")
    return x


def _checked_linear(x: Tensor, channels: int, weight: Tensor, bias: Tensor | None, rows: int | str) -> None:
    check.require_tensor("weight", weight)
    check.require_tensor("bias", bias, optional=True)
    if weight.dim() != 2 or weight.size(1) != channels:
        raise ValueError(f"weight: expected ({rows}, {channels}), got {check.shape_of(weight)}")
    if bias is not None:
        check.require_shape("bias", bias, (weight.size(0),), "(rows of weight,)")
    check.require_alike("x", x, weight=weight, bias=bias)


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

    Args:
        x: (B, N, C), or (B, C, *spatial) with ``channels_first``; then N is the number of positions.
        weight: (H * D, C), H = ``num_heads``.
        bias: (H * D,).
        norm, norm_eps, rotary, interleaved: as in ``qkv_projection``, of this one part; norm is (D,).

    Returns:
        (B, H, N, D), with a contiguous last dim.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not fit, or heads that do not divide the weight's rows.

    Example:
        >>> multi_head_projection(torch.randn(2, 5, 6), torch.randn(8, 6), num_heads=4).shape
        torch.Size([2, 4, 5, 2])
    """
    check.require_positive("num_heads", num_heads)
    check.require_tensor("weight", weight)
    if weight.size(0) % num_heads != 0:
        raise ValueError(f"num_heads: expected a divisor of weight's {weight.size(0)} rows, got {num_heads}")
    return qkv_projection(
        x,
        weight,
        bias,
        heads=(num_heads,),
        head_dims=(weight.size(0) // num_heads,),
        channels_first=channels_first,
        norms=() if norm is None else (norm,),
        norm_eps=norm_eps,
        rotary=rotary,
        rotated=1,
        interleaved=interleaved,
    )[0]


def _checked_rotary(rotary: tuple[Tensor, Tensor], x: Tensor, batch: int, length: int, dims: Sequence[int]) -> None:
    """Tables for heads of each of ``dims``."""
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


def _wide_tables(rotary: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(1|B, N, R / 2), in float32, or float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (table.to(dtype) if table.dim() == 3 else table.to(dtype).unsqueeze(0) for table in rotary)
    return cos, sin


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Heads turned by their position: pairs (a, b) become ``(a cos - b sin, b cos + a sin)``.

    Su et al., "RoFormer: Enhanced Transformer with rotary position embedding" (2021), section 3.2.2.

    Args:
        x: (B, H, N, D).
        cos, sin: (N, R / 2) or (B, N, R / 2), R <= D; computed in float32 or wider. The channels beyond R stay.
        interleaved: pairs are channels (2 i, 2 i + 1), as in the paper; otherwise (i, i + R / 2), as in Llama.

    Returns:
        Like x.

    Raises:
        TypeError: integer tensors. ValueError: shapes or devices that do not fit.

    Example:
        >>> angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.01])
        >>> rotary_embedding(torch.randn(2, 3, 5, 4), angles.cos(), angles.sin()).shape
        torch.Size([2, 3, 5, 4])
    """
    check.require_tensor("x", x)
    check.require_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, H, N, D), got {check.shape_of(x)}")
    _checked_rotary((cos, sin), x, x.size(0), x.size(2), (x.size(3),))
    return reference.rotary(x, *_wide_tables((cos, sin), x), interleaved).to(x.dtype)


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
    """Query, key and value from one packed weight.

    Args:
        x: (B, N, C), or (B, C, *spatial) with ``channels_first``.
        weight: (Hq * Dk + Hk * Dk + Hv * Dv, C), the rows of q, then k, then v.
        bias: (Hq * Dk + Hk * Dk + Hv * Dv,).
        heads: (Hq, Hk, Hv). head_dims: (Dk, Dk, Dv). Any number of parts works the same way.
        norms: weights (Dk,) of q, or of q and k, whose heads are then normalised: ``y / sqrt(mean(y^2) + norm_eps) *
            weight`` (Zhang and Sennrich, "Root mean square layer normalization", 2019). In general: of the first parts.
        rotary: tables (cos, sin) by which the first ``rotated`` parts are turned, after that; see
            ``rotary_embedding``, also for ``interleaved``.

    Returns:
        q (B, Hq, N, Dk), k (B, Hk, N, Dk), v (B, Hv, N, Dv), each with a contiguous last dim.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not fit.

    Example:
        >>> q, k, v = qkv_projection(torch.randn(2, 5, 6), torch.randn(24, 6), heads=(4, 1, 1), head_dims=(4, 4, 4))
        >>> q.shape, v.shape
        (torch.Size([2, 4, 5, 4]), torch.Size([2, 1, 5, 4]))
    """
    tokens = _projection_input(x, channels_first)
    if len(heads) != len(head_dims) or not heads:
        raise ValueError(f"head_dims: expected as many as heads {tuple(heads)}, got {tuple(head_dims)}")
    for name, counts in (("heads", heads), ("head_dims", head_dims)):
        for count in counts:
            check.require_positive(name, count)
    rows = sum(h * d for h, d in zip(heads, head_dims, strict=True))
    check.require_tensor("weight", weight)
    if weight.dim() != 2 or weight.size(0) != rows:
        raise ValueError(f"weight: expected {rows} rows, the sum of heads * head_dims, got {check.shape_of(weight)}")
    low = _autocast_dtype(x)
    tokens, weight, bias = _cast(tokens, low), _cast(weight, low), None if bias is None else _cast(bias, low)
    _checked_linear(tokens, tokens.size(1 if channels_first else 2), weight, bias, rows)
    finish = HeadFinish()
    if norms or rotary is not None:
        length = tokens.size(2 if channels_first else 1)
        finish = _checked_finish(tokens, length, head_dims, norms, norm_eps, rotary, rotated, interleaved, low)
    layout = Layout(
        list(heads),
        list(head_dims),
        channels_first,
        finish.eps,
        finish.rotated,
        finish.interleaved,
        may_use_tf32(tokens),
    )
    namespace = _place_of_heads(tokens, layout, finish)
    if finish.cos is not None and _may_be_differentiated(finish.cos, finish.sin):
        # The fused operators take tables for constants.
        parts = _autograd.projection(tokens, weight, bias, HeadFinish(), layout, namespace)
        return tuple(finish_parts(list(parts), finish))
    return _autograd.projection(tokens, weight, bias, finish, layout, namespace)


def _place_of_heads(tokens: Tensor, layout: Layout, finish: HeadFinish) -> str:
    if tokens.device.type == "cpu":  # there is nothing to choose
        return select("projection_forward", tokens)
    sizes = list(zip(layout.heads, layout.head_dims, strict=True))
    inputs = tokens.size(1 if layout.channels_first else 2)
    normed, rotated = len(finish.norms), finish.rotated
    whole = layout.head_dims[: max(normed, rotated)]
    refused = plan.refused(tokens.dtype, [inputs, *layout.head_dims], len(sizes), whole)
    rows = tokens.numel() // max(inputs, 1)
    problem = plan.heads_problem(rows, inputs, sizes, normed, rotated, tokens.dtype.itemsize, layout.allow_tf32)
    return select("projection_forward", tokens, refused, plan.slower(problem, tokens))


def _may_be_differentiated(*tables: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in tables)


def _checked_finish(
    tokens: Tensor,
    length: int,
    head_dims: Sequence[int],
    norms: Sequence[Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    rotated: int,
    interleaved: bool,
    low: torch.dtype | None,
) -> HeadFinish:
    if isinstance(norms, Tensor) or len(norms) > len(head_dims):
        raise ValueError(f"norms: expected a sequence of at most {len(head_dims)} weights, one for each part")
    cast = []
    for norm, dim in zip(norms, head_dims, strict=False):
        check.require_tensor("norms", norm)
        check.require_shape("norms", norm, (dim,), "(head dim of the part,)")
        cast.append(_cast(norm, low))
        check.require_alike("x", tokens, norms=cast[-1])
    finish = HeadFinish(norms=tuple(cast), eps=float(eps))
    if rotary is None:
        return finish
    if isinstance(rotated, bool) or not isinstance(rotated, int) or not 1 <= rotated <= len(head_dims):
        raise ValueError(f"rotated: expected between 1 and the {len(head_dims)} parts, got {rotated!r}")
    _checked_rotary(rotary, tokens, tokens.size(0), length, head_dims[:rotated])
    cos, sin = _wide_tables(rotary, tokens)
    return finish._replace(cos=cos, sin=sin, rotated=rotated, interleaved=bool(interleaved))


def _checked_gate(gate: Tensor | None, batch: int, channels: int) -> Tensor | None:
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


def merge_heads_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    channels_first: bool = False,
) -> Tensor:
    """Heads joined and mapped back to channels: ``residual + gate * (join(x) @ weight^T + bias)``.

    Args:
        x: (B, H, N, D).
        weight: (E, H * D).
        bias: (E,).
        residual: like the output. Absent, nothing is added.
        gate: one element (SAGAN's gamma), (E,), or (B, E) (adaptive gates of diffusion Transformers).
        channels_first: make a feature map.

    Returns:
        (B, N, E); with ``channels_first`` (B, E, *spatial), the residual's shape, or (B, E, N) without one.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not fit.

    Example:
        >>> merge_heads_projection(torch.randn(2, 4, 5, 2), torch.randn(6, 8)).shape
        torch.Size([2, 5, 6])
    """
    for name, tensor, optional in (("x", x, False), ("residual", residual, True)):
        check.require_tensor(name, tensor, optional=optional)
    check.require_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, H, N, D), got {check.shape_of(x)}")
    low = _autocast_dtype(x)
    x, weight, bias = _cast(x, low), _cast(weight, low), None if bias is None else _cast(bias, low)
    _checked_linear(x, x.size(1) * x.size(3), weight, bias, "E")
    batch, length, channels = x.size(0), x.size(2), weight.size(0)
    wide_gate = _checked_gate(gate, batch, channels)
    flat: Tensor | None = None
    shape: tuple[int, ...] = (batch, channels, length) if channels_first else (batch, length, channels)
    if residual is not None:
        fits = residual.dim() >= 3 and residual.shape[:2] == (batch, channels)
        if channels_first and fits and math.prod(residual.shape[2:]) == length:
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
            gate=wide_gate is not None,
            channels_first=channels_first,
        )
        namespace = select("merge_heads_forward", x, refused, plan.slower(problem, x))
    if low is not None and any(t is not None and t.dtype != x.dtype for t in (flat, wide_gate)):
        # A residual stream kept in float32 stays float32, as torch's own promotion has it.
        y = _autograd.merge_heads(x, weight, bias, None, None, channels_first, may_use_tf32(x), namespace)
        if wide_gate is not None:
            y = y * (wide_gate.transpose(1, 2) if channels_first else wide_gate)
        return (y if flat is None else flat + y).reshape(shape)
    check.require_alike("x", x, residual=residual, gate=gate)
    y = _autograd.merge_heads(x, weight, bias, flat, wide_gate, channels_first, may_use_tf32(x), namespace)
    return y.reshape(shape)


# --------------------------------------------------------------------------------------------------
# Gaussian latent


def _rows(tensor: Tensor) -> Tensor:
    """(B, *) -> (B, D) with a contiguous last dim; a view for the halves of one encoder output."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.size(0), math.prod(tensor.shape[1:]))
    return rows if rows.size(1) <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _latent(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    generator: torch.Generator | None,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    tensors = {"mu": mu, "logvar": logvar, "prior_mu": prior_mu, "prior_logvar": prior_logvar}
    for name, tensor in tensors.items():
        check.require_tensor(name, tensor, optional=name.startswith("prior"))
        if tensor is not None:
            check.require_floating(name, tensor)
    if mu.dim() == 0:
        raise ValueError("mu: expected (B, *), got a scalar tensor")
    check.require_shape("logvar", logvar, tuple(mu.shape), "that of mu")
    if _autocast_dtype(mu) is not None:
        wide = mu.dtype
        for tensor in (logvar, prior_mu, prior_logvar):
            wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
        mu, logvar = mu.to(wide), logvar.to(wide)
        prior_mu = None if prior_mu is None else prior_mu.to(wide)
        prior_logvar = None if prior_logvar is None else prior_logvar.to(wide)
    check.require_alike("mu", mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    priors = []
    for name, tensor in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if tensor is not None:
            check.require_broadcast(name, tensor, tuple(mu.shape), "the shape of mu")
            tensor = _rows(tensor.expand(mu.shape))
        priors.append(tensor)
    seed = _draw_seed(mu.device, generator)
    namespace = select("latent_forward", mu)
    z, kl = _autograd.gaussian_latent(_rows(mu), _rows(logvar), priors[0], priors[1], seed, with_kl, namespace)
    return z if mu.dim() == 2 else z.reshape(mu.shape), kl


def reparameterize(mu: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""A sample of N(mu, e^logvar) that is differentiable in both: ``z = mu + noise * exp(logvar / 2)``.

    Kingma and Welling, "Auto-encoding variational Bayes" (2014), section 2.4. The noise is a function of one
    64-bit seed and each element's position (Philox4x32-10 and Box-Muller in float32): the same on every
    backend, and regenerated in the backward pass instead of kept.

    Args:
        mu: (B, *), floating.
        logvar: like mu; the log of the variance. NaN passes through to the elements it stands at.
        generator: source of the seed, on the tensors' device; default torch's global one.

    Returns:
        z, of mu's shape and dtype, contiguous.

    Raises:
        TypeError: integer tensors, or dtypes that differ. ValueError: shapes or devices that differ.

    Example:
        >>> h = torch.randn(4, 32)  # an encoder's output; its halves are read in place
        >>> reparameterize(*h.chunk(2, dim=1)).shape
        torch.Size([4, 16])
    """
    return _latent(mu, logvar, None, None, generator, with_kl=False)[0]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``reparameterize`` and the KL divergence from the prior, in one pass over memory.

    ``kl = 1/2 sum(e^(lv - plv) + (mu - pmu)^2 e^(-plv) - 1 - (lv - plv))`` (Kingma and Welling 2014, appendix B).

    Args:
        mu, logvar: (B, *), floating; the halves of one encoder output are read in place.
        prior_mu, prior_logvar: broadcast to mu's shape; absent, 0: the unit normal. Differentiable.
        generator: source of the seed, on the tensors' device.

    Returns:
        z like mu, and kl (B,), in nats, summed over the latent dims; float32 (float64 for float64).
        NaN in logvar passes through to that element of z and to the kl of its row, as in PyTorch.

    Raises:
        TypeError: integer tensors, or dtypes that differ. ValueError: shapes or devices that do not fit.

    Example:
        >>> z, kl = reparameterize_kl(torch.zeros(4, 16), torch.zeros(4, 16))
        >>> z.shape, kl
        (torch.Size([4, 16]), tensor([0., 0., 0., 0.]))
    """
    return _latent(mu, logvar, prior_mu, prior_logvar, generator, with_kl=True)
