"""The forward pass on Hopper (csrc/attention/sm90/) in the model: its kernels, and predicted times.

An iteration is that of :mod:`benchmarks.model.warpgroups`: all consumers multiply their 64 queries with one tile of
keys. It takes the simulated clocks, or longer if shared memory or L2 is slower. A tile of queries takes its iterations
and, simulated too, what is outside of the main loop: the first scores, the last products and the store. With one buffer
for queries, their copy is counted as a trip to memory, though part of it overlaps. Masked tiles take all code of the
loop, an upper estimate. Blocks of the persistent grid take tiles in turn; the slowest block counts.

usage: python -m benchmarks.model.hopper LISTING CONSUMERS
prints an iteration of another kernel, from the listing of ``nvdisasm -c``: see FLASH_ATTENTION.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.model import sass, warpgroups
from benchmarks.model.chips import CHIPS, Chip
from benchmarks.model.predict import MEMORY_LATENCY
from benchmarks.roofline import FORWARD, cost
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from fastgen.backend import plans

GROUP_ROWS = 64
CONSUMERS = 2  # of most kernels
# csrc/attention/sm90/plan.h: bytes of K and V of the heads in turn, and the widest head whose next queries are copied
# during the current ones.
L2_KEPT, TWO_QUERY_BUFFERS = 32 << 20, 128

LONG = {
    f"16k, d={dim}": AttentionShape(f"16k, d={dim}", 1, 2048 // dim, 16384, 16384, dim, dim) for dim in (64, 128, 256)
} | {"16k, d=192": AttentionShape("16k, d=192", 1, 11, 16384, 16384, 192, 192)}
"""16384 tokens and a hidden size of 2048, as in the benchmarks of FlashAttention-3 (192: 2112), without a mask."""


class Published(NamedTuple):
    chip: str
    shape: str
    code: str
    tflops: float
    source: str


PUBLISHED = (
    Published("H100", "16k, d=64", "FlashAttention-3", 497, "Shah et al., 2024, figure 5"),
    Published("H100", "16k, d=128", "FlashAttention-3", 648, "Shah et al., 2024, figure 5"),
    Published("H200", "16k, d=128", "cuDNN 9.19", 702, "as reported for that release"),
)


class Reference(NamedTuple):
    """A kernel of FlashAttention-3 in the same simulation, and its published speed."""

    dim: int
    queries: int
    keys: int
    executed: int
    least: float
    simulated: int
    slow: int  # with 1.5 x latency
    shape: str

    @property
    def published(self) -> float:
        """Share of the peak."""
        found = next(one for one in PUBLISHED if one.shape == self.shape and one.code == "FlashAttention-3")
        return found.tflops / (next(chip for chip in CHIPS if chip.name == found.chip).flops / 1e12)

    @property
    def ratio(self) -> float:
        """Of the published speed to that in the model."""
        return self.published / (self.least / self.simulated)


FLASH_ATTENTION = (
    Reference(64, 192, 128, 411, 1536, 1813, 1919, "16k, d=64"),
    Reference(128, 128, 176, 580, 2816, 2816, 2816, "16k, d=128"),
)
"""Commit 0251105a2f of its repository with CUTLASS 4.3.4 and nvcc 13.0.88; bfloat16, no mask, and the tiles that its
launcher takes, but for head dim 64 those of the paper."""


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: "forward", "backward_query", "backward_key_value", "tangent" or "forward_tangent".
        path: instructions of a consumer's warp in one iteration, in order.
        whole: instructions in the loop, executed or not.
        outside: what a tile of queries takes besides its iterations: one key tile, and the output.
    """

    name: str
    dim: int
    consumers: int
    padded: bool
    registers: int
    path: tuple[sass.Instruction, ...]
    whole: int
    outside: tuple[sass.Instruction, ...]

    @property
    def keys(self) -> int:
        """Of a tile: the columns of the scores, whose operands are both in shared memory. Queries, where the block has
        keys."""
        return columns_of(next(one for one in self.products if warpgroups.product_of(one).left < 0))

    @property
    def products(self) -> list[sass.Instruction]:
        return [one for one in self.path if one.base == "HGMMA" and warpgroups.product_of(one).clocks > 0]

    @property
    def copied_bytes(self) -> int:
        """Of the tiles that the producer copies in one iteration: of keys and values, or queries and dO, and of the
        tangents."""
        return (4 if self.name.endswith("tangent") else 2) * self.keys * self.dim * 2

    @property
    def scores_per_lane(self) -> float:
        """Of an iteration, for each thread."""
        return GROUP_ROWS * self.keys / 128

    @property
    def least(self) -> float:
        """Clocks of an iteration at 4096 FLOP per clock."""
        return self.consumers * sum(columns_of(one) / 2 for one in self.products)


def columns_of(product: sass.Instruction) -> int:
    match = re.search(r"x(\d+)x16", product.operands)
    if match is None:
        raise ValueError(f"not a product: {product}")
    return int(match[1])


def kernel_of(demangled: str, registers: int, listing: sass.Listing) -> Kernel | None:
    """A kernel and its main loop, or None for other kernels.

    Raises:
        ValueError: it has no main loop.
    """
    match = re.search(r"attention_(\w+)_sm90<(?:\w+::)*BFloat16, (\d+)(?:, (\d), \d+)?, (true|false)>", demangled)
    if match is None:
        return None
    blocks = sass.blocks_of(listing)
    loops = [loop for loop in sass.loops_of(blocks) if any(blocks[i].matrix for i in loop.members)]
    if len(loops) < 2:
        raise ValueError(f"{demangled}: no main loop inside that of the tiles")
    inner, outer = loops[:2]
    whole = sum(len(blocks[i].instructions) for i in inner.members)
    sizes = int(match[2]), int(match[3] or CONSUMERS), match[4] == "true"
    return Kernel(match[1], *sizes, registers, _longest(blocks, inner), whole, _longest(blocks, outer))


def main() -> None:
    consumers = int(sys.argv[2])
    listing = max(sass.parse(Path(sys.argv[1]).read_text()).values(), key=lambda one: len(one.instructions))
    blocks = sass.blocks_of(listing)
    loop = next(loop for loop in sass.loops_of(blocks) if any(blocks[i].matrix for i in loop.members))
    kernel = Kernel("", 0, consumers, False, 0, _longest(blocks, loop), 0, ())
    chip = next(chip for chip in CHIPS if chip.name == "H100")
    clocks = {name: round(steady(kernel, chip, **assumed).clocks) for name, assumed in {"": {}, **OTHERWISE}.items()}
    print(f"{kernel.keys} keys, {len(kernel.path)} executed, least {kernel.least:g}, simulated {clocks}")


def _longest(blocks: list[sass.Block], loop: sass.Loop) -> tuple[sass.Instruction, ...]:
    """The shortest path with most products and exponentials, without inner loops."""
    paths = sass.paths_of(blocks, loop)
    return paths[max(paths)].straight


def steady(kernel: Kernel, chip: Chip, **assumed: Any) -> warpgroups.Steady:
    """One iteration, if copies keep up. ``assumed``: of :func:`warpgroups.simulate`."""
    return warpgroups.simulate(kernel.path, kernel.consumers, chip, **assumed)


OTHERWISE: dict[str, dict[str, Any]] = {
    "1.5 x latency": {"latencies": warpgroups.Latencies().times(1.5)},
    "blocking": {"queue": 64.0},
    "greedy": {"greedy": True},
}
"""Other assumptions, of which nothing is published, as :func:`warpgroups.simulate` takes them."""


def iteration_clocks(kernel: Kernel, simulated: float) -> tuple[float, str]:
    """Clocks of an iteration, and what limits it."""
    rates = warpgroups.Rates.of(kernel.path, kernel.consumers, kernel.copied_bytes)
    first = "tensor" if simulated < 1.02 * kernel.least else "issue"
    choices = {first: simulated, "shared memory": rates.shared, "L2": rates.l2}
    clocks = max(choices.values())
    return clocks, ", ".join(name for name, one in choices.items() if one > 0.99 * clocks)


def tiles_of(shape: AttentionShape, rows: int, keys: int) -> Iterator[tuple[int, int]]:
    """Iterations of each tile of queries, in the order of the grid, and how many of them are masked."""
    heads, of_head = shape.batch * shape.heads, -(-shape.queries // rows)
    every, partial = -(-shape.keys // keys), shape.keys % keys != 0
    if shape.mask != "causal":
        yield from ((every, int(partial)) for _ in range(heads * of_head))
        return
    together = max(1, min(heads, L2_KEPT // (shape.keys * (shape.key_dim + shape.value_dim) * 2)))
    for first_head in range(0, heads, together):
        for tile in reversed(range(of_head)):
            first, last = tile * rows, min((tile + 1) * rows, shape.queries) - 1
            visited = min(last // keys + 1, every)
            full = sum((one + 1) * keys - 1 <= first for one in range(visited))
            yield from ((visited, visited - full) for _ in range(min(together, heads - first_head)))


def plan_of(shape: AttentionShape, chip: Chip) -> dict[str, Any] | None:
    """The launch plan, or None where another family serves the shape."""
    if shape.mask not in ("", "causal"):
        return None
    found: dict[str, Any] = plans.attention_plan(
        shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim,
        element_size=2, multiprocessors=chip.multiprocessors, plain=True, shared_limit=chip.shared_memory - 1024,
    )  # fmt: skip
    return None if "decode" in found else found.get("forward sm90")


def edge_clocks(kernel: Kernel, chip: Chip) -> float:
    """Of a tile of queries, besides all iterations but the first."""
    waits = 0 if kernel.dim <= TWO_QUERY_BUFFERS else MEMORY_LATENCY
    return waits + warpgroups.simulate(kernel.outside, kernel.consumers, chip).clocks


def predict(
    kernel: Kernel, shape: AttentionShape, chip: Chip, plan: dict[str, Any], simulated: float, edge: float
) -> float:
    """Seconds."""
    clocks, _ = iteration_clocks(kernel, simulated)
    masked_more = (kernel.whole - len(kernel.path)) * kernel.consumers
    blocks = [0.0] * plan["blocks"]
    for number, (iterations, masked) in enumerate(tiles_of(shape, plan["block_m"], kernel.keys)):
        blocks[number % len(blocks)] += (iterations - 1) * clocks + masked * masked_more + edge
    memory = cost(shape, FORWARD).bytes / chip.bandwidth
    return max(max(blocks) / chip.clock, memory) + chip.launch


def kernel_rows(kernels: list[Kernel], chip: Chip) -> list[dict[str, Any]]:
    """One row for each kernel: an iteration, and how it depends on what is assumed."""
    rows = []
    for one in kernels:
        found = steady(one, chip)
        rates = warpgroups.Rates.of(one.path, one.consumers, one.copied_bytes)
        clocks, limit = iteration_clocks(one, found.clocks)
        rows.append({
            "dim": one.dim, "consumers": one.consumers, "padded": one.padded, "keys": one.keys, "loop": one.whole,
            "executed": len(one.path), "least": one.least, "simulated": round(found.clocks),
            "otherwise": {name: round(steady(one, chip, **assumed).clocks) for name, assumed in OTHERWISE.items()},
            "shared": round(rates.shared), "l2": round(rates.l2),
            "special": round(found.busy["special"], 2), "issue": round(found.busy["issue"], 2),
            "edge": round(edge_clocks(one, chip)), "limit": limit, "share": round(one.least / clocks, 3),
        })  # fmt: skip
    return rows


def prediction_rows(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """One row for each chip and shape that these kernels serve."""
    rows = []
    clocks: dict[int, tuple[float, float]] = {}  # of an iteration and of the rest; the chips have the same rates
    for chip in CHIPS:
        if chip.arch != "90a":
            continue
        for shape in (*ATTENTION_SHAPES.values(), *LONG.values()):
            plan = plan_of(shape, chip)
            if plan is None:
                continue
            consumers = plan["block_m"] // GROUP_ROWS
            keys = plan["block_n"] if shape.mask == "" else min(plan["block_n"], 128)  # plan.h: 160 without a window
            wanted = plan["tile"][0], consumers, keys, False
            kernel = next(one for one in kernels if (one.dim, one.consumers, one.keys, one.padded) == wanted)
            place = kernels.index(kernel)
            if place not in clocks:
                clocks[place] = steady(kernel, chip).clocks, edge_clocks(kernel, chip)
            seconds = predict(kernel, shape, chip, plan, *clocks[place])
            flops = cost(shape, FORWARD).flops
            rows.append({
                "chip": chip.name, "shape": shape.name, "dim": kernel.dim, "consumers": consumers,
                "microseconds": float(f"{seconds * 1e6:.3g}"), "tflops": round(flops / seconds / 1e12),
                "share": round(flops / seconds / chip.flops, 3),
            })  # fmt: skip
    return rows


def rows(kernels: list[Kernel]) -> dict[str, Any]:
    """What predictions.json has of them."""
    chip = next(chip for chip in CHIPS if chip.name == "H100")
    return {"hopper_kernels": kernel_rows(kernels, chip), "hopper_predictions": prediction_rows(kernels)}


HEADER = """
## Attention on Hopper, forward (`csrc/attention/sm90/`): predicted

Products of warpgroups (`wgmma`), simulated from the machine code instruction by instruction, in
[warpgroups.py](warpgroups.py): one quarter of a multiprocessor with a warp of each consumer. A product of m64nNk16
takes N / 2 clocks (4096 FLOP per clock and multiprocessor), or as long as its operands take from shared memory at 128
bytes per clock.

**How far off it is.** There is no measurement of this code. The figures are for the boost clock of 1.83 GHz; an H100
that multiplies all the time stays below it, at its power limit. The kernels of FlashAttention-3, compiled from their
sources, are below in the same simulation, and the model is above their published speed by
{errors}.
"Expected" is the prediction divided by that, which would be right if the same things held both back; wider heads than
128 take the factor of 128. cuDNN 9.19 reaches {cudnn:g} TFLOP/s on an H200 with head dim 128.

| FlashAttention-3, head dim | queries x keys | executed | least | simulated | 1.5 x latency | model | published |
|---|---|---|---|---|---|---|---|
{references}

Nothing is published about latencies, the order in which warps issue, and how many products of a warpgroup queue before
the next one blocks its warp. The columns after "simulated" have longer latencies, warps that block while another
product waits, and warps that issue as long as they can. L2 is assumed to give {l2:g} bytes per clock and multiprocessor
(5120 for the chip would be 39); with 24, a share above 75% would be out of reach from head dim 128 on.

| head dim | consumers | keys | padding mask | executed | least | simulated | {otherwise} | shared memory | L2 | \
exponentials | issue | edge | limit | share of peak |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""

NOTES = """
Clocks of one iteration of all consumers: at the peak of the tensor cores (least), simulated, and what shared memory and
L2 need. "exponentials", "issue": share of the clocks. "edge": clocks of a tile of queries besides its iterations but
one, and what makes short sequences slow.

- From head dim 128 on, products fill the time; each byte of K and V is read from L2 for 128 queries, which is the next
  limit. Two blocks that share their copies (clusters with multicast) would halve it.
- With head dim 64 exponentials are as long as products, and two consumers leave both idle a third of the time. Three
  consumers share a tile of keys, so L2 is read for 192 queries; the launch plan takes them where that saves a round of
  blocks.
- Head dims that are no multiple of 64 are padded: 72 ... 128 take the products of 128. For 96 these are a third more
  than it needs, so that it reaches at most 75% of the peak.
- Head dim 128 has tiles of 160 keys where there is no window: less of the time is latency.
- Not written: a loop of its own for tiles that need no mask, which is what FlashAttention-3 has.
"""


def lines(data: dict[str, Any]) -> list[str]:
    """The section of predictions.md."""
    references = [
        f"| {one.dim} | {one.queries} x {one.keys} | {one.executed} | {one.least:g} | {one.simulated} | {one.slow}"
        f" | {one.least / one.simulated:.0%} | {one.published:.0%} |"
        for one in FLASH_ATTENTION
    ]
    out = HEADER.format(
        errors=" and ".join(f"{1 / one.ratio - 1:.0%} (head dim {one.dim})" for one in FLASH_ATTENTION),
        cudnn=next(one.tflops for one in PUBLISHED if one.code.startswith("cuDNN")),
        references="\n".join(references), l2=warpgroups.L2_BYTES, otherwise=" | ".join(OTHERWISE),
    ).splitlines()  # fmt: skip
    for row in data["hopper_kernels"]:
        cells = [row["dim"], row["consumers"], row["keys"], "yes" if row["padded"] else "no", row["executed"]]
        cells += [f"{row['least']:g}", row["simulated"], *row["otherwise"].values(), row["shared"], row["l2"]]
        cells += [f"{row['special']:.0%}", f"{row['issue']:.0%}", row["edge"], row["limit"], f"{row['share']:.0%}"]
        out.append(f"| {' | '.join(map(str, cells))} |")
    out += NOTES.splitlines()
    out += [
        "",
        "| GPU | shape | consumers | us | TFLOP/s | share of peak | expected, TFLOP/s | published, TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data["hopper_predictions"]:
        out.append(
            f"| {row['chip']} | {row['shape']} | {row['consumers']} | {row['microseconds']:g} | {row['tflops']}"
            f" | {row['share']:.0%} | {factor_of(row['dim']) * row['tflops']:.0f} | {published_text(PUBLISHED, row)} |"
        )
    return out


def factor_of(dim: int) -> float:
    """Of a published speed to that in the model."""
    return max((one for one in FLASH_ATTENTION if one.dim <= dim), default=FLASH_ATTENTION[0]).ratio


def published_text(published: Iterable[Published], row: dict[str, Any]) -> str:
    """The published speeds on the chip and shape of a row."""
    found = [one for one in published if (one.chip, one.shape) == (row["chip"], row["shape"])]
    return ", ".join(f"{one.tflops:g} ({one.code})" for one in found) or "-"


if __name__ == "__main__":
    main()
