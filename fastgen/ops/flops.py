"""Operation counts for ``torch.utils.flop_counter.FlopCounterMode``.

As in PyTorch, a multiply-add counts twice, only matrix products count, and masks, windows and causality do not lower
the count of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from fastgen.backend.registry import COMPILED, TORCH, operator

Shape = Any  # torch.Size; in place of other tensors, too


def _attention(query: Shape, key: Shape, value: Shape, key_products: int, value_products: int) -> int:
    """Products of depth Dk and Dv for each pair of query and key."""
    batch, heads, queries, key_dim = query
    depth = key_products * key_dim + value_products * value[-1]
    return int(2 * batch * heads * queries * key[-2] * depth)


def _attention_forward(query: Shape, key: Shape, value: Shape, *rest: Any, **out: Any) -> int:
    return _attention(query, key, value, 1, 1)


def _attention_backward(
    grad_out: Shape, grad_lse: Shape | None, query: Shape, key: Shape, value: Shape, *rest: Any, **out: Any
) -> int:
    return _attention(query, key, value, 3, 2)


def _attention_tangent(query: Shape, key: Shape, value: Shape, *rest: Any, **out: Any) -> int:
    """Scores, and two products for each of the tangents of scores and output."""
    return _attention(query, key, value, 3, 2)


def _attention_forward_tangent(query: Shape, key: Shape, value: Shape, *rest: Any, **out: Any) -> int:
    """The same and the output: the scores are those of both."""
    return _attention(query, key, value, 3, 3)


def _attention_second_order(
    grad_out: Shape, grad_lse: Shape | None, query: Shape, key: Shape, value: Shape, *rest: Any, **out: Any
) -> int:
    """Scores and their tangents (3 products), gradients of the weights and their tangents (2), results (2 for each of
    query and key, 1 for value)."""
    return _attention(query, key, value, 7, 3)


def _linear(x: Shape, weight: Shape, products: int) -> int:
    """Products of x with an (O, I) weight; x has I values for each of its tokens, in any dims."""
    return int(products * 2 * weight[0] * x.numel())


def _projection_forward(x: Shape, weight: Shape, *rest: Any, **out: Any) -> int:
    return _linear(x, weight, 1)


def _projection_backward(grads: Any, kept: Any, x: Shape, weight: Shape, *rest: Any, **out: Any) -> int:
    return _linear(x, weight, 2)


def _merge_heads_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **out: Any) -> int:
    return _linear(x, weight, 2)


FORMULAS: dict[str, Callable[..., int]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_tangent": _attention_tangent,
    "attention_forward_tangent": _attention_forward_tangent,
    "attention_second_order": _attention_second_order,
    "projection_forward": _projection_forward,
    "projection_backward": _projection_backward,
    "merge_heads_forward": _projection_forward,
    "merge_heads_backward": _merge_heads_backward,
}


def register() -> None:
    """Registers the formulas for the operators of both namespaces."""
    for namespace in (COMPILED, TORCH):
        for name, formula in FORMULAS.items():
            register_flop_formula([operator(namespace, name)])(formula)  # type: ignore[arg-type]
