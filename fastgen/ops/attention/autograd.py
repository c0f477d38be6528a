"""Derivatives of attention: first and second order through operators, in reverse and forward mode.

    attention          its backward is ``backward``, its jvp is ``tangent``
    backward           its backward is the first half of ``second_order``; its jvp adds the other half
    tangent            its backward is the other half of ``second_order``, and ``backward`` for the directions
    forward_tangent    its backward is those of attention and of tangent, added up
    second_order       raises where it is to be differentiated

since <G, backward(dO)> = <dO, tangent(G)>: see ``fastgen.reference.attention_second_order``. What an operator saves or
allocates grows with N + M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen import checks as check
from fastgen.backend import call, differentiate, select
from fastgen.ops.attention import operators as operators  # defines the operators that are differentiated here
from fastgen.ops.attention.problem import Options, Problem, Saved, Tangents, refused_heads
from fastgen.ops.autograd import choose, in_graph, only_wanted, refuse_batched_gradients, transforms_active

_ANY_ORDER = (
    "fastgen.reference.attention is plain PyTorch, which differentiates it to any order with memory for all N x M"
    " scores"
)

# In the arguments of a Function: number of tensors and of all fields of a flat Saved, and position of its mask.
_TENSORS, _SAVED, _MASK = 8, 15, Saved._fields.index("mask")


def _rows(tensor: Tensor) -> Tensor:
    """With the contiguous last dim that operators require."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Inside a derivative: whether the result is to be differentiated (``create_graph=True``, torch.func, dual
    numbers).

    Raises:
        RuntimeError: in ``torch.autograd.grad(..., is_grads_batched=True, create_graph=True)``.
    """
    if transforms_active():
        return True
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if recorded:
        refuse_batched_gradients(*tensors)
    return recorded


# --------------------------------------------------------------------------------------------------
# The four passes as operators


def _run(problem: Problem) -> tuple[Tensor, Tensor]:
    result = call(problem.namespace, "attention_forward", *problem[:6], *problem.options)
    return result[0], result[1]


def _run_backward(grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, mask_grad: bool) -> tuple[Tensor, ...]:
    arguments = (grad_out, grad_lse, *saved.tensors, *saved.options, mask_grad)
    return tuple(call(saved.namespace, "attention_backward", *arguments))


def _run_tangent(saved: Saved, tangents: Tangents) -> tuple[Tensor, ...]:
    namespace = _second_order_namespace("attention_tangent", saved)
    return tuple(call(namespace, "attention_tangent", *saved.tensors, *tangents, *saved.options))


def _run_forward_tangent(problem: Problem, tangents: Tangents) -> tuple[Tensor, ...]:
    """O, l, O' and l'."""
    namespace = _second_order_namespace("attention_forward_tangent", problem)
    arguments = (*problem[:6], *tangents, *problem.options)
    return tuple(call(namespace, "attention_forward_tangent", *arguments))


def _run_second_order(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, tangents: Tangents, mask_grad: bool
) -> tuple[Tensor, ...]:
    namespace = _second_order_namespace("attention_second_order", saved)
    arguments = (grad_out, grad_lse, *saved.tensors, *tangents, *saved.options, mask_grad)
    return tuple(call(namespace, "attention_second_order", *arguments))


def _second_order_namespace(name: str, saved: Saved | Problem) -> str:
    return select(name, saved.query, refused_heads(saved.query, saved.value), forward=saved.namespace)


# --------------------------------------------------------------------------------------------------
# The passes inside derivatives. A Function, which takes flat arguments, records those that are to be differentiated.


def backward(grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, mask_grad: bool) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and mask."""
    grad_out = _rows(grad_out)
    if _is_recorded(grad_out, grad_lse, *saved.tensors):
        results = _Backward.apply(grad_out, grad_lse, *saved.flat(), mask_grad)  # type: ignore[no-untyped-call]
    else:
        results = _run_backward(grad_out, grad_lse, saved, mask_grad)
    return (*results[:3], results[3] if mask_grad else None)


def _tangent(saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """O' and l'."""
    tangents = Tangents(*(t if t is None else _rows(t) for t in tangents))
    if _is_recorded(*saved.tensors, *tangents):
        out, lse = _Tangent.apply(*saved.flat(), *tangents)  # type: ignore[no-untyped-call]
    else:
        out, lse = _run_tangent(saved, tangents)
    return out, lse


def _second_order(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, tangents: Tangents, mask_grad: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of <dO, O'> + <dl, l'>, in this order: of dO, dl, query, key, value and mask."""
    grad_out, tangents = _rows(grad_out), Tangents(*(t if t is None else _rows(t) for t in tangents))
    if _is_recorded(grad_out, grad_lse, *saved.tensors, *tangents):
        arguments = (grad_out, grad_lse, *saved.flat(), *tangents, mask_grad)
        results = _SecondOrder.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        results = _run_second_order(grad_out, grad_lse, saved, tangents, mask_grad)
    return (*results[:5], results[5] if mask_grad else None)


# --------------------------------------------------------------------------------------------------
# Functions of torch.autograd


def _save(ctx: Any, problem: Problem, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest, options, namespace = problem
    _save_tensors(ctx, (query, key, value, *output, *rest), options, namespace)


def _save_tensors(ctx: Any, tensors: tuple[Any, ...], options: Options, namespace: str) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.options, ctx.namespace = options, namespace
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, tensors: Any) -> Saved:
    return Saved._make((*tensors, ctx.options, ctx.namespace))


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        problem = Problem.of(inputs)
        output = _run(problem)
        _save(ctx, problem, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 4)
        if grad_out is None and grad_lse is None:
            return (None,) * 4 + rest
        saved = _saved(ctx, ctx.saved_tensors)
        grad_out = torch.zeros_like(saved.out) if grad_out is None else grad_out
        mask_grad = saved.mask is not None and ctx.needs_input_grad[3]
        grads = backward(grad_out, grad_lse, saved, mask_grad)
        return (*only_wanted(ctx, 0, *grads), *rest)


class _TransformedAttention(Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _run(Problem.of(inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, Problem.of(inputs), output)

    backward = _Attention.backward
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        saved = _saved(ctx, ctx.saved_tensors)
        return _tangent(saved, _checked(saved, Tangents(*tangents[:4])))


def _checked(saved: Saved, tangents: Tangents) -> Tangents:
    primals = {"query": saved.query, "key": saved.key, "value": saved.value, "attn_mask": saved.mask}
    for (name, primal), tangent in zip(primals.items(), tangents, strict=True):
        if tangent is not None and primal is not None:
            check.require_shape(f"tangent of {name}", tangent, tuple(primal.shape), f"the shape of {name}")
            check.require_alike(name, primal, **{f"tangent of {name}": tangent})
    return tangents


class _Backward(Function):
    """``out`` and ``lse`` get no gradient of their own: those of query, key and value include what passes through
    them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return _run_backward(grad_out, grad_lse, Saved.of(rest), rest[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grads, saved, ctx.mask_grad = inputs[:2], Saved.of(inputs[2:]), inputs[-1]
        _save_tensors(ctx, (*grads, *saved.tensors), saved.options, saved.namespace)

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, *tensors = ctx.saved_tensors
        saved, tangents = _saved(ctx, tensors), Tangents(*directions[: 4 if ctx.mask_grad else 3])
        wanted = ctx.needs_input_grad
        if all(direction is None for direction in tangents):
            return (None,) * len(wanted)
        mask_grad = saved.mask is not None and saved.mask.is_floating_point() and wanted[2 + _MASK]
        of_out, of_lse, query, key, value, mask = _second_order(grad_out, grad_lse, saved, tangents, mask_grad)
        of_lse = None if grad_lse is None or of_lse is None else of_lse.to(grad_lse.dtype)
        grads = (of_out, of_lse, query, key, value, None, None, mask)
        return (*only_wanted(ctx, 0, *grads), *(None,) * (len(wanted) - len(grads)))

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, *tensors = ctx.saved_tensors
        saved = _saved(ctx, tensors)
        of_out, of_lse, query, key, value, _, _, mask = directions[: 2 + _MASK + 1]
        parts = []
        if any(tangent is not None for tangent in (query, key, value, mask)):
            tangents = Tangents(query, key, value, mask)
            parts.append(_second_order(grad_out, grad_lse, saved, tangents, ctx.mask_grad)[2:])
        if of_out is not None or of_lse is not None:
            of_out = torch.zeros_like(grad_out) if of_out is None else of_out
            parts.append(backward(of_out, of_lse, saved, ctx.mask_grad))
        # Not None where the mask has no gradient: PyTorch takes that for a tangent where a vmap is inside.
        whole = [[saved.query.new_zeros(0) if t is None else t for t in part] for part in parts]
        return tuple(whole[0]) if len(whole) == 1 else tuple(a + b for a, b in zip(*whole, strict=True))


class _Tangent(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _run_tangent(Saved.of(inputs), Tangents(*inputs[_SAVED:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        saved, tangents = Saved.of(inputs), inputs[_SAVED:]
        _save_tensors(ctx, (*saved.tensors, *tangents), saved.options, saved.namespace)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        saved, tangents = _saved(ctx, tensors[:_TENSORS]), Tangents(*tensors[_TENSORS:])
        if grad_out is None and grad_lse is None:
            return (None,) * len(wanted)
        grad_out = torch.zeros_like(saved.out) if grad_out is None else grad_out
        grads: list[Tensor | None] = [None] * len(wanted)
        if any(wanted[i] for i in (0, 1, 2, _MASK)):
            results = _second_order(grad_out, grad_lse, saved, tangents, wanted[_MASK])
            _, _, grads[0], grads[1], grads[2], grads[_MASK] = results
        if any(wanted[_SAVED:]):
            grads[_SAVED:] = backward(grad_out, grad_lse, saved, wanted[-1])
        return only_wanted(ctx, 0, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(
            "attention: forward mode over forward mode is not supported; use forward over reverse, such as"
            f" torch.func.jvp of torch.func.grad, or the formula: {_ANY_ORDER}"
        )


class _ForwardTangent(Function):
    """O, l, O' and l', from a flat Problem with the tangents after its tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _run_forward_tangent(Problem.of((*inputs[:6], *inputs[10:])), Tangents(*inputs[6:10]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, value, *rest, options, namespace = Problem.of((*inputs[:6], *inputs[10:]))
        _save_tensors(ctx, (query, key, value, *output[:2], *rest, *inputs[6:10]), options, namespace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_out, of_lse, of_tangent, of_tangent_lse = grads
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        saved, tangents = _saved(ctx, tensors[:_TENSORS]), Tangents(*tensors[_TENSORS:])
        zeros = torch.zeros_like
        primals: tuple[Tensor | None, ...] = (None,) * 4
        of_tangents: tuple[Tensor | None, ...] = (None,) * 4
        if any(wanted[:4]) and not (of_out is None and of_lse is None):
            primals = backward(zeros(saved.out) if of_out is None else of_out, of_lse, saved, wanted[3])
        if not (of_tangent is None and of_tangent_lse is None):
            of_tangent = zeros(saved.out) if of_tangent is None else of_tangent
            if any(wanted[:4]):
                more = _second_order(of_tangent, of_tangent_lse, saved, tangents, wanted[3])[2:]
                pairs = zip(primals, more, strict=True)
                primals = tuple(a if b is None else b if a is None else a + b for a, b in pairs)
            if any(wanted[6:10]):
                of_tangents = backward(of_tangent, of_tangent_lse, saved, wanted[9])
        results = only_wanted(ctx, 0, *primals, None, None, *of_tangents)
        return (*results, *(None,) * (len(wanted) - len(results)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _Tangent.jvp(ctx)


class _SecondOrder(Function):
    """Raises where it is differentiated: there are no operators for third derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return _run_second_order(grad_out, grad_lse, Saved.of(rest), Tangents(*rest[_SAVED:-1]), rest[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"attention: expected first or second derivatives, got a third one; {_ANY_ORDER}")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _SecondOrder.backward(ctx)


@in_graph
def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """``attention_forward``, twice differentiable in reverse mode and once in forward mode; a direct call of the
    operator where no derivative is needed."""
    function = choose(_Attention, _TransformedAttention, *problem[:4])
    if function is None:
        return _run(problem)
    result = function.apply(*problem.flat())
    return result[0], result[1]


@in_graph
def forward_tangent(problem: Problem, tangents: Tangents) -> tuple[Tensor, ...]:
    """``attention_forward_tangent``: O, l, O' and l', differentiable in reverse mode."""
    tangents = Tangents(*(t if t is None else _rows(t) for t in tangents))
    if choose(_ForwardTangent, _ForwardTangent, *problem[:4], *tangents) is None:
        return _run_forward_tangent(problem, tangents)
    arguments = (*problem[:6], *tangents, *problem.options, problem.namespace)
    return tuple(_ForwardTangent.apply(*arguments))  # type: ignore[no-untyped-call]


# --------------------------------------------------------------------------------------------------
# Operators called by name, in exported programs


def _recorded_forward(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    return attention(Problem.of((*args, namespace)))


def _recorded(function: type[Function], arrange: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """``arrange(namespace, *args)``: the arguments of an operator in the order of ``function``."""

    def record(namespace: str, *args: Any) -> tuple[Any, ...]:
        recorded = _is_recorded(*(a for a in args if isinstance(a, Tensor)))
        run: Callable[..., Any] = function.apply if recorded else function.forward
        return tuple(run(*arrange(namespace, *args)))

    return record


differentiate("attention_forward", _recorded_forward)
differentiate("attention_backward", _recorded(_Backward, lambda ns, *args: (*args[:-1], ns, args[-1])))
differentiate("attention_tangent", _recorded(_Tangent, lambda ns, *args: (*args[:8], *args[12:], ns, *args[8:12])))
differentiate("attention_forward_tangent", _recorded(_ForwardTangent, lambda ns, *args: (*args, ns)))
differentiate(
    "attention_second_order",
    _recorded(_SecondOrder, lambda ns, *args: (*args[:10], *args[14:-1], ns, *args[10:14], args[-1])),
)
