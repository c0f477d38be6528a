"""The common call of attention on CPU at the cost of PyTorch's own: few checks, then torch's kernel and its backward.

The work per call is counted in microseconds. What is not common (windows, grouped heads, most transforms,
compilation) is left to ``autograd.attention``, which gives the same results; so are derivatives that are to be
differentiated. Where the scores are few, these, jvps and masks with a gradient are plain PyTorch, which is faster then.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from fastgen.backend import COMPILED, call, select
from fastgen.ops._checks import FLOATS
from fastgen.ops._direct import PLAIN, is_watched
from fastgen.ops.attention.autograd import backward as any_backward
from fastgen.ops.attention.fused import SHORTEST_VECTOR_FREE, additive, flash, flash_backward
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
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_INFINITY = float("inf")


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Floating and on CPU, (B, H, N, D) all, without a key that every query masks; the mask boolean or like
    query. PyTorch checks the rest."""
    if key.is_nested or value.is_nested:
        return False
    shape, of_keys = query.shape, key.shape
    if (
        of_keys != value.shape
        or not query.is_cpu
        or query.dtype not in FLOATS
        or (shape != of_keys and (shape[:2] != of_keys[:2] or shape[3:] != of_keys[3:]))
        or len(shape) != 4
        or 0 in shape
        or 0 in of_keys
    ):
        return False
    if mask is None:
        return not is_causal or of_keys[2] <= shape[2]
    own = mask.shape
    return (
        not is_causal
        and (mask.dtype == torch.bool or mask.dtype == query.dtype)
        and type(mask) in PLAIN
        and len(own) == 4
        and own[3] == of_keys[2]
        and (own[2] == 1 or own[2] == shape[2])
        and (own[1] == 1 or own[1] == shape[1])
        and (own[0] == 1 or own[0] == shape[0])
        and mask.stride(3) == 1
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """out, (B, H, N, D); None where ``autograd.attention`` has to serve, for any other arguments too."""
    if (
        type(query) not in PLAIN
        or type(key) not in PLAIN
        or type(value) not in PLAIN
        or is_watched()
        or (is_causal is not False and is_causal is not True)
        or not (scale is None or (type(scale) is float and 0.0 < scale < _INFINITY))
        or not _takes(query, key, value, mask, is_causal)
    ):
        return None
    if query.dtype not in _DTYPES:
        return _attend_in_16_bits(query, key, value, mask, is_causal, scale)
    if forward_ad._current_level >= 0 or _interpreter() is not None:
        if mask is not None or not has_few_scores(query, key) or not _is_one_jvp():
            return None
        return _out(query, key, value, is_causal, scale)
    if mask is not None and mask.requires_grad and _grad_enabled():
        if not has_few_scores(query, key):
            return None
        try:
            out = _formula(query, key, value, mask, 0.0, False, None, scale=scale)[0]
        except RuntimeError:
            return None
    elif _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        dtype = query.dtype
        if (
            not dtype == key.dtype == value.dtype
            or not (key.is_cpu and value.is_cpu and (mask is None or mask.is_cpu))
            or not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
            or _is_tracing()  # the general path says what torch.jit.trace does not record
            or is_wrapped(query)
            or is_wrapped(key)
            or is_wrapped(value)
        ):
            return None
        mask = mask if mask is None else additive(mask, dtype)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        if has_few_scores(query, key) and _saved_tensor_hooks(False) is None and (mask is None or query.requires_grad):
            out, lse = _kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
            if mask is not None:
                if _may_be_wrong(out.detach(), mask):
                    return None
            elif key.shape[2] < SHORTEST_VECTOR_FREE and _has_zero(lse):
                return None
            _AnyOrder(query, key, value, mask, is_causal, scale).attach(out.grad_fn)
            return out  # type: ignore[no-any-return]
        out = _apply(query, key, value, mask, is_causal, scale)
    else:
        try:
            out = torch_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
        except RuntimeError:  # two dtypes or devices: fastgen's checks name the argument
            return None
    if mask is not None or key.shape[2] < SHORTEST_VECTOR_FREE:
        return None if _may_be_wrong(out.detach() if out.requires_grad else out, mask) else out
    return out


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
        or not dtype == key.dtype == value.dtype
        or not (key.is_cpu and value.is_cpu and (mask is None or mask.is_cpu))
        or not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        or is_wrapped(query)
        or is_wrapped(key)
        or is_wrapped(value)
    ):
        return None
    mask = mask if mask is None else additive(mask, dtype)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        try:
            out: Tensor = _apply(query, key, value, mask, is_causal, scale)
        except _LostError:
            return None
    else:
        out, lse = flash(query, key, value, mask, is_causal, scale)
        if _hides_nan(lse, mask):
            return None
    return None if mask is not None and _may_be_wrong(out.detach(), mask) else out


class _LostError(Exception):
    """The kernel may have lost a NaN."""


def _hides_nan(lse: Tensor, mask: Tensor | None) -> bool:
    """For 16 bits: whether a row has an infinite score, or there may be NaN in all scores of a row of few keys: the
    kernel takes such rows for fully masked ones. Only they, and rows whose logsumexp happens to be 0, have one of 0."""
    return not math.isfinite(lse.sum().item()) or (mask is None and _has_zero(lse))


def has_few_scores(query: Tensor, key: Tensor) -> bool:
    """Whether the scores take at most twice the memory of query and key, and fit a processor's cache."""
    _, _, queries, dim = query.shape
    keys = key.shape[2]
    scores = queries * keys
    return scores <= _FEW and scores <= 2 * (queries + keys) * dim


_FEW = 128 * 128


def takes_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> bool:
    """Whether ``attend_with_dropout`` may serve: few scores in all, outside of transforms."""
    return (
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and not is_watched()
        and (is_causal is False or is_causal is True)
        and (scale is None or (type(scale) is float and 0.0 < scale < _INFINITY))
        and forward_ad._current_level < 0
        and _interpreter() is None
        and not _is_tracing()
        and query.dtype in _DTYPES
        and _takes(query, key, value, mask, is_causal)
        and query.dtype == key.dtype == value.dtype
        and key.is_cpu
        and value.is_cpu
        and (mask is None or mask.is_cpu)
        and query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= _FEW
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
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    sizes = (batch * heads * queries, 0, batch, heads, queries, 0, queries, keys, 0, keys)
    keep = call(COMPILED, "cpu_dropout_keep", seed, *sizes, dropout_p)
    if query.dtype == torch.float64:  # the factor too
        keep = keep.sign().double().div_(1 - dropout_p)
    scores = _scores(query, key, is_causal, scale)
    if mask is None:
        return scores.softmax(-1).mul(keep) @ value
    added: Any = additive(mask, query.dtype)
    weights = torch._safe_softmax(scores + added, -1)  # type: ignore[attr-defined]
    out: Tensor = weights.mul(keep) @ value
    return None if _may_be_wrong(out.detach(), mask) else out


def _is_one_jvp() -> bool:
    """Whether dual numbers, or one ``torch.func.jvp``, are all that is active: no other transform around or inside."""
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack:
        return True
    return len(stack) == 1 and stack[0].key() == torch._C._functorch.TransformType.Jvp


def _has_zero(tensor: Tensor) -> bool:
    return bool(tensor.count_nonzero().item() < tensor.numel())


def _may_be_wrong(out: Tensor, mask: Tensor | None) -> bool:
    """Whether a key that every query masks holds NaN, or the kernel may have lost a NaN in a row of few keys."""
    if mask is None:
        return _has_zero(out)
    total = out.sum().item()
    return total != total


class _AnyOrder:
    """Hooks on the backward of torch's kernel, for few scores: torch's gradients, but those of the formula where they
    are to be differentiated, or where a key that every query masks holds NaN.

    A function of Python costs as much as the kernel and its backward. The tensors are those that the node saves, and
    are not kept alive beyond that.
    """

    __slots__ = ("given", "is_causal", "scale", "tensors")

    def __init__(self, *arguments: Any) -> None:
        *tensors, self.is_causal, self.scale = arguments
        self.tensors = [None if tensor is None else ref(tensor) for tensor in tensors]
        self.given: dict[int, Tensor] | None = None  # gradients of running backward passes that are differentiated

    def attach(self, node: Any) -> None:
        node.register_prehook(self.before)
        node.register_hook(self.after)

    def before(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """Where the formula serves, keeps the gradient from the kernel, which takes no dual numbers and no batch."""
        # must_be_differentiable, without its calls: this runs in every backward pass.
        if not _grad_enabled() and forward_ad._current_level < 0 and _interpreter() is None:
            return None
        query = self._saved()[0]
        if grads[0] is None or query is None:  # None: released by a backward pass before, which the node reports
            return None
        self.given = self.given or {}
        self.given[_task()] = grads[0]
        return (torch.zeros(query.shape, dtype=query.dtype), *grads[1:])

    def after(self, grads: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> Any:
        if not _grad_enabled() and forward_ad._current_level < 0 and _interpreter() is None:
            # Of the gradients of query and key, either shows a NaN of the scores' gradient.
            first = None if self.tensors[3] is None else grads[1] if grads[0] is None else grads[0]
            if first is None or _is_batched(first) or (total := first.sum().item()) == total:
                return None
        grad_out = given[0] if self.given is None else self.given.pop(_task(), given[0])
        if grad_out is None:
            return None
        query, key, value, mask = self._saved()
        results = _gradients(grad_out, query, key, value, mask, self.is_causal, self.scale)
        return tuple(None if old is None else new for old, new in zip(grads, results, strict=True))

    def _saved(self) -> list[Any]:
        found = [None if saved is None else saved() for saved in self.tensors]
        for tensor in found:
            if tensor is not None:
                tensor._fix_weakref()
        return found


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
            total = 0.0 if mask is None else grads[0].sum().item()
            if total == total:
                return (*grads, None, None, None)
        if query.dtype in _DTYPES and has_few_scores(query, key) and not transforms_active():
            return (
                *only_wanted(ctx, 0, *_gradients(grad_out, query, key, value, mask, is_causal, scale)),
                *(None,) * 3,
            )
        if mask is not None:
            lse = lse.masked_fill(mask.amax(-1) == -_INFINITY, -_INFINITY)
        options = Options(dropout_p=0.0, window_left=-1, window_right=0 if is_causal else -1, scale=scale)
        saved = Saved(query, key, value, out, lse, mask, None, None, options, select("attention_forward", query))
        any_order = any_backward(grad_out, None, saved, False)
        return (*only_wanted(ctx, 0, *any_order[:3]), None, None, None)


_apply = apply_of(_Attention)


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    scores = (query * (query.size(3) ** -0.5 if scale is None else scale)) @ key.transpose(2, 3)
    if not is_causal:
        return scores
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill(later, -_INFINITY)


def _out(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """The formula with a jvp that reverse mode differentiates: that of torch's softmax works in place."""
    if not _grad_enabled():
        return _formula(query, key, value, None, 0.0, is_causal, None, scale=scale)[0]  # type: ignore[no-any-return]
    return _scores(query, key, is_causal, scale).log_softmax(-1).exp() @ value


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by their formula, which autograd differentiates; (B, H, N, M) in memory."""
    scores = _scores(query, key, is_causal, scale)
    # Fully masked rows have weights of 0.
    weights = scores.softmax(-1) if mask is None else torch._safe_softmax(scores + mask, -1)  # type: ignore[attr-defined]
    products = weights * (grad @ value.transpose(2, 3))
    of_scores = (products - weights * products.sum(-1, keepdim=True)) * scale
    return of_scores @ key, of_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad
