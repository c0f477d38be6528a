"""Rows and tables of the static model."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.model.chips import CHIPS, Chip
from benchmarks.model.loops import PRODUCTS
from benchmarks.model.predict import Kernel, Prediction, plans_of, predict
from benchmarks.roofline import BACKWARD, FORWARD, SECOND_ORDER, TANGENT, Pass, cost
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape

PASSES: dict[str, tuple[Pass, tuple[str, ...]]] = {
    "forward": (FORWARD, ("attention_forward",)),
    "backward": (BACKWARD, ("attention_backward_query", "attention_backward_key_value")),
    "tangent": (TANGENT, ("attention_tangent",)),
    "second order": (SECOND_ORDER, ("attention_second_order_query", "attention_second_order_key_value")),
}
"""Name of a pass: its minimum work, and its kernels, which run one after the other; of most shapes."""


def kernels_of(name: str, shape: AttentionShape, chip: Chip) -> tuple[str, ...]:
    """The kernels that the launcher takes for a pass."""
    plan = plans_of(shape, chip, shape.mask in ("", "causal"))
    if name == "forward" and "decode" in plan:
        return ("attention_decode",)
    if name == "backward" and "one tile" in plan:
        return ("attention_backward_one_tile",)
    if name == "backward" and "one head" in plan:
        return ("attention_backward_one_head",)
    names = PASSES[name][1]

    def is_wide(bare: str) -> bool:
        found = plan.get(PRODUCTS[bare].plan)
        return f"{bare}_wide" in PRODUCTS and found is not None and found["warps"] == 8

    return tuple(f"{bare}_wide" if is_wide(bare) else bare for bare in names)


def kernel_for(kernels: list[Kernel], bare: str, shape: AttentionShape, chip: Chip) -> Kernel | None:
    """The kernel that the launcher takes for a shape, or None if none holds its head dims."""
    plain = shape.mask in ("", "causal")
    plan = plans_of(shape, chip, plain).get(PRODUCTS[bare].plan)
    if plan is None:
        return None
    rows = max(shape.queries, shape.keys)
    fitting = [one for one in kernels if one.name.bare == bare and one.name.dims == plan["tile"]]
    fitting = [one for one in fitting if one.name.rows == 0 or one.name.rows >= rows]
    fitting.sort(key=lambda one: (one.name.plain != plain, one.name.rows))
    return fitting[0] if fitting else None


def predict_pass(kernels: list[Kernel], name: str, shape: AttentionShape, chip: Chip) -> list[Prediction] | None:
    """The kernels of a pass, or None if one of them is missing."""
    names = kernels_of(name, shape, chip)
    bytes_each = cost(shape, PASSES[name][0]).bytes / len(names)
    chosen = [kernel_for(kernels, bare, shape, chip) for bare in names]
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
- `decode` forward, `swin-window` and `seq2seq` backward, and `vae-mid` take kernels of their own, the latter's forward
  and backward pass where a block may have 163 KiB; so does the backward pass of `transgan-window` and `char-lm` there.
  In decoding each warp has tiles of its own, and a copy takes at least a trip to memory. Where warps of a block differ,
  counts are their average, and the latency is that of the longest path.
- A block with one stage waits for each copy. Only other blocks of the multiprocessor fill that time.
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


def estimate_lines(estimates: list[dict[str, Any]]) -> list[str]:
    """The section about kernels that are not written."""
    from benchmarks.model.estimates import DESIGNS

    out = [
        "",
        "## Kernels that do not exist: estimated",
        "",
        "Times of the backward pass in us, from the iterations of the compiled kernels with what a design adds or",
        "removes, counted by hand ([estimates.py](estimates.py)). Registers are assumed to suffice.",
        "",
        *(f"- **{name}**: {text}." for name, text in DESIGNS.items()),
        "",
        f"| GPU | shape | now, predicted | {' | '.join(DESIGNS)} |",
        "|" + "---|" * (3 + len(DESIGNS)),
    ]
    cases = dict.fromkeys((one["chip"], one["shape"]) for one in estimates)
    for chip, shape in cases:
        found = {one["design"]: one for one in estimates if (one["chip"], one["shape"]) == (chip, shape)}
        cells = [
            f"{found[name]['then']:g} ({found[name]['now'] / found[name]['then']:.2f}x)" if name in found else "-"
            for name in DESIGNS
        ]
        out.append(f"| {chip} | {shape} | {next(iter(found.values()))['now']:g} | {' | '.join(cells)} |")
    return out


def lines(data: dict[str, Any]) -> list[str]:
    """predictions.md."""
    from benchmarks.model import calibration, estimates, hopper, hopper_derivatives, hopper_wide, predict

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
    out += hopper.lines(data)
    out += hopper_derivatives.lines(data)
    out += hopper_wide.lines()
    out += estimate_lines(data["estimates"])
    out += ["", *estimates.REJECTED.splitlines()]
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
