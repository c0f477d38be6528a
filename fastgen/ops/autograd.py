"""Which autograd function a call needs, and when a gradient must itself be differentiable.

Every operator has two. The plain one is for reverse mode. The transformed one has ``setup_context``, ``jvp`` and a
vmap rule besides: torch.func and dual numbers need them, and each of their calls costs more.
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
    """The function to apply; None where nobody differentiates and the operator can be called as it is."""
    if transforms_active():
        return transformed
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return plain
    return None


def must_be_differentiable() -> bool:
    """Inside a backward: whether somebody will differentiate its result (``create_graph=True``, torch.func).

    Then the gradient is computed by the reference formulas, which autograd follows to any order.
    """
    return torch.is_grad_enabled() or transforms_active()


def only_wanted(ctx: Any, first: int, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that the inputs from ``first`` on ask for; None for the others."""
    wanted = ctx.needs_input_grad[first : first + len(grads)]
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def record(name: str, recorded: Callable[..., Any]) -> None:
    """Operator ``name``, called by itself, as exported programs do: ``recorded(namespace, *args)`` where its arguments
    are differentiated."""

    def derivative(namespace: str, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        if choose(Function, Function, *tensors) is None:
            return call(namespace, name, *args)
        return recorded(namespace, *args)

    differentiate(name, derivative)


def formula_of(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation in PyTorch as what is recorded: autograd follows it to any order."""
    return lambda namespace, *args: outside_autocast(implementation)(*args)
