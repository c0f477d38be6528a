"""Peak memory of a process, for benchmarks that measure each case in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys


def peak_memory_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_in_subprocess(module: str, *arguments: object) -> float:
    """Number printed by ``python -m module --one ARGUMENTS``."""
    command = [sys.executable, "-m", module, "--one", *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
