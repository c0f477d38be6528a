"""Predicted times, from what main loops execute and from the rates of a chip.

A quarter of a multiprocessor issues one instruction per clock and has its own pipes; shared memory is common to the
four. With w warps on each quarter, one iteration of all of them takes, in clocks,

    T = max(L, (sum over pipes p of (w c_p)^q)^(1/q))        c_p: clocks of pipe p for one warp's iteration
    L = waits + sum over pipes of c_p                        one warp alone, whose phases follow each other
    waits = 150 for each barrier of the block, and 700 for a copy that nothing in the block overlaps with

q says how well warps overlap the phases of others: infinity if perfectly, 1 if not at all. It is calibrated with
published times of FlashAttention-2 (calibration.py). The limiting pipe is the one with the largest c_p.

The time of a kernel is that of its waves of blocks, or that of its minimal memory traffic if that is larger, plus the
launch. Where warps of a block differ, c_p is their average, and L that of the longest one. Keys that are split over
blocks add the time in which a second kernel reads their parts. Not modelled: bank conflicts (tiles have none by
construction), the instruction cache, L2, clock throttling, unequal speed of blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.model.chips import Chip
from benchmarks.model.iteration import Iteration
from benchmarks.model.loops import PRODUCTS, Name, attention_iteration
from benchmarks.model.sass import Listing
from benchmarks.shapes import AttentionShape
from fastgen.backend import plans

LATENCY = 150.0  # clocks of a barrier, a wait and the first fragments after it: an assumption
MEMORY_LATENCY = 700.0  # clocks of a trip to memory: an assumption
BLOCK_CLOCKS = 2 * MEMORY_LATENCY  # of a block before and after its loop
OVERLAP = 2.0  # q, see calibration.py


class Kernel(NamedTuple):
    """A compiled kernel."""

    name: Name
    arch: str
    registers: int
    static_shared: int
    iteration: Iteration
    listing: Listing | None = None  # where the iteration depends on the problem: one tile


def iteration_for(kernel: Kernel, plan: dict[str, Any]) -> Iteration:
    """What an iteration executes under a launch plan."""
    if kernel.name.rows and kernel.listing is not None:
        return attention_iteration(kernel.listing, kernel.name, plan)
    return kernel.iteration


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


def alone_clocks(cycles: dict[str, float], waits: float = LATENCY) -> float:
    """Clocks of one iteration of a warp alone."""
    return waits + sum(one for pipe, one in cycles.items() if pipe != "issue")


def clocks(cycles: dict[str, float], warps: float, overlap: float | None = None, alone: float | None = None) -> float:
    """Clocks in which ``warps`` warps on a quarter each complete one iteration. ``alone``: of one of them, at least."""
    q = OVERLAP if overlap is None else overlap
    shared = sum((warps * one) ** q for one in cycles.values()) ** (1 / q)
    return float(max(shared, alone_clocks(cycles) if alone is None else alone))


def waits_of(name: Name, iteration: Iteration, plan: dict[str, Any]) -> float:
    """Clocks in which a warp waits in one iteration."""
    if name.is_decode:  # for a copy that was started one iteration earlier, at least
        return MEMORY_LATENCY
    if name.is_wide and PRODUCTS[name.bare].plan not in ("forward", "query", "key_value"):
        # Of tangents and second order; with one stage, another barrier after the copy.
        return LATENCY * iteration.barriers + (0 if plan["stages"] == 2 else LATENCY + MEMORY_LATENCY)
    if name.is_wide or name.is_one_head or name.rows:  # their copies overlap with products, or come before everything
        return LATENCY * iteration.barriers
    # Two stages, or one: chosen by the launch plan, which the shortest path does not show, or at compile time.
    stages = plan.get("stages", 2 if iteration.barriers < 2 else 1)
    return LATENCY if stages == 2 else 2 * LATENCY + MEMORY_LATENCY


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
    """Iterations of each block for a shape, where its warps share the iterated tiles."""
    own, other = (shape.keys, shape.queries) if owns_keys else (shape.queries, shape.keys)
    owned, iterated = (plan["block_n"], plan["block_m"]) if owns_keys else (plan["block_m"], plan["block_n"])
    splits = plan.get("splits", 1)
    tiles, blocks = -(-other // iterated), plan["blocks"] * plan["slices"] * splits
    if splits > 1:  # of the keys, which this does not combine with a causal mask
        tiles = -(-tiles // splits)
        return Work(blocks, tiles, tiles, 1.0 if shape.mask else 0.0)
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


def decode_work(shape: AttentionShape, plan: dict[str, Any]) -> Work:
    """Iterations of each warp of the decode kernel, whose slices are parts of the keys."""
    tiles = -(-shape.keys // plan["block_n"])
    warps = plan["slices"] * plan["warps"]
    return Work(plan["blocks"] * plan["slices"], tiles / warps, -(-tiles // warps), 1.0 if shape.mask else 0.0)


def one_tile_work(shape: AttentionShape, plan: dict[str, Any]) -> Work:
    """A block has one head. A partial group of 32 keys is masked."""
    partial = 32 / plan["block_n"] if shape.keys % 32 else 0.0
    return Work(plan["blocks"], 1, 1, 1.0 if shape.mask else partial)


def one_head_work(shape: AttentionShape, plan: dict[str, Any]) -> Work:
    """A block has one head. Under a causal mask each warp has one tile at the diagonal; those that it skips count."""
    tiles = -(-shape.queries // plan["block_m"])
    return Work(plan["blocks"], tiles, tiles, 1 / tiles if shape.mask or shape.queries % plan["block_m"] else 0.0)


def combine_seconds(shape: AttentionShape, name: Name, plan: dict[str, Any], chip: Chip) -> float:
    """Of writing the parts of split keys and of the kernel that adds them, as if they went through memory."""
    splits = plan["slices"] if name.is_decode else plan.get("splits", 1)
    if splits == 1:
        return 0.0
    rows = shape.batch * shape.heads * shape.queries
    parts = splits * rows * (shape.value_dim + 2) * 4 / chip.bandwidth
    return parts + max(parts, BLOCK_CLOCKS / chip.clock) + chip.launch


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


class Launch(NamedTuple):
    """A kernel under a launch plan: what :func:`time_of` needs.

    Attributes:
        warps: of a block.
        resident: blocks on a multiprocessor.
        cycles: clocks of each pipe for one warp's iteration, see :func:`pipe_clocks`.
        alone: clocks of an iteration, at least.
        outside: instructions of a warp outside the loop.
    """

    work: Work
    warps: int
    resident: int
    cycles: dict[str, float]
    alone: float
    outside: float


def launch_of(kernel: Kernel, shape: AttentionShape, chip: Chip) -> Launch:
    """A kernel and its launch plan for a shape."""
    name, plan = kernel.name, plan_of(kernel, shape, chip)
    if name.is_decode:
        work = decode_work(shape, plan)
    elif name.rows:
        work = one_tile_work(shape, plan)
    elif name.is_one_head:
        work = one_head_work(shape, plan)
    else:
        work = work_of(shape, plan, name.owns_keys)
    resident = resident_blocks(chip, kernel.registers, plan["shared_bytes"] + kernel.static_shared, plan["warps"])
    iteration = iteration_for(kernel, plan)
    masked = _with_masks(iteration, work.masked)
    alone = alone_clocks(pipe_clocks(masked.longest or masked, chip), waits_of(name, iteration, plan))
    return Launch(work, plan["warps"], resident, pipe_clocks(masked, chip), alone, iteration.outside)


def plan_of(kernel: Kernel, shape: AttentionShape, chip: Chip) -> dict[str, Any]:
    return plans_of(shape, chip, kernel.name.plain)[PRODUCTS[kernel.name.bare].plan]


def predict(
    kernel: Kernel, shape: AttentionShape, chip: Chip, bytes_moved: float, overlap: float | None = None
) -> Prediction:
    """The time of one kernel, and of adding its parts."""
    found = time_of(launch_of(kernel, shape, chip), chip, bytes_moved, overlap)
    more = combine_seconds(shape, kernel.name, plan_of(kernel, shape, chip), chip)
    return found._replace(seconds=found.seconds + more)


def time_of(launch: Launch, chip: Chip, bytes_moved: float, overlap: float | None = None) -> Prediction:
    """The time of one launch."""
    work, resident, cycles = launch.work, launch.resident, launch.cycles
    if resident == 0:
        return Prediction(float("inf"), "no room", 0, 0, 0)

    def round_of(blocks: float) -> float:
        return clocks(cycles, blocks * launch.warps / 4, overlap, launch.alone)

    slots = resident * chip.multiprocessors
    full, rest = divmod(work.blocks, slots)
    start = BLOCK_CLOCKS / resident + launch.outside * launch.warps / 4
    loop = full * (work.average * round_of(resident) + start * resident)
    if rest:
        left = -(-rest // chip.multiprocessors)
        iterations = work.average if full else work.most
        loop += iterations * round_of(left) + BLOCK_CLOCKS + launch.outside * launch.warps / 4
    computing = loop / chip.clock
    memory = bytes_moved / chip.bandwidth
    limit = max(cycles, key=lambda pipe: cycles[pipe])
    warps = min(resident, max(1, -(-work.blocks // chip.multiprocessors))) * launch.warps / 4
    if launch.alone >= round_of(min(resident, -(-work.blocks // chip.multiprocessors))):
        limit = "latency"
    share = warps * max(cycles.values()) / clocks(cycles, warps, overlap, launch.alone)
    if memory > computing:
        limit = "memory"
    return Prediction(max(computing, memory) + chip.launch, limit, resident, work.blocks / slots, share)


def _with_masks(iteration: Iteration, masked: float) -> Iteration:
    """The average over tiles, of which a fraction is masked: the additional instructions go to the integer pipe."""
    if masked == 0:
        return iteration

    def with_more(one: Iteration) -> Iteration:
        more = masked * (one.masked - one.instructions)
        pipes = {**one.pipes, "alu": one.pipes.get("alu", 0.0) + 0.7 * more}
        return replace(one, instructions=one.instructions + more, pipes=pipes)

    longest = None if iteration.longest is None else with_more(iteration.longest)
    return replace(with_more(iteration), longest=longest)
