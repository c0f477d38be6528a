"""The instruction set level of the compiled CPU kernels.

Every kernel is compiled for each level; the best that the CPU has is used. The environment variable ``FASTGEN_CPU``
names another one, for tests and measurements.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from fastgen.backend import libraries

CPU_LEVELS = ("generic", "avx2", "avx512")
"""From the lowest to the highest. ``generic`` is what every CPU of the architecture has: SSE2 on x86-64, NEON on
aarch64."""

_VARIABLE = "FASTGEN_CPU"


def cpu_levels() -> tuple[str, ...]:
    """The levels that this CPU can use, from the lowest to the highest; empty without the compiled library."""
    best = _name("fastgen_best_cpu_level")
    return () if best is None else CPU_LEVELS[: CPU_LEVELS.index(best) + 1]


def cpu_level() -> str | None:
    """The level in use; None without the compiled library."""
    return _name("fastgen_cpu_level")


def choose_cpu_level() -> None:
    """Applies ``FASTGEN_CPU``. An empty value is no choice.

    Raises:
        ValueError: it names no level, or one that this CPU lacks.
    """
    name = os.environ.get(_VARIABLE, "")
    if name:
        _use(name, _VARIABLE)


@contextlib.contextmanager
def use_cpu_level(name: str) -> Iterator[None]:
    """Context manager that uses a level inside the block, in the whole process: for tests and measurements.

    Raises:
        ValueError: ``name`` is no level, or one that this CPU lacks.
    """
    previous = cpu_level()
    _use(name, "use_cpu_level")
    try:
        yield
    finally:
        if previous is not None:
            _use(previous, "use_cpu_level")


def _use(name: str, source: str) -> None:
    if name not in CPU_LEVELS:
        raise ValueError(f"{source}: expected one of {', '.join(CPU_LEVELS)}, got {name!r}")
    handle = libraries.library_for("cpu").handle
    if handle is None:  # there is nothing that has levels
        return
    if not handle.fastgen_use_cpu_level(ctypes.c_char_p(name.encode())):
        raise ValueError(f"{source}: expected a level of this CPU ({', '.join(cpu_levels())}), got {name!r}")


def _name(function: str) -> str | None:
    handle = libraries.library_for("cpu").handle
    if handle is None:
        return None
    call = getattr(handle, function)
    call.restype, call.argtypes = ctypes.c_char_p, []
    name: bytes = call()
    return name.decode()
