"""Builds the compiled parts of fastgen. FASTGEN_BUILD chooses them:

auto (default)  CUDA if torch has CUDA and nvcc is found, else CPU if a C++ compiler is found, else nothing.
                Never fails an install; what was not built, and why, is kept for fastgen.info().
none, cpu, cuda exactly that (cuda includes cpu), or an error with the reason.

No GPU is needed, but torch must be visible: pip install --no-build-isolation. TORCH_CUDA_ARCH_LIST is honoured.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = cpp_extension = None
try:
    import pybind11
except ImportError:
    pybind11 = None

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0a;12.0+PTX"
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
GIB_PER_JOB = 3


class Facts(NamedTuple):  # what this machine has
    torch_version: str | None
    torch_cuda: str | None
    nvcc: str | None
    compiler: str | None
    pybind11: bool = True


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of PyPI's cuda-toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(found).resolve() for found in [shutil.which("nvcc")] if found]
    candidates += [Path(entry, "nvidia", "cu13", "bin", "nvcc") for entry in sys.path]
    return next((str(path) for path in candidates if path.is_file()), None)


def gather_facts() -> Facts:
    compiler = shutil.which(os.environ.get("CXX", "").split(" ")[0] or "c++") or shutil.which("g++")
    versions = (None, None) if torch is None else (torch.__version__, torch.version.cuda)
    return Facts(*versions, find_nvcc(), compiler, pybind11 is not None)


def choose(mode: str, facts: Facts) -> tuple[list[str], dict[str, str]]:
    """The targets to build, and for each other one the reason why not."""
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTGEN_BUILD: expected auto, none, cpu or cuda, got {mode!r}")
    blockers = [
        (mode == "none", "FASTGEN_BUILD=none"),
        (os.name == "nt", "no build for Windows is written"),
        (facts.torch_version is None, "torch is not visible to the build (install it, then use --no-build-isolation)"),
        (not facts.pybind11, "pybind11 is not visible to the build (pip install pybind11 ninja)"),
        (facts.compiler is None, "no C++ compiler (c++, g++ or CXX)"),
    ]
    missing = next((dict.fromkeys(("cpu", "cuda"), reason) for blocked, reason in blockers if blocked), {})
    if not missing and facts.nvcc is None:
        missing = {"cuda": "nvcc was not found (CUDA_HOME, PATH)"}
    elif not missing and facts.torch_cuda is None and mode == "auto":
        missing = {"cuda": "this torch has no CUDA (FASTGEN_BUILD=cuda builds the kernels all the same)"}
    if mode == "cpu":
        missing.setdefault("cuda", "FASTGEN_BUILD=cpu")
    if mode in ("cpu", "cuda") and mode in missing:
        raise SystemExit(f"FASTGEN_BUILD={mode}: {missing[mode]}")
    return [target for target in ("cpu", "cuda") if target not in missing], missing


def ask_nvcc(nvcc: str, pattern: str, *arguments: str) -> str:
    done = subprocess.run([nvcc, *arguments], check=True, capture_output=True, text=True)
    return re.findall(pattern, done.stdout + done.stderr)[0]


def architecture_names(arch_list: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as names: "8.0;12.0+PTX" -> ["80", "120", "120+PTX"]."""
    entries = [entry.replace(".", "") for entry in re.split(r"[;\s]+", arch_list.strip())]
    return [name for e in entries for name in ([e.removesuffix("+PTX"), e] if e.endswith("+PTX") else [e])]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def make_extensions(targets: list[str], facts: Facts) -> list[Extension]:
    if not targets:
        return []
    release, home, names = "", "", []
    if "cuda" in targets:
        release = ask_nvcc(facts.nvcc, r"release (\d+\.\d+)", "--version")
        home = os.path.realpath(ask_nvcc(facts.nvcc, r"TOP=(\S+)", "--dryrun", "-E", "-x", "cu", os.devnull))
        names = architecture_names(os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES))
        cpp_extension.CUDA_HOME = home  # None under a CPU-only torch
    common = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]
    vectorised = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    # FASTGEN_SANITIZE=address,undefined: the CPU's library for tests/fuzz, which aborts where it reads out of bounds.
    sanitizers = os.environ.get("FASTGEN_SANITIZE", "")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-wrapv", "-fno-omit-frame-pointer", "-O1"]
    vectorised += sanitize if sanitizers else []
    macros = [("FASTGEN_NAMESPACE", "fastgen"), ("TORCH_TARGET_VERSION", TORCH_TARGET)]
    build_info = {"CUDA_ARCHITECTURES": " ".join(names), "CUDA_VERSION": release, "TORCH_VERSION": facts.torch_version}
    csrc, torch_root = str(ROOT / "csrc"), Path(torch.__file__).parent

    def stable(key: str, files: list[str], cxx: list[str], **options: Any) -> Extension:
        """A library on the stable ABI, its operators under one dispatch key."""
        return Extension(
            f"fastgen._{key.lower()}",
            files,
            include_dirs=[csrc, str(torch_root / "include"), *([f"{home}/include"] if key == "CUDA" else [])],
            library_dirs=[str(torch_root / "lib"), *([f"{home}/lib64", f"{home}/lib"] if key == "CUDA" else [])],
            define_macros=[*macros, ("FASTGEN_DISPATCH_KEY", key), (f"USE_{key}", None)],
            extra_compile_args={"cxx": common + cxx, "nvcc": ["-std=c++20", "-O3", "-lineinfo"]},
            **options,
        )

    defines = [(f"FASTGEN_{key}", f'"{value}"') for key, value in build_info.items()]
    include, flags = [csrc, pybind11.get_include()], {"cxx": common}
    module = Extension("fastgen._C", ["csrc/module.cpp"], include, defines, extra_compile_args=flags)
    cpu = stable(
        "CPU",
        sources("csrc/*/cpu/*.cpp", "csrc/latent/api.cpp"),
        vectorised,
        libraries=["torch", "torch_cpu"],
        extra_link_args=sanitize[:1] if sanitizers else [],
    )
    if "cuda" not in targets:
        return [module, cpu]
    # libtorch brings libtorch_cuda, wherever the torch that loads this has it.
    link = {"extra_link_args": ["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]}
    return [module, cpu, stable("CUDA", sources("csrc/*/api.cpp", "csrc/common/*.cpp", "csrc/**/*.cu"), [], **link)]


def make_commands(mode: str, missing: dict[str, str]) -> dict[str, type]:
    built: list[str] = []

    def finish(package: Path) -> None:
        """Leaves no library of an earlier build, and a report of this one."""
        for path in (path for name in {"C", "cpu", "cuda"} - {*built} for path in [*package.glob(f"_{name}.*so")]):
            path.unlink()
        package.mkdir(parents=True, exist_ok=True)
        report = json.dumps({"mode": mode, "built": built, "missing": missing}, indent=1)
        (package / "_build_report.json").write_text(report)
        reasons = "".join(f"; not {name}: {reason}" for name, reason in missing.items())
        print(f"fastgen: built {', '.join(built) or 'nothing compiled'}{reasons}", file=sys.stderr)

    class BuildLibraries(build_ext if torch is None else cpp_extension.BuildExtension):  # type: ignore[misc]
        """Builds what was chosen; in auto mode a failure is reported, not raised."""

        def run(self) -> None:
            super().run()
            finish(ROOT / "fastgen" if self.inplace else Path(self.build_lib, "fastgen"))

        def build_extensions(self) -> None:
            self.attempt([extension.name for extension in self.extensions], super().build_extensions)

        def build_extension(self, extension: Extension) -> None:
            self.attempt([extension.name], super().build_extension, extension)
            if extension.name.removeprefix("fastgen._") not in missing:
                built.append(extension.name.removeprefix("fastgen._"))

        def attempt(self, names: list[str], build: Callable[..., None], *arguments: Extension) -> None:
            try:
                build(*arguments)
            except Exception as error:
                if mode != "auto":
                    raise
                reason = f"the build failed: {str(error).strip().splitlines()[-1]}"
                missing.update(
                    (short, reason) for name in names if (short := name.removeprefix("fastgen._")) not in built
                )

        def copy_extensions_to_source(self) -> None:
            self.extensions = [e for e in self.extensions if e.name.removeprefix("fastgen._") in built]
            super().copy_extensions_to_source()

    class BuildPython(build_py):  # where there is nothing to compile, says so
        def run(self) -> None:
            super().run()
            if not self.distribution.ext_modules:
                finish(ROOT / "fastgen" if self.editable_mode else Path(self.build_lib, "fastgen"))

    return {"build_ext": BuildLibraries, "build_py": BuildPython}


if __name__ == "__main__":
    os.chdir(ROOT)
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 4
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, int(gib / GIB_PER_JOB)))))
    wanted, found = os.environ.get("FASTGEN_BUILD", "auto"), gather_facts()
    chosen, not_chosen = choose(wanted, found)
    setup(ext_modules=make_extensions(chosen, found), cmdclass=make_commands(wanted, not_chosen))
