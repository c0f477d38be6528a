"""Roofline model of attention: minimum cost of each shape and the limiting resource. Computed, not measured.

usage: python -m benchmarks.roofline > benchmarks/roofline.md

Peak rates are from data sheets; the rate of exponentials (16 per clock and multiprocessor) is from the instruction
throughput table of the CUDA programming guide. The number of executed operations is from the kernels' launch plan.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.model.chips import Chip, chip_of
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from fastgen.backend import plans

CHIPS = [chip for name in ("H200", "A100") if (chip := chip_of(name)) is not None]
"""The chips of the tables."""

ELEMENT = 2  # bytes of bfloat16


class Cost(NamedTuple):
    flops: float
    exponentials: float
    bytes: float

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Minimum time in seconds by each resource."""
        return {
            "matrix products": self.flops / chip.flops,
            "exponentials": self.exponentials / chip.exponentials,
            "memory": self.bytes / chip.bandwidth,
        }


class Pass(NamedTuple):
    """Operations of a pass: numbers of matrix products of depth key_dim and value_dim for each pair of query and key,
    and numbers of tensors (key_dim and value_dim columns) with one row per query and per key that are read or written.
    """

    name: str
    key_products: int
    value_products: int
    query_tensors: tuple[int, int]
    key_tensors: tuple[int, int]

    def __str__(self) -> str:
        count = self.key_products + self.value_products
        return f"{self.name} ({count} products)"


FORWARD = Pass("forward", 1, 1, (1, 1), (1, 1))  # q, k, v; out
BACKWARD = Pass("backward", 3, 2, (2, 2), (2, 2))  # out and its gradient too; three gradients
TANGENT = Pass("tangent", 3, 2, (2, 2), (2, 2))  # three tangents and out too; the tangent of out
FORWARD_TANGENT = Pass("forward and tangent", 3, 3, (2, 2), (2, 2))  # in one sweep, which shares the scores
SECOND_ORDER = Pass("second order, after the tangent", 7, 3, (3, 3), (3, 3))  # out, out' and the gradient of out; three
PASSES = (FORWARD, BACKWARD, TANGENT, SECOND_ORDER)


def cost(shape: AttentionShape, *passes: Pass) -> Cost:
    """Cost if operands are read once, results are written once, and weights are computed once per pass."""
    heads = shape.batch * shape.heads
    pairs = heads * shape.queries * shape.keys * (0.5 if shape.mask == "causal" else 1)
    masks = {"bias": shape.heads * shape.queries * shape.keys * ELEMENT, "padding": shape.batch * shape.keys}
    rest = masks.get(shape.mask, 0) + heads * shape.queries * 4  # lse
    dims = shape.key_dim, shape.value_dim

    def width(counts: tuple[int, int]) -> int:
        return counts[0] * dims[0] + counts[1] * dims[1]

    flops = sum(2 * pairs * width((one.key_products, one.value_products)) for one in passes)
    rows = sum(shape.queries * width(one.query_tensors) + shape.keys * width(one.key_tensors) for one in passes)
    return Cost(flops, pairs * len(passes), ELEMENT * heads * rows + rest * len(passes))


def computed_share(shape: AttentionShape) -> float:
    """Fraction of useful products that the forward kernel executes; the rest is padding to tiles and slices."""
    plan = plans.attention_plan(
        shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim,
        element_size=ELEMENT, multiprocessors=CHIPS[0].multiprocessors, plain=shape.mask in ("", "causal"),
    )["forward"]  # fmt: skip

    def padded(length: int, tile: int) -> int:
        return -(-length // tile) * tile

    rows, keys = padded(shape.queries, plan["block_m"] // plan["warps"]), padded(shape.keys, plan["block_n"])
    key_dim, value_dim = plan["tile"]
    useful = shape.queries * shape.keys * (shape.key_dim + shape.value_dim)
    return useful / (rows * keys * (key_dim * plan["slices"] + value_dim))


def row(shape: AttentionShape, chip: Chip, one: Pass) -> str:
    needed = cost(shape, one)
    bounds = needed.bounds(chip)
    bound = max(bounds, key=lambda name: bounds[name])
    times = " | ".join(f"{seconds * 1e6:.1f}" for seconds in bounds.values())
    return (
        f"| {shape.name} | {needed.flops / 1e9:.4g} | {needed.exponentials / 1e6:.4g} | {needed.bytes / 1e6:.4g} "
        f"| {times} | {bound} |"
    )


def lines() -> list[str]:
    found = [
        "# Roofline of attention on a GPU: minimum cost of each shape",
        "",
        "**Computed, not measured** (`python -m benchmarks.roofline`). bfloat16. Each operand is read and each",
        "result written once; a causal mask halves products and exponentials. The bound is the largest of the three.",
    ]
    for chip in CHIPS:
        for one in PASSES:
            found += [
                "",
                f"## {chip.name}, {one}",
                "",
                "| shape | GFLOP | Mexp | MB | products, us | exponentials, us | memory, us | bound |",
                "|---|---|---|---|---|---|---|---|",
            ]
            found += [row(shape, chip, one) for shape in ATTENTION_SHAPES.values()]
    found += [
        "",
        "## Work executed by the forward kernel",
        "",
        "Useful fraction of the matrix products, for bfloat16 on an H200: head dims are padded to the tile, queries to",
        "a warp's 16 or 32 rows and keys to a tile. A head dim above 256 is split into slices that recompute the",
        "scores in float32, and on GPUs with 99 KiB of shared memory per block. Tiles that are fully masked by a",
        "causal mask are skipped. If queries and keys both have gradients, two kernels compute the scores, so that",
        "each sum has a single writer and a fixed order: 7 products in the backward pass and 15 in the second-order",
        "pass, of which 5 and 10 are necessary.",
        "",
        "| shape | useful fraction |",
        "|---|---|",
    ]
    return found + [f"| {shape.name} | {computed_share(shape):.2f} |" for shape in ATTENTION_SHAPES.values()]


if __name__ == "__main__":
    print("\n".join(lines()))
