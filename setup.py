"""Installs fastgen with its compiled parts. FASTGEN_BUILD chooses them:

auto (default)  CUDA if torch has CUDA and nvcc is found, else CPU if a C++ compiler is found, else nothing.
                Never fails an install; what was not built, and why, is kept for fastgen.info().
none, cpu, cuda exactly that (cuda includes cpu), or an error with the reason.

No GPU is needed, but a torch: the one that is importable, or that of the environment that is installed into.
TORCH_CUDA_ARCH_LIST is honored. FASTGEN_DTYPES=bfloat16,float32 chooses the dtypes of the CUDA kernels, by default all.
FASTGEN_LOCAL_VERSION=cu130 makes a wheel of version X+cu130.
tools/build_libraries.py compiles.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools import build_libraries  # noqa: E402

NO_TORCH = "no torch in this environment (install it first, then fastgen with --no-cache-dir)"


class Facts(NamedTuple):  # what this machine has
    torch_version: str | None
    torch_cuda: str | None
    nvcc: str | None
    compiler: str | None
    ninja: str | None = "ninja"


def gather_facts() -> Facts:
    torch = build_libraries.find_torch()
    versions = (None, None) if torch is None else (torch.version, torch.cuda)
    tools = build_libraries.find_compiler(), build_libraries.find_ninja()
    return Facts(*versions, build_libraries.find_nvcc(), *tools)


def choose(mode: str, facts: Facts) -> tuple[list[str], dict[str, str]]:
    """The libraries to build, and for each other one the reason why not."""
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTGEN_BUILD: expected auto, none, cpu or cuda, got {mode!r}")
    blockers = [
        (mode == "none", "FASTGEN_BUILD=none"),
        (os.name == "nt", "no build for Windows is written"),
        (facts.torch_version is None, NO_TORCH),
        (facts.ninja is None, "ninja was not found (pip install ninja)"),
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


def public_version() -> str:
    return re.findall(r'^__version__ = "(.+)"', (ROOT / "fastgen" / "version.py").read_text(), re.MULTILINE)[0]


def version() -> str:
    """The version in fastgen/version.py, with FASTGEN_LOCAL_VERSION as its local part."""
    local = os.environ.get("FASTGEN_LOCAL_VERSION", "")
    if not local:
        return public_version()
    if not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local):
        raise SystemExit(f"FASTGEN_LOCAL_VERSION: expected letters, digits and dots, such as cu130, got {local!r}")
    return f"{public_version()}+{local}"


def make_commands(mode: str, targets: list[str], missing: dict[str, str]) -> dict[str, type]:
    """The setuptools commands that build ``targets``. ``missing``: reasons why other libraries are not built."""

    def compile_targets() -> dict[str, Path]:
        """The built libraries by target. In auto mode a failure is recorded in ``missing``, else raised."""
        if not targets:
            return {}
        facts, torch = gather_facts(), build_libraries.find_torch()
        libraries = []
        if "cpu" in targets:
            libraries.append(build_libraries.cpu_library(torch, version()))
        if "cuda" in targets:
            names, dtypes = build_libraries.cuda_architectures(), build_libraries.cuda_dtypes()
            libraries.append(build_libraries.cuda_library(torch, version(), facts.nvcc, names, dtypes))
        sanitized = "sanitized-objects" if os.environ.get("FASTGEN_SANITIZE") else "libraries"
        built = {}
        for name, result in build_libraries.build(libraries, facts.nvcc, ROOT / "build" / sanitized).items():
            target = name.removeprefix("_")
            if isinstance(result, Path):
                built[target] = result
            elif mode == "auto":
                missing[target] = result
            else:
                raise SystemExit(f"FASTGEN_BUILD={mode}: {target}: {result}")
        return built

    def install(package: Path, in_place: bool) -> None:
        """Puts the libraries and a report of the build into the package, and removes libraries of earlier builds.

        In a checkout, auto mode keeps a library that this machine cannot build now.
        """
        built = compile_targets()
        package.mkdir(parents=True, exist_ok=True)
        for old in [*package.glob("_C.*so"), *package.glob("_cpu.*.so"), *package.glob("_cuda.*.so")]:
            old.unlink()  # names of before version 0.1
        kept = []
        for target in ("cpu", "cuda"):
            library = package / f"_{target}.so"
            if target in built:
                # A running process may have the old file mapped: replace it, do not write into it.
                shutil.copy2(built[target], library.with_suffix(".new"))
                library.with_suffix(".new").replace(library)
            elif library.exists() and in_place and mode == "auto" and target not in targets:
                kept.append(target)
            else:
                library.unlink(missing_ok=True)
        report = {"version": version(), "mode": mode, "built": list(built), "kept": kept, "missing": missing}
        (package / "_build_report.json").write_text(json.dumps(report, indent=1) + "\n")
        parts = ", ".join(built) or "nothing compiled"
        parts += "".join(f"; kept {target}, built earlier" for target in kept)
        parts += "".join(f"; not {target}: {reason}" for target, reason in missing.items())
        print(f"fastgen: built {parts}", file=sys.stderr)

    def checked_in_place(in_place: bool) -> bool:
        if in_place and version() != public_version():
            raise SystemExit("FASTGEN_LOCAL_VERSION: only a wheel can have a local version, not an editable install")
        return in_place

    class BuildLibraries(build_ext):
        """Builds what was chosen."""

        def get_ext_filename(self, fullname: str) -> str:
            return fullname.replace(".", "/") + ".so"

        def run(self) -> None:
            in_place = checked_in_place(bool(self.inplace))
            package = ROOT / "fastgen" if in_place else Path(self.build_lib, "fastgen")
            install(package, in_place)
            self.extensions = [e for e in self.extensions if (package / f"{e.name.partition('.')[2]}.so").exists()]

    class BuildPython(build_py):
        """Writes the local version into the wheel's fastgen/version.py; builds nothing where nothing was chosen."""

        def run(self) -> None:
            super().run()
            if not self.distribution.ext_modules:
                in_place = checked_in_place(bool(self.editable_mode))
                install(ROOT / "fastgen" if in_place else Path(self.build_lib, "fastgen"), in_place)
            if not self.editable_mode:
                text = (ROOT / "fastgen" / "version.py").read_text()
                path = Path(self.build_lib, "fastgen", "version.py")
                path.write_text(text.replace(f'"{public_version()}"', f'"{version()}"'))

    class BuildWheel(bdist_wheel):
        """The libraries contain no Python: one wheel serves all Pythons."""

        def get_tag(self) -> tuple[str, str, str]:
            return ("py3", "none", super().get_tag()[2])

    return {"build_ext": BuildLibraries, "build_py": BuildPython, "bdist_wheel": BuildWheel}


if __name__ == "__main__":
    os.chdir(ROOT)
    wanted = os.environ.get("FASTGEN_BUILD", "auto")
    build_libraries.cuda_dtypes()  # raises for a name that is no dtype, whatever is built
    chosen, not_chosen = choose(wanted, gather_facts())
    setup(
        version=version(),
        ext_modules=[Extension(f"fastgen._{target}", []) for target in chosen],
        cmdclass=make_commands(wanted, chosen, not_chosen),
    )
