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
from fastgen._attention_arguments import attention_arguments, causal_bias, window_bounds
from fastgen._library import may_use_tf32, select
from fastgen._seeds import draw_seed
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
        key: (B, Hk, M, Dk); Hk is H, or divides it when ``enable_gqa``. Leading dims broadcast.
        value: (B, Hk, M, Dv). Dv need not be Dk.
        attn_mask: broadcasts to (B, H, N, M). Boolean: True where a query may attend to a key. Floating: added to the
            scores in its own precision, which may be wider than query's, and differentiable; its gradient has the
            mask's own shape. Or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: probability of dropping an attention weight, in [0, 1]. Applied whenever it is above 0.
        is_causal: query i sees keys j <= i, as torch aligns it when N and M differ. May be combined with a mask.
        scale: factor of the scores, a finite number; default ``1 / sqrt(Dk)``. For a learned factor multiply query.
        enable_gqa: let several query heads share one key and value head, the third dim from the end.
        window: (left, right): query i sees keys i - left <= j <= i + right; None on a side is unbounded.
        generator: source of the dropout seed, on the tensors' device. Under ``torch.utils.checkpoint`` it needs
            ``use_reentrant=False``.
        return_lse: also return the logsumexp of each row of scores, differentiable.

    Returns:
        out (B, H, N, Dv) in query's dtype; with ``return_lse`` also lse (B, H, N), float32 (float64 for
        float64), in nats. A row that may see no key gives 0, with lse -inf and gradients 0, never NaN.

    Raises:
        TypeError: integer inputs, a mask that is neither boolean nor floating, dtypes that differ, a tensor as scale,
            nested, sparse or quantised tensors, and tensor subclasses with a ``__torch_function__`` of their own.
        ValueError: shapes that do not fit, a negative window, a probability out of range, a scale that is not finite.
        RuntimeError: the backend ``compiled`` is forced and there is no kernel for these tensors; a derivative that
            is not there.

    On CUDA, float32 is multiplied at float32 accuracy unless ``torch.backends.cuda.matmul`` allows TF32, and kernels
    give the same bits in every run. A key that no query of the call may attend to is ignored, whatever it and its value
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
    check.require_probability("dropout_p", dropout_p, certain=True)
    window_left, window_right = window_bounds(window, is_causal)
    if type(attn_mask).__name__ == "CausalBias":
        attn_mask, bound = causal_bias(attn_mask, query, key, is_causal)
        window_right = window_right if bound is None else bound if window_right < 0 else min(window_right, bound)
    check.require_tensor("attn_mask", attn_mask, optional=True)
    low = _autocast_dtype(query)
    query, key, value = _cast(query, low), _cast(key, low), _cast(value, low)
    if dropout_p == 1:  # every weight is dropped: 0 in place of the values, with gradients of 0
        value, dropout_p = value * 0.0, 0.0
    query, key, value, mask, rows = attention_arguments(query, key, value, attn_mask, enable_gqa)
    # Without a head dim all scores are 0, whatever their factor.
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else check.require_finite("scale", scale)
    seed = draw_seed(query.device, generator) if dropout_p > 0 else None
    options = Options(dropout_p, window_left, window_right, scale, may_use_tf32(query))
    namespace = select("attention_forward", query, refused_heads(query, value))
    out, lse = _autograd.attention(query, key, value, mask, seed, options, namespace)
    if len(rows) != 3 or rows[:2] != out.shape[:2]:
        out, lse = out.reshape(*rows, value.size(-1)), lse.reshape(rows)
    return (out, lse) if return_lse else out


# --------------------------------------------------------------------------------------------------
# Multi-head projection


def _projection_input(x: Tensor, channels_first: bool) -> Tensor:
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
    if weight.dim() != 2 or weight.size(0) == 0:
        raise ValueError(f"weight: expected (num_heads * head_dim, C), got {check.shape_of(weight)}")
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
    """(1|B, N, R / 2), in float32, or float64 where x or a table is."""
    wide = any(t.dtype == torch.float64 for t in (x, *rotary))
    dtype = torch.float64 if wide else torch.float32
    cos, sin = (table.to(dtype) if table.dim() == 3 else table.to(dtype).unsqueeze(0) for table in rotary)
    return cos, sin


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Heads turned by their position: pairs (a, b) become ``(a cos - b sin, b cos + a sin)``.

    Su et al., "RoFormer: Enhanced Transformer with rotary position embedding" (2021), section 3.2.2.

    Args:
        x: (B, H, N, D).
        cos, sin: (N, R / 2) or (B, N, R / 2), R <= D. Computed in float32, or in float64 where x or a table is float64.
            The channels beyond R stay.
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
    check.require_flag("interleaved", interleaved)
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
            Autocast lowers them with the weight. ``norm_eps`` is a number >= 0.
        rotary: tables (cos, sin) by which the first ``rotated`` parts are turned, after that; see
            ``rotary_embedding``, also for ``interleaved``.

    Returns:
        q (B, Hq, N, Dk), k (B, Hk, N, Dk), v (B, Hv, N, Dv), each with a contiguous last dim.

    Raises:
        TypeError: integer input, or dtypes that differ.
        ValueError: shapes that do not fit, heads or head dims that are not positive integers, a negative ``norm_eps``.

    Example:
        >>> q, k, v = qkv_projection(torch.randn(2, 5, 6), torch.randn(24, 6), heads=(4, 1, 1), head_dims=(4, 4, 4))
        >>> q.shape, v.shape
        (torch.Size([2, 4, 5, 4]), torch.Size([2, 1, 5, 4]))
    """
    tokens = _projection_input(x, channels_first)
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
    low = _autocast_dtype(x)
    tokens, weight, bias = _cast(tokens, low), _cast(weight, low), None if bias is None else _cast(bias, low)
    _checked_linear(tokens, tokens.size(1 if channels_first else 2), weight, bias, rows)
    finish = HeadFinish()
    norms = () if norms is None else norms
    if not isinstance(norms, (tuple, list)):
        raise TypeError(f"norms: expected a tuple or list of weights, one for each part, got {type(norms).__name__}")
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
    if finish.cos is not None and (
        _may_be_differentiated(finish.cos, finish.sin) or finish.cos.dtype.itemsize > max(tokens.dtype.itemsize, 4)
    ):
        # The fused operators take tables for constants, in float32 where x is not float64.
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
    if len(norms) > len(head_dims):
        raise ValueError(f"norms: expected at most {len(head_dims)} weights, one for each part, got {len(norms)}")
    cast = []
    for norm, dim in zip(norms, head_dims, strict=False):
        check.require_tensor("norms", norm)
        check.require_shape("norms", norm, (dim,), "(head dim of the part,)")
        cast.append(_cast(norm, low))
        check.require_alike("x", tokens, norms=cast[-1])
    finish = HeadFinish(norms=tuple(cast), eps=check.require_eps("norm_eps", eps))
    if rotary is None:
        return finish
    check.require_flag("interleaved", interleaved)
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
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for name, tensor in tensors.items():
        check.require_tensor(name, tensor, optional=name in ("bias", "residual"))
    check.require_flag("channels_first", channels_first)
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
        # In this order: a length that is compared with channels would be a guard of torch.export.
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
            gate=wide_gate is not None,
            channels_first=channels_first,
        )
        namespace = select("merge_heads_forward", x, refused, plan.slower(problem, x))
    if low is not None and any(t is not None and t.dtype != x.dtype for t in (flat, wide_gate)):
        # A residual stream kept in float32 stays float32, as torch's own promotion has it.
        for name, tensor in (("residual", flat), ("gate", wide_gate)):
            if tensor is not None:
                check.require_floating(name, tensor)
                check.require_device(name, tensor, "x", x)
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
    seed = draw_seed(mu.device, generator)
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
