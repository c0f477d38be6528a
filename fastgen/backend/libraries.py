"""The compiled libraries: which are built, whether they load, and for which operators and devices they have kernels."""

from __future__ import annotations

import importlib
import importlib.machinery
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from fastgen.backend._shared_objects import why_incomplete
from fastgen.backend.registry import COMPILED, definition_of

COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class CompiledLibrary:
    """A shared library in the package's folder that registers kernels for one device type."""

    name: str
    device: str
    path: Path | None = None
    problem: str | None = None

    @property
    def loaded(self) -> bool:
        return self.path is not None and self.problem is None

    def load(self) -> None:
        self.path = _built(self.name)
        if self.path is None:
            self.problem = f"{self.name} was not built (see FASTGEN_BUILD in docs/install.md)"
            return
        missing = why_incomplete(self.path)
        if missing is not None:
            self.problem = f"{self.path.name} was cut short: {missing}"
            return
        try:
            torch.ops.load_library(str(self.path))
        except Exception as error:
            cause = error.__cause__ or error
            self.problem = f"{self.path.name} does not load: {str(cause).splitlines()[0].rpartition('/')[2]}"


def _built(name: str) -> Path | None:
    """The file of a compiled part, in the package's folder."""
    folder = Path(__file__).parents[1]
    paths = (folder / (name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _load_module() -> tuple[ModuleType | None, str | None]:
    path = _built("_C")
    missing = None if path is None else why_incomplete(path)
    if path is not None and missing is not None:
        return None, f"{path.name} was cut short: {missing}"
    try:
        return importlib.import_module("fastgen._C"), None
    except ImportError as error:
        return None, f"_C was not built, or does not load: {error}"


_compiled = [CompiledLibrary("_cpu", "cpu"), CompiledLibrary("_cuda", "cuda")]
build_module, build_module_problem = _load_module()


def load_compiled() -> None:
    """Loads each compiled library, or records why it cannot be loaded."""
    for library in _compiled:
        library.load()


def compiled_libraries() -> list[CompiledLibrary]:
    return list(_compiled)


def compiled_architectures() -> list[str]:
    """CUDA architectures in the compiled library, such as ``["80", "90a", "120", "120+PTX"]``."""
    if build_module is None:
        return []
    return list(build_module.build_info()["cuda_architectures"])


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether machine code or PTX for one of the architectures runs on a device of this capability."""
    major, minor = capability
    for name in architectures:
        number = int(name.rstrip("af+PTX"))
        built = divmod(number, 10)
        if name.endswith("+PTX"):
            if built <= (major, minor):
                return True
        elif name.endswith("a"):
            if built == (major, minor):
                return True
        elif built[0] == major and built[1] <= minor:
            return True
    return False


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

    Meta tensors have shapes and no data: any backend serves them.
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
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(capability, compiled_architectures()):
            return f"the kernels are compiled for {', '.join(compiled_architectures())}, not for {capability}"
    return None
