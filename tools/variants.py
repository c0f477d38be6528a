"""The wheels of a release: what each is built with and what it serves. The only place that lists them.

usage: python tools/variants.py VARIANT     prints the variables of the build, for the shell
       python tools/variants.py --list      prints the names
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import build_libraries

R525, R580 = "525.60.13", "580.65.06"  # the first Linux driver that CUDA 12.x, and 13.x, programs run on


class Variant(NamedTuple):
    local: str  # the local version: fastgen-X+cu126; empty for the public index, which accepts none
    cuda: str | None = None  # of nvcc; None: the CPU kernels only
    architectures: str | None = None  # TORCH_CUDA_ARCH_LIST; None: the default list of tools/build_libraries.py
    driver: str | None = None  # the oldest driver
    image: str | None = None  # of .github/workflows/wheels.yml: the tag of pytorch/manylinux2_28-builder


VARIANTS = {
    "cpu": Variant("cpu", image="cpu"),
    "cu126": Variant("cu126", "12.6", "8.0;9.0a;9.0+PTX", R525, "cuda12.6"),
    "cu128": Variant("cu128", "12.8", "8.0;9.0a;10.0;12.0", R525, "cuda12.8"),
    "cu130": Variant("cu130", "13.0", None, R580, "cuda13.0"),
    # The default CUDA version of PyTorch on the public index.
    "public": Variant("", "13.0", None, R580, "cuda13.0"),
    # The oldest CUDA that the sources compile with, for one architecture: never published.
    "cu12-smoke": Variant("cu124", "12.4", "9.0a", R525),
}


def architecture_list(variant: Variant) -> str:
    """Its TORCH_CUDA_ARCH_LIST; empty without CUDA."""
    return "" if variant.cuda is None else variant.architectures or build_libraries.DEFAULT_ARCHITECTURES


def of_version(version: str) -> Variant:
    """The variant of a wheel of this version, by its local part."""
    local = version.partition("+")[2]
    for variant in VARIANTS.values():
        if variant.local == local:
            return variant
    known = ", ".join(repr(variant.local) for variant in VARIANTS.values())
    raise KeyError(f"version {version}: expected one of the local versions {known}, got {local!r}")


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        print(*VARIANTS, sep="\n")
        return 0
    if len(arguments) != 1 or arguments[0] not in VARIANTS:
        print(f"VARIANT: expected one of {', '.join(VARIANTS)}, got {' '.join(arguments) or 'none'}", file=sys.stderr)
        return 2
    variant = VARIANTS[arguments[0]]
    variables = {
        "FASTGEN_BUILD": "cpu" if variant.cuda is None else "cuda",
        "FASTGEN_LOCAL_VERSION": variant.local,
        "TORCH_CUDA_ARCH_LIST": architecture_list(variant),
        "FASTGEN_DTYPES": "",  # all
        "RELEASE_CUDA": variant.cuda or "",
    }
    print(*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
