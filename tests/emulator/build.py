"""Compiles the emulator, the CUDA sources and the sample kernels with a host compiler, by ninja.

Outputs in build/emulator/:
    libemulator.so       core/: the scheduler, the checks, the instructions
    libemulator_torch.so torch_memory.cpp: tensors as device memory
    <family>.so          a family's .cu files and its api.cpp, unchanged: operators of the namespace fastgen_emulated
    emulated_kernels.so  a Python module: the emulator's controls, unit kernels and samples
    <name>.so            the same for a .cu file of your own, see module_of
    <family>_<dtype>.so  a family built for one dtype, see register_dtype
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from fastgen import backend
from tests import compile_check
from tools import build_libraries

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulator"
NAMESPACE = "fastgen_emulated"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


PROBE = "#include <source_location>\nint line(std::source_location where = std::source_location::current());"


@cache
def why_not() -> str | None:
    """The reason why the emulator cannot be built; None if it can."""
    if sys.platform != "linux":
        return "the emulator requires Linux"
    if shutil.which(compiler().split(" ")[0]) is None:
        return f"no C++ compiler ({compiler()})"
    if ninja() is None:
        return "ninja was not found (pip install ninja)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not found (pip install pybind11)"
    command = [*compiler().split(" "), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=PROBE, capture_output=True, text=True, check=False).returncode != 0:
        return f"{compiler()} is too old: g++ 11 or clang 16 is needed"
    return None


@cache
def accepts(flag: str) -> bool:
    """Whether the compiler knows a flag."""
    command = [*compiler().split(" "), flag, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode == 0


def ninja() -> str | None:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.is_file() else shutil.which("ninja")


def families() -> list[str]:
    """The families that have CUDA kernels."""
    return [name for name in backend.operators() if any((CSRC / name).rglob("*.cu"))]


def manifest(own: Path | None = None, dtype: str | None = None) -> str:
    """build.ninja; with ``own``, that of the emulator and a module with the kernels of this .cu file. With ``dtype``,
    that of the families as FASTGEN_DTYPES=dtype builds them, in a namespace of their own; their kernels are the objects
    that are built for all dtypes.
    """
    import pybind11

    torch_root = Path(torch.__file__).parent
    # Kernels call a hook before each memory access; -O1 keeps the accesses as written.
    instrument = "-fsanitize=thread,alignment,bounds -O1"
    version = subprocess.run([*compiler().split(" "), "--version"], capture_output=True, text=True, check=True).stdout
    if "clang" in version:
        # Without the second, x += 1 is no read; without the third, loops become one call with no alignment.
        options = ("instrument-func-entry-exit=0", "instrument-read-before-write=1")
        instrument += "".join(f" -mllvm -tsan-{option}" for option in options) + " -mllvm -disable-loop-idiom-all"
    else:
        instrument += " --param tsan-instrument-func-entry-exit=0"
    # Registers that are read before they are written hold a pattern, which results and checks show.
    unwritten = "-ftrivial-auto-var-init=pattern"
    if accepts(unwritten):
        instrument += f" {unwritten}"
    # Calls of these are wrapped by the emulator.
    wrapped = ("memcpy", "memmove", "memset")
    instrument += "".join(f" -fno-builtin-{name}" for name in wrapped)
    wrap = "".join(f" -Wl,--wrap={name}" for name in wrapped)
    # The emulator's own templates must not be the kernels' instrumented ones.
    core_link = "-ldl -Wl,-Bsymbolic-functions"
    includes = "-Itests/emulator -Itests/emulator/host -Icsrc"
    torch_flags = f"-isystem {torch_root}/include -isystem {torch_root}/include/torch/csrc/api/include"
    stable = f"-DFASTGEN_NAMESPACE={NAMESPACE} -DFASTGEN_DISPATCH_KEY=CPU -DTORCH_TARGET_VERSION=0x020a000000000000"
    python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']} -fvisibility=hidden"
    origin, torch_link = "'-Wl,-rpath,$$ORIGIN' -L$out_dir", f"-L{torch_root}/lib -ltorch -ltorch_cpu -lc10"
    lines = [
        f"out_dir = {OUT.relative_to(ROOT)}",
        "builddir = $out_dir",
        f"cxx = {compiler()}",
        f"flags = -std=c++20 -g1 -fPIC -Wall -Wno-unknown-pragmas {includes} -ffile-prefix-map={ROOT}=.",
        "rule cc",
        "  command = $cxx $flags $extra -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out $libs",
    ]

    def compiled(name: str, sources: list[tuple[Path, str]]) -> list[str]:
        objects = []
        for source, extra in sources:
            path = source.relative_to(ROOT)
            objects.append(f"$out_dir/{name}/{path}.o")
            lines.extend([f"build {objects[-1]}: cc {path}", f"  extra = {extra}"])
        return objects

    def library(name: str, sources: list[tuple[Path, str]], libs: str, *after: str, linked: Sequence[str] = ()) -> None:
        objects = [*linked, *compiled(name, sources)]
        needs = " ".join(f"$out_dir/{other}" for other in after)
        lines.extend([f"build $out_dir/{name}.so: link {' '.join(objects)} | {needs}", f"  libs = {libs}"])

    if dtype is not None:
        without = [f"-DFASTGEN_WITHOUT_{name.upper()}" for name in build_libraries.DTYPES if name != dtype]
        stable = stable.replace(NAMESPACE, f"{NAMESPACE}_{dtype}")
        for family in families():
            paths = [path.relative_to(ROOT) for path in sorted((CSRC / family).rglob("*.cu"))]
            kernels = [f"$out_dir/{family}/{path}.o" for path in paths if build_libraries.dtype_of(str(path)) == dtype]
            sources = [(ROOT / path, instrument) for path in paths if build_libraries.dtype_of(str(path)) is None]
            sources += [
                (path, f"-O1 {torch_flags} {stable}") for path in (CSRC / family / "api.cpp", HERE / "device_scope.cpp")
            ]
            sources = [(path, " ".join([extra, *without])) for path, extra in sources]
            libs = f"-Wl,-z,defs {origin}{wrap} -lemulator -lemulator_torch {torch_link} -lstdc++"
            library(f"{family}_{dtype}", sources, libs, linked=kernels)
        return "\n".join(lines) + "\n"
    library("libemulator", [(path, "-O2") for path in sorted((HERE / "core").glob("*.cpp"))], core_link)

    def kernels_module(name: str, kernels: list[Path]) -> None:
        # Compiled once for all modules.
        options = f"-O1 {python} -DFASTGEN_KERNELS_EMULATED"
        bindings = compiled("bindings", [(HERE / file, options) for file in ("bindings.cpp", "controls.cpp")])
        sources = [(path, instrument) for path in kernels]
        library(name, sources, f"{origin}{wrap} -lemulator", "libemulator.so", linked=bindings)

    if own is not None:
        kernels_module(own.stem, [own])
        return "\n".join(lines) + "\n"
    library(
        "libemulator_torch",
        [(HERE / "torch_memory.cpp", f"-O1 {torch_flags}")],
        f"{origin} -lemulator {torch_link}",
        "libemulator.so",
    )
    for family in families():
        kernels = [(path, instrument) for path in sorted((CSRC / family).rglob("*.cu"))]
        api = [(path, f"-O1 {torch_flags} {stable}") for path in (CSRC / family / "api.cpp", HERE / "device_scope.cpp")]
        libs = f"{origin}{wrap} -lemulator -lemulator_torch {torch_link}"
        library(family, kernels + api, libs, "libemulator.so", "libemulator_torch.so")
    kernels_module("emulated_kernels", sorted((HERE / "kernels").glob("*.cu")))
    return "\n".join(lines) + "\n"


@contextmanager
def alone() -> Iterator[None]:
    """Serializes builds of several processes, such as the workers of pytest-xdist."""
    import fcntl  # which Windows lacks, but there why_not() comes first

    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, be it by the death of the process
        yield


@cache
def build(own: Path | None = None) -> Path:
    """The folder with the built libraries; with ``own``, only what this .cu file needs."""
    run_ninja(OUT / ("build.ninja" if own is None else f"{own.stem}.ninja"), manifest(own))
    return OUT


@cache
def register_dtype(dtype: str) -> str:
    """Adds a backend with the families as FASTGEN_DTYPES=dtype builds them, and returns its name."""
    run_ninja(build() / f"{dtype}.ninja", manifest(dtype=dtype))
    backend.add_backend(f"emulated {dtype}", f"{NAMESPACE}_{dtype}", families())
    for family in families():
        torch.ops.load_library(str(OUT / f"{family}_{dtype}.so"))
    return f"emulated {dtype}"


def run_ninja(path: Path, text: str) -> None:
    with alone():
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        done = subprocess.run([str(ninja()), "-f", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaint = done.stdout[max(done.stdout.find("FAILED"), 0) :]
        raise RuntimeError(f"the emulator does not build:\n{complaint}{done.stderr}")


def load(library: Path) -> ModuleType:
    """A library with bindings.cpp, which names each module alike."""
    spec = importlib.util.spec_from_file_location("kernels_module", library)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def module() -> ModuleType:
    """The Python module of the emulator."""
    return load(build() / "emulated_kernels.so")


def module_of(source: Path) -> ModuleType:
    """A Python module with the emulator's controls and the kernels of a .cu file of your own.

    The file lies in the repository and registers its kernels as ``kernels/samples.cu`` does (``kernels/registry.h``).
    """
    return load(build(source.resolve()) / f"{source.stem}.so")


def why_not_cuda() -> str | None:
    """None where the unit kernels can be built and run on a GPU, else the reason."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if compile_check.find_nvcc() is None:
        return "nvcc was not found"
    missing = (
        importlib.util.find_spec("pybind11") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    )
    return "pybind11 or Python.h was not found" if missing else None


def compile_for_cuda(architecture: str, library: Path) -> None:
    """The same kernels and bindings, by nvcc, as a Python module for "80" or "90a"; each source in a process."""
    import pybind11

    sources = [HERE / "bindings.cpp", *compile_check.unit_kernels(architecture)]
    folders = [*compile_check.INCLUDES, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [str(compile_check.find_nvcc()), "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    options = [f"-I{one}" for one in folders]

    def compiled(source: Path) -> str:
        target = library.with_name(f"{library.stem}-{source.stem}.o")
        subprocess.run([*command, *options, "-x", "cu", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*command, "-shared", *objects, "-o", str(library)], check=True)


def newest_source() -> float:
    """Time of the newest source of the unit kernels."""
    files = [
        path for folder in (CSRC, HERE) for path in folder.rglob("*") if path.suffix in (".h", ".cu", ".cuh", ".cpp")
    ]
    return max(path.stat().st_mtime for path in files)


@cache
def cuda_module() -> ModuleType:
    """The unit kernels and samples on the GPU; compiled if a source is newer than what an earlier process compiled."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    library = OUT / f"cuda_kernels_{architecture}" / "cuda_kernels.so"
    with alone():
        library.parent.mkdir(exist_ok=True)
        if not library.is_file() or library.stat().st_mtime < newest_source():
            compile_for_cuda(architecture, library)
        return load(library)


@cache
def register() -> None:
    """Adds the backend "emulated": the families with CUDA kernels."""
    folder = build()
    backend.add_backend("emulated", NAMESPACE, families())
    for family in families():
        torch.ops.load_library(str(folder / f"{family}.so"))


@cache
def allocator() -> ctypes.CDLL:
    return ctypes.CDLL(str(build() / "libemulator_torch.so"))


def track_tensors(on: bool) -> None:
    """From now on new tensors are (are not) memory that emulated kernels know."""
    allocator().fastgen_emulator_install_allocator(int(on))
