"""Derivatives of the multi-head projections, which are linear in each argument.

A backward pass that is itself differentiated calls the operators' PyTorch implementation, which autograd records. It is
a formula of the saved inputs and never calls ``torch.autograd.grad`` on them: one input may have been computed from
another, and that path would be counted twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen.backend import COMPILED, COMPILED_DTYPES, call, helper, overload
from fastgen.ops.autograd import (
    apply_of,
    choose,
    formula_of,
    in_graph,
    must_be_differentiable,
    only_wanted,
    record,
    tangent_formula,
    transforms_active,
)
from fastgen.ops.projection import epilogue, operators
from fastgen.ops.projection.dispatch import backward_operator, by_pytorch
from fastgen.ops.projection.epilogue import HeadEpilogue
from fastgen.ops.projection.layout import Layout, length_first, split_heads, to_tokens
from fastgen.ops.projection.operators import WIDEST_CPU_HEAD

_IDENTITY = HeadEpilogue()


def _run_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, namespace: str
) -> tuple[Tensor, ...]:
    return _run_with_epilogue(x, weight, bias, _IDENTITY, layout, namespace, keep=False)


def _run_with_epilogue(
    x: Tensor, weight: Tensor, bias: Tensor | None, after: HeadEpilogue, layout: Layout, namespace: str, keep: bool
) -> tuple[Tensor, ...]:
    heads, head_dims, channels_first, allow_tf32 = layout
    tensors = (x, weight, bias, list(after.norms), after.cos, after.sin)
    numbers = (heads, head_dims, channels_first, after.eps, after.rotated, after.interleaved, keep, allow_tf32)
    return tuple(call(namespace, "projection_forward", *tensors, *numbers))


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.save_for_forward(*inputs[:2])
    ctx.bias = inputs[2] is not None
    ctx.layout, ctx.namespace = inputs[3:]


class _Projection(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run_projection(*inputs)
        _save_projection(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layout = ctx.layout
        numbers = (ctx.bias, layout.channels_first, 0.0, 0, False, layout.allow_tf32)
        backward = backward_operator(ctx.namespace, "projection_backward", operators.backward, grads)
        grad_x, grad_weight, grad_bias, _ = backward(list(grads), [], x, weight, [], None, None, *numbers)
        return (*only_wanted(ctx, 0, grad_x, grad_weight, grad_bias), None, None)


class _TransformedProjection(Function):
    forward = staticmethod(_run_projection)
    setup_context = staticmethod(_save_projection)
    backward = _Projection.backward
    generate_vmap_rule = True

    @staticmethod
    @tangent_formula
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[Tensor, ...]:
        x, weight = saved
        t_x, t_weight, t_bias = tangents[:3]
        layout = ctx.layout
        y = torch.zeros((), dtype=x.dtype, device=x.device)
        if t_x is not None:
            y = y + to_tokens(t_x, layout.channels_first) @ weight.t()
        if t_weight is not None:
            y = y + to_tokens(x, layout.channels_first) @ t_weight.t()
        if t_bias is not None:
            y = y + t_bias
        length = x.size(2 if layout.channels_first else 1)
        parts = split_heads(y.expand(x.size(0), length, -1), layout)
        return tuple(part.clone() for part in parts)


class _PartEpilogue(Function):
    """The epilogue of one part, by the compiled CPU kernel; reverse mode only."""

    @staticmethod
    def forward(
        ctx: Any, part: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, *options: Any
    ) -> Tensor:
        ctx.save_for_backward(part, norm, cos, sin)
        ctx.options = options
        result: Tensor = call(COMPILED, "cpu_finish_heads", part, norm, cos, sin, *options)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grad, *ctx.saved_tensors, *ctx.options)
        backward = backward_operator(COMPILED, "cpu_finish_heads_backward", epilogue.part_backward, [grad])
        grad_part, grad_norm = backward(*arguments)
        return (*only_wanted(ctx, 0, grad_part, grad_norm), None, None, None, None)


def _apply_epilogue(parts: list[Tensor], after: HeadEpilogue, namespace: str) -> list[Tensor]:
    """The epilogue apart from the product: in one pass over memory where the compiled CPU kernel takes the parts."""
    compiled = helper(namespace, "cpu_finish_heads", parts[0].device)
    takes = parts[0].dtype in COMPILED_DTYPES and max(p.size(-1) for p in parts) <= WIDEST_CPU_HEAD
    if compiled is None or not takes or transforms_active():
        return epilogue.apply(parts, after)
    results = list(parts)
    for i in range(after.parts):
        norm, cos, sin = after.of_part(i)
        function = choose(_PartEpilogue, _PartEpilogue, parts[i], norm)
        run: Callable[..., Tensor] = partial(call, COMPILED, "cpu_finish_heads")
        run = run if function is None else function.apply
        results[i] = run(parts[i], norm, cos, sin, after.eps, after.interleaved)
    return results


class _ProjectionWithEpilogue(Function):
    """With norms or rotary tables; reverse mode only. A gradient that is differentiated comes from the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        after: HeadEpilogue,
        layout: Layout,
        namespace: str,
        *norms: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.namespace, ctx.norms = layout, namespace, len(norms)
        ctx.numbers = (layout.channels_first, after.eps, after.rotated, after.interleaved, layout.allow_tf32)
        outputs = _run_with_epilogue(x, weight, bias, after, layout, namespace, keep=True)
        count = len(layout.heads)
        ctx.save_for_backward(x, weight, bias, after.cos, after.sin, *norms, *outputs[count:])
        return outputs[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cos, sin, *rest = ctx.saved_tensors
        norms, kept = rest[: ctx.norms], rest[ctx.norms :]
        if must_be_differentiable() and norms:
            # Saved outputs are constants to autograd.
            kept = list(projection(x, weight, bias, _IDENTITY, ctx.layout, ctx.namespace)[: ctx.norms])
        backward = backward_operator(ctx.namespace, "projection_backward", operators.backward, grads)
        grad_x, grad_weight, grad_bias, grad_norms = backward(
            list(grads), kept, x, weight, norms, cos, sin, bias is not None, *ctx.numbers
        )
        first = only_wanted(ctx, 0, grad_x, grad_weight, grad_bias)
        return (*first, None, None, None, *only_wanted(ctx, 6, *grad_norms))


@in_graph
def projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, after: HeadEpilogue, layout: Layout, namespace: str
) -> tuple[Tensor, ...]:
    """``projection_forward`` with derivatives of every order."""
    if not layout.channels_first and by_pytorch("projection_forward", x, namespace):
        tokens = x.transpose(0, 1) if length_first(x) else x
        y = torch.nn.functional.linear(tokens, weight, bias)
        y = y if tokens is x else y.transpose(0, 1)
        parts = split_heads(y, layout)
        return tuple(parts if after.is_identity else _apply_epilogue(parts, after, namespace))
    if not after.is_identity:
        if transforms_active() or helper(namespace, "cpu_finish_heads", x.device) is not None:
            parts = list(projection(x, weight, bias, _IDENTITY, layout, namespace))
            return tuple(_apply_epilogue(parts, after, namespace))
        recorded = choose(_ProjectionWithEpilogue, _ProjectionWithEpilogue, x, weight, bias, *after.norms)
        if recorded is None:
            return _run_with_epilogue(x, weight, bias, after, layout, namespace, keep=False)
        return tuple(recorded.apply(x, weight, bias, after, layout, namespace, *after.norms))
    function = choose(_Projection, _TransformedProjection, x, weight, bias)
    if function is None:
        return _run_projection(x, weight, bias, layout, namespace)
    return tuple(function.apply(x, weight, bias, layout, namespace))


_apply = apply_of(_Projection)


def of_operator(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, namespace: str) -> tuple[Tensor, ...]:
    """``projection`` without an epilogue, of plain tensors outside of transforms, where the operator has a kernel."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, bias, layout, namespace)  # type: ignore[no-any-return]
    heads, head_dims, channels_first, tf32 = layout
    with torch._C._AutoDispatchBelowADInplaceOrView():
        run = overload(namespace, "projection_forward")
        parts = run(x, weight, bias, [], None, None, heads, head_dims, channels_first, 0.0, 0, False, False, tf32)
    return tuple(parts)


# --------------------------------------------------------------------------------------------------
# Operators called by name, in exported programs


def _recorded_projection(namespace: str, *args: Any) -> list[Tensor]:
    x, weight, bias, after, layout, keep = operators.unpack(*args)
    parts = list(projection(x, weight, bias, _IDENTITY, layout, namespace))
    return [*epilogue.apply_in_layout(parts, after), *(parts[: len(after.norms)] if keep else [])]


record("projection_forward", _recorded_projection)
record("projection_backward", formula_of(operators.backward))
record("cpu_finish_heads", formula_of(operators.part_epilogue))
record("cpu_finish_heads_backward", formula_of(operators.part_epilogue_backward))
