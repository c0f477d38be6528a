"""Marks for torch.compile that do not import it: ``torch._dynamo`` takes longer to import than all of fastgen."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling as is_dynamo_compiling

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``: Dynamo calls the function while it traces, and keeps the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_graph(function: _Function) -> _Function:
    """torch.compile puts calls of the function into its graph as they are, and does not look inside.

    Then PyTorch's own autograd and transforms differentiate it, under whatever backend. (What Dynamo makes of an
    autograd.Function that it traces has a backward that nothing differentiates: a second derivative is raised by
    AOTAutograd, and silently wrong where a backend does without. A transform makes it call operators as constants.)

    This is ``torch.compiler.allow_in_graph``, put off until Dynamo traces a call for the first time: it then runs
    ``allow``, whose result is constant, before it looks at ``function``.
    """

    @constant
    def allow() -> bool:
        torch.compiler.allow_in_graph(function)
        return True

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if is_dynamo_compiling():
            allow()
        return function(*arguments)

    return call  # type: ignore[return-value]
