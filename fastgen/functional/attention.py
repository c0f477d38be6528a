"""Scaled dot-product attention. Shapes: B batch, H heads, N queries, M keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen import checks as check
from fastgen._dynamo import is_dynamo_compiling
from fastgen.backend import may_use_tf32, select
from fastgen.backend.selection import selection
from fastgen.functional._attention_arguments import (
    attention_arguments,
    causal_bias,
    checked_sinks,
    window_bounds,
    with_sinks,
    without_negative_bounds,
)
from fastgen.functional._autocast import autocast_dtype, lower
from fastgen.functional._overrides import handle_torch_function, overridden, relevant
from fastgen.functional._seeds import sample_seed
from fastgen.functional.packed import nested_attention
from fastgen.ops.attention import direct, operator_path
from fastgen.ops.attention.autograd import attention
from fastgen.ops.attention.problem import Options, Problem, refused_heads


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, ``softmax(scale * query @ key^T + mask) @ value``; a drop-in for torch's function.

    Vaswani et al., "Attention is all you need" (2017), section 3.2.1.

    Args:
        query: (B, H, N, Dk). Other numbers of leading dims are accepted as in torch: (N, Dk), (B, N, Dk),
            (..., H, N, Dk). Or a jagged nested tensor (B, H, j, Dk), as key and value then are, without attn_mask: see
            ``varlen_attention``.
        key: (B, Hk, M, Dk); Hk is H, or divides it when ``enable_gqa``. Leading dims broadcast.
        value: (B, Hk, M, Dv). Dv need not be Dk.
        attn_mask: broadcasts to (B, H, N, M). Boolean: True where a query attends to a key. Floating: added to the
            scores in its own precision, which may be higher than query's, and differentiable; its gradient has the
            mask's shape. Or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: probability of dropping an attention weight, in [0, 1]; applied whenever it is above 0.
        is_causal: query i attends to keys j <= i, aligned as in torch when N and M differ. Combines with a mask.
        scale: factor of the scores, a finite number; default ``1 / sqrt(Dk)``. For a learned factor multiply query.
        enable_gqa: let several query heads share one key and value head; heads are the third dim from the end.
        window: (left, right): query i attends to keys i - left <= j <= i + right; None is unbounded. Bounds may be
            negative: ``(None, M - N)`` is causal with the last query at the last key, and ``(left - o, o)`` a causal
            window for queries that begin at position o of the keys.
        softcap: bound of the scores before the mask is added: ``softcap * tanh(scale * query @ key^T / softcap)``, a
            number from 1e-30 to 1e30 (Gemma Team, "Gemma 2", 2024, section 2; FlashAttention 2.6). None is unbounded.
        sinks: (H,), a learned logit per head that takes part in the softmax and has no value (attention sinks: Xiao et
            al., "Efficient streaming language models with attention sinks", 2024; gpt-oss). Differentiable.
        generator: source of the dropout seed, on the tensors' device. Under ``torch.utils.checkpoint`` it requires
            ``use_reentrant=False``.
        return_lse: also return the logsumexp of each row of scores, which is differentiable.

    Returns:
        out (B, H, N, Dv) in query's dtype; with ``return_lse`` also lse (B, H, N), float32 (float64 for float64), in
        nats, of the scores and the sink. A fully masked row gives out 0, lse -inf (or the sink) and gradients 0, never
        NaN. A key that every query masks is ignored, whatever it and its value contain.

    Raises:
        TypeError: integer inputs, a mask that is neither boolean nor floating, dtypes that differ, a tensor as scale
            or softcap, a nested tensor of another layout, a sparse or quantized tensor.
        ValueError: shapes that do not match, a probability out of range, a scale that is not finite, or a softcap that
            is not positive.
        RuntimeError: the backend ``compiled`` is forced and has no kernel for these tensors; or a derivative is not
            supported.

    Twice differentiable in reverse mode (gradient penalties), once in forward mode (``torch.func.jvp``, dual numbers),
    and once in each, in either order. Memory is O(N + M) per head for all of these. A third derivative raises
    ``RuntimeError``, except for few scores on CPU, and so does forward mode over forward mode. ``fastgen.reference``
    states the formulas.

    On CUDA, float32 products have float32 accuracy unless ``torch.backends.cuda.matmul`` allows TF32, and kernels are
    deterministic.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 16, d) for d in (8, 8, 32))
        >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 16, 32])
    """
    if (
        not overridden(query)  # attend checks the types of the others
        and window is None
        and softcap is None
        and sinks is None
        and dropout_p == 0.0
        and not return_lse
        and selection.backend == "auto"
        and getattr(query, "is_cpu", False)
        and not is_dynamo_compiling()
    ):
        common = direct.attend(query, key, value, attn_mask, is_causal, scale)
        if common is not None:
            return common
    if overridden(query, key, value, attn_mask, sinks) and (own := relevant(query, key, value, attn_mask, sinks)):
        return handle_torch_function(  # type: ignore[no-any-return]
            scaled_dot_product_attention, own, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            window=window, softcap=softcap, sinks=sinks, generator=generator, return_lse=return_lse,
        )  # fmt: skip
    if getattr(query, "is_nested", False):
        return nested_attention(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            window=window, softcap=softcap, sinks=sinks, generator=generator, return_lse=return_lse,
        )  # fmt: skip
    seed = None
    if window is None and softcap is None and sinks is None and not is_dynamo_compiling():
        if not getattr(query, "is_cpu", True) or selection.backend != "auto":
            namespace = None
            if type(dropout_p) is float and 0.0 <= dropout_p < 1.0:
                tensors = query, key, value, attn_mask
                namespace = operator_path.namespace_for(*tensors, is_causal, scale, enable_gqa)
            if namespace is not None:
                seed = None if dropout_p == 0.0 else sample_seed(query.device, generator)
                both = operator_path.attend(namespace, *tensors, seed, dropout_p, is_causal, scale)
                return both if return_lse else both[0]
        elif type(dropout_p) is float and 0.0 < dropout_p < 1.0 and not return_lse:
            tensors = query, key, value, attn_mask
            if direct.takes_dropout(*tensors, is_causal, scale):
                seed = sample_seed(query.device, generator)
                common = direct.attend_with_dropout(*tensors, is_causal, scale, dropout_p, seed)
                if common is not None:
                    return common
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_tensor(name, tensor)
    check.require_probability("dropout_p", dropout_p, certain=True)
    cap = check.require_softcap("softcap", softcap)
    left, right = window_bounds(window, is_causal)
    if type(attn_mask).__name__ == "CausalBias":
        bound = causal_bias(attn_mask, query, key, is_causal)
        attn_mask, right = None, bound if right is None else min(right, bound)
    check.require_tensor("attn_mask", attn_mask, optional=True)
    check.require_tensor("sinks", sinks, optional=True)
    low = autocast_dtype(query)
    query, key, value = lower(query, low), lower(key, low), lower(value, low)
    if dropout_p == 1:  # every weight is dropped: the values become 0, with gradients of 0
        value, dropout_p = value * 0.0, 0.0
    arguments = attention_arguments(query, key, value, attn_mask, enable_gqa)
    arguments, window_left, window_right, dropped = without_negative_bounds(arguments, left, right)
    query, key, value, mask, rows = arguments
    # Without a head dim all scores are 0, whatever their factor.
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else check.require_finite("scale", scale)
    if seed is None and dropout_p > 0:
        seed = sample_seed(query.device, generator)
    options = Options(dropout_p, window_left, window_right, scale, cap, may_use_tf32(query))
    namespace = select("attention_forward", query, refused_heads(query, value))
    out, lse = attention(Problem(query, key, value, mask, seed, None, options, namespace))
    if dropped:
        out, lse = pad(out, (0, 0, dropped, 0)), pad(lse, (dropped, 0), value=-math.inf)
    if sinks is not None:
        out, lse = with_sinks(out, lse, checked_sinks(sinks, query, out.size(1)))
    if len(rows) != 3 or rows[:2] != out.shape[:2]:
        out, lse = out.reshape(*rows, value.size(-1)), lse.reshape(rows)
    return (out, lse) if return_lse else out
