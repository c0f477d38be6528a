"""Rows and tables of the static model."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.model.chips import CHIPS, Chip
from benchmarks.model.predict import Kernel, Prediction, predict, takes_another_kernel
from benchmarks.roofline import BACKWARD, FORWARD, SECOND_ORDER, TANGENT, Pass, cost
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from fastgen.backend import plans

PASSES: dict[str, tuple[Pass, tuple[str, ...]]] = {
    "forward": (FORWARD, ("attention_forward",)),
    "backward": (BACKWARD, ("attention_backward_query", "attention_backward_key_value")),
    "tangent": (TANGENT, ("attention_tangent",)),
    "second order": (SECOND_ORDER, ("attention_second_order_query", "attention_second_order_key_value")),
}
"""Name of a pass: its minimum work, and its kernels, which run one after the other."""


def kernel_for(kernels: list[Kernel], bare: str, shape: AttentionShape) -> Kernel | None:
    """The kernel that the launcher takes for a shape, or None if none holds its head dims."""
    second_order = "tangent" in bare or "second_order" in bare
    dims = next(
        (one for one in plans.attention_tiles(second_order) if shape.key_dim <= one[0] and shape.value_dim <= one[1]),
        None,
    )
    plain = shape.mask in ("", "causal")
    fitting = [one for one in kernels if one.name.bare == bare and one.name.dims == dims]
    return next((one for one in fitting if one.name.plain == plain), fitting[0] if fitting else None)


def predict_pass(kernels: list[Kernel], name: str, shape: AttentionShape, chip: Chip) -> list[Prediction] | None:
    """The kernels of a pass, or None if one of them is missing, or another one takes the shape."""
    work, names = PASSES[name]
    if any(takes_another_kernel(bare, shape, chip) for bare in names):
        return None
    bytes_each = cost(shape, work).bytes / len(names)
    chosen = [kernel_for(kernels, bare, shape) for bare in names]
    if any(kernel is None for kernel in chosen):
        return None
    return [predict(kernel, shape, chip, bytes_each) for kernel in chosen if kernel is not None]


def prediction_rows(found: dict[str, list[Kernel]]) -> list[dict[str, Any]]:
    """One row for each chip, pass and named shape."""
    rows = []
    for chip in CHIPS:
        for name, (work, _) in PASSES.items():
            for shape in ATTENTION_SHAPES.values():
                parts = predict_pass(found[chip.arch], name, shape, chip) if chip.arch in found else None
                if parts is None:
                    continue
                seconds, minimum = sum(part.seconds for part in parts), cost(shape, work)
                slowest = max(parts, key=lambda part: part.seconds)
                bound = max(minimum.flops / chip.flops, minimum.exponentials / chip.exponentials,
                            minimum.bytes / chip.bandwidth)  # fmt: skip
                rows.append({
                    "chip": chip.name, "pass": name, "shape": shape.name, "microseconds": _short(seconds * 1e6),
                    "limit": slowest.limit, "blocks_per_multiprocessor": slowest.resident,
                    "waves": _short(slowest.waves), "tflops": _short(minimum.flops / seconds / 1e12),
                    "of_roofline": _short(bound / seconds),
                })  # fmt: skip
    return rows


def kernel_rows(found: dict[str, list[Kernel]]) -> list[dict[str, Any]]:
    """One row for each kernel: resources and what an iteration executes."""
    rows = []
    for arch, kernels in found.items():
        for kernel in kernels:
            one = kernel.iteration
            pipes = {pipe: _short(count) for pipe, count in sorted(one.pipes.items())}
            rows.append({
                "arch": arch, "kernel": str(kernel.name), "registers": kernel.registers, "loop": one.whole,
                "branches": one.branches, "executed": _short(one.instructions), "per_score": _short(one.per_score),
                "pipes": pipes, "shared_bytes": _short(one.shared_bytes), "copied_bytes": _short(one.copied_bytes),
            })  # fmt: skip
    return rows


def _short(value: float) -> float:
    """Three significant digits, and all of a larger number."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


SHOWN = ("90a", "80")
"""Architectures whose main loops are in predictions.md."""

HEADER = """\
# Predicted times of the attention kernels

**Predicted, not measured.** A static model computes these figures from the machine code (`python -m benchmarks.model`;
[predict.py](predict.py) has the formulas, [chips.py](chips.py) the rates of the GPUs). nvcc {nvcc}, commit {commit},
bfloat16. No kernel has run on a GPU for this table.

## How far off the model is

The machine code of FlashAttention-2, read by the same program, against its published speed. `q` = {overlap:g} is chosen
to fit these rows, so they show how well one number fits them all, not how well the model predicts other kernels.

| GPU | pass | head dim | published, TFLOP/s | model, TFLOP/s | error |
|---|---|---|---|---|---|"""

NOTES = """
{sources}

## How to read it

- The path through the main loop is the one of a tile of which everything is visible. Branches around rare work count
  as taken: the rescaling of the output, the search for the next tile, divisions.
- A masked tile (at the diagonal of a causal mask, under a bias or a padding mask) costs all code of the loop but
  dropout, softcaps and divisions. That is an upper estimate, which is high for `swin-window` and `seq2seq`.
- Backward and second order are two kernels each; the gradient of a learned bias is not included. The limit is that of
  the slower one. *latency*: too few warps to fill a pipe. *memory*: the minimal traffic takes longer than the loop.
- Shapes that take kernels of their own are left out, because the model does not read those: the forward pass of
  `decode`, the backward pass of `swin-window` and `seq2seq`, and `vae-mid` where eight warps share a tile.
- "of roofline": the minimum time of [roofline.md](../roofline.md) by the predicted time. TFLOP/s count the necessary
  products (5 in the backward pass).
"""


def text_of(data: dict[str, Any]) -> str:
    """predictions.json, with one row per line."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list):
            inner = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(key)}: [\n  {inner}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def lines(data: dict[str, Any]) -> list[str]:
    """predictions.md."""
    from benchmarks.model import calibration, predict

    out = HEADER.format(overlap=predict.OVERLAP, **data).splitlines()
    for one in data["calibration"]:
        error = one["model"] / one["published"] - 1
        out.append(
            f"| {one['chip']} | {one['pass']} | {one['head_dim']} | {one['published']:g} | {one['model']:.0f}"
            f" | {error:+.0%} |"
        )
    out += NOTES.format(sources=calibration.SOURCES).splitlines()
    for chip in dict.fromkeys(row["chip"] for row in data["predictions"]):
        for name in PASSES:
            rows = [row for row in data["predictions"] if row["chip"] == chip and row["pass"] == name]
            if rows:
                out += ["", f"## {chip}, {name}: predicted", ""]
                out += [
                    "| shape | us | limit | blocks per SM | waves | TFLOP/s | of roofline |",
                    "|---|---|---|---|---|---|---|",
                ]
                out += [
                    f"| {row['shape']} | {row['microseconds']:g} | {row['limit']} | {row['blocks_per_multiprocessor']}"
                    f" | {row['waves']:g} | {row['tflops']:g} | {row['of_roofline']:.0%} |"
                    for row in rows
                ]
    out += [
        "",
        "## Main loops",
        "",
        "Instructions of a warp in one iteration, by pipe; bytes of shared memory per warp.",
    ]
    out += ["[predictions.json](predictions.json) has those of the other architectures."]
    for arch in SHOWN:
        out += ["", f"### sm_{arch}", ""]
        pipes = ("tensor", "special", "fma", "imad", "alu", "shared", "global", "issue")
        out += [f"| kernel | registers | loop | branches | executed | per score | {' | '.join(pipes)} | bytes |"]
        out += ["|" + "---|" * (len(pipes) + 7)]
        for row in data["kernels"]:
            if row["arch"] == arch:
                counts = " | ".join(f"{row['pipes'].get(pipe, 0):g}" for pipe in pipes)
                out.append(
                    f"| `{row['kernel'].removeprefix('attention_').replace('BFloat16, ', '')}` | {row['registers']}"
                    f" | {row['loop']} | {row['branches']} | {row['executed']:g} | {row['per_score']:g} | {counts}"
                    f" | {row['shared_bytes']:g} |"
                )
    return out
