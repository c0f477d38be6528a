"""Decorators for torch.compile that do not import ``torch._dynamo``, which takes longer than all of fastgen."""

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
    """torch.compile puts calls of the function into its graph and does not trace into it.

    PyTorch's own autograd and transforms then differentiate it, under any backend. (An autograd.Function that Dynamo
    traces has a backward that nothing differentiates: AOTAutograd raises for a second derivative, and a backend without
    it is silently wrong. Under a transform it calls operators as constants.)

    This is ``torch.compiler.allow_in_graph``, deferred until Dynamo first traces a call: it then runs ``allow``, whose
    result is constant, before it traces ``function``.
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
