"""CPU times of compilations and sizes of their machine code, for tests/compile_check.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

# A build in parallel should not wait for one source. The limit is on its machine code for one architecture: the time
# follows it, 25 to 45 KiB a second on an AMD EPYC (Zen 3), and twice that with another machine or with other work.
MOST_KIB = 1100


class Compiled(NamedTuple):
    """What a compilation printed, and its CPU time in seconds, that of the processes it started included."""

    returncode: int
    output: str
    seconds: float


class Cost(NamedTuple):
    """CPU seconds of a source for an architecture, and the KiB of its cubin."""

    seconds: float
    kib: float


Costs = dict[tuple[str, str], Cost]  # by (source, architecture)


def run_compiler(command: list[str], report: Path) -> Compiled:
    """Runs a compiler, with its output in ``report``."""
    with report.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Compiled(process.returncode, report.read_text(), usage.ru_utime + usage.ru_stime)


def large_sources(costs: Costs) -> list[str]:
    """Sources with more machine code than MOST_KIB."""
    return [
        f"{source} for sm_{arch}: {cost.kib:.0f} KiB of machine code, at most {MOST_KIB}; split it by launcher or dtype"
        for (source, arch), cost in costs.items()
        if cost.kib > MOST_KIB
    ]


def print_costs(costs: Costs) -> None:
    if not costs:
        return
    print(f"\n{'arch':<6}{'CPU s':>7}{'KiB':>7}  source")
    for (source, arch), cost in sorted(costs.items(), key=lambda item: -item[1].seconds):
        print(f"{arch:<6}{cost.seconds:>7.1f}{cost.kib:>7.0f}  {source}")
    for arch in sorted({arch for _, arch in costs}):
        own = [cost for (_, its), cost in costs.items() if its == arch]
        print(f"{arch:<6}{sum(cost.seconds for cost in own):>7.1f}{sum(cost.kib for cost in own):>7.0f}  all")
