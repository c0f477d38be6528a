"""Everything a bug report needs."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen import _library


@dataclass(frozen=True)
class Info:
    """What ``fastgen.info()`` found. ``str()`` is for people, ``as_dict()`` for programs."""

    versions: dict[str, str]
    devices: list[str]
    backend: str
    build: dict[str, Any]
    libraries: dict[str, str]
    architectures: list[str]
    operators: dict[str, dict[str, str]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"device: {device}" for device in self.devices]
        lines.append(f"backend: {self.backend}")
        built = ", ".join(self.build.get("built", [])) or "nothing compiled"
        lines.append(f"build ({self.build.get('mode', 'no report')}): {built}")
        lines += [f"  not {name}: {reason}" for name, reason in self.build.get("missing", {}).items()]
        lines += [f"library {name}: {state}" for name, state in self.libraries.items()]
        lines.append(f"CUDA architectures: {', '.join(self.architectures) or 'none'}")
        width = max(len(name) for name in self.operators)
        for name, places in self.operators.items():
            lines += [f"{name:<{width}}  {device:<5} {served}" for device, served in places.items()]
        return "\n".join(lines)


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gib = properties.total_memory / 2**30
            found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {gib:.0f} GiB")
    return found


def _served_by(name: str, device: torch.device) -> str:
    reason = _library.why_not_compiled(name, device)
    if reason is not None:
        return f"{_pytorch(name, device)} ({reason})"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _library.COMPILED_DTYPES)
    return f"compiled for {dtypes}; PyTorch for other dtypes"


def _pytorch(name: str, device: torch.device) -> str:
    """Which PyTorch: on CPU attention takes fused kernels where they fit."""
    if device.type != "cpu" or not name.startswith("attention"):
        return "PyTorch"
    helper = name == "attention_forward" and _library.has_kernel("cpu_attention_forward", device)
    kernels = "torch's fused kernel or fastgen's for narrow heads" if helper else "torch's fused kernel"
    return f"{kernels} where it fits, else PyTorch"


def info() -> Info:
    """Versions, devices, what is compiled, what serves each operator on each device, and why not more.

    Example:
        >>> print(fastgen.info())  # doctest: +SKIP
    """
    from fastgen import __version__

    report = Path(__file__).with_name("_build_report.json")
    build: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    module = _library.build_module
    versions = {
        "fastgen": __version__,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if module is not None:
        details = module.build_info()
        versions |= {
            "built with torch": details["torch_version"],
            "nvcc": details["cuda_version"] or "none",
            "compiler": details["compiler"],
        }
    libraries = {lib.name: lib.problem or "loaded" for lib in _library.compiled_libraries()}
    libraries["_C"] = _library.build_module_problem or "loaded"
    kinds = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    names = [name for family, names in _library.operators().items() if family != "helpers" for name in names]
    return Info(
        versions,
        _devices(),
        _library.current_backend(),
        build,
        libraries,
        _library.compiled_architectures(),
        {name: {kind.type: _served_by(name, kind) for kind in kinds} for name in names},
    )
