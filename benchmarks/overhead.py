"""The cost of a call: small tensors, where only the overhead counts, against PyTorch's own functions and layers.

usage: python benchmarks/overhead.py [--only TEXT] [--json FILE]

Each row is the median wall time of short interleaved blocks of calls on one thread, which a block that another process
interrupts does not change. (The clock of a thread's CPU time is too coarse for such blocks. On a GPU the host's time
before the launch can't be separated from the kernel's, so the script measures CPU tensors only.)
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import fastgen
from fastgen import functional, nn


class Case(NamedTuple):
    """``limit``: the largest ratio of the times ours / theirs that is wanted."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    limit: float


def _with_gradients(run: Callable[[], Any], leaves: list[torch.Tensor]) -> Callable[[], Any]:
    def step() -> None:
        out = run()
        out = out if isinstance(out, torch.Tensor) else sum(part.sum() for part in out)
        torch.autograd.grad(out.sum(), leaves)

    return step


def attention_cases() -> list[Case]:
    query, key, value = (torch.randn(1, 1, 4, 8) for _ in range(3))
    boolean = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean mask": {"attn_mask": boolean},
        "float mask": {"attn_mask": torch.zeros(1, 1, 4, 4)},
        "dropout": {"dropout_p": 0.1},
        "bfloat16": {},
        "float16": {},
    }
    cases = []
    for name, chosen in options.items():
        inputs = query, key, value
        if "float" in name and not chosen:
            inputs = tuple(tensor.to(getattr(torch, name)) for tensor in inputs)
        leaves = [t.clone().requires_grad_() for t in inputs]

        def ours(inputs: Any = inputs, chosen: Any = chosen) -> Any:
            return functional.scaled_dot_product_attention(*inputs, **chosen)

        def theirs(inputs: Any = inputs, chosen: Any = chosen) -> Any:
            return F.scaled_dot_product_attention(*inputs, **chosen)

        cases.append(Case(f"attention, {name}: forward", ours, theirs, 1.3))
        both = (
            _with_gradients(lambda f=f, leaves=leaves, chosen=chosen: f(leaves, chosen), leaves) for f in (ours, theirs)
        )
        cases.append(Case(f"attention, {name}: forward + backward", *both, 1.3))
    return cases


def projection_cases() -> list[Case]:
    x, weight, bias = torch.randn(1, 4, 8), torch.randn(24, 8), torch.randn(24)
    heads, merge_weight = torch.randn(1, 2, 4, 4), torch.randn(8, 8)

    def torch_qkv() -> Any:
        return F.linear(x, weight, bias).view(1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)

    def torch_heads() -> Any:
        return F.linear(x, weight, bias).view(1, 4, 6, 4).transpose(1, 2)

    def torch_merge() -> Any:
        return F.linear(heads.transpose(1, 2).reshape(1, 4, 8), merge_weight)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[torch.Tensor]]] = {
        "qkv_projection": (
            lambda: functional.qkv_projection(x, weight, bias, heads=(2, 2, 2), head_dims=(4, 4, 4)),
            torch_qkv,
            [x, weight, bias],
        ),
        "multi_head_projection": (
            lambda: functional.multi_head_projection(x, weight, bias, num_heads=6),
            torch_heads,
            [x, weight, bias],
        ),
        "merge_heads_projection": (
            lambda: functional.merge_heads_projection(heads, merge_weight),
            torch_merge,
            [heads, merge_weight],
        ),
    }
    cases = []
    for name, (ours, theirs, leaves) in pairs.items():
        cases.append(Case(f"{name}: forward", _without_grad(ours), _without_grad(theirs), 1.5))
        for leaf in leaves:
            leaf.requires_grad_()
        cases.append(
            Case(f"{name}: forward + backward", _with_gradients(ours, leaves), _with_gradients(theirs, leaves), 1.5)
        )
    return cases


def _without_grad(run: Callable[[], Any]) -> Callable[[], Any]:
    def step() -> Any:
        with torch.no_grad():
            return run()

    return step


def latent_cases() -> list[Case]:
    mu, logvar = (torch.randn(4, 8).requires_grad_() for _ in range(2))

    def ours() -> Any:
        return functional.reparameterize_kl(mu, logvar)

    def theirs() -> Any:
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return z, 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)

    return [
        Case("reparameterize_kl: forward", _without_grad(ours), _without_grad(theirs), 1.0),
        Case("reparameterize_kl: forward + backward", *(_with_gradients(f, [mu, logvar]) for f in (ours, theirs)), 1.0),
    ]


def layer_cases() -> list[Case]:
    x = torch.randn(2, 4, 32)
    pairs: dict[str, tuple[torch.nn.Module, torch.nn.Module, Callable[[Any], Callable[[], Any]]]] = {
        "MultiheadAttention": (
            nn.MultiheadAttention(32, 4, batch_first=True),
            torch.nn.MultiheadAttention(32, 4, batch_first=True),
            lambda module: lambda: module(x, x, x, need_weights=False)[0],
        ),
        "TransformerEncoderLayer": (
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
            torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
            lambda module: lambda: module(x),
        ),
        "LSTM": (nn.LSTM(32, 32), torch.nn.LSTM(32, 32), lambda module: lambda: module(x[:1])[0]),
        "GRU": (nn.GRU(32, 32), torch.nn.GRU(32, 32), lambda module: lambda: module(x[:1])[0]),
    }
    cases = []
    for name, (ours, theirs, call) in pairs.items():
        theirs.load_state_dict(ours.state_dict())
        copies = [copy.deepcopy(module).eval() for module in (ours, theirs)]
        cases.append(Case(f"{name}: eval", *(_without_grad(call(module)) for module in copies), 1.1))
        trained = (_with_gradients(call(module), list(module.parameters())) for module in (ours, theirs))
        cases.append(Case(f"{name}: training step", *trained, 1.1))
    return cases


def all_cases() -> list[Case]:
    return attention_cases() + projection_cases() + latent_cases() + layer_cases()


def measure(case: Case, seconds: float = 0.15, block: float = 3e-4) -> tuple[float, float]:
    """Median microseconds of a call, ours and theirs, over blocks of ``block`` seconds for ``seconds`` each."""
    both, counts = (case.ours, case.theirs), []
    times: tuple[list[float], list[float]] = [], []
    for run in both:
        once = min(_seconds(run, 1) for _ in range(20))
        counts.append(max(1, int(block / once)))
    for _ in range(int(seconds / block)):
        for run, count, kept in zip(both, counts, times, strict=True):
            kept.append(_seconds(run, count) / count * 1e6)
    return median(times[0]), median(times[1])


def _seconds(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - begin


def machine() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": name, "capability": torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure the rows whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| call | ours, us | PyTorch, us | ratio | wanted |")
    print("|---|---|---|---|---|")
    for case in all_cases():
        if given.only in case.name:
            ours, theirs = measure(case)
            rows.append({"call": case.name, "ours_us": ours, "torch_us": theirs, "wanted": case.limit})
            short = "" if ours <= case.limit * theirs else ", missed"
            print(
                f"| {case.name} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {case.limit}{short} |", flush=True
            )
    if given.json is not None:
        found = {"machine": machine(), "torch": torch.__version__, "fastgen": fastgen.__version__, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
