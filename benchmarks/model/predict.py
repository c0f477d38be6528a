"""Predicted times, from what main loops execute and from the rates of a chip.

A quarter of a multiprocessor issues one instruction per clock and has its own pipes; shared memory is common to the
four. With w warps on each quarter, one iteration of all of them takes, in clocks,

    T = max(L, (sum over pipes p of (w c_p)^q)^(1/q))        c_p: clocks of pipe p for one warp's iteration
    L = latency + sum over pipes of c_p                      one warp alone, whose phases follow each other

q says how well warps overlap the phases of others: infinity if perfectly, 1 if not at all. It is calibrated with
published times of FlashAttention-2 (calibration.py). The limiting pipe is the one with the largest c_p.

The time of a kernel is that of its waves of blocks, or that of its minimal memory traffic if that is larger, plus the
launch. Not modelled: bank conflicts (tiles have none by construction), the instruction cache, L2, clock throttling,
unequal speed of blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.model.chips import Chip
from benchmarks.model.loops import PRODUCTS, Iteration, Name
from benchmarks.shapes import AttentionShape
from fastgen.backend import plans

LATENCY = 150.0  # clocks of the barrier, the wait and the first fragments of an iteration: an assumption
BLOCK_CLOCKS = 1400.0  # of a block before and after its loop: two trips to memory, an assumption
OVERLAP = 2.0  # q, see calibration.py


class Kernel(NamedTuple):
    """A compiled kernel."""

    name: Name
    arch: str
    registers: int
    static_shared: int
    iteration: Iteration


def pipe_clocks(iteration: Iteration, chip: Chip) -> dict[str, float]:
    """Clocks of a quarter of a multiprocessor for one warp's iteration, by pipe."""
    pipes = iteration.pipes

    def count(pipe: str) -> float:
        return pipes.get(pipe, 0.0)

    return {
        "tensor": count("tensor") * chip.mma_cycles,
        "special": count("special") * chip.special_cycles,
        "float": max(count("fma") * chip.fma_cycles + count("imad"), count("imad") * chip.imad_cycles),
        "integer": count("alu") * chip.alu_cycles,
        # A quarter has a quarter of the bandwidth.
        "shared memory": iteration.shared_bytes / (chip.shared_bytes / 4),
        "issue": iteration.instructions,
    }


def clocks(cycles: dict[str, float], warps: float, overlap: float | None = None) -> float:
    """Clocks in which ``warps`` warps on a quarter each complete one iteration."""
    q = OVERLAP if overlap is None else overlap
    shared = sum((warps * one) ** q for one in cycles.values()) ** (1 / q)
    return max(shared, LATENCY + sum(one for pipe, one in cycles.items() if pipe != "issue"))


def resident_blocks(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Blocks of ``warps`` warps on a multiprocessor. Registers are allocated in units of 256 per warp."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = (65536 // 4 // of_warp) * 4 // warps
    by_shared = chip.shared_memory // (shared + 1024)
    return min(by_registers, by_shared, chip.warps // warps, chip.blocks)


class Work(NamedTuple):
    """Iterations of a kernel's blocks."""

    blocks: int
    average: float  # iterations of a block
    most: int
    masked: float  # fraction of the iterations whose tile is masked


def work_of(shape: AttentionShape, plan: dict[str, Any], owns_keys: bool) -> Work:
    """Iterations of each block for a shape."""
    own, other = (shape.keys, shape.queries) if owns_keys else (shape.queries, shape.keys)
    owned, iterated = (plan["block_n"], plan["block_m"]) if owns_keys else (plan["block_m"], plan["block_n"])
    tiles, blocks = -(-other // iterated), plan["blocks"] * plan["slices"]
    if shape.mask != "causal":
        partial = other % iterated != 0
        masked = 1.0 if shape.mask else (1 / tiles if partial else 0.0)
        return Work(blocks, tiles * plan["tiles_per_block"], tiles * plan["tiles_per_block"], masked)
    counts, full = [], 0
    for first in range(0, own, owned):
        last = min(first + owned, own) - 1
        if owns_keys:
            visited = range(first // iterated, tiles)
            full += sum(tile * iterated >= last for tile in visited)
        else:
            visited = range(0, min(last // iterated + 1, tiles))
            full += sum((tile + 1) * iterated - 1 <= first for tile in visited)
        counts.append(len(visited))
    per_tile = plan["tiles_per_block"]
    average = sum(counts) / len(counts)
    return Work(blocks, average * per_tile, max(counts) * per_tile, 1 - full / max(sum(counts), 1))


class Prediction(NamedTuple):
    """Of one kernel for one shape on one chip. Times in seconds."""

    seconds: float
    limit: str  # the limiting pipe, "memory" or "latency"
    resident: int
    waves: float
    share: float  # of the limiting pipe's time in that of the loop


def plans_of(shape: AttentionShape, chip: Chip, plain: bool) -> dict[str, dict[str, Any]]:
    """The launch plans of a shape on a chip."""
    return plans.attention_plan(
        shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim,
        element_size=2, multiprocessors=chip.multiprocessors, plain=plain, shared_limit=chip.shared_memory - 1024,
    )  # fmt: skip


def takes_another_kernel(bare: str, shape: AttentionShape, chip: Chip) -> bool:
    """Whether the launcher takes a kernel that this model does not read: decode, one tile, or wide heads."""
    found, plan = plans_of(shape, chip, shape.mask in ("", "causal")), PRODUCTS[bare].plan
    if (plan == "forward" and "decode" in found) or (plan in ("query", "key_value") and "one tile" in found):
        return True
    return max(shape.key_dim, shape.value_dim) > 256 and plan in found and found[plan]["warps"] == 8


def predict(
    kernel: Kernel, shape: AttentionShape, chip: Chip, bytes_moved: float, overlap: float | None = None
) -> Prediction:
    """The time of one kernel."""
    products = PRODUCTS[kernel.name.bare]
    plan = plans_of(shape, chip, kernel.name.plain)[products.plan]
    work = work_of(shape, plan, products.plan.endswith("key_value"))
    resident = resident_blocks(chip, kernel.registers, plan["shared_bytes"] + kernel.static_shared, plan["warps"])
    if resident == 0:
        return Prediction(float("inf"), "no room", 0, 0, 0)
    cycles = pipe_clocks(_with_masks(kernel.iteration, work.masked), chip)

    def round_of(blocks: float) -> float:
        return clocks(cycles, blocks * plan["warps"] / 4, overlap)

    slots = resident * chip.multiprocessors
    full, rest = divmod(work.blocks, slots)
    start = BLOCK_CLOCKS / resident + kernel.iteration.outside * plan["warps"] / 4
    loop = full * (work.average * round_of(resident) + start * resident)
    if rest:
        left = -(-rest // chip.multiprocessors)
        iterations = work.average if full else work.most
        loop += iterations * round_of(left) + BLOCK_CLOCKS + kernel.iteration.outside * plan["warps"] / 4
    computing = loop / chip.clock
    memory = bytes_moved / chip.bandwidth
    limit = max(cycles, key=lambda pipe: cycles[pipe])
    warps = min(resident, max(1, -(-work.blocks // chip.multiprocessors))) * plan["warps"] / 4
    alone = LATENCY + sum(one for pipe, one in cycles.items() if pipe != "issue")
    if alone >= round_of(min(resident, -(-work.blocks // chip.multiprocessors))):
        limit = "latency"
    share = warps * max(cycles.values()) / clocks(cycles, warps, overlap)
    if memory > computing:
        limit = "memory"
    return Prediction(max(computing, memory) + chip.launch, limit, resident, work.blocks / slots, share)


def _with_masks(iteration: Iteration, masked: float) -> Iteration:
    """The average over tiles, of which a fraction is masked: the additional instructions go to the integer pipe."""
    if masked == 0:
        return iteration
    more = masked * (iteration.masked - iteration.instructions)
    pipes = {**iteration.pipes, "alu": iteration.pipes.get("alu", 0.0) + 0.7 * more}
    return Iteration(**{**iteration.__dict__, "instructions": iteration.instructions + more, "pipes": pipes})
