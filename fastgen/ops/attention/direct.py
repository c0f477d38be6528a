"""The common call of attention on CPU at the cost of PyTorch's own: few checks, then torch's kernel and its backward.

The work per call is counted in microseconds. What is not common (windows, grouped heads, most transforms,
compilation) is left to ``autograd.attention``, which gives the same results; so are derivatives that are to be
differentiated. Where the scores are few, these, jvps and masks with a gradient are plain PyTorch, which is faster then.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from fastgen.backend import COMPILED, call, select
from fastgen.ops._checks import FLOATS
from fastgen.ops._contents import NAN, NOT_FINITE, ZERO, contents, may_overflow
from fastgen.ops._direct import PLAIN, is_watched
from fastgen.ops._direct import _autocast as _autocast
from fastgen.ops._direct import _dispatch_modes as _dispatch_modes
from fastgen.ops.attention import short, small
from fastgen.ops.attention.autograd import backward as any_backward
from fastgen.ops.attention.formula import gradients, scores_of
from fastgen.ops.attention.fused import (
    FEW_ELEMENTS,
    SHORTEST_VECTOR_FREE,
    additive,
    flash,
    flash_backward,
    has_products,
    widens,
)
from fastgen.ops.attention.problem import Options, Saved
from fastgen.ops.autograd import apply_of, is_wrapped, must_be_differentiable, only_wanted, transforms_active

_DTYPES = frozenset((torch.float32, torch.float64))
_kernel = torch._scaled_dot_product_flash_attention_for_cpu  # type: ignore[attr-defined]
_formula = torch._scaled_dot_product_attention_math  # type: ignore[attr-defined]
_interpreter = torch._C._functorch.peek_interpreter_stack
_grad_enabled = torch.is_grad_enabled
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_is_tracing = torch._C._is_tracing
_task = torch._C._current_graph_task_id
_current_node: Any = torch._C._current_autograd_node
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_INFINITY = float("inf")
_BOOLEAN, _FLOAT32 = torch.bool, torch.float32


def _reads(mask: Tensor, shape: torch.Size, keys: int, dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel takes the mask as it is: (B, H, N, M), boolean or like query. ``shape``: query's."""
    own, of_mask = mask.shape, mask.dtype
    return (
        (of_mask is dtype or of_mask is _BOOLEAN)
        and len(own) == 4
        and own[3] == keys
        and (own[2] == shape[2] or own[2] == 1)
        and (own[1] == 1 or own[1] == shape[1])
        and (own[0] == 1 or own[0] == shape[0])
        and mask.is_cpu
        and (mask.is_contiguous() or mask.stride()[3] == 1)
    )


@functools.cache
def _zero_and_infinity(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # for later calls in other modes, too
        return torch.zeros((), dtype=dtype, device="cpu"), torch.full((), -_INFINITY, dtype=dtype, device="cpu")


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``fused.additive`` of a mask that ``_reads`` takes: one operator, where that and torch's function take three."""
    if mask.dtype is not _BOOLEAN:
        return mask
    mask = torch.where(mask, *_zero_and_infinity(dtype))
    return mask if mask.stride()[3] == 1 else mask.contiguous()


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """out, (B, H, N, D); None where ``autograd.attention`` has to serve, for any other arguments
    too. ``query`` is on CPU.

    One function, because a call of Python takes a tenth of what PyTorch's function takes.
    """
    if (
        type(query) not in PLAIN
        or type(key) not in PLAIN
        or type(value) not in PLAIN
        or _dispatch_modes()
        or _autocast()
        or (is_causal is not False and is_causal is not True)
        or not (scale is None or (type(scale) is float and 0.0 < scale < _INFINITY))
    ):
        return None
    try:
        shape, of_keys = query.shape, key.shape
        if of_keys != value.shape:
            return None
    except RuntimeError:  # nested tensors have no shape
        return None
    dtype = query.dtype
    if 0 in of_keys or len(shape) != 4 or dtype not in FLOATS:
        return None
    if shape != of_keys and (
        shape[:2] != of_keys[:2]
        or shape[3] != of_keys[3]
        or shape[2] == 0
        or (is_causal and of_keys[2] > shape[2])  # every query masks the last keys
    ):
        return None
    if mask is not None and (is_causal or type(mask) not in PLAIN):
        return None
    recorded = grad_of_mask = False
    if _grad_enabled():
        recorded = query.requires_grad or key.requires_grad or value.requires_grad
        grad_of_mask = mask is not None and mask.requires_grad
    keys = of_keys[2]
    transformed = forward_ad._current_level >= 0 or _interpreter() is not None
    if not (recorded or grad_of_mask or transformed) and query.numel() * keys <= small.MOST and not _is_tracing():
        out = small.attend(query, key, value, mask, is_causal, scale, shape, of_keys)
        if out is not None:
            return out
    if mask is not None and not _reads(mask, shape, keys, dtype):
        return None
    narrow = dtype not in _DTYPES
    if (
        not (transformed or narrow or is_causal)
        and short.takes(shape, of_keys)
        and dtype is _FLOAT32
        and not _is_tracing()
    ):
        out = short.attend(query, key, value, mask, scale)
        if out is not None:
            return out
    if narrow and (mask is not None or query.numel() >= FEW_ELEMENTS or not _is_small(shape, of_keys)):
        return _attend_in_16_bits(query, key, value, mask, is_causal, scale)
    if transformed:
        if mask is not None or narrow or not has_few_scores(query, key) or not _is_one_jvp():
            return None
        return _out(query, key, value, is_causal, scale)
    if grad_of_mask:
        return _with_learned_bias(query, key, value, mask, scale)
    if recorded:
        if _is_tracing():  # the general path says what torch.jit.trace does not record
            return None
        if not _is_small(shape, of_keys) or _saved_tensor_hooks(False) is not None:
            attend_to_many = _attend_in_16_bits if narrow else _attend_to_many
            return attend_to_many(query, key, value, mask, is_causal, scale)
        if mask is not None:
            if may_overflow(key, value):
                return None
            mask = _added(mask, dtype)
    try:
        if scale is None:
            out = torch_attention(query, key, value, mask, 0.0, is_causal)
        else:
            out = torch_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
    except RuntimeError:  # two dtypes or devices: fastgen's checks name the argument
        return None
    if mask is not None:
        if contents(out, NAN) & NAN:
            return None
    elif (keys < SHORTEST_VECTOR_FREE or narrow) and contents(out, ZERO) & ZERO:
        return None  # the kernel may have lost a NaN, or in 16 bits an infinite score: such a row is 0
    if recorded and not _let_differentiate(out.grad_fn) and mask is not None:
        return None  # the formula's gradients may be NaN where a key that every query masks is large
    return out


def _with_learned_bias(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor | None:
    if not has_few_scores(query, key) or may_overflow(key, value):
        return None
    try:
        out: Tensor = _formula(query, key, value, mask, 0.0, False, None, scale=scale)[0]
    except RuntimeError:
        return None
    return None if contents(out, NAN) & NAN else out


def _are_alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Plain CPU tensors of one dtype whose last dims are contiguous, as torch's kernel takes them."""
    return (
        query.dtype == key.dtype == value.dtype
        and key.is_cpu
        and value.is_cpu
        and query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        and not (is_wrapped(query) or is_wrapped(key) or is_wrapped(value))
    )


def _attend_to_many(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """The same where derivatives are wanted and the formula would take too much memory for that of a gradient."""
    dtype = query.dtype
    if not _are_alike(query, key, value):
        return None
    mask = mask if mask is None else _added(mask, dtype)
    out: Tensor = _apply(query, key, value, mask, is_causal, query.shape[3] ** -0.5 if scale is None else scale)
    return None if _may_be_wrong(out, key, mask) else out


def _attend_in_16_bits(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """The same for bfloat16 and float16, whose second derivatives are those of the operators, in float32."""
    dtype = query.dtype
    if (
        forward_ad._current_level >= 0
        or _interpreter() is not None
        or _is_tracing()
        or (mask is not None and mask.dtype != torch.bool)
        or not _are_alike(query, key, value)
    ):
        return None
    node_wanted = _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if (
        dtype == torch.float16
        and not (node_wanted or is_causal)
        and short.takes(query.shape, key.shape)
        and not has_products(dtype)
    ):  # converting takes a quarter of what PyTorch's products take there
        in_float32 = short.attend(query.float(), key.float(), value.float(), mask, scale)
        if in_float32 is not None:
            return in_float32.to(dtype)
    mask = mask if mask is None else _added(mask, dtype)
    if node_wanted and (
        not has_few_scores(query, key) or widens(query, backward=True) or _saved_tensor_hooks(False) is not None
    ):
        try:
            out: Tensor = _apply(query, key, value, mask, is_causal, query.shape[3] ** -0.5 if scale is None else scale)
        except _LostError:
            return None
    else:
        if not node_wanted and widens(query, backward=False):
            out, lse = flash(query, key, value, mask, is_causal, query.shape[3] ** -0.5 if scale is None else scale)
        else:
            out, lse = _kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        if _hides_nan(lse, mask):
            return None
        if node_wanted:
            if mask is not None and may_overflow(key, value):
                return None
            _let_differentiate(out.grad_fn)
    return None if mask is not None and contents(out, NAN) & NAN else out


class _LostError(Exception):
    """The kernel may have lost a NaN."""


def _hides_nan(lse: Tensor, mask: Tensor | None) -> bool:
    """For 16 bits: whether a row has an infinite score, or there may be NaN in all scores of a row of few keys: the
    kernel takes such rows for fully masked ones. Only they, and rows whose logsumexp happens to be 0, have one of 0."""
    wanted = NOT_FINITE | (ZERO if mask is None else 0)
    return bool(contents(lse, wanted) & wanted)


def _may_be_wrong(out: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether a key that every query masks holds NaN, or the kernel may have lost a NaN in a row of few keys."""
    if mask is None:
        return key.shape[2] < SHORTEST_VECTOR_FREE and bool(contents(out, ZERO) & ZERO)
    return bool(contents(out, NAN) & NAN)


def has_few_scores(query: Tensor, key: Tensor) -> bool:
    """Whether the scores take at most twice the memory of query and key, and fit a processor's cache."""
    return _is_small(query.shape, key.shape)


def _is_small(shape: torch.Size, of_keys: torch.Size) -> bool:
    queries, keys = shape[2], of_keys[2]
    scores = queries * keys
    return scores <= _FEW and scores <= 2 * (queries + keys) * shape[3]


_FEW = 128 * 128


def takes_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> bool:
    """Whether ``attend_with_dropout`` may serve: few scores in all, outside of transforms."""
    if (
        type(query) not in PLAIN
        or type(key) not in PLAIN
        or type(value) not in PLAIN
        or is_watched()
        or (is_causal is not False and is_causal is not True)
        or not (scale is None or (type(scale) is float and 0.0 < scale < _INFINITY))
        or forward_ad._current_level >= 0
        or _interpreter() is not None
        or _is_tracing()
        or query.dtype not in _DTYPES
        or not query.dtype == key.dtype == value.dtype
        or not (query.is_cpu and key.is_cpu and value.is_cpu)
        or key.is_nested
        or value.is_nested
    ):
        return False
    shape, of_keys = query.shape, key.shape
    return (
        of_keys == value.shape
        and len(shape) == len(of_keys) == 4
        and shape[:2] == of_keys[:2]
        and shape[3] == of_keys[3]
        and 0 < shape[0] * shape[1] * shape[2] * of_keys[2] <= _FEW
        and shape[3] > 0
        and not (is_causal and (mask is not None or of_keys[2] > shape[2]))
        and (mask is None or _reads(mask, shape, of_keys[2], query.dtype))
    )


def attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor,
) -> Tensor | None:
    """out by the formula, which autograd differentiates to any order, with the operators' dropout mask; None where
    they have to serve, since a key that every query masks may hold NaN."""
    shape, of_keys = query.shape, key.shape
    recorded = _grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (mask is not None and mask.requires_grad)
    )
    if query.numel() * of_keys[2] <= small.MOST and not recorded:
        small_out = small.attend(query, key, value, mask, is_causal, scale, shape, of_keys, seed, dropout_p)
        if small_out is not None:
            return small_out
    if recorded and mask is not None and may_overflow(key, value):
        return None
    batch, heads, queries, _ = shape
    keys = of_keys[2]
    sizes = (batch * heads * queries, 0, batch, heads, queries, 0, queries, keys, 0, keys)
    keep = call(COMPILED, "cpu_dropout_keep", seed, *sizes, dropout_p)
    if query.dtype == torch.float64:  # the factor too
        keep = keep.sign().double().div_(1 - dropout_p)
    scores = scores_of(query, key, is_causal, scale)
    if mask is None:
        return scores.softmax(-1).mul(keep) @ value
    added: Any = additive(mask, query.dtype)
    weights = torch._safe_softmax(scores + added, -1)  # type: ignore[attr-defined]
    out: Tensor = weights.mul(keep) @ value
    return None if contents(out, NAN) & NAN else out


def _is_one_jvp() -> bool:
    """Whether dual numbers, or one ``torch.func.jvp``, are all that is active: no other transform around or inside."""
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack:
        return True
    return len(stack) == 1 and stack[0].key() == torch._C._functorch.TransformType.Jvp


def _before(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """Hook before the backward of torch's kernel, for few scores: torch's gradients, but those of the formula where
    they are to be differentiated.

    A function of Python costs as much as the kernel and its backward, and a hook a tenth of it. The hook after the
    kernel is registered by this one, where it has work to do. They hold no tensor: they read those that the node saved.
    """
    # must_be_differentiable, without its calls: this runs in every backward pass.
    if not _grad_enabled() and forward_ad._current_level < 0 and _interpreter() is None:
        return None
    node = _current_node()
    mine = object()
    if node.metadata.setdefault(_HOOKED, mine) is mine:  # once, also if two threads differentiate the graph
        hooks = node.register_hook(_after).hooks_dict_ref()
        for key in list(hooks)[:-1]:  # those of others come after it
            hooks[key] = hooks.pop(key)
    if grads[0] is None:
        return None
    if forward_ad._current_level < 0 and _interpreter() is None and not _is_batched(grads[0]):
        return None  # the hook after the kernel takes the gradient as the hooks of others leave it
    _refuse_hooks(node)
    query = node._saved_query
    node.metadata[_KEPT, _task()] = grads[0]  # from the kernel, which takes no dual numbers and no batch
    return (torch.zeros(query.shape, dtype=query.dtype), *grads[1:])


def _refuse_hooks(node: Any) -> None:
    """Raises for hooks that would be called after ``_before``, and get zeros."""
    handle = node.register_prehook(_before)
    hooks = len(handle.hooks_dict_ref())
    handle.remove()
    if hooks > 2:
        raise RuntimeError(
            "attention: expected no hooks of grad_fn.register_prehook under torch.func, dual numbers or"
            " is_grads_batched=True with create_graph=True, got some; take Tensor.register_hook of the output"
        )


def _after(grads: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> Any:
    if not _grad_enabled() and forward_ad._current_level < 0 and _interpreter() is None:
        return None
    return _any_order(grads, given)


_KEPT, _HOOKED = "fastgen: gradient of out", "fastgen: hook after the kernel"
_nodes: set[type] = set()


def _let_differentiate(node: Any) -> bool:
    """Hooks for the node of torch's kernel. False for any other node, which PyTorch differentiates itself."""
    if type(node) not in _nodes:
        if type(node).__name__ != "ScaledDotProductFlashAttentionForCpuBackward0":
            return False
        _nodes.add(type(node))
    node.register_prehook(_before)
    return True


def _any_order(grads: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> Any:
    node = _current_node()
    grad_out = node.metadata.pop((_KEPT, _task()), given[0])
    if grad_out is None:
        return None
    return tuple(None if old is None else new for old, new in zip(grads, _differentiable(grad_out, node), strict=False))


def _differentiable(grad_out: Tensor, node: Any) -> tuple[Any, ...]:
    """Gradients of query, key and value that autograd differentiates."""
    query, key, value, mask = node._saved_query, node._saved_key, node._saved_value, node._saved_attn_mask
    scale = query.size(3) ** -0.5 if node._saved_scale is None else node._saved_scale
    if query.dtype in _DTYPES:
        return gradients(grad_out, query, key, value, mask, node._saved_is_causal, scale)[:3]
    out, lse = node._saved_output, node._saved_logsumexp
    return _by_operators(grad_out, (query, key, value, out, lse), mask, node._saved_is_causal, scale)


def _by_operators(
    grad_out: Tensor, tensors: tuple[Tensor, ...], mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Any, ...]:
    query, key, value, out, lse = tensors
    if mask is not None:
        lse = lse.masked_fill(mask.amax(-1) == -_INFINITY, -_INFINITY)
    options = Options(dropout_p=0.0, window_left=-1, window_right=0 if is_causal else -1, scale=scale)
    saved = Saved(query, key, value, out, lse, mask, None, None, options, select("attention_forward", query))
    return any_backward(grad_out, None, saved, False)[:3]


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        if query.dtype in _DTYPES:
            out, lse = _kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        else:
            out, lse = flash(query, key, value, mask, is_causal, scale)
            if _hides_nan(lse, mask):
                raise _LostError
        ctx.save_for_backward(query, key, value, out, lse, mask)
        ctx.options = is_causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, mask = ctx.saved_tensors
        is_causal, scale = ctx.options
        grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
        if not must_be_differentiable():
            grads = flash_backward(grad_out, query, key, value, out, lse, mask, is_causal, scale)
            if mask is None or not contents(grads[0], NAN) & NAN:
                return (*grads, None, None, None)
        if (
            query.dtype in _DTYPES
            and has_few_scores(query, key)
            and not transforms_active()
            and (mask is None or not may_overflow(key, value))
        ):
            return (
                *only_wanted(ctx, 0, *gradients(grad_out, query, key, value, mask, is_causal, scale)[:3]),
                *(None,) * 3,
            )
        any_order = _by_operators(grad_out, (query, key, value, out, lse), mask, is_causal, scale)
        return (*only_wanted(ctx, 0, *any_order), None, None, None)


_apply = apply_of(_Attention)


def _out(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """The formula with a jvp that reverse mode differentiates: that of torch's softmax works in place."""
    if not _grad_enabled():
        return _formula(query, key, value, None, 0.0, is_causal, None, scale=scale)[0]  # type: ignore[no-any-return]
    return scores_of(query, key, is_causal, scale).log_softmax(-1).exp() @ value
