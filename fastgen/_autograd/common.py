"""When a gradient is needed, and when that gradient must itself be differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether forward-mode derivatives or a torch.func transform may be watching."""
    return bool(forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None)


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether the call must go through ``autograd.Function``, rather than straight to the operator."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and transforms_active()


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
