"""How a class computes attention, found by reading the names in the code of its methods."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["fingerprint", "names_used"]

_DEPTH = 4
"""Calls from a method down to the attention function that are followed."""


_NAMES: dict[tuple[type, str], frozenset[str]] = {}


def names_used(cls: type, method: str = "forward") -> frozenset[str]:
    """Names of globals, attributes and methods in the code of a method, and in the code that it calls.

    The class's own methods and functions of the same package are followed. Submodules are not: they are modules of
    their own.
    """
    if (cls, method) not in _NAMES:
        _NAMES[cls, method] = frozenset(_names_reached(cls, method))
    return _NAMES[cls, method]


def _names_reached(cls: type, method: str) -> set[str]:
    found: set[str] = set()
    pending = [(function, _DEPTH) for function in _functions(getattr(cls, method, None))]
    seen = set()
    while pending:
        function, depth = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        found |= {name for name, _ in names}
        if depth:
            pending += [(callee, depth - 1) for named in names for callee in _callees(cls, function, *named)]
    return found


def _names(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Names in the code, and whether each is a global; otherwise it is an attribute."""
    for instruction in dis.get_instructions(code):
        if instruction.opcode in dis.hasname:
            yield instruction.argval, instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _callees(cls: type, function: FunctionType, name: str, is_global: bool) -> Iterator[FunctionType]:
    if not is_global:
        own = getattr(cls, name, None)
        if own is not getattr(nn.Module, name, None):
            yield from _functions(own)
        return
    package = (function.__module__ or "").partition(".")[0]
    for callee in _functions(function.__globals__.get(name)):
        if (callee.__module__ or "").partition(".")[0] == package:
            yield callee


def _functions(value: Any) -> Iterator[FunctionType]:
    """A function or method, and what it decorates."""
    value = getattr(value, "__func__", value)
    if isinstance(value, FunctionType):
        yield value
        inner = inspect.unwrap(value)
        if inner is not value and isinstance(inner, FunctionType):
            yield inner


def fingerprint(function: Any) -> str:
    """Digest of a function's code without formatting, comments, docstrings and annotations; empty without a source.

    A rewritten ``forward`` replaces only versions of the original that it was compared with.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        elif isinstance(node, ast.arg):
            node.annotation = None
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
