"""Compiles the attention kernels for the static model, one cubin for each source and architecture, and reads them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.model import hopper, loops, sass
from benchmarks.model.predict import Kernel
from tests import compile_check, compile_report

SOURCES = (
    "forward", "backward_query", "backward_key_value", "tangent", "second_order_query", "second_order_key_value",
    "decode", "backward_one_tile", "wide", "wide_second_order",
)  # fmt: skip
HOPPER_SOURCES = "forward", "backward", "tangent", "forward_tangent"


def compiler_version(nvcc: str) -> str:
    """nvcc's version, such as "13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return text.rpartition(", V")[2].split()[0]


def compiled(arch: str, folder: Path) -> list[Kernel]:
    """The bfloat16 attention kernels for an architecture such as "90a".

    Cubins are kept in ``folder``, and compiled again if a source in csrc/ is newer.

    Raises:
        RuntimeError: nvcc or nvdisasm was not found.
        subprocess.CalledProcessError: a source does not compile.
        ValueError: the main loop of a kernel was not found.
    """
    kernels = []
    for source in SOURCES:
        for found, listing in _compiled(source, arch, folder, "instantiations"):
            name = loops.name_of(found.name)
            if name is not None:
                iteration = loops.attention_iteration(listing, name)
                kernels.append(Kernel(name, arch, found.registers, found.shared_bytes, iteration, listing))
    return kernels


def compiled_hopper(folder: Path) -> list[hopper.Kernel]:
    """The bfloat16 kernels of csrc/attention/sm90; otherwise as :func:`compiled`."""
    kernels = [
        hopper.kernel_of(found.name, found.registers, listing)
        for source in HOPPER_SOURCES
        for found, listing in _compiled(source, "90a", folder, "sm90/instantiations")
    ]
    return sorted(
        (one for one in kernels if one is not None), key=lambda one: (one.padded, *one[1:3], one.keys, one.name)
    )


def _compiled(source: str, arch: str, folder: Path, place: str) -> list[tuple[compile_report.Kernel, sass.Listing]]:
    """The kernels of a source."""
    nvcc = compile_check.find_nvcc()
    nvdisasm = compile_check.find_nvdisasm(nvcc) if nvcc else None
    if nvcc is None or nvdisasm is None:
        raise RuntimeError("nvcc or nvdisasm was not found; see tests/compile_check.py")
    folder.mkdir(parents=True, exist_ok=True)
    csrc = compile_check.ROOT / "csrc"
    newest = max(path.stat().st_mtime for path in csrc.rglob("*") if path.is_file())
    stem = f"{'sm90_' if place.startswith('sm90') else ''}{source}_{arch}"
    cubin, log = folder / f"{stem}.cubin", folder / f"{stem}.log"
    if not cubin.is_file() or cubin.stat().st_mtime < newest:
        path = csrc / "attention" / place / f"{source}_bfloat16.cu"
        command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{csrc}", f"-arch=sm_{arch}", "-cubin"]
        done = subprocess.run([*command, str(path), "-o", str(cubin)], capture_output=True, text=True, check=True)
        log.write_text(done.stderr)
    listing = sass.parse(compile_check.disassemble(nvdisasm, cubin))
    return [(found, listing[found.symbol]) for found in compile_report.parse_ptxas(source, arch, log.read_text())]
