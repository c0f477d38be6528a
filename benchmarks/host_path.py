"""The host's time before a CUDA kernel starts, measured without a GPU: Python, dispatcher, checks, plan, allocation.

usage: python benchmarks/host_path.py [--only TEXT] [--json FILE]

The sources of the CUDA libraries, with ``host_launch/device/launch.cuh`` in place of the launch, are compiled for CPU
tensors into ``build/host_path/`` and registered as the backend "host". A call then takes the path of a CUDA call, and
the launch returns at once: results are uninitialized memory.

Not counted: the launch itself in the CUDA runtime, setting the device and asking for its current stream, and the
difference between PyTorch's allocators of CUDA and CPU memory. A backward pass on CUDA runs in a thread of its own;
here it runs in the caller's. Times are medians of blocks of calls, CPU time of the thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fastgen  # noqa: E402
from benchmarks.overhead import machine  # noqa: E402
from fastgen import backend, functional  # noqa: E402
from tests.emulator import build as emulator  # noqa: E402

OUT = ROOT / "build" / "host_path"
NAMESPACE = "fastgen_host"


def _manifest() -> str:
    torch_root = Path(torch.__file__).parent
    includes = "-Ibenchmarks/host_launch -Itests/emulator -Itests/emulator/host -Icsrc"
    stable = f"-DFASTGEN_NAMESPACE={NAMESPACE} -DFASTGEN_DISPATCH_KEY=CPU -DTORCH_TARGET_VERSION=0x020a000000000000"
    torch_flags = f"-isystem {torch_root}/include -isystem {torch_root}/include/torch/csrc/api/include"
    lines = [
        "builddir = build/host_path",
        f"flags = -std=c++20 -O3 -fPIC -w {includes} {torch_flags} {stable}",
        "rule cc",
        f"  command = {emulator.compiler()} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {emulator.compiler()} -shared $in -o $out $libs -L{torch_root}/lib -ltorch -ltorch_cpu -lc10",
    ]
    # Kernels that are chosen at run time are compiled, though nothing calls them, and refer to the emulator.
    core = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/emulator/core").glob("*.cpp"))]
    objects = [f"build/host_path/{source}.o" for source in core]
    lines += [f"build {target}: cc {source}" for target, source in zip(objects, core, strict=True)]
    lines.append(f"build build/host_path/libemulator.so: link {' '.join(objects)}")
    scope = "benchmarks/host_launch/device_scope.cpp"
    for family in backend_families():
        kernels = sorted((ROOT / "csrc" / family).rglob("*.cu"))
        sources = [*(str(path.relative_to(ROOT)) for path in kernels), f"csrc/{family}/api.cpp", scope]
        objects = [f"build/host_path/{family}/{source}.o" for source in sources]
        lines += [f"build {target}: cc {source}" for target, source in zip(objects, sources, strict=True)]
        lines.append(f"build build/host_path/{family}.so: link {' '.join(objects)} | build/host_path/libemulator.so")
        lines.append("  libs = '-Wl,-rpath,$$ORIGIN' -Lbuild/host_path -lemulator")
    return "\n".join(lines) + "\n"


def backend_families() -> list[str]:
    return emulator.families()


@cache
def register() -> None:
    """Builds the libraries and adds the backend "host"."""
    OUT.mkdir(parents=True, exist_ok=True)
    path, text = OUT / "build.ninja", _manifest()
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    subprocess.run([str(emulator.ninja()), "--quiet", "-f", str(path)], cwd=ROOT, check=True)
    backend.add_backend("host", NAMESPACE, backend_families())
    for family in backend_families():
        torch.ops.load_library(str(OUT / f"{family}.so"))


class Case(NamedTuple):
    """``limit``: microseconds that a call may take; None where there is no such limit."""

    name: str
    call: Callable[[], Any]
    limit: float | None = None


def _step(run: Callable[[], Any], leaves: list[torch.Tensor]) -> Callable[[], Any]:
    """Forward and backward, with given gradients of the outputs."""
    outputs = run()
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    gradients = [torch.ones_like(out) for out in outputs]

    def step() -> None:
        outputs = run()
        torch.autograd.grad((outputs,) if isinstance(outputs, torch.Tensor) else outputs, leaves, gradients)

    return step


def cases() -> list[Case]:
    query, key, value = (torch.randn(2, 4, 16, 64) for _ in range(3))
    boolean = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    attend = functional.scaled_dot_product_attention
    x, weight, bias = torch.randn(2, 16, 64), torch.randn(192, 64), torch.randn(192)
    merge_weight, merge_bias = torch.randn(64, 256), torch.randn(64)
    mu, logvar = torch.randn(16, 64), torch.randn(16, 64)
    operator = backend.operator(NAMESPACE, "attention_forward").default  # type: ignore[attr-defined]
    options = (None, None, None, 0.0, -1, -1, 0.125, 0.0, False)

    def heads(*tensors: Any) -> Any:
        return functional.qkv_projection(*tensors, heads=(4, 4, 4), head_dims=(16, 16, 16))

    def below_autograd() -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator(query, key, value, *options)

    found = [
        Case("attention_forward, the operator below autograd", below_autograd),
        Case("attention: forward", lambda: attend(query, key, value), 12.0),
        Case("attention, causal: forward", lambda: attend(query, key, value, is_causal=True), 12.0),
        Case("attention, boolean mask: forward", lambda: attend(query, key, value, boolean)),
        Case("attention, dropout: forward", lambda: attend(query, key, value, dropout_p=0.1)),
        Case("qkv_projection: forward", lambda: heads(x, weight, bias)),
        Case("merge_heads_projection: forward", lambda: functional.merge_heads_projection(query, merge_weight)),
        Case("reparameterize_kl: forward", lambda: functional.reparameterize_kl(mu, logvar)),
    ]
    steps: list[tuple[str, Callable[..., Any], list[torch.Tensor]]] = [
        ("attention", attend, [query, key, value]),
        ("attention, causal", lambda *t: attend(*t, is_causal=True), [query, key, value]),
        ("attention, boolean mask", lambda *t: attend(*t, boolean), [query, key, value]),
        ("qkv_projection", heads, [x, weight, bias]),
        ("merge_heads_projection", functional.merge_heads_projection, [query, merge_weight, merge_bias]),
        ("reparameterize_kl", functional.reparameterize_kl, [mu, logvar]),
    ]
    for name, function, inputs in steps:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        run = _step(lambda function=function, leaves=leaves: function(*leaves), leaves)  # type: ignore[misc]
        found.append(Case(f"{name}: forward + backward", run))
    return found


def measure(case: Case, rounds: int = 40, calls: int = 50) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            case.call()
        times.append((time.thread_time() - begin) / calls * 1e6)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure the rows whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    register()
    rows = []
    print("| call | host, us | limit |")
    print("|---|---|---|")
    with fastgen.use_backend("host"):
        for case in cases():
            if given.only not in case.name:
                continue
            took = measure(case)
            rows.append({"call": case.name, "us": took, "limit_us": case.limit})
            missed = ", missed" if case.limit is not None and took > case.limit else ""
            limit = "" if case.limit is None else f"{case.limit:.0f}{missed}"
            print(f"| {case.name} | {took:.1f} | {limit} |", flush=True)
    if given.json is not None:
        found = {"machine": machine(), "torch": torch.__version__, "fastgen": fastgen.__version__, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
