"""Runner of ``fastgen bench``: compares fastgen with plain PyTorch on this machine in about a minute.

Both implementations run alternately in one process. Ratios are reliable, absolute times vary with the load of the
machine.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import backend
from fastgen.bench.cases import Call, Case, cases
from fastgen.environment import info
from fastgen.testing import interleaved_times, median_ratio

ROUNDS = 9


@dataclass(frozen=True)
class Row:
    """Result of a benchmark case. Times are medians and quartiles over ``rounds`` rounds, in milliseconds.

    Attributes:
        name: name of the case.
        what: what is computed.
        shape: shape of the inputs.
        dtype: dtype of the inputs.
        device: device of the inputs.
        peer: name of the PyTorch implementation.
        ours_ms: median time of fastgen.
        ours_quartiles_ms: first and third quartile of the time of fastgen.
        peer_ms: median time of the PyTorch implementation.
        peer_quartiles_ms: first and third quartile of the time of the PyTorch implementation.
        ratio: median over the rounds of the time of PyTorch divided by the time of fastgen.
        kernels: fused kernels of fastgen or torch that ran in fastgen's call; empty for plain PyTorch operators.
        rounds: number of rounds.
    """

    name: str
    what: str
    shape: str
    dtype: str
    device: str
    peer: str
    ours_ms: float
    ours_quartiles_ms: tuple[float, float]
    peer_ms: float
    peer_quartiles_ms: tuple[float, float]
    ratio: float
    kernels: list[str]
    rounds: int


def run(
    only: list[str] | None = None,
    rounds: int = ROUNDS,
    device: torch.device | str = "cpu",
    length: int | None = None,
    on_row: Callable[[Row], Any] = lambda row: None,
) -> list[Row]:
    """Runs benchmark cases.

    Args:
        only: names of cases, or prefixes of names ("attention", "latent-forward"). Default: all cases.
        rounds: number of timed calls of each implementation.
        device: "cpu" (float32) or "cuda" (bfloat16).
        length: limit of the number of positions, for a quick run.
        on_row: callback that is called with each result.

    Returns:
        The results.

    Raises:
        ValueError: if a name is unknown, the device is neither CPU nor CUDA, or ``rounds`` or ``length`` is not
            positive.
        RuntimeError: if the device is not available.
    """
    device = torch.device(device)
    for name, count in (("rounds", rounds), ("length", length)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected a positive number, got {count}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    torch.empty(0, device=device)
    known = cases(device, length)
    for prefix in only or []:
        if not any(name.startswith(prefix) for name in known):
            raise ValueError(f"only: expected some of {', '.join(known)}, got {prefix!r}")
    selected = [name for name in known if not only or any(name.startswith(prefix) for prefix in only)]
    rows = []
    for name in selected:
        rows.append(_benchmark(name, known[name], rounds, device))
        on_row(rows[-1])
    return rows


def line(row: Row) -> str:
    """Formats a result as three lines of text."""
    ours = _spread(row.ours_ms, row.ours_quartiles_ms)
    peer = _spread(row.peer_ms, row.peer_quartiles_ms)
    return (
        f"{row.what} {row.shape}, {row.dtype}\n"
        f"  {row.ratio:5.2f} x   {ours}   against {peer} of {row.peer}\n"
        f"            {', '.join(row.kernels) or 'no fused kernel'}"
    )


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describes the machine: processor, threads, device, versions and backend."""
    found = info()
    device = torch.device(device)
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": found.versions,
        "backend": found.backend,
        "libraries": found.libraries,
    }


def as_dict(rows: list[Row], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Results and machine as a JSON-serializable dictionary."""
    return {"machine": machine(device), "rows": [asdict(row) for row in rows]}


def describe_machine(device: torch.device | str = "cpu") -> str:
    """Formats ``machine`` as one line."""
    found = machine(device)
    versions = found["versions"]
    place = f", {found['device']}" if found["device"] != "cpu" else ""
    return (
        f"{found['processor']}, {found['threads']} threads{place}; fastgen {versions['fastgen']},"
        f" torch {versions['torch']}, python {versions['python']}; backend {found['backend']}"
    )


# --------------------------------------------------------------------------------------------------
# Timing


def _benchmark(name: str, case: Case, rounds: int, device: torch.device) -> Row:
    ours, peer = case.make()
    kernels = _kernels(ours, device)
    times = interleaved_times(
        {"ours": ours, "peer": peer}, rounds=rounds, warmup=min(2, rounds), synchronize=device.type == "cuda"
    )
    return Row(
        name,
        case.what,
        case.shape,
        "float32" if device.type == "cpu" else "bfloat16",
        str(device),
        case.peer,
        median(times["ours"]) * 1e3,
        _quartiles(times["ours"]),
        median(times["peer"]) * 1e3,
        _quartiles(times["peer"]),
        median_ratio(times["peer"], times["ours"]),
        kernels,
        rounds,
    )


class _KernelRecorder(TorchDispatchMode):
    """Records the names of fused kernels, including those called by fastgen's PyTorch implementations."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        namespace, _, operator = name.partition("::")
        own = namespace in (backend.COMPILED, backend.TORCH)
        if own and (namespace == backend.TORCH or not backend.has_kernel(operator, self.device)):
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        if name not in self.names and (own or re.search("scaled_dot_product.*attention", name)):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _kernels(call: Call, device: torch.device) -> list[str]:
    with _KernelRecorder(device) as recorder:
        call()
    return sorted(recorder.names)


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) == 1:
        return seconds[0] * 1e3, seconds[0] * 1e3
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return low * 1e3, high * 1e3


def _spread(middle: float, quartiles: tuple[float, float]) -> str:
    return f"{middle:.3g} ms ({quartiles[0]:.3g} to {quartiles[1]:.3g})"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()
