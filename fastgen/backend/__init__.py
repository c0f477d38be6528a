"""Operators and their implementations: registration, compiled libraries, and the choice between them."""

from __future__ import annotations

from fastgen.backend import plans
from fastgen.backend.cpu_levels import CPU_LEVELS, choose_cpu_level, cpu_level, cpu_levels, use_cpu_level
from fastgen.backend.drivers import runs_on, version_name
from fastgen.backend.libraries import (
    COMPILED_DTYPES,
    CompiledLibrary,
    compiled_architectures,
    compiled_dtypes,
    compiled_libraries,
    compiled_parts,
    device_capability,
    driver_problem,
    has_kernel,
    library_for,
    load_compiled,
    why_not_compiled,
)
from fastgen.backend.registry import (
    COMPILED,
    TORCH,
    add_backend,
    call,
    decompositions,
    define,
    differentiate,
    operator,
    operators,
    outside_autocast,
    overload,
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
from fastgen.backend.sharded import shard

__all__ = [
    "BACKENDS",
    "COMPILED",
    "COMPILED_DTYPES",
    "CPU_LEVELS",
    "TORCH",
    "CompiledLibrary",
    "add_backend",
    "call",
    "choose_cpu_level",
    "compiled_architectures",
    "compiled_dtypes",
    "compiled_libraries",
    "compiled_parts",
    "cpu_level",
    "cpu_levels",
    "current_backend",
    "decompositions",
    "define",
    "device_capability",
    "differentiate",
    "driver_problem",
    "has_kernel",
    "helper",
    "library_for",
    "load_compiled",
    "may_use_tf32",
    "operator",
    "operators",
    "outside_autocast",
    "overload",
    "plans",
    "refuse_other_derivatives",
    "runs_on",
    "select",
    "shard",
    "use_backend",
    "use_cpu_level",
    "version_name",
    "why_not_compiled",
]
