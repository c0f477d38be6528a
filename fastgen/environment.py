"""Versions, devices, compiled kernels and launch plans: the report of ``fastgen.info()``."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgen import backend, integrations
from fastgen.backend import plans
from fastgen.ops.attention.problem import WIDEST_HEAD
from fastgen.ops.projection import plan


@dataclass(frozen=True)
class Info:
    """Result of ``fastgen.info()``: ``str()`` is a readable report, ``as_dict()`` a dictionary for JSON."""

    versions: dict[str, str]
    devices: list[str]
    backend: str
    build: dict[str, Any]
    libraries: dict[str, str]
    architectures: list[str]
    dtypes: list[str]
    operators: dict[str, dict[str, str]]
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    integrations: dict[str, str] = field(default_factory=dict)

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
        lines.append(f"CUDA dtypes: {', '.join(self.dtypes) or 'none'}")
        lines.append("integrations: " + "; ".join(f"{name} {state}" for name, state in self.integrations.items()))
        width = max(len(name) for name in self.operators)
        for name, places in self.operators.items():
            lines += [f"{name:<{width}}  {device:<5} {served}" for device, served in places.items()]
        for name, launch in self.plans.items():
            lines.append(f"{name}: " + ", ".join(f"{what} {value}" for what, value in launch.items()))
        return "\n".join(lines)


def _versions_of_libraries() -> dict[str, str]:
    """Of the build, from the libraries that are loaded, and of the CUDA driver."""
    versions: dict[str, str] = {}
    for library in backend.compiled_libraries():
        details = library.build_info()
        if details:
            versions |= {
                "built with torch": details["torch"],
                "nvcc": details["cuda"] or "none",
                "compiler": details["compiler"],
            }
    found = None
    with contextlib.suppress(RuntimeError):  # shown with the state of the library
        found = backend.library_for("cuda").cuda_versions()
    if found is not None:
        versions |= {
            "CUDA of the kernels": backend.version_name(found.runtime),
            "CUDA of the driver": backend.version_name(found.driver),
        }
    return versions


def _state(library: backend.CompiledLibrary) -> str:
    problem = backend.driver_problem() if library.device == "cuda" else None
    return library.problem or ("loaded" if problem is None else f"loaded, but {problem}")


def _cpu_level() -> str:
    """The instruction set level of the compiled kernels, with the others that this CPU has."""
    level = backend.cpu_level()
    if level is None:
        return ""
    others = [name for name in backend.cpu_levels() if name != level]
    return f", kernels for {level}" + (f" (FASTGEN_CPU={' or '.join(others)} selects another)" if others else "")


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads{_cpu_level()}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gib = properties.total_memory / 2**30
            found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {gib:.0f} GiB")
    return found


def _served_by(name: str, device: torch.device) -> str:
    reason = backend.why_not_compiled(name, device)
    if reason is not None:
        parts = backend.compiled_parts(name, device)
        return f"{_pytorch(name, device)}; compiled: {'; '.join(parts)}" if parts else f"PyTorch ({reason})"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.compiled_dtypes(device.type))
    compiled = f"compiled for {dtypes}; PyTorch for other dtypes"
    if name.startswith(("projection", "merge_heads")) and device.type == "cuda":
        compiled += ", and where cuBLAS is expected to be faster (fastgen info --projection)"
    return compiled + _for_hopper(name, device)


_HEADS_OF_HOPPER = {
    "attention_forward": "40 to 256, or without padding 456 to 512",
    "attention_backward": "40 to 128",
    "attention_tangent": "40 to 128",
    "attention_forward_tangent": "40 to 64",
}


def _for_hopper(name: str, device: torch.device) -> str:
    """What the kernels for sm_90a serve, where the library has them for the device."""
    heads = _HEADS_OF_HOPPER.get(name)
    has_them = heads is not None and device.type == "cuda" and "90a" in backend.compiled_architectures()
    if not has_them or torch.cuda.get_device_capability(device) != (9, 0):
        return ""
    if os.environ.get("FASTGEN_SM90") != "1":
        return "; FASTGEN_SM90=1 takes those for sm_90a, which have not been measured"
    served = f"of 16 bits, with no mask but a window or padding, with head dims {heads}"
    return f"; {served}, by the kernels for sm_90a"


def _pytorch(name: str, device: torch.device) -> str:
    if device.type != "cpu" or not name.startswith("attention"):
        return "PyTorch"
    if name in ("attention_tangent", "attention_forward_tangent", "attention_second_order"):
        return "PyTorch in tiles"
    return "PyTorch, its fused kernel where that fits, else in tiles"


H200_MULTIPROCESSORS = 132


def _attention_plans(sizes: Sequence[int], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    if len(sizes) != 6 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"attention: expected six positive integers (B, H, N, M, Dk, Dv), got {tuple(sizes)}")
    _require_kernel_dtype(dtype)
    if plans.why_not() is not None:
        raise RuntimeError(f"attention: no plan without the compiled CPU library: {plans.why_not()}")
    batch, heads, queries, keys, key_dim, value_dim = sizes
    if max(key_dim, value_dim) > WIDEST_HEAD:
        raise ValueError(f"attention: expected head dims up to {WIDEST_HEAD}, got {key_dim} and {value_dim}")
    count, shared_limit = H200_MULTIPROCESSORS, plans.SHARED_LIMITS["sm_90"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        count = properties.multi_processor_count
        architecture = f"sm_{properties.major}{properties.minor}"
        shared_limit = plans.SHARED_LIMITS.get(architecture, min(plans.SHARED_LIMITS.values()))
    found = plans.attention_plan(
        batch, heads, heads, queries, keys, key_dim, value_dim, dtype.itemsize, count, shared_limit=shared_limit
    )
    return {f"attention {name}": launch for name, launch in found.items()}


def _projection_plans(sizes: Sequence[int], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    if len(sizes) != 4 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"projection: expected four positive integers (B, N, C, E), got {tuple(sizes)}")
    _require_kernel_dtype(dtype)
    batch, tokens, inputs, outputs = sizes
    reason = plan.refused(dtype, [inputs, outputs])
    if reason is not None:
        raise ValueError(f"projection: {reason}")
    major, count = 9, H200_MULTIPROCESSORS
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        major, count = properties.major, properties.multi_processor_count
    problem = plan.heads_problem(batch * tokens, inputs, [(1, outputs)], 0, 0, dtype.itemsize)
    expected = plan.estimate(problem, major)
    times = {
        "kernels": f"{expected.kernel * 1e6:.0f} us",
        "cuBLAS": f"{expected.library * 1e6:.0f} us",
        "taken": "cuBLAS" if expected.takes_library else "kernels",
    }
    shown: dict[str, dict[str, Any]] = {"projection, forward and backward, by roofline": times}
    if plans.why_not() is None:
        found = plans.projection_plan(1, batch * tokens, inputs, outputs, 1, dtype.itemsize, count)
        shown |= {f"projection {name}": launch for name, launch in found.items()}
    return shown


def _require_kernel_dtype(dtype: torch.dtype) -> None:
    built = backend.compiled_dtypes("cuda")
    if dtype not in built:
        known = ", ".join(str(dtype) for dtype in built)
        chosen = "" if built == backend.COMPILED_DTYPES else ", which the CUDA library was built for (FASTGEN_DTYPES)"
        raise ValueError(f"dtype: expected one of {known}{chosen}, got {dtype}")


def info(
    attention: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    projection: Sequence[int] | None = None,
) -> Info:
    """Report of versions, devices, compiled libraries, and the implementation of each operator on each device.

    Args:
        attention: sizes (B, H, N, M, Dk, Dv) of an attention problem without mask and dropout. Adds the launch plan of
            each of its CUDA kernels, for the current GPU, or for an H200 where there is none.
        dtype: dtype of that problem and of the projection.
        projection: sizes (B, N, C, E) of a projection of tokens (B, N, C) to E channels. Adds the expected times of
            the kernels and of cuBLAS, which of them serves, and the kernels' launch plans.

    Raises:
        ValueError: not six (or four) positive integers, head dims above the kernels' limit, or a dtype without kernels.
        RuntimeError: a launch plan is requested and nothing is compiled.

    Example:
        >>> print(fastgen.info())  # doctest: +SKIP
    """
    from fastgen.version import __version__

    report = Path(__file__).with_name("_build_report.json")
    build: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    versions = {
        "fastgen": __version__,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    versions |= _versions_of_libraries()
    libraries = {lib.name: _state(lib) for lib in backend.compiled_libraries()}
    kinds = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    names = [name for family, names in backend.operators().items() if family != "helpers" for name in names]
    return Info(
        versions,
        _devices(),
        backend.current_backend(),
        build,
        libraries,
        backend.compiled_architectures(),
        backend.library_for("cuda").build_info().get("dtypes", []),
        {name: {kind.type: _served_by(name, kind) for kind in kinds} for name in names},
        ({} if attention is None else _attention_plans(attention, dtype))
        | ({} if projection is None else _projection_plans(projection, dtype)),
        integrations.available(),
    )
