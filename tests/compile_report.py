"""What the reports of ptxas and the listings of nvdisasm say about kernels."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from typing import NamedTuple

INSTRUCTIONS = ["HMMA", "HGMMA", "UTMALDG", "LDSM", "STSM", "MUFU.EX2", "LDL", "STL", "BAR", "SHFL"]
BESIDE_PRODUCTS = "MUFU.EX2 beside products"
GLOBAL_ACCESSES = ["LDG", "STG", "LDGSTS"]  # counted by width
WIDTHS = ["U8", "S8", "U16", "S16", "32", "64", "128", "256"]


class LoopCount(NamedTuple):
    """Instructions of a kernel's main loop.

    per_score: executed by a thread for each score of a tile of which everything is visible; of kernels without scores,
    by a warp for each matrix instruction.
    """

    loop: int
    per_score: float


class Kernel(NamedTuple):
    source: str
    arch: str
    symbol: str
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    instructions: dict[str, int] | None = None  # None: not counted
    loop: LoopCount | None = None  # None: not counted, or not among LOOP_KERNELS


def demangle(symbols: list[str]) -> list[str]:
    """Names with template arguments, without parameters."""
    done = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    return [name.replace("(bool)1", "true").replace("(bool)0", "false") for name in done.stdout.splitlines()]


def short_name(name: str) -> str:
    """A demangled name without return type and namespaces, with template arguments: "scale<float, true>"."""
    return re.sub(r"(?:\(anonymous namespace\)|\w+)::", "", name).removeprefix("void ")


def bare_name(name: str) -> str:
    """A demangled name without namespaces and template arguments."""
    shorter = re.sub(r"<[^<>]*>", "", name)
    return name.rpartition("::")[2] if shorter == name else bare_name(shorter)


def parse_ptxas(source: str, arch: str, report: str) -> list[Kernel]:
    """The kernels of one ``ptxas -v`` report; the resources of called functions are included."""
    _, *entries = report.split("Compiling entry function '")
    symbols = [entry.partition("'")[0] for entry in entries]

    def most(entry: str, pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, entry)), default=0)

    return [
        Kernel(
            source,
            arch,
            symbol,
            name,
            registers=int(re.findall(r"Used (\d+) registers", entry)[0]),
            shared_bytes=most(entry, r"(\d+) bytes smem"),
            stack_bytes=most(entry, r"(\d+) bytes (?:stack frame|cumulative stack size)"),
            spill_bytes=sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", entry)),
        )
        for symbol, name, entry in zip(symbols, demangle(symbols), entries, strict=True)
    ]


def serializations(report: str) -> list[str]:
    """What ptxas reports as lost performance: products of a warpgroup that wait for each other, ignored setmaxnreg."""
    return re.findall(r"\(C75\d\d\)[^\n]*", report)


def classify(opcode: str) -> str | None:
    """The column that counts an instruction, if any: "LDG.E.128.CONSTANT" -> "LDG.128"."""
    base, *modifiers = opcode.split(".")
    if base in GLOBAL_ACCESSES:
        return f"{base}.{next((modifier for modifier in modifiers if modifier in WIDTHS), '32')}"
    return next((name for name in INSTRUCTIONS if f"{opcode}.".startswith(f"{name}.")), None)


def parse_sass(listing: str) -> dict[str, Counter[str]]:
    """The number of instructions of each column, for each symbol of ``nvdisasm -c``.

    BESIDE_PRODUCTS: the most exponentials between two waits for products of a warpgroup with no product between: those
    that run while the product that the second one waits for does.
    """
    counts: dict[str, Counter[str]] = {}
    waits, exponentials = False, 0
    pattern = re.compile(r"^\.text\.(\S+):|^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    for symbol, opcode in pattern.findall(listing):
        if symbol:
            current = counts.setdefault(symbol, Counter())
            waits = False
            continue
        if column := classify(opcode):
            current[column] += 1
        if opcode.startswith("WARPGROUP.DEPBAR"):
            if waits and exponentials:
                current[BESIDE_PRODUCTS] = max(current[BESIDE_PRODUCTS], exponentials)
            waits, exponentials = True, 0
        waits = waits and column != "HGMMA"
        exponentials += column == "MUFU.EX2"
    return counts
