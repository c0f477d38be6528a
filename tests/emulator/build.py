"""Compiles the CUDA sources of a family with g++ against the host twins, as operators of another namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

from fastgen import _library

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NAMESPACE = "fastgen_emulated"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split(" ")[0])


def build(family: str, folder: Path) -> Path:
    """The shared library of one family: its .cu files and its api.cpp, unchanged."""
    torch_root = Path(torch.__file__).parent
    library = folder / f"{family}_emulated.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{HERE}", f"-I{CSRC}", f"-I{torch_root / 'include'}"]
    defines = [f"-DFASTGEN_NAMESPACE={NAMESPACE}", "-DFASTGEN_DISPATCH_KEY=CPU"]
    defines.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
    kernels = sorted(str(path) for path in (CSRC / family).rglob("*.cu"))
    api = [str(CSRC / family / "api.cpp"), str(CSRC / "cpu" / "device_scope.cpp")]
    link = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lpthread"]
    command = [compiler(), *flags, *defines, "-x", "c++", *kernels, *api, "-o", str(library), *link]
    subprocess.run(command, check=True)
    return library


def register(family: str, folder: Path) -> torch.library.Library:
    """Builds, defines the operators of the family in the namespace, and loads their kernels."""
    namespace = torch.library.Library(NAMESPACE, "DEF")
    for name in _library.operators()[family]:
        schema = str(getattr(torch.ops.fastgen, name).default._schema)
        namespace.define(schema.partition("::")[2])
    torch.ops.load_library(str(build(family, folder)))
    return namespace
