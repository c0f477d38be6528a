"""Softmax attention on 4-d tensors: forward with logsumexp, its backward, its tangent, and the gradient of that.

query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), each with a contiguous last dim;
mask: boolean (True = attend) or floating, 4-d, each dim full or 1; seed (S,) int64, S dividing B, where
there is dropout. Query i attends to keys i - window_left <= j <= i + window_right; -1 is unbounded, so
causal is (-1, 0). sequences (2, S + 1) int32: where packed sequences begin, see ``Problem``. Outputs: out like
query with Dv columns, lse (B, H, N) in float32 (float64 for float64).

On CPU, torch's fused kernel (``fused``) serves what it takes, with heads padded to one size, and fastgen's own kernel
where query heads are much narrower than value heads, in the forward and the backward pass. The blocked implementation
(``blocked``) serves everything else: it holds one tile of scores at a time, never N x M. So do tangents and their
gradients (``tangent``). Compiled helpers do the work between a tile's products in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen.backend import COMPILED_DTYPES, TORCH, define, helper
from fastgen.ops.attention import blocked, checks, decomposition, fused, packed, tangent
from fastgen.ops.attention.batching import vmap_rule
from fastgen.ops.attention.blocked import allocate_grad, allocate_lse, allocate_out
from fastgen.ops.attention.masking import zero_masked_keys
from fastgen.ops.attention.problem import Options, Problem, Saved, Tangents

# --------------------------------------------------------------------------------------------------
# Implementations receive the namespace, then ``*args`` in the order of the schema, and pack them into structs once.


_Call = TypeVar("_Call", Problem, Saved)
_Results = TypeVar("_Results", bound=tuple[Any, ...])
_NO_TANGENTS = Tangents()


def _ignoring_masked_keys(
    run: Callable[[_Call, Tangents], _Results],
    call: _Call,
    tangents: Tangents = _NO_TANGENTS,
    checked: tuple[int, ...] = (0,),
) -> _Results:
    """``run(call, tangents)``, whatever the keys and values that every query masks contain.

    A weight of zero times NaN is NaN, and it shows in the results ``checked``. On CPU these are tested, and only if
    there is a NaN are the masked keys set to zero; on other devices the test would synchronize.
    """
    options = call.options
    if call.mask is None and options.window_right < 0:
        return run(call, tangents)
    if call.query.device.type == "cpu":
        results = run(call, tangents)
        total = sum(float(results[i].sum()) for i in checked)
        if total == total:
            return results
    of_keys = (call.key, call.value, tangents.key, tangents.value)
    bounds = options.window_left, options.window_right
    key, value, tangent_key, tangent_value = zero_masked_keys(call.query, call.mask, *bounds, *of_keys)
    call = call._replace(key=key, value=value)
    return run(call, tangents._replace(key=tangent_key, value=tangent_value))


# --------------------------------------------------------------------------------------------------
# Forward


def _forward(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem.of((*args, namespace))
    if problem.sequences is None:
        return _ignoring_masked_keys(_run_forward, problem)
    return packed.forward(_forward, problem)


def _run_forward(problem: Problem, tangents: Tangents) -> tuple[Tensor, Tensor]:
    kernel = _narrow_heads_kernel(problem, "cpu_attention_forward")
    if kernel is not None:
        options, query = problem.options, problem.query
        tensors = (tensor.float() for tensor in problem[:3])
        out, lse = kernel(*tensors, options.window_right == 0, options.scale)
        return out if out.dtype == query.dtype else allocate_out(query, out.size(-1)).copy_(out), lse
    results = fused.forward(problem) if fused.takes(problem) else None
    return blocked.forward(problem) if results is None else results


def _narrow_heads_kernel(problem: Problem | Saved, name: str) -> Callable[..., Any] | None:
    """fastgen's CPU kernel ``name``, of float32 operands, where it takes the problem and padding queries to the values
    would cost more."""
    query, key_dim, value_dim = problem.query, problem.query.size(-1), problem.value.size(-1)
    if 2 * key_dim > value_dim:
        return None
    takes = (
        key_dim <= 64
        and problem.mask is None
        and query.dtype in COMPILED_DTYPES
        and value_dim <= 256
        and value_dim % 16 == 0
        and fused.takes(problem)
    )
    return helper(problem.namespace, name, query.device) if takes else None


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    options = Options(0.0, -1, 0 if is_causal else -1, scale)
    return blocked.forward(Problem(query, key, value, None, None, None, options, TORCH))


# --------------------------------------------------------------------------------------------------
# Backward


def _backward(
    namespace: str, grad_out: Tensor, grad_lse: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, mask_grad = args
    saved = Saved.of((*rest, namespace))
    if saved.sequences is not None:
        return packed.backward(_backward, grad_out, grad_lse, saved)

    def run(saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        options, empty = saved.options, saved.query.new_empty(0)
        kernel = _narrow_heads_kernel(saved, "cpu_attention_backward")
        if kernel is not None:
            tensors = (None if tensor is None else tensor.float() for tensor in (grad_out, grad_lse, *saved[:5]))
            grads = kernel(*tensors, options.window_right == 0, options.scale)
            if saved.query.dtype != torch.float32:
                grads = tuple(allocate_grad(like).copy_(grad) for like, grad in zip(saved[:3], grads, strict=True))
            return *grads, empty
        if not mask_grad and fused.takes(saved) and not blocked.lse_is_coarse(saved.lse, saved.mask):
            return *fused.backward(grad_out, grad_lse, saved), empty
        grad_query, grad_key, grad_value, grad_mask = blocked.backward(grad_out, grad_lse, saved, mask_grad)
        grad_key = allocate_grad(saved.key).copy_(grad_key)
        grad_value = allocate_grad(saved.value).copy_(grad_value)
        return grad_query, grad_key, grad_value, empty if grad_mask is None else grad_mask

    return _ignoring_masked_keys(run, saved)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask, mask_grad = rest[2], rest[-1]
    grad_mask = mask.new_empty(mask.shape) if mask is not None and mask_grad else query.new_empty(0)
    return allocate_grad(query), allocate_grad(key), allocate_grad(value), grad_mask


def _cpu_backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, is_causal, scale = args
    options = Options(0.0, -1, 0 if is_causal else -1, scale)
    saved = Saved._make((*tensors, None, None, None, options, TORCH))
    grads = blocked.backward(grad_out, grad_lse, saved, False)[:3]
    grad_query, grad_key, grad_value = (
        allocate_grad(tensor).copy_(grad) for tensor, grad in zip(saved[:3], grads, strict=True)
    )
    return grad_query, grad_key, grad_value


def _cpu_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_grad(query), allocate_grad(key), allocate_grad(value)


# --------------------------------------------------------------------------------------------------
# Tangent and second order


def _tangent(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    saved, tangents = Saved.of((*args[:8], *args[12:], namespace)), Tangents(*args[8:12])
    if saved.sequences is not None:
        return packed.tangent(_tangent, saved, tangents)
    return _ignoring_masked_keys(tangent.tangent, saved, tangents)


def _second_order(
    namespace: str, grad_out: Tensor, grad_lse: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *options, mask_grad = args[12:]
    saved, tangents = Saved.of((*args[:8], *options, namespace)), Tangents(*args[8:12])
    if saved.sequences is not None:
        return packed.second_order(_second_order, grad_out, grad_lse, saved, tangents)

    def run(saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        *rows, grad_key, grad_value, grad_mask = tangent.second_order(grad_out, grad_lse, saved, tangents, mask_grad)
        grad_key = allocate_grad(saved.key).copy_(grad_key)
        grad_value = allocate_grad(saved.value).copy_(grad_value)
        grad_mask = saved.query.new_empty(0) if grad_mask is None else grad_mask
        return rows[0], rows[1], rows[2], grad_key, grad_value, grad_mask

    return _ignoring_masked_keys(run, saved, tangents, checked=(0, 2))


def _second_order_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_forward_fake(query, key, value), *_backward_fake(grad_out, grad_lse, query, key, value, *rest)


# --------------------------------------------------------------------------------------------------
# Schemas


_NARROW = "query heads at most half as wide as value heads, without mask, window and dropout, causal or not"
_KEEP = {"cpu_dropout_keep": "dropout masks"}
_WEIGHTS = {"cpu_attention_weights": "the float32 arithmetic between the products of a tile", **_KEEP}
_FORWARD_PARTS = {"cpu_attention_forward": _NARROW, "cpu_attention_softmax": "the softmax of a float32 tile", **_KEEP}
_BACKWARD_PARTS = {
    "cpu_attention_backward": _NARROW,
    "cpu_attention_softmax_backward": "the softmax gradient of a float32 tile",
    **_KEEP,
}
_OPTIONS = "float dropout_p, int window_left, int window_right, float scale, float softcap, bool allow_tf32"
define(
    "attention",
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? seed, Tensor? sequences, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    vmap_rule(query_at=0, mask_at=3),
    check=checks.attention_forward,
    parts=_FORWARD_PARTS,
    takes_namespace=True,
    decomposition=decomposition.forward,
)
define(
    "attention",
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, Tensor? sequences, {_OPTIONS}, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    vmap_rule(query_at=2, mask_at=7, mask_grad=True),
    check=checks.attention_backward,
    parts=_BACKWARD_PARTS,
    takes_namespace=True,
)
_TANGENTS = "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_mask"
define(
    "attention",
    "attention_tangent(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? mask, Tensor? seed, "
    f"Tensor? sequences, {_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _tangent,
    _forward_fake,
    vmap_rule(query_at=0, mask_at=5, tangent_mask_at=11),
    check=checks.attention_tangent,
    parts=_WEIGHTS,
    takes_namespace=True,
)
define(
    "attention",
    "attention_second_order(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, Tensor? sequences, {_TANGENTS}, {_OPTIONS}, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _second_order,
    _second_order_fake,
    vmap_rule(query_at=2, mask_at=7, tangent_mask_at=13, mask_grad=True),
    check=checks.attention_second_order,
    parts=_WEIGHTS,
    takes_namespace=True,
)
define(
    "helpers",
    "cpu_attention_forward(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> (Tensor, Tensor)",
    _cpu_forward,
    _forward_fake,
    check=checks.cpu_attention_forward,
)
define(
    "helpers",
    "cpu_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
    _cpu_backward,
    _cpu_backward_fake,
    check=checks.cpu_attention_backward,
)
define(
    "helpers",
    "cpu_attention_weights(Tensor(a!) scores, Tensor(b!) direction, Tensor lse, Tensor? keep, Tensor(c!)? grads, "
    "Tensor? delta, Tensor(d!)? cross) -> Tensor",
    tangent.weigh,
    lambda scores, direction, lse, *rest: torch.empty_like(lse),
    check=checks.cpu_attention_weights,
)
define(
    "helpers",
    "cpu_dropout_keep(Tensor seed, int rows_per_seed, int first_batch, int batches, int heads, int length, "
    "int first_query, int queries, int keys, int first_key, int last_key, float p) -> Tensor",
    blocked.keep_of_tile,
    blocked.keep_fake,
    check=checks.cpu_dropout_keep,
)
define(
    "helpers",
    "cpu_attention_softmax(Tensor(a!) scores, Tensor? keep, Tensor(b!) lse) -> ()",
    blocked.softmax_of_tile,
    lambda scores, keep, lse: None,
    check=checks.cpu_attention_softmax,
)
define(
    "helpers",
    "cpu_attention_softmax_backward(Tensor(a!) scores, Tensor(b!) grads, Tensor? keep, Tensor lse, Tensor delta) -> ()",
    blocked.softmax_backward_of_tile,
    lambda scores, grads, keep, lse, delta: None,
    check=checks.cpu_attention_softmax_backward,
)
