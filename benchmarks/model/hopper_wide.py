"""Head dim 512 on Hopper (csrc/attention/sm90/wide.cuh): what a key tile takes at least, of three designs.

Bounds from the sizes of the products, by hand; not simulated, since the two consumers run different code: products of
m64nNk16 take N / 2 clocks, shared memory gives 128 bytes per clock, and L2 what :mod:`benchmarks.model.warpgroups`
assumes. A left operand in shared memory is read for each product. Latencies and what a query tile takes besides its key
tiles are left out.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.model import warpgroups
from benchmarks.model.chips import CHIPS
from benchmarks.roofline import FORWARD, cost
from benchmarks.shapes import ATTENTION_SHAPES

DIM, ROWS, KEYS, DEPTH = 512, 64, 64, 16
SPLITS = 2  # of vae-mid: csrc/attention/plan.h, wide_splits


class Product(NamedTuple):
    """``count`` products of 64 rows and ``columns`` columns."""

    columns: int
    count: int
    left_in_shared: bool

    @property
    def clocks(self) -> float:
        return self.count * self.columns / 2

    @property
    def bytes(self) -> int:
        """Read from shared memory."""
        return self.count * 2 * DEPTH * (self.columns + (ROWS if self.left_in_shared else 0))


SCORES = Product(KEYS, DIM // DEPTH, True)
HALF_OF_THE_SCORES = Product(KEYS // 2, DIM // DEPTH, True)
OWN, SHARED = (Product(128, 2 * KEYS // DEPTH, left_in_shared) for left_in_shared in (False, True))
DESIGNS: dict[str, list[Product]] = {
    "one consumer has the scores (written)": [SCORES, OWN, SHARED],
    "each has the scores of half of the keys": [HALF_OF_THE_SCORES, HALF_OF_THE_SCORES, SHARED, SHARED],
    "each has all scores": [SCORES, SCORES, OWN, OWN],
}
COPIED = 2 * KEYS * DIM * 2  # bytes of K and V


def bounds(products: list[Product]) -> dict[str, float]:
    """Clocks of a key tile, by what limits them. Weights that pass through shared memory are counted as read only."""
    return {
        "tensor": sum(one.clocks for one in products),
        "shared memory": (sum(one.bytes for one in products) + COPIED) / warpgroups.SHARED_BYTES,
        "L2": COPIED / warpgroups.L2_BYTES,
    }


def lines() -> list[str]:
    """The section of predictions.md."""
    shape, chip = ATTENTION_SHAPES["vae-mid"], next(chip for chip in CHIPS if chip.name == "H100")
    out = """
## Attention on Hopper, head dim 512 (`csrc/attention/sm90/wide.cuh`): bounds

Clocks that a tile of 64 keys takes at least for 64 queries, by hand ([hopper_wide.py](hopper_wide.py)). Not simulated:
the two consumers run different code. "vae-mid" is the least time of that shape on an H100 at its boost clock, by the
largest of the bounds, without latencies and without adding up the parts of the keys.

| design | tensor | shared memory | L2 | vae-mid, us | TFLOP/s |
|---|---|---|---|---|---|""".splitlines()
    tiles = -(-shape.keys // (SPLITS * KEYS))
    for name, products in DESIGNS.items():
        found = bounds(products)
        seconds = tiles * max(found.values()) / chip.clock
        cells = [name, *(f"{clocks:.0f}" for clocks in found.values()), f"{seconds * 1e6:.1f}"]
        out.append(f"| {' | '.join(cells)} | {cost(shape, FORWARD).flops / seconds / 1e12:.0f} |")
    return out
