"""Softmax attention on 4-d tensors: forward with logsumexp, its backward, its tangent, both, and the gradient of that.

query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), each with a contiguous last dim;
mask: boolean (True = attend) or floating, 4-d, each dim full or 1; seed (S,) int64, S dividing B, where
there is dropout. Query i attends to keys i - window_left <= j <= i + window_right; -1 is unbounded, so
causal is (-1, 0). sequences (2, S + 1) int32: where packed sequences begin, see ``Problem``. Outputs: out like
query with Dv columns, lse (B, H, N) in float32 (float64 for float64).

On CPU, torch's fused kernel (``fused``) serves equal head dims where it takes the call, and fastgen's own fused kernels
(``native``) the rest of float32, with tangents and their gradients; beyond them torch's serves with heads padded to one
size. The blocked implementation (``blocked``, ``tangent``) serves everything else: it holds one tile of scores at a
time, never N x M. Compiled helpers do the work between a tile's products in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen.backend import TORCH, define
from fastgen.ops.attention import blocked, checks, decomposition, fused, native, packed, tangent
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
    kernel = native.first_order_kernel(problem, "cpu_attention_forward")
    if kernel is not None:
        query, options = problem.query, problem.options
        tensors = (tensor.float() for tensor in problem[:3])
        out, lse = kernel(*tensors, problem.mask, problem.seed, *options[:4])
        return out if out.dtype == query.dtype else allocate_out(query, out.size(-1)).copy_(out), lse
    results = fused.forward(problem) if fused.takes(problem) else None
    return blocked.forward(problem) if results is None else results


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _cpu_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return blocked.forward(Problem._make((*args[:5], None, Options(*args[5:]), TORCH)))


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
        coarse = blocked.lse_is_coarse(saved.lse, saved.mask)
        kernel = None if coarse else native.first_order_kernel(saved, "cpu_attention_backward", mask_grad)
        if kernel is not None:
            tensors = (None if tensor is None else tensor.float() for tensor in (grad_out, grad_lse, *saved[:5]))
            *grads, grad_mask = kernel(*tensors, saved.mask, saved.seed, *options[:4], mask_grad)
            if saved.query.dtype != torch.float32:
                grads = [allocate_grad(like).copy_(grad) for like, grad in zip(saved[:3], grads, strict=True)]
            return grads[0], grads[1], grads[2], grad_mask
        if not mask_grad and not coarse and fused.takes(saved):
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


def _cpu_backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, dropout_p, window_left, window_right, scale, mask_grad = args
    saved = Saved._make((*tensors, None, Options(dropout_p, window_left, window_right, scale), TORCH))
    *grads, grad_mask = blocked.backward(grad_out, grad_lse, saved, mask_grad)
    query, key, value = (allocate_grad(t).copy_(grad) for t, grad in zip(saved[:3], grads, strict=True))
    return query, key, value, saved.query.new_empty(0) if grad_mask is None else grad_mask


# --------------------------------------------------------------------------------------------------
# Tangent and second order


def _tangent(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    saved, tangents = Saved.of((*args[:8], *args[12:], namespace)), Tangents(*args[8:12])
    if saved.sequences is not None:
        return packed.tangent(_tangent, saved, tangents)
    return _ignoring_masked_keys(_run_tangent, saved, tangents)


def _run_tangent(saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor]:
    kernel = native.kernel(saved, "cpu_attention_tangent", tangents.mask)
    if kernel is None:
        return tangent.tangent(saved, tangents)
    results: tuple[Tensor, Tensor] = kernel(*saved[:7], *tangents, *saved.options[:4])
    return results


def _forward_tangent(namespace: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, tangents, options = args[:6], args[6:10], args[10:]
    out, lse = _forward(namespace, *tensors, *options)
    return out, lse, *_tangent(namespace, *tensors[:3], out, lse, *tensors[3:], *tangents, *options)


def _forward_tangent_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_forward_fake(query, key, value), *_forward_fake(query, key, value)


def _second_order(
    namespace: str, grad_out: Tensor, grad_lse: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *options, mask_grad = args[12:]
    saved, tangents = Saved.of((*args[:8], *options, namespace)), Tangents(*args[8:12])
    if saved.sequences is not None:
        return packed.second_order(_second_order, grad_out, grad_lse, saved, tangents)

    def run(saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        kernel = None if mask_grad else native.kernel(saved, "cpu_attention_second_order", tangents.mask)
        if kernel is not None:
            *tensors, options, _ = saved
            results = kernel(grad_out, native.as_float32(grad_lse), *tensors[:7], *tangents, *options[:4])
            return *results, saved.query.new_empty(0)
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


def _cpu_tangent(*args: Any) -> tuple[Tensor, Tensor]:
    saved, tangents = Saved._make((*args[:7], None, Options(*args[11:]), TORCH)), Tangents(*args[7:11])
    return tangent.tangent(saved, tangents)


def _cpu_second_order(
    grad_out: Tensor, grad_lse: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved, tangents = Saved._make((*args[:7], None, Options(*args[11:]), TORCH)), Tangents(*args[7:11])
    out, lse, *grads, _ = tangent.second_order(grad_out, grad_lse, saved, tangents, False)
    query, key, value = (allocate_grad(t).copy_(grad) for t, grad in zip(saved[:3], grads, strict=True))
    return out, lse, query, key, value


def _cpu_second_order_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_forward_fake(query, key, value), allocate_grad(query), allocate_grad(key), allocate_grad(value)


# --------------------------------------------------------------------------------------------------
# Schemas


_KEEP = {"cpu_dropout_keep": "dropout masks"}
_WEIGHTS = {"cpu_attention_weights": "the float32 arithmetic between the products of a tile", **_KEEP}
_FUSED = "float32 without softcap"
_TANGENT_PARTS = {"cpu_attention_tangent": _FUSED, **_WEIGHTS}
_SECOND_ORDER_PARTS = {"cpu_attention_second_order": f"{_FUSED}, and no gradient of the mask", **_WEIGHTS}
_FORWARD_PARTS = {"cpu_attention_forward": _FUSED, "cpu_attention_softmax": "the softmax of a float32 tile", **_KEEP}
_BACKWARD_PARTS = {
    "cpu_attention_backward": f"{_FUSED}, and a gradient of a mask that has all queries and keys",
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
    parts=_TANGENT_PARTS,
    takes_namespace=True,
)
define(
    "attention",
    "attention_forward_tangent(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? seed, "
    f"Tensor? sequences, {_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_tangent,
    _forward_tangent_fake,
    vmap_rule(query_at=0, mask_at=3, tangent_mask_at=9),
    check=checks.attention_forward_tangent,
    parts={**_FORWARD_PARTS, **_TANGENT_PARTS},
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
    parts=_SECOND_ORDER_PARTS,
    takes_namespace=True,
)
_WINDOW = "float dropout_p, int window_left, int window_right, float scale"
define(
    "helpers",
    f"cpu_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? seed, {_WINDOW}) "
    "-> (Tensor, Tensor)",
    _cpu_forward,
    _forward_fake,
    check=checks.cpu_attention_forward,
)
define(
    "helpers",
    "cpu_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, {_WINDOW}, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _cpu_backward,
    _backward_fake,
    check=checks.cpu_attention_backward,
)
define(
    "helpers",
    "cpu_attention_tangent(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? mask, Tensor? seed, "
    f"{_TANGENTS}, {_WINDOW}) -> (Tensor, Tensor)",
    _cpu_tangent,
    _forward_fake,
    check=checks.cpu_attention_tangent,
)
define(
    "helpers",
    "cpu_attention_second_order(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, {_TANGENTS}, {_WINDOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cpu_second_order,
    _cpu_second_order_fake,
    check=checks.cpu_attention_second_order,
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
