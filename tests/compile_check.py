"""Compiles every CUDA source and says what ptxas made of each kernel; fails on a spill.

usage: python tests/compile_check.py [--arch 80 --arch 90a] [--json FILE]
No GPU is needed: only nvcc, from CUDA_HOME, PATH, or PyPI's cuda-toolkit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Kernel(NamedTuple):
    source: str
    arch: str
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def find_nvcc() -> str | None:
    spec = importlib.util.spec_from_file_location("fastgen_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


def demangle(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |\(.*\)$", "", text.replace("(bool)1", "true").replace("(bool)0", "false"))


def parse_ptxas(source: str, arch: str, report: str) -> list[Kernel]:
    """The kernels of one ``ptxas -v`` report."""
    kernels = []
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spills = int(match["stores"]) + int(match["loads"])
        shared_bytes = int(shared.group(1)) if shared else 0
        kernels.append(
            Kernel(
                source,
                arch,
                demangle(match["name"]),
                int(match["registers"]),
                shared_bytes,
                int(match["stack"]),
                spills,
            )
        )
    return kernels


def compile_one(nvcc: str, source: Path, arch: str) -> tuple[list[Kernel], str]:
    """The kernels of one source, and the compiler's complaint if it failed."""
    name = str(source.relative_to(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", "-I", str(ROOT / "csrc")]
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(Path(folder, "out.o"))], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        return [], f"{name} for sm_{arch}:\n{done.stderr}"
    return parse_ptxas(name, arch, done.stderr), ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="for example 80 or 90a; may be given several times")
    parser.add_argument("--json", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile check: nvcc was not found (CUDA_HOME, PATH, or pip install cuda-toolkit[nvcc,...])")
        return 1
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    jobs = [(source, arch) for arch in arguments.arch or ["90a"] for source in sources]
    start = time.perf_counter()
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(lambda job: compile_one(nvcc, *job), jobs))
    kernels = [kernel for found, _ in results for kernel in found]
    errors = [error for _, error in results if error]
    print(f"{'arch':<6}{'regs':>5}{'smem':>7}{'stack':>7}{'spills':>7}  kernel")
    for kernel in kernels:
        row = f"{kernel.registers:>5}{kernel.shared_bytes:>7}{kernel.stack_bytes:>7}{kernel.spill_bytes:>7}"
        print(f"{kernel.arch:<6}{row}  {kernel.name}")
    if arguments.json:
        arguments.json.write_text(json.dumps([kernel._asdict() for kernel in kernels], indent=1))
    spilled = [kernel.name for kernel in kernels if kernel.spill_bytes]
    seconds = time.perf_counter() - start
    print(f"{len(kernels)} kernels of {len(sources)} sources in {seconds:.0f} s, {len(spilled)} with spills")
    for problem in [*errors, *(f"spills: {name}" for name in spilled)]:
        print(problem, file=sys.stderr)
    return 1 if errors or spilled or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
