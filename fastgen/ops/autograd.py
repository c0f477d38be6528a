"""The autograd function of a call, and whether a gradient must itself be differentiable.

Every operator has two functions. The plain one is for reverse mode. The transformed one has ``setup_context``, ``jvp``
and a vmap rule, which torch.func and dual numbers require and which make each call slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen._dynamo import in_graph as in_graph
from fastgen.backend import call, differentiate, outside_autocast
from fastgen.ops.transforms import tangent_formula as tangent_formula
from fastgen.ops.transforms import transforms_active as transforms_active


def choose(plain: type[Function], transformed: type[Function], *tensors: Tensor | None) -> type[Function] | None:
    """The function to apply; None where no derivative is recorded and the operator can be called directly.

    Raises:
        RuntimeError: while ``torch.jit.trace`` records, whose graph would have a Python function in place of the
            operator.
    """
    transforms = transforms_active()
    if transforms or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        if torch._C._is_tracing():
            raise RuntimeError(_TRACED)
        return transformed if transforms else plain
    return None


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor belongs to a torch.func transform, or to one that has ended."""


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` without the search for transforms and for tensors of ended ones, which takes a third of it.

    For calls outside of transforms, with no tensor that ``is_wrapped``.
    """
    return super(Function, function).apply  # type: ignore[no-any-return, misc]


_TRACED = (
    "torch.jit.trace: expected a call without derivatives, got tensors that require grad; trace inside"
    " torch.no_grad(), or use torch.export or torch.compile, which record derivatives too"
)


def must_be_differentiable() -> bool:
    """Inside a backward: whether its result is to be differentiated (``create_graph=True``, torch.func).

    The gradient is then computed by formulas in PyTorch, which autograd differentiates to any order.
    """
    return torch.is_grad_enabled() or transforms_active()


def refuse_batched_gradients(*tensors: Tensor | None) -> None:
    """Raises where a backward that is to be differentiated gets a batch from ``is_grads_batched=True``: PyTorch would
    lose what a Python function records inside it, and return gradients that nothing depends on."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors):
        raise RuntimeError(_BATCHED)


_BATCHED = (
    "is_grads_batched: expected False with create_graph=True, got True, for which PyTorch does not record the backward"
    " of fastgen's functions; call torch.autograd.grad for one vector at a time, or use torch.func.vmap of"
    " torch.func.vjp (torch.autograd.functional.jacobian: vectorize=False)"
)


def only_wanted(ctx: Any, first: int, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that the inputs from ``first`` on require; None for the others."""
    wanted = ctx.needs_input_grad[first : first + len(grads)]
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def record(name: str, recorded: Callable[..., Any]) -> None:
    """Registers ``recorded(namespace, *args)`` for calls of operator ``name`` by exported programs whose arguments are
    differentiated."""

    def derivative(namespace: str, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        if choose(Function, Function, *tensors) is None:
            return call(namespace, name, *args)
        return recorded(namespace, *args)

    differentiate(name, derivative)


def formula_of(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's PyTorch implementation for ``record``: autograd differentiates it to any order."""
    return lambda namespace, *args: outside_autocast(implementation)(*args)
