"""Whether a CUDA driver can run kernels that were built with another CUDA version."""

from __future__ import annotations

from typing import NamedTuple

Version = tuple[int, int]

_BRANCHES = {11: "R450", 12: "R525", 13: "R580"}
"""The oldest driver branch that runs machine code built with any minor version of a CUDA major version."""


class CudaVersions(NamedTuple):
    """CUDA versions as (major, minor): of the runtime in a library, of the compiler that made its PTX, and the newest
    that the driver supports. ``driver`` is None on a machine without a driver.
    """

    runtime: Version
    compiler: Version
    driver: Version | None


def version_of(number: int) -> Version:
    """CUDA's own number of a version, 12080 for 12.8, as (major, minor)."""
    return number // 1000, number % 1000 // 10


def version_from(name: str) -> Version:
    """The version of a name such as "12.8"."""
    major, minor = name.split(".")[:2]
    return int(major), int(minor)


def version_name(version: Version | None) -> str:
    return "none" if version is None else f"{version[0]}.{version[1]}"


def why_too_old(versions: CudaVersions) -> str | None:
    """Why the driver cannot run a library's kernels; None where it can, and on a machine without a driver.

    A driver runs libraries of its own CUDA major version and of all older ones (CUDA Compatibility, "Minor Version
    Compatibility" and "Backward Compatibility").
    """
    runtime, driver = versions.runtime, versions.driver
    if driver is None or driver[0] >= runtime[0]:
        return None
    branch = f" ({_BRANCHES[runtime[0]]} or newer)" if runtime[0] in _BRANCHES else ""
    return (
        f"the kernels are built with CUDA {version_name(runtime)} and the driver supports CUDA {version_name(driver)}:"
        f" install a driver for CUDA {runtime[0]}{branch}, or the fastgen wheel for CUDA {driver[0]}"
    )


def compiles_ptx(versions: CudaVersions) -> bool:
    """Whether the driver compiles the library's PTX. It reads none of a newer CUDA version, not even of a minor one."""
    return versions.driver is None or versions.driver >= versions.compiler


# Jetson and Thor: machine code of a lower minor version does not run there, nor theirs elsewhere (CUDA programming
# guide, "Binary Compatibility").
INTEGRATED = {(8, 7), (10, 1), (11, 0)}


def runs_on(capability: tuple[int, int], architectures: list[str], *, ptx: bool = True) -> bool:
    """Whether code for one of the architectures runs on a device of this capability.

    ``ptx``: whether the driver compiles PTX, the entries that end with "+PTX". The other entries are machine code.
    """
    major, minor = capability
    for name in architectures:
        number = int(name.rstrip("af+PTX"))
        built = divmod(number, 10)
        if name.endswith("+PTX"):
            if ptx and built <= (major, minor):
                return True
        elif name.endswith("a") or {built, capability} & INTEGRATED:
            if built == (major, minor):
                return True
        elif built[0] == major and built[1] <= minor:
            return True
    return False
