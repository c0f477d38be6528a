"""Attention and its forward-mode derivative in one call. Shapes: B batch, H heads, N queries, M keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen import checks as check
from fastgen.backend import may_use_tf32, select
from fastgen.functional._attention_arguments import (
    Window,
    attention_arguments,
    causal_bias,
    window_bounds,
    without_negative_bounds,
)
from fastgen.functional._autocast import autocast_dtype, lower
from fastgen.functional._overrides import handle_torch_function, overridden, relevant
from fastgen.functional._seeds import sample_seed
from fastgen.ops.attention.autograd import forward_tangent
from fastgen.ops.attention.problem import Options, Problem, Tangents, refused_heads

_NAMES = ("query", "key", "value")


def scaled_dot_product_attention_jvp(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attn_mask_tangent: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    r"""``scaled_dot_product_attention`` and its Jacobian-vector product, as ``torch.func.jvp`` returns them.

    With weights P and the tangent W of the scores, ``out_tangent = (P * (W - rowsum(P * W))) @ value + P @
    value_tangent``: ``fastgen.reference.attention_tangent``. MeanFlow (Geng et al., 2025) and continuous-time
    consistency models (Lu and Song, 2024) train with it.

    One operator computes both, so that a kernel may compute the scores once: that for sm_90a with head dims up to 64
    does (docs/kernels.md). Elsewhere the kernels of ``torch.func.jvp`` run one after the other.

    Args:
        primals: (query, key, value) as in ``scaled_dot_product_attention``: (B, H, N, Dk), (B, Hk, M, Dk) and
            (B, Hk, M, Dv), or other leading dims.
        tangents: of query, key and value, each of the shape and dtype of its primal; None is zero.
        attn_mask_tangent: of a floating attn_mask, with its shape and dtype; None is zero.
        attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, generator: as in
            ``scaled_dot_product_attention``. Both results have the same dropout.
        return_lse: return ``(out, lse), (out_tangent, lse_tangent)``.

    Returns:
        out and out_tangent, (B, H, N, Dv) in query's dtype; with ``return_lse`` also lse and lse_tangent, (B, H, N),
        float32 (float64 for float64). A fully masked row has out, out_tangent and lse_tangent 0. A key that every query
        masks is ignored, whatever it, its value and their tangents contain.

    Raises:
        TypeError: not three primals and three tangents, dtypes that differ, and what ``scaled_dot_product_attention``
            raises.
        ValueError: a tangent of another shape or device, a tangent of a mask that is not floating, and what
            ``scaled_dot_product_attention`` raises.
        RuntimeError: the backend ``compiled`` is forced and has no kernel for these tensors; or a derivative is not
            supported.

    Differentiable in reverse mode with respect to primals, tangents and mask, in O(N + M) memory per head; where only
    ``out`` has a gradient, again (gradient penalties). Forward mode raises ``RuntimeError``: use ``torch.func.jvp`` of
    ``torch.func.grad`` of ``scaled_dot_product_attention``.

    Example:
        >>> primals = [torch.randn(2, 4, 16, 8) for _ in range(3)]
        >>> out, out_tangent = scaled_dot_product_attention_jvp(primals, [torch.ones_like(t) for t in primals])
        >>> out_tangent.shape
        torch.Size([2, 4, 16, 8])
    """
    primals, tangents = _triple("primals", primals), _triple("tangents", tangents)
    everything = (*primals, *tangents, attn_mask, attn_mask_tangent)
    if overridden(*everything) and (own := relevant(*everything)):
        return handle_torch_function(  # type: ignore[no-any-return]
            scaled_dot_product_attention_jvp, own, primals, tangents, attn_mask, dropout_p, is_causal, scale,
            enable_gqa, attn_mask_tangent=attn_mask_tangent, window=window, softcap=softcap, generator=generator,
            return_lse=return_lse,
        )  # fmt: skip
    for name, primal in zip(_NAMES, primals, strict=True):
        check.require_tensor(name, primal)
    query, key, value = primals
    check.require_probability("dropout_p", dropout_p, certain=True)
    cap = check.require_softcap("softcap", softcap)
    left, right = window_bounds(window, is_causal)
    if type(attn_mask).__name__ == "CausalBias":
        bound = causal_bias(attn_mask, query, key, is_causal)
        attn_mask, right = None, bound if right is None else min(right, bound)
    check.require_tensor("attn_mask", attn_mask, optional=True)
    for name, primal, tangent in zip(_NAMES, primals, tangents, strict=True):
        _require_tangent(f"tangent of {name}", tangent, name, primal)
    if attn_mask_tangent is not None and (attn_mask is None or not attn_mask.is_floating_point()):
        got = "None" if attn_mask is None else str(attn_mask.dtype)
        raise ValueError(f"attn_mask_tangent: expected None without a floating attn_mask, which is {got}")
    _require_tangent("attn_mask_tangent", attn_mask_tangent, "attn_mask", attn_mask)

    low = autocast_dtype(query)

    def in_four_dims(tensors: Sequence[Tensor], mask: Tensor | None) -> Window:
        query, key, value = (lower(tensor, low) for tensor in tensors)
        if dropout_p == 1:  # every weight is dropped: the values become 0, with gradients of 0
            value = value * 0.0
        return without_negative_bounds(attention_arguments(query, key, value, mask, enable_gqa), left, right)

    (query, key, value, mask, rows), window_left, window_right, dropped = in_four_dims(primals, attn_mask)
    # Where there is no tangent, the primal shows the shape.
    shown = [primal if tangent is None else tangent for primal, tangent in zip(primals, tangents, strict=True)]
    of_mask = attn_mask if attn_mask_tangent is None else attn_mask_tangent
    given = in_four_dims(shown, of_mask).arguments[:4]
    wanted = (*tangents, attn_mask_tangent)
    directions = Tangents(*(None if t is None else own for t, own in zip(wanted, given, strict=True)))

    scale = max(query.size(-1), 1) ** -0.5 if scale is None else check.require_finite("scale", scale)
    dropout_p = 0.0 if dropout_p == 1 else dropout_p
    seed = sample_seed(query.device, generator) if dropout_p > 0 else None
    options = Options(dropout_p, window_left, window_right, scale, cap, may_use_tf32(query))
    namespace = select("attention_forward_tangent", query, refused_heads(query, value))
    problem = Problem(query, key, value, mask, seed, None, options, namespace)
    out, lse, out_tangent, lse_tangent = forward_tangent(problem, directions)

    def in_dims_of_caller(out: Tensor, lse: Tensor, of_dropped: float) -> tuple[Tensor, Tensor]:
        if dropped:
            out, lse = pad(out, (0, 0, dropped, 0)), pad(lse, (dropped, 0), value=of_dropped)
        if len(rows) != 3 or rows[:2] != out.shape[:2]:
            out, lse = out.reshape(*rows, value.size(-1)), lse.reshape(rows)
        return out, lse

    both = in_dims_of_caller(out, lse, -math.inf), in_dims_of_caller(out_tangent, lse_tangent, 0.0)
    return both if return_lse else (both[0][0], both[1][0])


def _triple(name: str, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 3:
        got = f"{len(tensors)} of them" if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        raise TypeError(f"{name}: expected a tuple of three, of query, key and value, got {got}")
    return tuple(tensors)


def _require_tangent(name: str, tangent: Tensor | None, of: str, primal: Tensor | None) -> None:
    check.require_tensor(name, tangent, optional=True)
    if tangent is not None and primal is not None:
        check.require_shape(name, tangent, tuple(primal.shape), f"the shape of {of}")
        check.require_alike(of, primal, **{name: tangent})
