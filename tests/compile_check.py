"""Compiles every CUDA source and reports the resources of each kernel; fails on spills and exceeded budgets.

usage: python tests/compile_check.py [--arch 80 --arch 90a] [--wheel 90a] [--json FILE] [SOURCE ...]
The first table is the report of ptxas, the second one counts instructions. Budgets: tests/kernel_budgets.py. Requires
nvcc (CUDA_HOME, PATH, or PyPI's cuda-toolkit), but no GPU; the second table requires nvdisasm (next to nvcc, PATH, or
PyPI's nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.kernel_budgets import Budget

ROOT = Path(__file__).resolve().parents[1]
# Unit kernels of the device layer and samples of the emulator: they must compile without spills, and have no budget.
UNIT_KERNELS = ROOT / "tests" / "emulator" / "kernels"
INCLUDES = (ROOT / "csrc", UNIT_KERNELS.parent / "cuda", UNIT_KERNELS.parent)
ARCHITECTURES = ["80", "90a", "120"]
# Other architectures must compile, with at most a few words of spills: their instruction scheduling differs.
WITH_BUDGETS = ["80", "90a"]
SPILLS_ELSEWHERE = 128  # bytes, stored and loaded
INSTRUCTIONS = ["HMMA", "HGMMA", "LDSM", "STSM", "MUFU.EX2", "LDL", "STL", "BAR", "SHFL"]
GLOBAL_ACCESSES = ["LDG", "STG", "LDGSTS"]  # counted by width
WIDTHS = ["U8", "S8", "U16", "S16", "32", "64", "128", "256"]


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


def load(path: str) -> ModuleType:
    """A module of the repository by path, independent of sys.path."""
    spec = importlib.util.spec_from_file_location("fastgen_" + Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> str | None:
    return load("tools/build_libraries.py").find_nvcc()


def find_nvdisasm(nvcc: str) -> str | None:
    candidates = [Path(nvcc).with_name("nvdisasm"), *(Path(found) for found in [shutil.which("nvdisasm")] if found)]
    candidates += [path for entry in sys.path for path in Path(entry).glob("nvidia/*/bin/nvdisasm")]
    return next((str(path) for path in candidates if path.is_file()), None)


def demangle(symbols: list[str]) -> list[str]:
    """Names with template arguments, without parameters."""
    done = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    return [name.replace("(bool)1", "true").replace("(bool)0", "false") for name in done.stdout.splitlines()]


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


def classify(opcode: str) -> str | None:
    """The column that counts an instruction, if any: "LDG.E.128.CONSTANT" -> "LDG.128"."""
    base, *modifiers = opcode.split(".")
    if base in GLOBAL_ACCESSES:
        return f"{base}.{next((modifier for modifier in modifiers if modifier in WIDTHS), '32')}"
    return next((name for name in INSTRUCTIONS if f"{opcode}.".startswith(f"{name}.")), None)


def parse_sass(listing: str) -> dict[str, Counter[str]]:
    """The number of instructions of each column, for each symbol of ``nvdisasm -c``."""
    counts: dict[str, Counter[str]] = {}
    pattern = re.compile(r"^\.text\.(\S+):|^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    for symbol, opcode in pattern.findall(listing):
        if symbol:
            current = counts.setdefault(symbol, Counter())
        elif column := classify(opcode):
            current[column] += 1
    return counts


def compile_one(nvcc: str, nvdisasm: str | None, source: Path, arch: str) -> tuple[list[Kernel], str]:
    """The kernels of one source, and the error message, if any."""
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", *(f"-I{folder}" for folder in INCLUDES)]
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}", "--keep", "--keep-dir", folder]
        command += ["-c", str(source), "-o", str(Path(folder, "out.o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return [], f"{name} for sm_{number}:\n{done.stderr}"
        kernels = parse_ptxas(name, number, done.stderr)
        if nvdisasm is None or not kernels:
            return kernels, ""
        (cubin,) = Path(folder).glob("*.cubin")
        done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return kernels, f"nvdisasm on {name} for sm_{number}:\n{done.stderr}"
    counts = parse_sass(done.stdout)
    return [kernel._replace(instructions=dict(counts[kernel.symbol])) for kernel in kernels], ""


def parse_build(arch: str, log: str) -> list[Kernel]:
    """The kernels in the log of a build, in which ninja names each source before its report."""
    _, *parts = re.split(r"^\s*\[\d+/\d+\] ", log, flags=re.MULTILINE)
    found = [parse_ptxas(part.split(None, 1)[0], arch, part) for part in parts if "Compiling entry function" in part]
    return [kernel for kernels in found for kernel in kernels]


def compile_wheel(arch: str) -> tuple[list[Kernel], str]:
    """The kernels of a wheel that pip builds of a copy of the project, without a GPU, and the error message, if any.

    One compilation serves two checks: that the package builds, and what its kernels use.
    """
    number, letter = re.fullmatch(r"(?:sm_)?(\d+)([a-z]?)", arch).groups()  # type: ignore[union-attr]
    environment = {"FASTGEN_BUILD": "cuda", "NVCC_APPEND_FLAGS": "-Xptxas -v"}
    environment["TORCH_CUDA_ARCH_LIST"] = f"{number[:-1]}.{number[-1]}{letter}"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__", "*.so")
    with tempfile.TemporaryDirectory() as folder:
        project = shutil.copytree(ROOT, Path(folder, "project"), ignore=skipped)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            folder,
            project,
        ]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        names = zipfile.ZipFile(wheels[0]).namelist() if wheels else []
    if done.returncode != 0 or not {"fastgen/_cpu.so", "fastgen/_cuda.so"} <= set(names):
        return [], f"the wheel for sm_{number}{letter}:\n{done.stdout[-3000:]}"
    return parse_build(f"{number}{letter}", done.stdout), ""


def excesses(kernel: Kernel, budget: Budget) -> list[str]:
    """The resources of a kernel that exceed its budget."""
    found = [
        f"{used} {field.replace('_', ' ')}, budget {most}"
        for field, most in budget._asdict().items()
        if (used := getattr(kernel, field)) > most
    ]
    counts = kernel.instructions or {}
    local = counts.get("LDL", 0) + counts.get("STL", 0)
    if local and budget.stack_bytes == 0:
        found.append(f"{local} accesses of local memory (LDL, STL), budget 0")
    return found


def compare(kernels: list[Kernel], budgets: Mapping[str, Budget], everything: bool) -> list[str]:
    """Problems with kernels or budgets. everything: the list has all kernels, so that unused budgets are reported."""
    problems = []
    for kernel in kernels:
        budget = budgets.get(bare_name(kernel.name)) if kernel.arch in WITH_BUDGETS else None
        allowed = 0 if kernel.arch in WITH_BUDGETS else SPILLS_ELSEWHERE
        found = [f"{kernel.spill_bytes} bytes of spills"] if kernel.spill_bytes > allowed else []
        found += excesses(kernel, budget) if budget else []
        problems += [f"{kernel.name} for sm_{kernel.arch}: {what}" for what in found]
    names = {bare_name(kernel.name) for kernel in kernels}
    problems += [
        f"{name} has no budget: declare one in tests/kernel_budgets.py" for name in sorted(names - budgets.keys())
    ]
    unused = sorted(budgets.keys() - names) if everything else []
    return problems + [f"tests/kernel_budgets.py: no kernel is called {name}" for name in unused]


def print_tables(kernels: list[Kernel]) -> None:
    print(f"{'arch':<6}{'regs':>5}{'smem':>7}{'stack':>7}{'spills':>7}  kernel")
    for kernel in kernels:
        row = f"{kernel.registers:>5}{kernel.shared_bytes:>7}{kernel.stack_bytes:>7}{kernel.spill_bytes:>7}"
        print(f"{kernel.arch:<6}{row}  {kernel.name}")
    counted = [(kernel, kernel.instructions) for kernel in kernels if kernel.instructions is not None]
    possible = [*INSTRUCTIONS, *(f"{base}.{width}" for base in GLOBAL_ACCESSES for width in WIDTHS)]
    columns = [column for column in possible if any(counts.get(column) for _, counts in counted)]
    if not columns:
        return
    print(f"\n{'arch':<6}{''.join(f'{column:>9}' for column in columns)}  kernel")
    for kernel, counts in counted:
        print(f"{kernel.arch:<6}{''.join(f'{counts.get(column, 0):>9}' for column in columns)}  {kernel.name}")


def unit_kernels(arch: str) -> list[Path]:
    """The sources of UNIT_KERNELS for "80" or "sm_90a", without planted bugs."""
    has_sm90 = int(re.findall(r"\d+", arch)[0]) >= 90
    sources = [path for path in sorted(UNIT_KERNELS.glob("*.cu")) if path.stem != "planted"]
    return [path for path in sources if has_sm90 or not path.stem.endswith("_sm90")]


def all_jobs(architectures: list[str], wheel: str | None) -> list[tuple[Path, str]]:
    """Every source for every architecture that supports its instructions; the library's not where a wheel has them."""
    library = sorted((ROOT / "csrc").rglob("*.cu"))
    return [(path, arch) for arch in architectures for path in (library if arch != wheel else []) + unit_kernels(arch)]


def main(argv: list[str] | None = None, budgets: Mapping[str, Budget] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="default: all of csrc")
    parser.add_argument("--arch", action="append", help="for example 80 or 90a (the default); may be given repeatedly")
    parser.add_argument("--wheel", help="build a wheel for this architecture, and check the kernels in it")
    parser.add_argument("--json", type=Path, help="write the tables there too")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile check: nvcc was not found (CUDA_HOME, PATH, or pip install cuda-toolkit[nvcc,...])")
        return 1
    if shutil.which("c++filt") is None:
        print("compile check: c++filt was not found (binutils)")
        return 1
    nvdisasm = find_nvdisasm(nvcc)
    architectures = arguments.arch or ARCHITECTURES
    jobs = [(path.resolve(), arch) for arch in architectures for path in arguments.sources]
    jobs = jobs or all_jobs(architectures, arguments.wheel)
    start = time.perf_counter()
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(lambda job: compile_one(nvcc, nvdisasm, *job), jobs))
    if arguments.wheel:
        results.append(compile_wheel(arguments.wheel))
    seconds = time.perf_counter() - start
    found = [kernel for kernels, _ in results for kernel in kernels]
    units = [kernel for kernel in found if Path(ROOT, kernel.source).is_relative_to(UNIT_KERNELS)]
    kernels = [kernel for kernel in found if kernel not in units]
    problems = [error for _, error in results if error]
    problems += [
        f"{unit.name} for sm_{unit.arch}: {unit.spill_bytes} bytes of spills" for unit in units if unit.spill_bytes
    ]
    everything = not problems and not arguments.sources
    problems += compare(kernels, load("tests/kernel_budgets.py").BUDGETS if budgets is None else budgets, everything)
    print_tables(kernels)
    if nvdisasm is None:
        print("instructions were not counted: nvdisasm was not found (pip install nvidia-cuda-nvdisasm)")
    if arguments.json:
        arguments.json.write_text(json.dumps([kernel._asdict() for kernel in kernels], indent=1))
    if units:
        print(f"and {len(units)} unit kernels of the device layer and samples, which must compile without spills")
    sources = {source for source, _ in jobs}
    print(f"{len(found)} kernels of {len(sources)} sources in {seconds:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
