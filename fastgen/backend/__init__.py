"""Operators and their implementations: registration, compiled libraries, and the choice between them."""

from __future__ import annotations

from fastgen.backend.libraries import (
    COMPILED_DTYPES,
    CompiledLibrary,
    build_module,
    build_module_problem,
    compiled_architectures,
    compiled_libraries,
    compiled_parts,
    has_kernel,
    load_compiled,
    runs_on,
    why_not_compiled,
)
from fastgen.backend.registry import (
    COMPILED,
    TORCH,
    add_backend,
    call,
    define,
    differentiate,
    operator,
    operators,
    outside_autocast,
    refuse_other_derivatives,
)
from fastgen.backend.selection import (
    BACKENDS,
    current_backend,
    helper,
    may_use_tf32,
    select,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "COMPILED",
    "COMPILED_DTYPES",
    "TORCH",
    "CompiledLibrary",
    "add_backend",
    "build_module",
    "build_module_problem",
    "call",
    "compiled_architectures",
    "compiled_libraries",
    "compiled_parts",
    "current_backend",
    "define",
    "differentiate",
    "has_kernel",
    "helper",
    "load_compiled",
    "may_use_tf32",
    "operator",
    "operators",
    "outside_autocast",
    "refuse_other_derivatives",
    "runs_on",
    "select",
    "use_backend",
    "why_not_compiled",
]
