"""What each attention shape costs at least, and which limit of the GPU it meets first. Computed, not measured.

usage: python -m benchmarks.roofline > benchmarks/roofline.md

Limits of the chips are the vendors' (data sheets; the CUDA programming guide's table of instruction throughput for
exponentials: 16 per clock and multiprocessor). What the kernels execute comes from their own plan.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from fastgen import _library


class Chip(NamedTuple):
    """Dense bfloat16 FLOP/s, bytes/s of memory, multiprocessors, boost clock in Hz."""

    name: str
    flops: float
    bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def exponentials(self) -> float:
        return 16 * self.multiprocessors * self.clock


CHIPS = [Chip("H200", 989e12, 4.8e12, 132, 1.98e9), Chip("A100 80GB", 312e12, 2.04e12, 108, 1.41e9)]


def chip_of(device_name: str) -> Chip | None:
    """The chip of a name such as "NVIDIA H200"; None where it is not in the table."""
    return next((chip for chip in CHIPS if chip.name.split(" ")[0] in device_name), None)


ELEMENT = 2  # bytes of bfloat16


class Cost(NamedTuple):
    flops: float
    exponentials: float
    bytes: float

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each limit alone would allow."""
        return {
            "matrix products": self.flops / chip.flops,
            "exponentials": self.exponentials / chip.exponentials,
            "memory": self.bytes / chip.bandwidth,
        }


def cost(shape: AttentionShape, backward: bool = False) -> Cost:
    """Each operand read once, each result written once. Backward: five products, the scores' weights once more."""
    pairs = shape.batch * shape.heads * shape.queries * shape.keys * (0.5 if shape.mask == "causal" else 1)
    query = shape.batch * shape.heads * shape.queries * (shape.key_dim + shape.value_dim)
    key = shape.batch * shape.heads * shape.keys * (shape.key_dim + shape.value_dim)
    mask = {"bias": shape.heads * shape.queries * shape.keys * ELEMENT, "padding": shape.batch * shape.keys}
    lse = shape.batch * shape.heads * shape.queries * 4
    read_mask = mask.get(shape.mask, 0)
    if not backward:
        return Cost(2 * pairs * (shape.key_dim + shape.value_dim), pairs, ELEMENT * (query + key) + lse + read_mask)
    flops = 2 * pairs * (3 * shape.key_dim + 2 * shape.value_dim)
    out = shape.batch * shape.heads * shape.queries * shape.value_dim
    moved = ELEMENT * (2 * query + 2 * key + out) + lse + read_mask
    return Cost(flops, pairs, moved)


def computed_share(shape: AttentionShape) -> float:
    """Useful part of the products that the forward kernel executes: the rest is padding to tiles and slices."""
    assert _library.build_module is not None, "the plan is compiled: FASTGEN_BUILD=cpu or cuda"
    plan = _library.build_module.attention_plan(
        shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim,
        element_size=ELEMENT, multiprocessors=CHIPS[0].multiprocessors, plain=shape.mask in ("", "causal"),
    )["forward"]  # fmt: skip

    def padded(length: int, tile: int) -> int:
        return -(-length // tile) * tile

    rows, keys = padded(shape.queries, plan["rows"] // plan["warps"]), padded(shape.keys, plan["step"])
    key_dim, value_dim = plan["tile"]
    useful = shape.queries * shape.keys * (shape.key_dim + shape.value_dim)
    return useful / (rows * keys * (key_dim * plan["slices"] + value_dim))


def row(shape: AttentionShape, chip: Chip, backward: bool) -> str:
    needed = cost(shape, backward)
    bounds = needed.bounds(chip)
    bound = max(bounds, key=lambda name: bounds[name])
    times = " | ".join(f"{seconds * 1e6:.1f}" for seconds in bounds.values())
    return (
        f"| {shape.name} | {needed.flops / 1e9:.4g} | {needed.exponentials / 1e6:.4g} | {needed.bytes / 1e6:.4g} "
        f"| {times} | {bound} |"
    )


def lines() -> list[str]:
    found = [
        "# Attention on a GPU: what each shape costs at least",
        "",
        "**Computed, not measured** (`python -m benchmarks.roofline`). bfloat16. Each operand is read and each",
        "result written once; a causal mask halves products and exponentials. The bound is the largest of the three.",
    ]
    for chip in CHIPS:
        for backward in (False, True):
            found += [
                "",
                f"## {chip.name}, {'backward (five products)' if backward else 'forward (two products)'}",
                "",
                "| shape | GFLOP | Mexp | MB | products, us | exponentials, us | memory, us | bound |",
                "|---|---|---|---|---|---|---|---|",
            ]
            found += [row(shape, chip, backward) for shape in ATTENTION_SHAPES.values()]
    found += [
        "",
        "## What the forward kernel executes",
        "",
        "The useful share of its matrix products: head dims are padded to the tile, queries to a warp's 16 or 32 and",
        "keys to a step, and a head wider than 256 is cut into slices that compute the scores again. Tiles that a",
        "causal mask rules out are not computed. The backward pass computes seven products where five are needed, so",
        "that each sum has one writer and one order.",
        "",
        "| shape | useful share |",
        "|---|---|",
    ]
    return found + [f"| {shape.name} | {computed_share(shape):.2f} |" for shape in ATTENTION_SHAPES.values()]


if __name__ == "__main__":
    print("\n".join(lines()))
