"""Which autograd function a call needs, and when a gradient must itself be differentiable.

Every operator has two. The plain one is for reverse mode, eager or under torch.compile. The transformed one
has ``setup_context``, ``jvp`` and a vmap rule besides: torch.func and dual numbers need them, torch.compile
does not trace them, and each of their calls costs more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def transforms_active() -> bool:
    """Whether forward-mode derivatives or a torch.func transform may be watching."""
    return bool(forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None)


def choose(plain: type[Function], transformed: type[Function], *tensors: Tensor | None) -> type[Function] | None:
    """The function to apply; None where nobody differentiates and the operator can be called as it is."""
    if not torch.compiler.is_compiling() and transforms_active():
        return transformed
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return plain
    return None


def apply(function: type[Function], arguments: tuple[Any, ...]) -> Any:
    """``function.apply``; under torch.compile, which refuses one tensor in two places, with views for the repeats."""
    if torch.compiler.is_compiling():
        distinct: list[Any] = []
        for argument in arguments:
            repeated = isinstance(argument, Tensor) and any(argument is other for other in distinct)
            distinct.append(argument.view_as(argument) if repeated else argument)
        arguments = tuple(distinct)
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def must_be_differentiable() -> bool:
    """Inside a backward: whether somebody will differentiate its result (``create_graph=True``, torch.func).

    Then the gradient is computed by the reference formulas, which autograd follows to any order. Under
    torch.compile the kernel is taken: AOTAutograd refuses double backward by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transforms_active()


def only_wanted(ctx: Any, first: int, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that the inputs from ``first`` on ask for; None for the others."""
    wanted = ctx.needs_input_grad[first : first + len(grads)]
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
