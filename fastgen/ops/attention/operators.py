"""Softmax attention on 4-d tensors: forward with logsumexp, its backward, its tangent, and the gradient of that.

query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), each with a contiguous last dim;
mask: boolean (True = attend) or floating, 4-d, each dim full or 1; seed (S,) int64, S dividing B, where
there is dropout. Query i sees keys i - window_left <= j <= i + window_right; -1 is unbounded, so
causal is (-1, 0). Outputs: out like query with Dv columns, lse (B, H, N) in float32 (float64 for float64).

On CPU, torch's fused kernel serves whatever it can, with heads padded to one size, and fastgen's own where
query heads are much narrower than value heads, forwards and backwards. The rest takes a blocked implementation that
holds one tile of scores at a time, never N x M; so do tangents and their gradients, where a helper does in one pass
over memory what lies between a tile's products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen import reference
from fastgen.backend import define, has_kernel
from fastgen.ops._batching import fold, fold_seed, unfold
from fastgen.ops.attention import blocked, checks, fused, tangent
from fastgen.ops.attention.blocked import Options as Options
from fastgen.ops.attention.blocked import allocate_grad, allocate_lse, allocate_out

WIDEST_HEAD = 512
"""The largest head dim that has a CUDA kernel (csrc/attention/tiles.h)."""


WIDEST_HEAD_TWICE = 256
"""The same for tangents and second derivatives, which hold twice as many tiles."""


def refused_heads(query: Tensor, value: Tensor) -> str | None:
    """Why no CUDA kernel takes heads of this width; None where one does."""
    return _refused(query, value, WIDEST_HEAD, "attention has")


def refused_heads_twice(query: Tensor, value: Tensor) -> str | None:
    """The same for tangents and second derivatives."""
    return _refused(query, value, WIDEST_HEAD_TWICE, "tangents and second derivatives of attention have")


def _refused(query: Tensor, value: Tensor, widest: int, who: str) -> str | None:
    dims = query.size(-1), value.size(-1)
    if min(dims) > 0 and max(dims) <= widest:
        return None
    return f"{who} CUDA kernels for head dims up to {widest}, not for {dims[0]} and {dims[1]}"


# --------------------------------------------------------------------------------------------------
# The operators


_Results = TypeVar("_Results", bound=tuple[Any, ...])


def _heedless(
    run: Callable[..., _Results],
    query: Tensor,
    of_keys: tuple[Tensor | None, ...],
    mask: Tensor | None,
    options: Options,
    shown_in: tuple[int, ...] = (0,),
) -> _Results:
    """``run(*of_keys)``, whatever the keys and values hold that no query sees.

    A weight of zero times NaN is NaN, so what nobody sees shows in the results ``shown_in``. On CPU they are looked at,
    and only then are those keys taken out; elsewhere a look would wait for the device.
    """
    if mask is None and options.window_right < 0:
        return run(*of_keys)
    if query.device.type == "cpu":
        results = run(*of_keys)
        total = sum(float(results[i].sum()) for i in shown_in)
        if total == total:
            return results
    return run(*reference.without_unseen_keys(query, mask, options.window_left, options.window_right, *of_keys))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
    assisted: bool = False,
) -> tuple[Tensor, Tensor]:
    known = Options(*options)

    def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if fused.takes(query, key, value, mask, seed, known):
            out, lse = fused.forward(query, key, value, mask, known.window_right == 0, known.scale)
            if not fused.hides_nan(lse, query, key, mask, known.window_right == 0):
                return out, lse
        return blocked.forward(query, key, value, mask, seed, known, assisted)

    return _heedless(run, query, (key, value), mask, known)


def _assisted_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The same, with fastgen's own CPU kernel where the head dims differ."""
    known = Options(*options)
    if not _kernel_takes("cpu_attention_forward", query, key, value, mask, seed, known):
        return _forward(query, key, value, mask, seed, *options, assisted=True)

    def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        is_causal = known.window_right == 0
        out, lse = torch.ops.fastgen.cpu_attention_forward(query, key, value, is_causal, known.scale)
        return out, lse

    return _heedless(run, query, (key, value), mask, known)


def _kernel_takes(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Tensor | None, options: Options
) -> bool:
    """Whether fastgen's CPU kernel ``name`` takes this, and padding the queries to the values would cost more."""
    key_dim, value_dim = query.size(-1), value.size(-1)
    return (
        mask is None
        and query.dtype == torch.float32
        and key_dim <= min(64, value_dim // 2)
        and value_dim <= 256
        and value_dim % 16 == 0
        and fused.takes(query, key, value, mask, seed, options)
        and has_kernel(name, query.device)
    )


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    options = Options(0.0, -1, 0 if is_causal else -1, scale)
    return blocked.forward(query, key, value, None, None, options)


def _cpu_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
    assisted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known, mask_grad = Options(*options[:-1]), options[-1]

    def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fits = not mask_grad and fused.takes(query, key, value, mask, seed, known)
        if fits and not blocked.lse_is_coarse(lse, mask):
            causal = known.window_right == 0
            grads = fused.backward(grad_out, grad_lse, query, key, value, out, lse, mask, causal, known.scale)
            grad_query, grad_key, grad_value = (fused.settle(grad, True) for grad in grads)
            return grad_query, grad_key, grad_value, query.new_empty(0)
        grad_query, grad_key, grad_value, grad_mask = blocked.backward(
            grad_out, grad_lse, query, key, value, out, lse, mask, seed, known, mask_grad, assisted
        )
        grad_key, grad_value = allocate_grad(key).copy_(grad_key), allocate_grad(value).copy_(grad_value)
        return grad_query, grad_key, grad_value, query.new_empty(0) if grad_mask is None else grad_mask

    return _heedless(run, query, (key, value), mask, known)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_mask = mask.new_empty(mask.shape) if mask is not None and options[-1] else query.new_empty(0)
    return allocate_grad(query), allocate_grad(key), allocate_grad(value), grad_mask


def _assisted_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, with fastgen's own CPU kernel where the head dims differ."""
    known = Options(*options[:-1])
    if not _kernel_takes("cpu_attention_backward", query, key, value, mask, seed, known):
        return _backward(grad_out, grad_lse, query, key, value, out, lse, mask, seed, *options, assisted=True)

    def run(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grads = torch.ops.fastgen.cpu_attention_backward(
            grad_out, grad_lse, query, key, value, out, lse, known.window_right == 0, known.scale
        )
        return *grads, query.new_empty(0)

    return _heedless(run, query, (key, value), mask, known)


def _cpu_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(0.0, -1, 0 if is_causal else -1, scale)
    arguments = grad_out, grad_lse, query, key, value, out, lse, None, None, options, False
    grads = blocked.backward(*arguments)[:3]
    grad_query, grad_key, grad_value = (
        allocate_grad(tensor).copy_(grad) for tensor, grad in zip((query, key, value), grads, strict=True)
    )
    return grad_query, grad_key, grad_value


def _cpu_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_grad(query), allocate_grad(key), allocate_grad(value)


def _helper_weighs(query: Tensor) -> bool:
    return has_kernel("cpu_attention_weights", query.device)


def _tangent(
    assisted: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    known = Options(*options)

    def run(key: Tensor, value: Tensor, of_key: Tensor | None, of_value: Tensor | None) -> tuple[Tensor, Tensor]:
        tangents = tangent.Tangents(tangent_query, of_key, of_value, tangent_mask)
        helped = assisted and _helper_weighs(query)
        return tangent.tangent(query, key, value, lse, mask, seed, tangents, known, helped)

    return _heedless(run, query, (key, value, tangent_key, tangent_value), mask, known)


def _tangent_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return allocate_out(query, value.size(-1)), allocate_lse(query)


def _second_order(
    assisted: bool,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    known, mask_grad = Options(*options[:-1]), options[-1]

    def run(
        key: Tensor, value: Tensor, of_key: Tensor | None, of_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        tangents = tangent.Tangents(tangent_query, of_key, of_value, tangent_mask)
        *rows, grad_key, grad_value, grad_mask = tangent.second_order(
            grad_out, grad_lse, query, key, value, out, lse, mask, seed, tangents, known, mask_grad,
            assisted and _helper_weighs(query),
        )  # fmt: skip
        grad_key, grad_value = allocate_grad(key).copy_(grad_key), allocate_grad(value).copy_(grad_value)
        return rows[0], rows[1], rows[2], grad_key, grad_value, query.new_empty(0) if grad_mask is None else grad_mask

    return _heedless(run, query, (key, value, tangent_key, tangent_value), mask, known, shown_in=(0, 2))


def _second_order_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask, mask_grad = rest[2], rest[-1]
    grad_mask = mask.new_empty(mask.shape) if mask is not None and mask_grad else query.new_empty(0)
    rows = allocate_out(query, value.size(-1)), allocate_lse(query)
    return *rows, allocate_grad(query), allocate_grad(key), allocate_grad(value), grad_mask


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A mask that every batch entry shares stays shared; any other is folded with the batch."""
    if mask is None or (dim is None and mask.size(0) == 1):
        return mask
    front = mask.unsqueeze(0) if dim is None else mask.movedim(dim, 0)
    return front.expand(size, batch, *front.shape[2:]).flatten(0, 1)


def _vmap(query_at: int, mask_at: int, tangent_mask_at: int | None = None, mask_grad: bool = False) -> Any:
    """The rule of an operator: everything folds into the batch. The seed follows the mask; with ``mask_grad`` the last
    argument asks for the mask's gradient, the last result."""

    def rule(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size, query_dim = info.batch_size, in_dims[query_at]
        query = args[query_at] if query_dim is None else args[query_at].movedim(query_dim, 0)[0]
        batch = query.size(0)
        folded: list[Any] = []
        for at, (argument, dim) in enumerate(zip(args, in_dims, strict=True)):
            if at in (mask_at, tangent_mask_at):
                folded.append(_fold_mask(argument, dim, size, batch))
            elif at == mask_at + 1:
                folded.append(fold_seed(argument, dim, size))
            else:
                folded.append(fold(argument, dim, size) if isinstance(argument, Tensor) else argument)
        mask = folded[mask_at]
        wanted = mask_grad and mask is not None and args[-1]
        if wanted and mask.size(0) == 1:
            folded[mask_at] = mask.expand(size * batch, *mask.shape[1:])  # each slice wants a gradient of its own
        results = list(operator(*folded))
        if mask_grad:
            *results, of_mask = results
            if wanted:
                own = args[mask_at].size(0 if in_dims[mask_at] is None or in_dims[mask_at] > 0 else 1)
                of_mask = of_mask.unflatten(0, (size, batch))
                of_mask = of_mask.sum(1, keepdim=True) if own == 1 else of_mask
            else:
                of_mask = of_mask.reshape(size, 0)
            return (*(unfold(result, size) for result in results), of_mask), (0,) * (len(results) + 1)
        return tuple(unfold(result, size) for result in results), (0,) * len(results)

    return rule


_OPTIONS = "float dropout_p, int window_left, int window_right, float scale, bool allow_tf32"
define(
    "attention",
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? seed, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _vmap(query_at=0, mask_at=3),
    assisted=_assisted_forward,
    check=checks.attention_forward,
)
define(
    "attention",
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, {_OPTIONS}, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _vmap(query_at=2, mask_at=7, mask_grad=True),
    assisted=_assisted_backward,
    check=checks.attention_backward,
)
_TANGENTS = "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_mask"
define(
    "attention",
    "attention_tangent(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? mask, Tensor? seed, "
    f"{_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    partial(_tangent, False),
    _tangent_fake,
    _vmap(query_at=0, mask_at=5, tangent_mask_at=10),
    assisted=partial(_tangent, True),
    check=checks.attention_tangent,
)
define(
    "attention",
    "attention_second_order(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? mask, Tensor? seed, {_TANGENTS}, {_OPTIONS}, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(_second_order, False),
    _second_order_fake,
    _vmap(query_at=2, mask_at=7, tangent_mask_at=12, mask_grad=True),
    assisted=partial(_second_order, True),
    check=checks.attention_second_order,
)
define(
    "helpers",
    "cpu_attention_forward(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> (Tensor, Tensor)",
    _cpu_forward,
    _cpu_forward_fake,
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
