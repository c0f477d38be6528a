"""Who is watching a call, and what an autograd function's jvp needs where it is watched itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether forward-mode derivatives or a torch.func transform may be watching."""
    return bool(forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None)


def tangent_formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """``formula(ctx, saved, *tangents)``, in plain PyTorch, as a jvp that a jvp around it may differentiate.

    PyTorch turns forward mode off inside a jvp, and the outer one would lose its tangents without a word. It is turned
    on again here, for saved tensors without the tangents of the level that is being worked on.
    """

    @wraps(formula)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            level = max(forward_ad._current_level, 0)
            saved = [t if t is None else forward_ad.unpack_dual(t, level=level).primal for t in ctx.saved_tensors]
            return formula(ctx, saved, *tangents)

    return jvp
