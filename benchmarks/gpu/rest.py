"""The third call of a session: latent, projection and layers in device time, and the training of two models.

usage: python -m benchmarks.gpu.rest FOLDER [--limit 180]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from benchmarks import roofline
from benchmarks.gpu import smoke
from benchmarks.gpu.check import run
from benchmarks.gpu.session import REHEARSAL, Session, machine
from benchmarks.gpu.timing import Call, measure
from benchmarks.shapes import LATENT_SHAPES, PROJECTION_SHAPES, PROJECTION_SIZES
from fastgen.bench.cases import eager_latent
from fastgen.functional import qkv_projection, reparameterize_kl
from fastgen.reference import split_heads

MODELS = {"conv-vae": "300", "sagan": "100"}
"""Models to train, and their steps: the latent's kernels, and attention with second derivatives."""
MODEL_SECONDS = 45


def latent(name: str, backward: bool) -> tuple[dict[str, Callable[[], Call]], int]:
    """The Gaussian latent and the eager formula, and the bytes that have to be moved."""
    batch, *rest = (4, 8) if REHEARSAL else LATENT_SHAPES[name]

    def call_of(function: Callable[..., Any]) -> Callable[[], Call]:
        def make() -> Call:
            encoded = torch.randn(batch, 2 * rest[0], *rest[1:], device=smoke.device())
            operands = [one.detach().requires_grad_(backward) for one in encoded.chunk(2, dim=1)]
            if not backward:
                return lambda: function(*operands)
            outputs = function(*operands)
            upstream = [torch.randn_like(one) for one in outputs]
            return lambda: torch.autograd.grad(outputs, operands, upstream, retain_graph=True)

        return make

    def ours(*args: Tensor) -> Any:
        with smoke.kernels():
            return reparameterize_kl(*args)

    count = 4 * batch
    for size in rest:
        count *= size
    return {"ours": call_of(ours), "eager": call_of(eager_latent)}, count * (5 if backward else 3)


def projection(name: str) -> tuple[dict[str, Callable[[], Call]], float]:
    """The packed projection forward, torch's linear and split, and the products' FLOP."""
    batch, length, channels, heads, dims = PROJECTION_SHAPES[name]
    batch, length = (1, 16) if REHEARSAL else PROJECTION_SIZES.get(name, (batch, length))
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))

    def call_of(function: Callable[..., Any]) -> Callable[[], Call]:
        def make() -> Call:
            operands = [
                torch.randn(*size, device=smoke.device()).bfloat16()
                for size in ((batch, length, channels), (rows, channels))
            ]

            def forward() -> Any:
                with torch.no_grad():
                    return function(*operands)

            return forward

        return make

    def ours(x: Tensor, weight: Tensor) -> Any:
        return qkv_projection(x, weight, heads=heads, head_dims=dims)

    def kernels(x: Tensor, weight: Tensor) -> Any:
        with smoke.kernels():
            return ours(x, weight)

    def plain(x: Tensor, weight: Tensor) -> Any:
        return [part.contiguous() for part in split_heads(F.linear(x, weight), list(heads), list(dims))]

    found = {"ours": call_of(ours), "kernels": call_of(kernels), "torch": call_of(plain)}
    return found, 2.0 * batch * length * channels * rows


def layer() -> dict[str, Callable[[], Call]]:
    """Forward and backward of torch's encoder layer, and of the same one accelerated."""
    device = smoke.device()
    width, batch, length = (32, 1, 16) if REHEARSAL else (512, 16, 1024)
    dtype = torch.float32 if REHEARSAL else torch.bfloat16
    plain = nn.TransformerEncoderLayer(width, width // 16 if REHEARSAL else 8, 4 * width, dropout=0.0, batch_first=True)
    plain = plain.to(device, dtype)
    fused = nn.Sequential(copy.deepcopy(plain))
    fastgen.accelerate(fused)

    def call_of(module: nn.Module) -> Callable[[], Call]:
        def make() -> Call:
            x = torch.randn(batch, length, width, device=device, dtype=dtype, requires_grad=True)
            leaves = [x, *module.parameters()]
            upstream = torch.randn_like(x)
            return lambda: torch.autograd.grad(module(x), leaves, upstream)

        return make

    return {"ours": call_of(fused), "torch": call_of(plain)}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Time of each peer by ours."""
    mine = rows["ours"].get("median_us")
    return {
        name: round(one["median_us"] / mine, 3)
        for name, one in rows.items()
        if mine and name != "ours" and "median_us" in one
    }


def train(session: Session, model: str) -> None:
    """Trains a model for some steps by the command line, which requires fastgen[train]."""
    if importlib.util.find_spec("jsonargparse") is None:
        session.write("training", model=model, note="jsonargparse is not installed")
        return
    out, log, start = session.folder / "runs" / model, session.folder / "train.log", time.monotonic()
    device = "cpu" if REHEARSAL else "cuda"
    command = [sys.executable, "-m", "fastgen", "train", model, "--device", device, "--out", str(out), "--overwrite"]
    command += ["--steps", "3" if REHEARSAL else MODELS[model]]
    code = run(command, 300 if REHEARSAL else min(MODEL_SECONDS, session.left), log)
    seconds = round(time.monotonic() - start, 1)
    metrics = out / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.is_file() and metrics.stat().st_size else None
    session.write("training", model=model, passed=code == 0, code=code, seconds=seconds, last=last,
                  log="" if code == 0 else log.read_text()[-1500:])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=180, help="seconds for everything")
    arguments = parser.parse_args()
    session = Session(arguments.folder.resolve(), arguments.limit)
    session.write("machine", **machine())
    torch.manual_seed(0)
    smoke.prepare()

    def latent_row(name: str, backward: bool) -> dict[str, Any]:
        calls, moved = latent(name, backward)
        rows = measure(calls, moved)
        found = {"case": f"latent {'backward' if backward else 'forward'} {name}", "rows": rows, "ratios": ratios(rows)}
        if "median_us" in rows["ours"]:
            found["GB/s"] = round(moved / rows["ours"]["median_us"] / 1e3, 1)
            chip = None if REHEARSAL else roofline.chip_of(torch.cuda.get_device_name())
            if chip is not None:
                found["of_roofline"] = round(found["GB/s"] * 1e9 / chip.bandwidth, 4)
        return found

    def projection_row(name: str) -> dict[str, Any]:
        calls, flops = projection(name)
        rows = measure(calls, 1 << 22)
        found = {"case": f"projection {name}", "rows": rows, "ratios": ratios(rows)}
        if "median_us" in rows["ours"]:
            found["tflops"] = round(flops / rows["ours"]["median_us"] / 1e6, 2)
        return found

    def layer_row() -> dict[str, Any]:
        rows = measure(layer(), 1 << 26)
        return {"case": "encoder layer, forward and backward", "rows": rows, "ratios": ratios(rows)}

    work: list[Callable[[], dict[str, Any]]] = []
    for name in LATENT_SHAPES:
        work += [lambda name=name: latent_row(name, False), lambda name=name: latent_row(name, True)]  # type: ignore[misc]
    projections = ["grouped"] if REHEARSAL else [name for name in PROJECTION_SHAPES if name != "odd"]
    work += [lambda name=name: projection_row(name) for name in projections]  # type: ignore[misc]
    work.append(layer_row)
    for one in work:
        if session.left < (0 if REHEARSAL else 2 * MODEL_SECONDS):
            session.write("left out", call="rest", what="benchmarks, for the training")
            break
        try:
            line = session.write("rest", **one())
        except Exception as problem:
            line = session.write("rest", problem=f"{type(problem).__name__}: {problem}"[:500])
        print(json.dumps({key: line.get(key) for key in ("case", "ratios", "of_roofline", "problem")}), flush=True)
    for model in MODELS:
        train(session, model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
