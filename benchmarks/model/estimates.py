"""Kernels that are not written, in the model: would they be worth it?

Their iterations are those of the compiled kernels with what a design adds or removes, counted by hand. Estimates: these
kernels do not exist. bfloat16, head dims of queries and values equal, no spills assumed at 255 registers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.model.chips import CHIPS, Chip
from benchmarks.model.iteration import Iteration
from benchmarks.model.predict import (
    LATENCY,
    Kernel,
    Launch,
    alone_clocks,
    launch_of,
    pipe_clocks,
    plan_of,
    resident_blocks,
    time_of,
    work_of,
)
from benchmarks.model.tables import kernel_for, predict_pass
from benchmarks.roofline import BACKWARD, cost
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape

L2_BYTES = 32.0  # per clock and multiprocessor, read and written: an assumption
REGISTERS = 255
ADDRESSES = 40  # instructions of an iteration for addresses and predicates of what a design adds

DESIGNS = {
    "dK and dV with 8 warps": "a block owns 128 keys instead of 64: half as many copies of Q and dO",
    "one kernel, ordered dQ": (
        "5 products: the kernel of dK and dV also multiplies dS K, through shared memory, and adds it to dQ in float32,"
        " each tile of dQ in a fixed order of the blocks. They start at different queries, so that they wait little;"
        " waiting is not modelled. dQ is cleared before and rounded after it"
    ),
}

REJECTED = """\
## Occupancy: counted, and not built

- **Launch bounds.** Blocks of 128 threads have at most 255 registers per thread, so registers leave room for two in
  every kernel. Where a table above shows one block, shared memory is the limit, and a second argument of
  `__launch_bounds__` changes nothing. Tangents and second order therefore choose their stages as the other passes do.
- **`long` forward with 100 KiB per multiprocessor**: one block of 4 warps with two fragments each, 69,632 bytes. With 8
  warps of one fragment (iteration of the masked kernel) 1000 scores take 720 instead of 997 clocks on an L40S, 1126
  instead of 1497 on an RTX 4090: another kernel per type, and tile tables with a column for the architecture. Two
  blocks of 3 warps and one stage, without another kernel: 803 clocks on an L40S; but six warps are two on some quarters
  of a multiprocessor and one on others, which leaves 1.06x of an RTX 4090.
- **dK and dV of second order, head dim 64, with 100 KiB**: a block with one stage has 50,688 bytes, and two blocks may
  have 50,176 each. Head dim 96 (`dit-xl`): tangents 53,248 with one stage.
- **Float32 forward, head dim 128, two fragments per warp**: 186 instead of 194 instructions per score and 252 instead
  of 162 registers, but 84,480 bytes with one stage: one block instead of two on sm_80. Up to head dim 96 they are taken
  (head dim 64: 95 instead of 103 instructions per score, 205 registers, no spills).
- **One float32 forward kernel for calls with and without a mask**: at head dim 64 the masked kernel has 130
  instructions per score, that without masks 95.
"""


class Estimate(NamedTuple):
    design: str
    chip: str
    shape: str
    now: float  # microseconds of the backward pass, predicted
    then: float  # the same with the design, estimated


def _more(iteration: Iteration, tensor: float, shared: float, shared_bytes: float, rest: float) -> Iteration:
    """The iteration with additional matrix instructions, accesses of shared memory, their bytes, and other
    instructions."""
    pipes = dict(iteration.pipes)
    for pipe, count in (("tensor", tensor), ("shared", shared), ("alu", rest)):
        pipes[pipe] = pipes.get(pipe, 0.0) + count
    instructions = iteration.instructions + tensor + shared + rest
    return replace(
        iteration, instructions=instructions, pipes=pipes, shared_bytes=iteration.shared_bytes + shared_bytes
    )


def eight_warps(kernel: Kernel, shape: AttentionShape, chip: Chip) -> Launch:
    """The kernel of dK and dV with twice as many warps and keys per block."""
    plan = plan_of(kernel, shape, chip)
    owned, iterated = 2 * plan["block_n"], plan["block_m"]
    row = 2 * (2 * kernel.name.dims[0] + 16)  # of Q and dO, or of K and V, with padding
    shared = (owned + plan.get("stages", 2) * iterated) * row
    blocks = shape.batch * shape.heads * -(-shape.keys // owned) * plan["slices"]
    work = work_of(shape, {**plan, "block_n": owned, "blocks": blocks // plan["slices"]}, True)
    half = kernel.iteration.copied_bytes / 2
    iteration = _more(kernel.iteration, 0, 0, -half, -half / 512)
    before = launch_of(kernel, shape, chip)
    resident = resident_blocks(chip, kernel.registers, shared, 8)
    return before._replace(work=work, warps=8, resident=resident, cycles=pipe_clocks(iteration, chip))


def ordered(kernel: Kernel, shape: AttentionShape, chip: Chip) -> Launch:
    """The kernel of dK and dV with dQ too. Its tile is block_m queries; four warps own 64 keys."""
    plan, width = plan_of(kernel, shape, chip), kernel.name.dims[0]
    queries = plan["block_m"]
    scores, columns = 16 * queries, width * queries // 64  # of a warp; it has 16 rows and these columns of dQ
    loads = 4 + columns // 4  # ldmatrix.x4 of dS and of K, 64 keys deep
    stores = scores // 64  # of dS, 4 bytes
    adds = queries * width / 128 / (1 if chip.arch == "80" else 4)  # of a thread; vectors from sm_90 on
    more = _more(
        kernel.iteration, kernel.iteration.pipes["tensor"] / 4, loads + stores, 512 * loads + 2 * scores,
        adds + ADDRESSES,
    )  # fmt: skip
    cycles = {**pipe_clocks(more, chip), "L2": queries * width / 4 * 8 / (L2_BYTES / 4)}
    shared = plan["shared_bytes"] + queries * (2 * 64 + 16)
    before = launch_of(kernel, shape, chip)
    resident = resident_blocks(chip, REGISTERS, shared, 4)
    return before._replace(resident=resident, cycles=cycles, alone=alone_clocks(cycles, 3 * LATENCY))


def rows(found: dict[str, list[Kernel]]) -> list[dict[str, Any]]:
    """The backward pass now and with each design, for shapes without a mask or with a causal one."""
    estimates = []
    for chip in (one for one in CHIPS if one.name in ("A100 80GB", "H100")):
        kernels = found.get(chip.arch, [])
        for shape in ATTENTION_SHAPES.values():
            kernel = kernel_for(kernels, "attention_backward_key_value", shape, chip)
            if not _is_estimated(kernel, shape):
                continue
            now = predict_pass(kernels, "backward", shape, chip)
            if kernel is None or now is None or len(now) != 2:
                continue
            needed, total = cost(shape, BACKWARD).bytes, sum(one.seconds for one in now)
            elements = shape.batch * shape.heads * shape.queries * shape.key_dim
            # Clearing dQ and rounding it: written, added to, read, and written in two bytes.
            around = elements * (4 + 4 + 2) / chip.bandwidth + 2 * chip.launch
            seconds = {
                "dK and dV with 8 warps": now[0].seconds
                + time_of(eight_warps(kernel, shape, chip), chip, needed / 2).seconds,
                "one kernel, ordered dQ": time_of(ordered(kernel, shape, chip), chip, needed).seconds + around,
            }
            estimates += [
                Estimate(design, chip.name, shape.name, _short(total * 1e6), _short(then * 1e6))._asdict()
                for design, then in seconds.items()
            ]
    return estimates


def _is_estimated(kernel: Kernel | None, shape: AttentionShape) -> bool:
    """Shapes whose head dims a design could have, and that take two kernels with all their warps."""
    if kernel is None or shape.mask not in ("", "causal") or min(shape.queries, shape.keys) < 128:
        return False
    return kernel.name.dims in ((64, 64), (128, 128))


def _short(value: float) -> float:
    return round(value) if value >= 100 else float(f"{value:.3g}")
