"""FlashAttention-2 in the model: how far its published speed is from the predicted one.

usage: python -m benchmarks.model.calibration LISTING forward|backward HEAD_DIM
prints the counts of a kernel's main loop, from the listing of ``nvdisasm -c``. The counts below are of flash-attn 2.8.3
(PyPI's source distribution), bfloat16, without mask and dropout, compiled by nvcc 13.0.88 for the chip, one kernel at a
time: ``flash_fwd_kernel`` and ``flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel`` with the tiles that its launchers take.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.model import sass
from benchmarks.model.chips import CHIPS
from benchmarks.model.iteration import Iteration, Role, iteration_of
from benchmarks.model.predict import clocks, pipe_clocks, resident_blocks

SOURCES = """\
Published: Dao, "FlashAttention-2", 2023, section 4.1 (A100: forward up to 73% of 312 TFLOP/s, backward up to 63%); Shah
et al., "FlashAttention-3", 2024, figures of attention on an H100 SXM5 (FlashAttention-2, 16k tokens, no causal mask).
Their kernels were compiled by earlier versions of nvcc; the backward kernel here is that of sm_80 on both. The model
knows no throttling: an H100 under load may run below the clock that it assumes."""


class Reference(NamedTuple):
    """A published speed, and the kernel that reached it."""

    chip: str
    name: str  # of the pass
    head_dim: int
    published: float  # TFLOP/s, of 2 products forward and 5 backward
    instructions: int
    pipes: dict[str, float]
    shared_bytes: int


def geometry(name: str, head_dim: int) -> tuple[int, int, int, int]:
    """Rows, columns and warps of a block, and its shared memory in bytes."""
    if name == "forward":
        rows, columns, warps = {64: (128, 128, 4), 128: (128, 64, 4), 256: (64, 64, 4)}[head_dim]
        return rows, columns, warps, (rows + 2 * columns) * head_dim * 2
    rows, columns, warps = {64: (128, 128, 8), 128: (64, 128, 8)}[head_dim]
    return rows, columns, warps, 144 << 10


def read(listing: str, name: str, head_dim: int) -> Iteration:
    """The main loop of a kernel of FlashAttention-2."""
    rows, columns, warps, _ = geometry(name, head_dim)
    products, copied = (2, 2 * columns) if name == "forward" else (5, rows)
    matrix = products * 2 * rows * columns * head_dim // 4096 // warps
    code = max(sass.parse(listing).values(), key=lambda one: len(one.instructions))
    copies = copied * head_dim * 2 * (1 if name == "forward" else 2) / 16 / (32 * warps)
    return iteration_of(code, [Role(matrix, copies, 1)], rows * columns / (32 * warps))


_BACKWARD = {
    "global": 54, "issue": 28, "alu": 133, "shared": 176, "tensor": 320, "fma": 100, "special": 32, "imad": 48,
}  # fmt: skip

REFERENCES: tuple[Reference, ...] = (
    Reference(
        "A100 80GB", "forward", 128, 228, 941,
        {"global": 28, "alu": 210, "issue": 15, "imad": 8, "shared": 88, "tensor": 256, "fma": 268, "special": 68},
        50176,
    ),
    Reference(
        "H100", "forward", 128, 370, 939,
        {"global": 28, "alu": 208, "issue": 15, "imad": 8, "shared": 88, "tensor": 256, "fma": 268, "special": 68},
        50176,
    ),
    Reference("A100 80GB", "backward", 128, 197, 891, _BACKWARD, 82944),
    # Machine code for sm_80.
    Reference("H100", "backward", 128, 322, 891, _BACKWARD, 82944),
)  # fmt: skip


def rows(overlap: float | None = None) -> list[dict[str, Any]]:
    """Published and predicted speed."""
    found = []
    for one in REFERENCES:
        chip = next(chip for chip in CHIPS if chip.name == one.chip)
        rows, columns, warps, shared = geometry(one.name, one.head_dim)
        iteration = Iteration(one.instructions, one.pipes, one.shared_bytes, 0, 0, 0, 0, 0, 1, 0)
        resident = resident_blocks(chip, 255, shared, warps)
        products = 2 if one.name == "forward" else 5
        flops = products * 2 * rows * columns * one.head_dim * resident * chip.multiprocessors
        seconds = clocks(pipe_clocks(iteration, chip), resident * warps / 4, overlap) / chip.clock
        found.append({
            "chip": one.chip, "pass": one.name, "head_dim": one.head_dim, "published": one.published,
            "model": round(flops / seconds / 1e12, 1),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    one = read(Path(sys.argv[1]).read_text(), sys.argv[2], int(sys.argv[3]))
    print(round(one.instructions), {pipe: round(count) for pipe, count in one.pipes.items()}, round(one.shared_bytes))
