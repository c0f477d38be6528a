"""CPU times of compilations, for tests/compile_check.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

MOST_SECONDS = 30.0  # of CPU time for a source and an architecture, so that a build in parallel does not wait for one


class Compiled(NamedTuple):
    """What a compilation printed, and its CPU time in seconds, that of the processes it started included."""

    returncode: int
    output: str
    seconds: float


Times = dict[tuple[str, str], float]  # CPU seconds by (source, architecture)


def run_compiler(command: list[str], report: Path) -> Compiled:
    """Runs a compiler, with its output in ``report``."""
    with report.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Compiled(process.returncode, report.read_text(), usage.ru_utime + usage.ru_stime)


def slow_sources(times: Times) -> list[str]:
    """Sources that take longer than MOST_SECONDS."""
    return [
        f"{source} for sm_{arch}: {seconds:.0f} CPU seconds, at most {MOST_SECONDS:.0f}; split it by launcher or dtype"
        for (source, arch), seconds in times.items()
        if seconds > MOST_SECONDS
    ]


def print_times(times: Times) -> None:
    if not times:
        return
    print(f"\n{'arch':<6}{'CPU s':>7}  source")
    for (source, arch), seconds in sorted(times.items(), key=lambda item: -item[1]):
        print(f"{arch:<6}{seconds:>7.1f}  {source}")
    for arch in sorted({arch for _, arch in times}):
        print(f"{arch:<6}{sum(seconds for (_, own), seconds in times.items() if own == arch):>7.1f}  all")
