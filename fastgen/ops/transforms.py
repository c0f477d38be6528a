"""Detection of torch.func transforms and dual numbers, and jvps that are differentiable themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether a dual level or a torch.func transform is active."""
    return bool(forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None)


def tangent_formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """``formula(ctx, saved, *tangents)``, in plain PyTorch, as a jvp that an outer jvp can differentiate.

    PyTorch disables forward mode inside a jvp, and an outer one would silently lose its tangents. It is enabled again
    here, for saved tensors without the tangents of the current level.
    """

    @wraps(formula)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            level = max(forward_ad._current_level, 0)
            saved = [t if t is None else forward_ad.unpack_dual(t, level=level).primal for t in ctx.saved_tensors]
            return formula(ctx, saved, *tangents)

    return jvp
