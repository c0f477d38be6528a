"""Derivatives of attention: first and second ones through operators, in reverse and forward mode.

    attention          its backward is ``backward``, its jvp is ``tangent``
    backward           its backward is the first half of ``second_order``; its jvp adds the other half
    tangent            its backward is the other half of ``second_order``, and ``backward`` for the directions
    second_order       raises where it is to be differentiated

since <G, backward(dO)> = <dO, tangent(G)>: see ``reference.attention_second_order``. Everything an operator saves or
allocates grows with N + M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen import checks as check
from fastgen.backend import call, differentiate, namespace_for_derivative
from fastgen.ops.attention.operators import Options, refused_heads_twice
from fastgen.ops.autograd import choose, in_graph, only_wanted, transforms_active

_ANY_ORDER = (
    "fastgen.reference.attention is plain PyTorch, which differentiates it as often as you like with memory for all"
    " N x M scores"
)


class _Inputs(NamedTuple):
    """What the derivatives of a call are made from: its arguments and results."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    mask: Tensor | None
    seed: Tensor | None


_INPUTS, _MASK = len(_Inputs._fields), _Inputs._fields.index("mask")
Directions = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of query, key, value and mask; None is zero."""


def _rows(tensor: Tensor | None) -> Tensor | None:
    """With a contiguous last dim, as operators read it."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _call(function: type[Function], run: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inside a derivative: ``run``, or ``function`` where somebody will differentiate what comes out
    (``create_graph=True``, torch.func, dual numbers)."""
    recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if recorded or transforms_active():
        return tuple(function.apply(*arguments))  # type: ignore[no-untyped-call]
    return tuple(run(*arguments))


# --------------------------------------------------------------------------------------------------
# The four passes, each with its derivatives where somebody wants them


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: _Inputs,
    options: Options,
    mask_grad: bool,
    namespace: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and mask."""
    arguments = (_rows(grad_out), grad_lse, *inputs, *options, mask_grad, namespace)
    results = _call(_Backward, _run_backward, arguments)
    return (*results[:3], results[3] if mask_grad else None)


def _tangent(inputs: _Inputs, directions: Directions, options: Options, namespace: str) -> tuple[Tensor, Tensor]:
    """O' and l'."""
    arguments = (*inputs, *map(_rows, directions), *options, namespace)
    out, lse = _call(_Tangent, _run_tangent, arguments)
    return out, lse


def _second_order(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: _Inputs,
    directions: Directions,
    options: Options,
    mask_grad: bool,
    namespace: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of <dO, O'> + <dl, l'>, in this order: of dO, dl, query, key, value and mask."""
    arguments = (_rows(grad_out), grad_lse, *inputs, *map(_rows, directions), *options, mask_grad, namespace)
    results = _call(_SecondOrder, _run_second_order, arguments)
    return (*results[:5], results[5] if mask_grad else None)


def _run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``rest``: the options, one by one, and the namespace."""
    *options, namespace = rest
    result = call(namespace, "attention_forward", query, key, value, mask, seed, *options)
    return result[0], result[1]


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(call(arguments[-1], "attention_backward", *arguments[:-1]))


def _run_tangent(*arguments: Any) -> tuple[Tensor, ...]:
    query, _, value = arguments[:3]
    return _run_twice("attention_tangent", query, value, arguments)


def _run_second_order(*arguments: Any) -> tuple[Tensor, ...]:
    query, _, value = arguments[2:5]
    return _run_twice("attention_second_order", query, value, arguments)


def _run_twice(name: str, query: Tensor, value: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    namespace = namespace_for_derivative(arguments[-1], name, query, refused_heads_twice(query, value))
    return tuple(call(namespace, name, *arguments[:-1]))


# --------------------------------------------------------------------------------------------------
# What torch.autograd makes of them


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, seed, *options, ctx.namespace = inputs
    saved = _Inputs(query, key, value, *output, mask, seed)
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.options = Options(*options)
    ctx.set_materialize_grads(False)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = _Inputs(*ctx.saved_tensors)
        rest = (None,) * (len(ctx.needs_input_grad) - 4)
        if grad_out is None and grad_lse is None:
            return (None,) * 4 + rest
        grad_out = torch.zeros_like(inputs.out) if grad_out is None else grad_out
        mask_grad = inputs.mask is not None and ctx.needs_input_grad[3]
        grads = _backward(grad_out, grad_lse, inputs, ctx.options, mask_grad, ctx.namespace)
        return (*only_wanted(ctx, 0, *grads), *rest)


class _TransformedAttention(Function):
    forward = staticmethod(_run)
    setup_context = staticmethod(_save)
    backward = _Attention.backward
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(*ctx.saved_tensors)
        return _tangent(inputs, _checked(inputs, tangents[:4]), ctx.options, ctx.namespace)


def _checked(inputs: _Inputs, tangents: tuple[Any, ...]) -> Directions:
    primals = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "attn_mask": inputs.mask}
    for (name, primal), tangent in zip(primals.items(), tangents, strict=True):
        if tangent is not None and primal is not None:
            check.require_shape(f"tangent of {name}", tangent, tuple(primal.shape), f"the shape of {name}")
            check.require_alike(name, primal, **{f"tangent of {name}": tangent})
    return tangents[0], tangents[1], tangents[2], tangents[3]


def _save_all(ctx: Any, inputs: tuple[Any, ...], tensors: int) -> None:
    """The first ``tensors`` of the inputs, the options, the namespace."""
    ctx.save_for_backward(*inputs[:tensors])
    ctx.save_for_forward(*inputs[:tensors])
    ctx.options, ctx.namespace = Options(*inputs[tensors : tensors + len(Options._fields)]), inputs[-1]
    ctx.set_materialize_grads(False)


class _Backward(Function):
    """``out`` and ``lse`` get no gradient of their own: those of query, key and value count what goes through them."""

    forward = staticmethod(_run_backward)
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_all(ctx, inputs, 2 + _INPUTS)
        ctx.mask_grad = inputs[-2]

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, *saved = ctx.saved_tensors
        inputs, directions = _Inputs(*saved), directions if ctx.mask_grad else (*directions[:3], None)
        wanted = ctx.needs_input_grad
        if all(direction is None for direction in directions):
            return (None,) * len(wanted)
        mask_grad = inputs.mask is not None and inputs.mask.is_floating_point() and wanted[2 + _MASK]
        of_out, of_lse, query, key, value, mask = _second_order(
            grad_out, grad_lse, inputs, directions, ctx.options, mask_grad, ctx.namespace
        )
        of_lse = None if grad_lse is None or of_lse is None else of_lse.to(grad_lse.dtype)
        grads = (of_out, of_lse, query, key, value, None, None, mask)
        return (*only_wanted(ctx, 0, *grads), *(None,) * (len(wanted) - len(grads)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, *saved = ctx.saved_tensors
        inputs = _Inputs(*saved)
        of_out, of_lse, query, key, value, _, _, mask = tangents[: 2 + _MASK + 1]
        parts = []
        if any(tangent is not None for tangent in (query, key, value, mask)):
            directions = (query, key, value, mask)
            rest = (inputs, directions, ctx.options, ctx.mask_grad, ctx.namespace)
            parts.append(_second_order(grad_out, grad_lse, *rest)[2:])
        if of_out is not None or of_lse is not None:
            of_out = torch.zeros_like(grad_out) if of_out is None else of_out
            parts.append(_backward(of_out, of_lse, inputs, ctx.options, ctx.mask_grad, ctx.namespace))
        # Not None where the mask has no gradient: PyTorch takes that for a tangent where a vmap is inside.
        whole = [[inputs.query.new_zeros(0) if t is None else t for t in part] for part in parts]
        return tuple(whole[0]) if len(whole) == 1 else tuple(a + b for a, b in zip(*whole, strict=True))


class _Tangent(Function):
    forward = staticmethod(_run_tangent)
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_all(ctx, inputs, _INPUTS + 4)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, query, key, value, mask = ctx.saved_tensors
        inputs, directions, wanted = _Inputs(*saved), (query, key, value, mask), ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(wanted)
        grad_out = torch.zeros_like(inputs.out) if grad_out is None else grad_out
        grads: list[Tensor | None] = [None] * len(wanted)
        if any(wanted[i] for i in (0, 1, 2, _MASK)):
            rest = (inputs, directions, ctx.options, wanted[_MASK], ctx.namespace)
            _, _, grads[0], grads[1], grads[2], grads[_MASK] = _second_order(grad_out, grad_lse, *rest)
        if any(wanted[_INPUTS : _INPUTS + 4]):
            mask_grad = wanted[_INPUTS + 3]
            of_directions = _backward(grad_out, grad_lse, inputs, ctx.options, mask_grad, ctx.namespace)
            grads[_INPUTS : _INPUTS + 4] = of_directions
        return only_wanted(ctx, 0, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(
            "attention: forward mode over forward mode is not there; take forward over reverse, such as"
            f" torch.func.jvp of torch.func.grad, or the formula: {_ANY_ORDER}"
        )


class _SecondOrder(Function):
    """The end of the line: what is right up to here would be wrong, or missing, in the next derivative."""

    forward = staticmethod(_run_second_order)
    generate_vmap_rule = True

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
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    namespace: str,
) -> tuple[Tensor, Tensor]:
    """``attention_forward``, twice differentiable; straight to the operator where no derivative is needed."""
    arguments = (query, key, value, mask, seed, *options, namespace)
    function = choose(_Attention, _TransformedAttention, query, key, value, mask)
    result = _run(*arguments) if function is None else function.apply(*arguments)
    return result[0], result[1]


def _recorded(namespace: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    mask, seed, *options = rest
    return attention(query, key, value, mask, seed, Options(*options), namespace)


differentiate("attention_forward", _recorded)
differentiate("attention_backward", lambda namespace, *args: _call(_Backward, _run_backward, (*args, namespace)))
differentiate("attention_tangent", lambda namespace, *args: _call(_Tangent, _run_tangent, (*args, namespace)))
differentiate(
    "attention_second_order", lambda namespace, *args: _call(_SecondOrder, _run_second_order, (*args, namespace))
)
