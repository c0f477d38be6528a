"""Backward pass and tangent on Hopper (csrc/attention/sm90/) in the model of :mod:`benchmarks.model.hopper`.

Of the backward pass two kernels run one after the other: one for dQ, whose blocks own 128 queries and iterate tiles
of keys, and one for dK and dV, whose blocks own 128 keys and iterate tiles of queries. Together they have 7 products
per score, and TFLOP/s count the 5 that are necessary: the most is 71% of the peak. The tangent has one kernel and 5
products; that of output and tangent has 6. What is owned has one buffer, so its copy is counted as a trip to memory
for each owned tile; the dQ kernel and the tangent read the output, one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.model import hopper, warpgroups
from benchmarks.model.chips import CHIPS, Chip
from benchmarks.model.predict import MEMORY_LATENCY
from benchmarks.roofline import BACKWARD, FORWARD_TANGENT, TANGENT, Pass, cost
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from fastgen.backend import plans


class Kind(NamedTuple):
    """Of derivative: its minimum work, and its kernels, which run in turn, with the names of their launch plans."""

    work: Pass
    kernels: dict[str, str]


KINDS = {
    "backward": Kind(BACKWARD, {"backward_query": "query sm90", "backward_key_value": "key_value sm90"}),
    "tangent": Kind(TANGENT, {"tangent": "tangent sm90"}),
    "forward_tangent": Kind(FORWARD_TANGENT, {"forward_tangent": "forward tangent sm90"}),
}
TITLES = {
    "backward_query": "dQ",
    "backward_key_value": "dK and dV",
    "tangent": "tangent",
    "forward_tangent": "output and tangent",
}
OWNED = hopper.CONSUMERS * hopper.GROUP_ROWS  # csrc/attention/sm90/backward_plan.h

PUBLISHED = (
    hopper.Published("H100", "16k, d=64", "FlashAttention-3", 474, "Shah et al., 2024, figure 6"),
    hopper.Published("H100", "16k, d=128", "FlashAttention-3", 561, "Shah et al., 2024, figure 6"),
    hopper.Published("H200", "16k, d=128", "cuDNN", 612, "as reported by its release notes"),
)


def plans_of(shape: AttentionShape, chip: Chip, kind: Kind) -> dict[str, Any] | None:
    """The launch plans of the kernels, by name, or None where another family serves the shape."""
    if shape.mask not in ("", "causal"):
        return None
    found = plans.attention_plan(
        shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim,
        element_size=2, multiprocessors=chip.multiprocessors, plain=True, shared_limit=chip.shared_memory - 1024,
    )  # fmt: skip
    if not found.keys() >= set(kind.kernels.values()):
        return None
    return {name: found[plan] for name, plan in kind.kernels.items()}


def tiles_of(shape: AttentionShape, name: str, iterated: int) -> Iterator[tuple[int, int]]:
    """Iterations of each owned tile, in the order of the grid, and how many of them are masked."""
    owns_keys = name == "backward_key_value"
    if not owns_keys:
        yield from hopper.tiles_of(shape, OWNED, iterated)
        return
    heads, of_head = shape.batch * shape.heads, -(-shape.keys // OWNED)
    every, partial = -(-shape.queries // iterated), shape.queries % iterated != 0
    if shape.mask != "causal":
        yield from ((every, int(partial)) for _ in range(heads * of_head))
        return
    of_head_bytes = shape.queries * (shape.key_dim + shape.value_dim) * 2
    together = max(1, min(heads, hopper.L2_KEPT // of_head_bytes))
    for first_head in range(0, heads, together):
        for tile in range(of_head):
            first, last = tile * OWNED, min((tile + 1) * OWNED, shape.keys) - 1
            visited = max(0, every - first // iterated)
            full = sum(one * iterated >= last for one in range(every)) - partial
            yield from ((visited, visited - max(0, full)) for _ in range(min(together, heads - first_head)))


def edge_clocks(kernel: hopper.Kernel, chip: Chip) -> float:
    """Of an owned tile, besides its iterations; of the tangent with what the first of them needs."""
    trips = 1 if kernel.name in ("backward_key_value", "forward_tangent") else 2
    return trips * MEMORY_LATENCY + warpgroups.simulate(kernel.outside, kernel.consumers, chip).clocks


def predict(
    kernel: hopper.Kernel, shape: AttentionShape, chip: Chip, plan: dict[str, Any], simulated: float, edge: float
) -> float:
    """Seconds of one of the kernels, if memory is not slower."""
    clocks, _ = hopper.iteration_clocks(kernel, simulated)
    masked_more = (kernel.whole - len(kernel.path)) * kernel.consumers
    # The loops of the backward pass are left in the middle: the last iteration counts, though it has no products.
    in_edge = 1 if kernel.name.endswith("tangent") else 0
    blocks = [0.0] * plan["blocks"]
    for number, (iterations, masked) in enumerate(tiles_of(shape, kernel.name, kernel.keys)):
        blocks[number % len(blocks)] += (iterations - in_edge) * clocks + masked * masked_more + edge
    return max(blocks) / chip.clock + chip.launch


def prediction_rows(kernels: list[hopper.Kernel], kind: Kind) -> list[dict[str, Any]]:
    """One row for each chip and shape that the kernels serve."""
    rows = []
    clocks: dict[int, tuple[float, float]] = {}  # of an iteration and of the rest; the chips have the same rates
    for chip in CHIPS:
        if chip.arch != "90a":
            continue
        for shape in (*ATTENTION_SHAPES.values(), *hopper.LONG.values()):
            found = plans_of(shape, chip, kind)
            if found is None:
                continue
            times, needed = {}, cost(shape, kind.work)
            for name, plan in found.items():
                wanted = name, plan["tile"][0], False
                place = next(i for i, one in enumerate(kernels) if (one.name, one.dim, one.padded) == wanted)
                if place not in clocks:
                    kernel = kernels[place]
                    clocks[place] = hopper.steady(kernel, chip).clocks, edge_clocks(kernel, chip)
                seconds = predict(kernels[place], shape, chip, plan, *clocks[place])
                times[name] = max(seconds, needed.bytes / len(found) / chip.bandwidth)
            whole = sum(times.values())
            rows.append({
                "chip": chip.name, "shape": shape.name, "dim": next(iter(found.values()))["tile"][0],
                "microseconds": {name: float(f"{seconds * 1e6:.3g}") for name, seconds in times.items()},
                "tflops": round(needed.flops / whole / 1e12), "share": round(needed.flops / whole / chip.flops, 3),
            })  # fmt: skip
    return rows


def kernel_rows(kernels: list[hopper.Kernel]) -> list[dict[str, Any]]:
    """One row for each kernel, as :func:`hopper.kernel_rows`."""
    chip = next(chip for chip in CHIPS if chip.name == "H100")
    rows = hopper.kernel_rows(kernels, chip)
    for row, one in zip(rows, kernels, strict=True):
        row["name"], row["edge"] = one.name, round(edge_clocks(one, chip))
    return rows


def rows(kernels: list[hopper.Kernel]) -> dict[str, Any]:
    """What predictions.json has of them."""
    found = {}
    for name, kind in KINDS.items():
        of_kind = [one for one in kernels if one.name in kind.kernels]
        found[f"hopper_{name}_kernels"] = kernel_rows(of_kind)
        found[f"hopper_{name}_predictions"] = prediction_rows(of_kind, kind)
    return found


HEADERS = {
    "backward": """
## Attention on Hopper, backward (`csrc/attention/sm90/`): predicted

The same simulation. A kernel for dQ (3 products) runs before one for dK and dV (4 products); TFLOP/s count the 5
products that are necessary, so that the most is 71% of the peak. "Iterated" are the keys, or queries, of a tile.
"Expected" has the factors of the forward pass: backward kernels of others have not been simulated. By that figure
FlashAttention-3 is faster with head dim 128, which adds dQ up with atomics and so needs 5 products, in no fixed order.
""",
    "tangent": """
## Attention on Hopper, tangent (`csrc/attention/sm90/`): predicted

The same simulation, of one kernel with 5 products: two for the tangent of the scores, two for that of the output. It
has the most products per exponential, so that they fill the time without turns. The forward pass, which runs first, is
not included. Nothing is published about the tangents of others.
""",
    "forward_tangent": """
## Attention on Hopper, output and tangent (`csrc/attention/sm90/`): predicted

The same simulation, of the kernel of `scaled_dot_product_attention_jvp` with head dims up to 64: 6 products, in the
place of the 2 of the forward kernel and the 5 of the tangent, and one softmax. TFLOP/s count 6 products.
""",
}

COLUMNS = """
| kernel | head dim | iterated | padding mask | executed | least | simulated | {otherwise} | shared memory | L2 | \
exponentials | issue | edge | limit | share of peak |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def section(data: dict[str, Any], kind: str) -> list[str]:
    """The section of predictions.md on a kind of derivative."""
    out = HEADERS[kind].splitlines() + COLUMNS.format(otherwise=" | ".join(hopper.OTHERWISE)).splitlines()
    for row in data[f"hopper_{kind}_kernels"]:
        cells = [TITLES[row["name"]], row["dim"], row["keys"], "yes" if row["padded"] else "no", row["executed"]]
        cells += [f"{row['least']:g}", row["simulated"], *row["otherwise"].values(), row["shared"], row["l2"]]
        cells += [f"{row['special']:.0%}", f"{row['issue']:.0%}", row["edge"], row["limit"], f"{row['share']:.0%}"]
        out.append(f"| {' | '.join(map(str, cells))} |")
    times = " | ".join(f"{TITLES[name]}, us" for name in KINDS[kind].kernels)
    head = f"| GPU | shape | {times} | TFLOP/s | share of peak | expected, TFLOP/s | published, TFLOP/s |"
    out += ["", head, "|---" * (head.count("|") - 1) + "|"]
    for row in data[f"hopper_{kind}_predictions"]:
        times = " | ".join(f"{one:g}" for one in row["microseconds"].values())
        published = hopper.published_text(PUBLISHED if kind == "backward" else (), row)
        out.append(
            f"| {row['chip']} | {row['shape']} | {times} | {row['tflops']} | {row['share']:.0%}"
            f" | {hopper.factor_of(row['dim']) * row['tflops']:.0f} | {published} |"
        )
    return out


def lines(data: dict[str, Any]) -> list[str]:
    """The sections of predictions.md."""
    return [line for kind in KINDS for line in section(data, kind)]
