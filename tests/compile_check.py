"""Compiles every CUDA source and reports the resources of each kernel; fails on spills and exceeded budgets.

usage: python tests/compile_check.py [--arch 80] [--wheel 90a] [--dtype bfloat16] [--json FILE] [--sass] [--tighten]
       [SOURCE ...]
The first table is the report of ptxas, the second one counts instructions, the third one those of main loops, the last
one has the CPU time of each source of csrc and its machine code, at most MOST_KIB. Budgets: tests/kernel_budgets.py,
and tests/loop_budgets.json, which --tighten writes. Requires nvcc (CUDA_HOME, PATH, or PyPI's cuda-toolkit), but no
GPU; instructions require nvdisasm (next to nvcc, PATH, or PyPI's nvidia-cuda-nvdisasm), and of a wheel cuobjdump (the
same, or PyPI's nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.kernel_budgets import Budget

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks.model import sass  # noqa: E402
from tests.compile_costs import Cost, Costs, large_sources, print_costs, run_compiler  # noqa: E402
from tests.compile_report import (  # noqa: E402
    GLOBAL_ACCESSES,
    INSTRUCTIONS,
    WIDTHS,
    Kernel,
    LoopCount,
    bare_name,
    parse_ptxas,
    parse_sass,
    serializations,
    short_name,
)

# Unit kernels of the device layer and samples of the emulator: they must compile without spills, and have no budget.
UNIT_KERNELS = ROOT / "tests" / "emulator" / "kernels"
INCLUDES = (ROOT / "csrc", UNIT_KERNELS.parent / "cuda", UNIT_KERNELS.parent)
ARCHITECTURES = ["80", "90a", "120"]
# Other architectures must compile, with at most a few words of spills: their instruction scheduling differs.
WITH_BUDGETS = ["80", "90a"]
SPILLS_ELSEWHERE = 128  # bytes, stored and loaded
SLACK = 1.03  # of the budgets of main loops, so that a new version of nvcc does not fail the check
LOOP_BUDGETS = ROOT / "tests" / "loop_budgets.json"
LoopBudgets = dict[str, dict[str, dict[str, float]]]  # by architecture and short name


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


def find_tool(nvcc: str, name: str) -> str | None:
    """nvdisasm or cuobjdump: next to nvcc, in PATH, or a package of PyPI."""
    candidates = [Path(nvcc).with_name(name), *(Path(found) for found in [shutil.which(name)] if found)]
    candidates += [path for entry in sys.path for path in Path(entry).glob(f"nvidia/*/bin/{name}")]
    return next((str(path) for path in candidates if path.is_file()), None)


def find_nvdisasm(nvcc: str) -> str | None:
    return find_tool(nvcc, "nvdisasm")


def count_loops(kernels: list[Kernel], listing: str, names: Collection[str]) -> list[Kernel]:
    """The kernels, with the main loops of those in ``names`` counted.

    Raises:
        ValueError: a main loop was not found, or is not that of the launch plan.
    """
    wanted = {kernel.symbol for kernel in kernels if short_name(kernel.name) in names}
    if not wanted:
        return kernels
    code = sass.parse(listing, wanted)
    return [
        kernel._replace(loop=count_loop(kernel, code[kernel.symbol])) if kernel.symbol in code else kernel
        for kernel in kernels
    ]


def count_loop(kernel: Kernel, code: sass.Listing) -> LoopCount:
    """The main loop of one kernel."""
    from benchmarks.model import hopper, loops

    of_warpgroups = hopper.kernel_of(kernel.name, kernel.registers, code)
    if of_warpgroups is not None:
        return LoopCount(of_warpgroups.whole, len(of_warpgroups.path) / of_warpgroups.scores_per_lane)
    name = loops.name_of(kernel.name)
    if name is not None:
        iteration = loops.attention_iteration(code, name)
        return LoopCount(iteration.whole, iteration.per_score)
    main = sass.main_loop(code)
    if main is None:
        raise ValueError(f"{kernel.name}: no loop with matrix instructions and a barrier")
    path = main.paths[max(main.paths)]
    return LoopCount(main.whole, sum(1 for _ in path.instructions()) / path.total("matrix"))


def disassemble(nvdisasm: str, cubin: Path) -> str:
    """The listing of a cubin.

    Raises:
        subprocess.CalledProcessError: nvdisasm failed; its message is in ``stderr``.
    """
    return subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def compile_one(
    nvcc: str,
    nvdisasm: str | None,
    source: Path,
    arch: str,
    loops: Collection[str] = (),
    instructions: Collection[str] = (),
    everything: bool = True,
    costs: Costs | None = None,
    host: bool = True,
) -> tuple[list[Kernel], str]:
    """The kernels of one source, and the error message, if any.

    loops: kernels whose main loop is counted. instructions: kernels whose instructions are checked. everything:
    instructions are counted in all kernels, not only where the source has one of those. costs: takes the cost of the
    source. host: code for the host is compiled, too.
    """
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", *(f"-I{folder}" for folder in INCLUDES)]
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}", "--keep", "--keep-dir", folder]
        what, output = ("-c", "out.o") if host else ("-cubin", "out.cubin")
        command += [what, str(source), "-o", str(Path(folder, output))]
        done = run_compiler(command, Path(folder, "report.txt"))
        if done.returncode != 0:
            return [], f"{name} for sm_{number}:\n{done.output}"
        (cubin,) = Path(folder).glob("*.cubin")
        if costs is not None:
            costs[name, number] = Cost(done.seconds, cubin.stat().st_size / 1024)
        kernels = parse_ptxas(name, number, done.output)
        lost = serializations(done.output)
        if lost:
            return kernels, f"{name} for sm_{number}:\n" + "\n".join(lost)
        wanted = everything or any(
            short_name(kernel.name) in loops or bare_name(kernel.name) in instructions for kernel in kernels
        )
        if nvdisasm is None or not kernels or not wanted:
            return kernels, ""
        try:
            listing = disassemble(nvdisasm, cubin)
        except subprocess.CalledProcessError as error:
            return kernels, f"nvdisasm on {name} for sm_{number}:\n{error.stderr}"
    counts = parse_sass(listing)
    kernels = [kernel._replace(instructions=dict(counts[kernel.symbol])) for kernel in kernels]
    try:
        return count_loops(kernels, listing, loops), ""
    except (ValueError, RuntimeError) as error:
        return kernels, f"main loops for sm_{number}: {error}"


def parse_build(arch: str, log: str) -> list[Kernel]:
    """The kernels in the log of a build, in which ninja names each source before its report."""
    _, *parts = re.split(r"^\s*\[\d+/\d+\] ", log, flags=re.MULTILINE)
    found = [parse_ptxas(part.split(None, 1)[0], arch, part) for part in parts if "Compiling entry function" in part]
    return [kernel for kernels in found for kernel in kernels]


def count_library_loops(
    kernels: list[Kernel], library: Path, nvcc: str, names: Collection[str]
) -> tuple[list[Kernel], str]:
    """The kernels, with the main loops of those in ``names`` counted from a shared library; and the error, if any."""
    nvdisasm, cuobjdump = find_tool(nvcc, "nvdisasm"), find_tool(nvcc, "cuobjdump")
    symbols = [kernel.symbol.encode() for kernel in kernels if short_name(kernel.name) in names]
    if nvdisasm is None or cuobjdump is None or not symbols:
        return kernels, ""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [cuobjdump, "-xelf", "all", str(library)], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            return kernels, f"cuobjdump on {library.name}:\n{done.stderr}"
        for cubin in sorted(Path(folder).glob("*.cubin")):
            content = cubin.read_bytes()
            if any(symbol in content for symbol in symbols):
                try:
                    kernels = count_loops(kernels, disassemble(nvdisasm, cubin), names)
                except subprocess.CalledProcessError as error:
                    return kernels, f"nvdisasm on {cubin.name}:\n{error.stderr}"
                except (ValueError, RuntimeError) as error:
                    return kernels, f"main loops of {library.name}: {error}"
    return kernels, ""


def compile_wheel(arch: str, nvcc: str, loops: Collection[str] = ()) -> tuple[list[Kernel], str]:
    """The kernels of a wheel that pip builds of a copy of the project, without a GPU, and the error message, if any.

    One compilation serves two checks: that the package builds, and what its kernels use. loops: kernels whose main loop
    is counted.
    """
    number, letter = re.fullmatch(r"(?:sm_)?(\d+)([a-z]?)", arch).groups()  # type: ignore[union-attr]
    environment = {"FASTGEN_BUILD": "cuda", "FASTGEN_DTYPES": "", "NVCC_APPEND_FLAGS": "-Xptxas -v"}
    environment["TORCH_CUDA_ARCH_LIST"] = f"{number[:-1]}.{number[-1]}{letter}"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__", "*.so")
    with tempfile.TemporaryDirectory() as folder:
        project = shutil.copytree(ROOT, Path(folder, "project"), ignore=skipped)
        # Objects of the CPU kernels come along with their times, and are not compiled again.
        objects = ROOT / "build" / "libraries"
        if objects.is_dir():
            shutil.copytree(objects, project / "build" / "libraries", ignore=shutil.ignore_patterns("_cuda*"))
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
        kernels = parse_build(f"{number}{letter}", done.stdout)
        library = Path(zipfile.ZipFile(wheels[0]).extract("fastgen/_cuda.so", folder))
        return count_library_loops(kernels, library, nvcc, loops)


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


def compare_instructions(kernel: Kernel, required: Mapping[str, bool]) -> list[str]:
    """Problems with the instructions of a kernel that it must have (true) or must not have."""
    if kernel.instructions is None:
        return []
    return [
        f"{kernel.name} for sm_{kernel.arch}: {'no' if wanted else 'has'} {name}"
        for name, wanted in required.items()
        if (kernel.instructions.get(name, 0) > 0) != wanted
    ]


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
    # Kernels for sm_90a alone, where it was compiled.
    has_sm90a = any(is_sm90a(kernel.arch) for kernel in kernels)
    missing = [name for name in sorted(budgets.keys() - names) if has_sm90a or not name.endswith("_sm90")]
    unused = missing if everything else []
    return problems + [f"tests/kernel_budgets.py: no kernel is called {name}" for name in unused]


def compare_loops(kernels: list[Kernel], budgets: LoopBudgets, names: Collection[str], everything: bool) -> list[str]:
    """Problems with main loops. everything: the list has all kernels, so that kernels not counted are reported."""
    problems, counted = [], set()
    for kernel in kernels:
        if kernel.loop is None or kernel.arch not in WITH_BUDGETS:
            continue
        name = short_name(kernel.name)
        counted.add((kernel.arch, name))
        budget = budgets.get(kernel.arch, {}).get(name)
        if budget is None:
            problems.append(f"{name} for sm_{kernel.arch}: no budget of its main loop; --tighten writes one")
            continue
        problems += [
            f"{name} for sm_{kernel.arch}: {used:.2f} instructions of the main loop ({field}), budget"
            f" {budget[field]:.2f}"
            for field, used in kernel.loop._asdict().items()
            if used > budget[field]
        ]
    compiled = {kernel.arch for kernel in kernels} & set(WITH_BUDGETS)
    every = {(arch, name) for arch in compiled for name in names if is_sm90a(arch) or "_sm90<" not in name}
    expected = every if everything else set()
    return problems + [
        f"{name} for sm_{arch}: its main loop was not counted (no such kernel, or no nvdisasm or cuobjdump)"
        for arch, name in sorted(expected - counted)
    ]


def tightened(kernels: list[Kernel], budgets: LoopBudgets) -> LoopBudgets:
    """The budgets, with those of the counted kernels set to SLACK above what they use."""
    found = {arch: dict(table) for arch, table in budgets.items()}
    for kernel in kernels:
        if kernel.loop is not None and kernel.arch in WITH_BUDGETS:
            count = {
                "loop": math.ceil(kernel.loop.loop * SLACK),
                "per_score": math.ceil(kernel.loop.per_score * SLACK * 10) / 10,
            }
            found.setdefault(kernel.arch, {})[short_name(kernel.name)] = count
    return {arch: dict(sorted(table.items())) for arch, table in sorted(found.items())}


def print_loops(kernels: list[Kernel]) -> None:
    counted = [(kernel, kernel.loop) for kernel in kernels if kernel.loop is not None]
    if counted:
        print(f"\n{'arch':<6}{'loop':>7}{'per score':>11}  main loop of")
    for kernel, loop in counted:
        print(f"{kernel.arch:<6}{loop.loop:>7}{loop.per_score:>11.2f}  {short_name(kernel.name)}")


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
    missing = [*([] if has_sm90 else ["_sm90"]), *([] if is_sm90a(arch) else ["_sm90a"])]
    sources = [path for path in sorted(UNIT_KERNELS.glob("*.cu")) if path.stem != "planted"]
    return [path for path in sources if not path.stem.endswith(tuple(missing))]


def is_sm90a(arch: str) -> bool:
    """Whether it has the instructions of sm_90a, which no other architecture has."""
    return arch.removeprefix("sm_") == "90a"


def library_sources(arch: str, dtypes: Collection[str] | None = None) -> list[Path]:
    """The library's .cu files for an architecture. Those in folders called sm90 are for sm_90a alone.

    dtypes: of the files with the kernels of one dtype, those of these.
    """
    dtype_of = load("tools/build_libraries.py").dtype_of
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    sources = [path for path in sources if is_sm90a(arch) or "sm90" not in path.parts]
    return [path for path in sources if dtypes is None or dtype_of(str(path)) in (None, *dtypes)]


def all_jobs(
    architectures: list[str], wheel: str | None, dtypes: Collection[str] | None = None
) -> list[tuple[Path, str]]:
    """Every source for every architecture that supports its instructions; the library's not where a wheel has them."""
    return [
        (path, arch)
        for arch in architectures
        for path in (library_sources(arch, dtypes) if arch != wheel else []) + unit_kernels(arch)
    ]


def main(
    argv: list[str] | None = None,
    budgets: Mapping[str, Budget] | None = None,
    loop_kernels: Collection[str] | None = None,
    loop_file: Path = LOOP_BUDGETS,
) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="default: all of csrc")
    parser.add_argument("--arch", action="append", help="for example 80 or 90a (the default); may be given repeatedly")
    parser.add_argument("--wheel", help="build a wheel for this architecture, and check the kernels in it")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=load("tools/build_libraries.py").DTYPES,
        help="dtype of the sources of one dtype; a wheel has all (default: all; repeatable)",
    )
    parser.add_argument("--json", type=Path, help="write the tables there too")
    parser.add_argument("--sass", action="store_true", help="count the instructions of all kernels; so with SOURCE")
    parser.add_argument("--tighten", action="store_true", help="write the budgets of main loops from what is compiled")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile check: nvcc was not found (CUDA_HOME, PATH, or pip install cuda-toolkit[nvcc,...])")
        return 1
    if shutil.which("c++filt") is None:
        print("compile check: c++filt was not found (binutils)")
        return 1
    nvdisasm = find_nvdisasm(nvcc)
    table = load("tests/kernel_budgets.py")
    loops = table.LOOP_KERNELS if loop_kernels is None else loop_kernels
    loop_budgets = json.loads(loop_file.read_text()) if loop_file.is_file() else {}
    architectures = arguments.arch or ARCHITECTURES
    jobs = [(path.resolve(), arch) for arch in architectures for path in arguments.sources]
    jobs = jobs or all_jobs(architectures, arguments.wheel, arguments.dtype)
    everywhere = arguments.sass or bool(arguments.sources)
    start = time.perf_counter()
    costs: Costs = {}
    checked = table.REQUIRED_INSTRUCTIONS

    def compile_job(job: tuple[Path, str]) -> tuple[list[Kernel], str]:
        # The host's code, which is the same for each architecture, is compiled in the wheel and for its architecture.
        host = arguments.wheel in (None, job[1])
        return compile_one(nvcc, nvdisasm, *job, loops, checked, everywhere, costs, host)

    with ThreadPoolExecutor(max_workers=2) as pool:
        wheel = pool.submit(compile_wheel, arguments.wheel, nvcc, loops) if arguments.wheel else None
        results = list(pool.map(compile_job, jobs))
        results += [wheel.result()] if wheel else []
    costs = {key: cost for key, cost in costs.items() if Path(ROOT, key[0]).is_relative_to(ROOT / "csrc")}
    seconds = time.perf_counter() - start
    found = [kernel for kernels, _ in results for kernel in kernels]
    units = [kernel for kernel in found if Path(ROOT, kernel.source).is_relative_to(UNIT_KERNELS)]
    kernels = [kernel for kernel in found if kernel not in units]
    problems = [error for _, error in results if error]
    problems += [
        f"{unit.name} for sm_{unit.arch}: {unit.spill_bytes} bytes of spills" for unit in units if unit.spill_bytes
    ]
    everything = not problems and not arguments.sources
    problems += large_sources(costs)
    problems += compare(kernels, table.BUDGETS if budgets is None else budgets, everything)
    if arguments.tighten:
        loop_budgets = tightened(kernels, loop_budgets)
        loop_file.write_text(json.dumps(loop_budgets, indent=1) + "\n")
    for kernel in kernels:
        problems += compare_instructions(kernel, table.REQUIRED_INSTRUCTIONS.get(bare_name(kernel.name), {}))
    problems += compare_loops(kernels, loop_budgets, loops, everything)
    print_tables(kernels)
    print_loops(kernels)
    print_costs(costs)
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
