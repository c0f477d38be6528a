"""The compiled libraries: which are built, whether they load, and for which operators and devices they have kernels."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgen.backend._shared_objects import why_incomplete, why_of_another_version
from fastgen.backend.drivers import (
    CudaVersions,
    compiles_ptx,
    runs_on,
    version_from,
    version_name,
    version_of,
    why_too_old,
)
from fastgen.backend.registry import COMPILED, definition_of

COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class CompiledLibrary:
    """A shared library in the package's folder that registers kernels for one device type."""

    name: str
    device: str
    path: Path | None = None
    problem: str | None = None
    handle: ctypes.CDLL | None = field(default=None, repr=False)

    @property
    def loaded(self) -> bool:
        return self.path is not None and self.problem is None

    def load(self) -> None:
        self.path = _built(self.name)
        self.problem = self._why_not_loaded()

    def _why_not_loaded(self) -> str | None:
        """Loads the library, or gives the reason why it cannot be loaded."""
        if self.path is None:
            return f"{self.name} was not built (see FASTGEN_BUILD in docs/install.md)"
        if self.device == "cuda" and torch.version.cuda is None:
            return (
                f"{self.path.name} requires CUDA, and this torch ({torch.__version__}) has none: install a build of"
                " torch 2.10 or newer for CUDA"
            )
        missing = why_incomplete(self.path)
        if missing is not None:
            return f"{self.path.name} was cut short: {missing}"
        other = why_of_another_version(self.path)
        if other is not None:
            return other
        try:
            torch.ops.load_library(str(self.path))
            handle = ctypes.CDLL(str(self.path))
        except Exception as error:
            cause = error.__cause__ or error
            return f"{self.path.name} does not load: {str(cause).splitlines()[0].rpartition('/')[2]}"
        needed = ["fastgen_build_info"]
        if self.device == "cpu":
            needed += ["fastgen_use_cpu_level", "fastgen_scan_float32", "fastgen_small_attention_dropout"]
        if not all(hasattr(handle, name) for name in needed):
            return f"{self.path.name} is of another version of fastgen: build or install fastgen again"
        self.handle = handle
        return None

    def build_info(self) -> dict[str, Any]:
        """What the library was built from; empty where it is not loaded.

        Keys: ``version`` of fastgen, ``torch``, ``dtypes`` of the kernels, ``cuda`` (nvcc's version, or None),
        ``architectures``, such as ``["80", "90a", "120", "120+PTX"]``, and ``compiler``.
        """
        if self.handle is None:
            return {}
        function = self.handle.fastgen_build_info
        function.restype, function.argtypes = ctypes.c_char_p, []
        info: dict[str, Any] = json.loads(function())
        return info

    def cuda_versions(self) -> CudaVersions | None:
        """CUDA versions of the library's runtime and of the driver; None for a library without CUDA, or not loaded.

        Loads the driver, and creates no CUDA context.

        Raises:
            RuntimeError: the CUDA runtime gives an error.
        """
        if self.handle is None or self.device != "cuda":
            return None
        runtime, driver = ctypes.c_int(), ctypes.c_int()
        error = self.handle.fastgen_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
        if error != 0:
            raise RuntimeError(f"the CUDA runtime of {self.name} gives error {error} for the driver's version")
        compiler = version_from(self.build_info()["cuda"])
        return CudaVersions(version_of(runtime.value), compiler, version_of(driver.value) if driver.value else None)


def _built(name: str) -> Path | None:
    """The file of a compiled part, in the package's folder."""
    path = Path(__file__).parents[1] / f"{name}.so"
    return path if path.is_file() else None


_compiled = [CompiledLibrary("_cpu", "cpu"), CompiledLibrary("_cuda", "cuda")]


def load_compiled() -> None:
    """Loads each compiled library, or records why it cannot be loaded."""
    for library in _compiled:
        library.load()


def compiled_libraries() -> list[CompiledLibrary]:
    return list(_compiled)


def library_for(device_type: str) -> CompiledLibrary:
    """The library with kernels for "cpu" or "cuda", loaded or not."""
    return next(library for library in _compiled if library.device == device_type)


def compiled_architectures() -> list[str]:
    """CUDA architectures in the compiled library, such as ``["80", "90a", "120", "120+PTX"]``."""
    return list(library_for("cuda").build_info().get("architectures", []))


def compiled_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """Dtypes that the kernels in the library for "cpu" or "cuda" serve: all, unless ``FASTGEN_DTYPES`` chose some when
    it was built. All where it is not loaded.
    """
    built = library_for(device_type).build_info().get("dtypes")
    return COMPILED_DTYPES if built is None else tuple(d for d in COMPILED_DTYPES if _dtype_name(d) in built)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_capabilities: dict[torch.device, tuple[int, int]] = {}


def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where this machine has no such device.

    Fake tensors have devices that the machine lacks, when a model is traced for another machine.
    """
    found = _capabilities.get(device)
    if found is None and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count():
        found = torch.cuda.get_device_capability(device)
        if device.index is not None:
            _capabilities[device] = found
    return found


def driver_problem() -> str | None:
    """Why this machine's driver cannot run the kernels of the CUDA library; None where it can, and without either."""
    try:
        versions = library_for("cuda").cuda_versions()
    except RuntimeError as error:
        return str(error)
    return None if versions is None else why_too_old(versions)


def _why_not_on(capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels do not run on a device of this machine."""
    problem = driver_problem()
    if problem is not None:
        return problem
    versions, architectures = library_for("cuda").cuda_versions(), compiled_architectures()
    ptx = versions is None or compiles_ptx(versions)
    if runs_on(capability, architectures, ptx=ptx):
        return None
    reason = f"the kernels are compiled for {', '.join(architectures)}, not for {capability}"
    if versions is not None and runs_on(capability, architectures):
        reason += (
            f", and the driver, which supports CUDA {version_name(versions.driver)}, does not compile PTX of CUDA"
            f" {version_name(versions.compiler)}: install a newer driver"
        )
    return reason


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether a loaded library registered a kernel of operator ``name`` for this kind of device."""
    if all(library.device != device.type for library in _compiled):
        return False
    key = torch._C._dispatch_key_for_device(device.type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{COMPILED}::{name}", key))


def compiled_parts(name: str, device: torch.device) -> list[str]:
    """What compiled helpers of operator ``name`` do, where the operator itself has no kernel for the device."""
    if has_kernel(name, device):
        return []
    return [what for helper, what in definition_of(name).parts.items() if has_kernel(helper, device)]


def why_not_compiled(name: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None where a compiled kernel of operator ``name`` serves the device, else the reason.

    Meta tensors have shapes and no data: any backend serves them. A CUDA device that this machine lacks has only fake
    tensors: its driver and architecture are unknown, and the loaded library is assumed to serve it.
    """
    if device.type == "meta":
        return None
    library = next((library for library in _compiled if library.device == device.type), None)
    if library is None:
        return f"there are no kernels for device type '{device.type}'"
    if library.problem is not None:
        return library.problem
    if not has_kernel(name, device):
        parts = compiled_parts(name, device)
        if not parts:
            return f"{name} has no compiled {device.type} kernel"
        return f"only parts of {name} have compiled {device.type} kernels ({'; '.join(parts)})"
    if dtype is not None and dtype not in COMPILED_DTYPES:
        return f"{name} has no compiled kernel for {dtype}"
    built = compiled_dtypes(device.type)
    if dtype is not None and dtype not in built:
        chosen = ",".join(_dtype_name(one) for one in built)
        return f"{name} has no compiled kernel for {dtype}: the library was built with FASTGEN_DTYPES={chosen}"
    capability = device_capability(device) if device.type == "cuda" else None
    return None if capability is None else _why_not_on(capability)
