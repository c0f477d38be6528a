"""What one iteration of a kernel's main loop executes, by the pipes of a multiprocessor.

The listing of a kernel has the instructions, the launch plan has the sizes of its tiles. Together they give how often
the inner loops run: as often as makes the number of matrix instructions that of the tile's products.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from benchmarks.model.sass import MATRIX, Instruction, Listing, MainLoop, Path, main_loop
from fastgen.backend import plans

STORED = {"BFloat16": 2, "Half": 2, "float": 4}


class Products(NamedTuple):
    """Matrix products of a tile: depth of those that give scores, width of those that take weights, in head dims."""

    plan: str  # its name in fastgen.backend.plans.attention_plan
    scores: str  # "kkv": two of depth key_dim, one of depth value_dim
    weights: str
    copies: str  # operands with one row per iterated row


PRODUCTS = {
    "attention_forward": Products("forward", "k", "v", "kv"),
    "attention_backward_query": Products("query", "kv", "k", "kv"),
    "attention_backward_key_value": Products("key_value", "kv", "vk", "kv"),
    "attention_tangent": Products("tangent", "kkk", "vv", "kkvv"),
    "attention_second_order_query": Products("second order query", "kkkvv", "kk", "kkvv"),
    "attention_second_order_key_value": Products("second order key_value", "kkkvv", "vkk", "kkv"),
}
"""The kernels that the model knows; softcaps and missing tangents are left out."""


class Name(NamedTuple):
    """A kernel's template arguments, from its demangled name. ``dims``: (key_dim, value_dim)."""

    bare: str
    dtype: str
    dims: tuple[int, int]
    plain: bool

    def __str__(self) -> str:
        return f"{self.bare}<{self.dtype}, {self.dims[0]}, {self.dims[1]}{', plain' if self.plain else ''}>"


def name_of(demangled: str) -> Name | None:
    """The parts of an attention kernel's name, or None for other kernels."""
    match = re.search(r"(\w+)<(?:\w+::)*(\w+), (\d+), (\d+)(?:, (true|false))?>", demangled)
    if match is None or match[1] not in PRODUCTS or match[2] not in STORED:
        return None
    return Name(match[1], match[2], (int(match[3]), int(match[4])), match[5] == "true")


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of a kernel: ``owned`` rows per block, ``iterated`` rows per iteration."""

    warps: int
    owned: int
    iterated: int
    columns: tuple[int, int]  # of the outputs in one slice, as wide as a key and as a value
    shared_bytes: int

    @property
    def scores_per_lane(self) -> float:
        """Scores of one iteration for each thread."""
        return self.owned * self.iterated / (32 * self.warps)


def tiles_of(name: Name) -> Tiles:
    """The tiles of a kernel where a block has all its warps, from the launch plan of a large problem."""
    products, size = PRODUCTS[name.bare], STORED[name.dtype]
    plan = plans.attention_plan(
        1, 1, 1, 4096, 4096, *name.dims, element_size=size, multiprocessors=132, plain=name.plain,
        shared_limit=min(plans.SHARED_LIMITS.values()),  # with more, wide heads take other kernels
    )[products.plan]  # fmt: skip
    if plan["tile"] != name.dims:
        raise ValueError(f"{name}: the launch plan takes the tile {plan['tile']}; is the CPU library of these sources?")
    owns_keys = products.plan.endswith("key_value")
    owned, iterated = (plan["block_n"], plan["block_m"]) if owns_keys else (plan["block_m"], plan["block_n"])
    width = -(-max(name.dims) // plan["slices"]) if owns_keys else -(-_sliced(name, products) // plan["slices"])
    columns = min(name.dims[0], width), min(name.dims[1], width)
    return Tiles(plan["warps"], owned, iterated, columns, plan["shared_bytes"])


def _sliced(name: Name, products: Products) -> int:
    """Width of the output of a kernel that owns queries."""
    return name.dims["kv".index(products.weights[0])]


def matrix_instructions(name: Name, tiles: Tiles) -> int:
    """mma instructions of one warp in one iteration: m16n8k16, or m16n8k8 for float32 in one pass (TF32)."""
    products, depth = PRODUCTS[name.bare], 16 if STORED[name.dtype] == 2 else 8
    fragments = tiles.owned // (16 * tiles.warps)
    scores = sum(tiles.iterated // 8 * (name.dims["kv".index(one)] // depth) for one in products.scores)
    weights = sum(tiles.iterated // depth * (tiles.columns["kv".index(one)] // 8) for one in products.weights)
    return fragments * (scores + weights)


def copied_pieces(name: Name, tiles: Tiles) -> float:
    """Pieces of 16 bytes that each thread copies per iteration."""
    products = PRODUCTS[name.bare]
    # A forward slice copies only its own columns of the values.
    widths = {"k": name.dims[0], "v": tiles.columns[1] if products.plan == "forward" else name.dims[1]}
    row = sum(widths[one] for one in products.copies) * STORED[name.dtype]
    return tiles.iterated * row / 16 / (32 * tiles.warps)


FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
NEITHER = {
    "BRA", "BRX", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "BAR", "DEPBAR", "LDGDEPBAR", "NOP",
    "CS2R", "S2R", "S2UR", "LDC", "LDCU", "ULDC", "MEMBAR", "ERRBAR", "FENCE", "YIELD", "NANOSLEEP", "VOTE", "VOTEU",
    "R2UR", "SYNCS", "ACQBULK", "KILL", "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT",
}  # fmt: skip
SHARED = {"LDS", "LDSM", "STS", "STSM", "ATOMS"}
GLOBAL = {"LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG", "LDL", "STL", "LDGSTS"}
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def pipe_of(one: Instruction) -> str:
    """The pipe of an instruction: tensor, special, fma, imad, alu, shared, global, or issue for those with none."""
    base = one.base
    if one.predicate == "@!PT" or base in NEITHER:
        return "issue"
    if base.startswith(("HMMA", "HGMMA", "IMMA")):
        return "tensor"
    if base in SPECIAL:
        return "special"
    if base in FMA:
        return "fma"
    if base.startswith("IMAD") or base in ("IDP", "IMUL"):
        return "imad"
    if base in SHARED or base == "SHFL":
        return "shared"
    if base in GLOBAL:
        return "global"
    if base.startswith("U") and base not in ("UMOV",):
        return "issue"  # the uniform pipe, once per warp
    return "issue" if base == "UMOV" else "alu"


def shared_bytes(one: Instruction) -> int:
    """Bytes that a warp moves between registers or L2 and shared memory, without bank conflicts."""
    modifiers = one.opcode.split(".")
    if one.predicate == "@!PT":
        return 0
    if one.base in ("LDSM", "STSM"):
        return 128 * next((int(number) for number in ("4", "2") if number in modifiers), 1)
    if one.base == "SHFL":
        return 128
    if one.base in SHARED or one.base in ("LDGSTS", "LDG", "STG"):
        return 32 * max(4, next((WIDTHS[width] for width in modifiers if width in WIDTHS), 4))
    return 0


@dataclass(frozen=True)
class Iteration:
    """What a warp executes in one iteration of the main loop for a tile of which everything is visible.

    Attributes:
        instructions: all executed instructions, which is the number of issue slots.
        pipes: of them by pipe, see :func:`pipe_of`.
        shared_bytes: bytes moved to and from shared memory, copies included.
        copied_bytes: bytes copied from global to shared memory.
        exponentials: instructions MUFU.EX2.
        whole: instructions in the loop, executed or not.
        masked: instructions where a mask applies to the tile, an upper estimate: all code of the loop without dropout,
            softcaps and divisions, and at least the path.
        branches: branches in the loop.
        scores_per_lane: scores of the tile per thread.
        outside: instructions outside the loop.
    """

    instructions: float
    pipes: dict[str, float]
    shared_bytes: float
    copied_bytes: float
    exponentials: float
    whole: int
    masked: int
    branches: int
    scores_per_lane: float
    outside: int

    @property
    def per_score(self) -> float:
        """Instructions of a thread for each of its scores."""
        return self.instructions / self.scores_per_lane

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "per_score": round(self.per_score, 2)}


@dataclass
class _Sum:
    pipes: Counter[str] = field(default_factory=Counter)
    instructions: float = 0
    shared: float = 0
    copied: float = 0
    exponentials: float = 0

    def add(self, path: Path, times: float, of_matrix: float, of_copies: float) -> None:
        for one in path.straight:
            self.instructions += times
            self.pipes[pipe_of(one)] += times
            self.shared += times * shared_bytes(one)
            self.copied += times * shared_bytes(one) * (one.base == "LDGSTS")
            self.exponentials += times * (one.opcode.startswith("MUFU.EX2"))
        for inner in path.inner:
            trips = of_matrix if inner.total("matrix") else of_copies if inner.total("copies") else 1
            self.add(inner, times * trips, 1, 1)


def _trips(straight: int, total: int, wanted: float) -> float | None:
    """How often inner loops run so that the total is as wanted; None if no number of times does that.

    Below 1 where only some of the warps take part.
    """
    if total == straight:
        return 1.0 if straight == wanted else None
    trips = (wanted - straight) / (total - straight)
    return trips if trips > 0 else None


PHILOX = ("0x2daee0ad", "0xd2511f53", "0x326172a9", "0xcd9e8d57")  # its multipliers, of either sign


def _is_rare(block: Iterable[Instruction]) -> bool:
    """Whether a block draws random numbers, or has a reciprocal: of a softcap's tanh or of a division."""
    return any(one.opcode.startswith("MUFU.RCP") or any(word in one.operands for word in PHILOX) for one in block)


def _chosen(loop: MainLoop, matrix: int, copies: float, operands: int) -> tuple[Path, float, float] | None:
    """The path of :func:`iteration_of`, and how often its inner loops of products and of copies run."""
    # Of products a whole number of times; else, an unrolled loop that is left in its middle.
    for whole in (True, False):
        for product_count in sorted({key[0] for key in loop.paths}, reverse=True):
            copy_counts = sorted(key[1] for key in loop.paths if key[0] == product_count and key[1] >= operands)
            # Exactly as many copies as expected; else, those that are not in a loop and of which some are left out.
            for exact in (True, False):
                for copy_count in copy_counts:
                    path = loop.paths[product_count, copy_count]
                    of_matrix, of_copies = (
                        _trips(path.matrix, product_count, matrix),
                        _trips(path.copies, copy_count, copies),
                    )
                    if not exact and path.copies == copy_count:
                        of_copies = 1.0
                    if of_matrix is None or of_copies is None:
                        continue
                    if of_matrix == int(of_matrix) if whole else of_matrix > 1:
                        return path, of_matrix, of_copies
    return None


def iteration_of(listing: Listing, matrix: int, copies: float, operands: int, scores: float) -> Iteration:
    """The main loop of a kernel.

    The path is the shortest one that has ``matrix`` matrix instructions and copies the next tile, ``copies`` pieces of
    each thread for ``operands`` operands. Branches around rare work are taken, such as masks, the rescaling of an
    output, the search for the next tile and divisions; inner loops run as often as these numbers require.

    Raises:
        ValueError: there is no such path.
    """
    loop = main_loop(listing)
    if loop is None:
        raise ValueError("no loop with matrix instructions and a barrier")
    found = _chosen(loop, matrix, copies, operands)
    if found is None:
        counts = sorted(loop.paths)
        raise ValueError(f"no path has {matrix} matrix instructions and {copies:g} copies, but {counts}")
    path, of_matrix, of_copies = found
    total = _Sum()
    total.add(path, 1, of_matrix, of_copies)
    masked = sum(sum(one.base not in MATRIX for one in block) for block in loop.blocks if not _is_rare(block))
    masked = max(masked + round(total.pipes["tensor"]), round(total.instructions))
    return Iteration(
        total.instructions, dict(total.pipes), total.shared, total.copied, total.exponentials, loop.whole, masked,
        loop.branches, scores, len(listing.instructions) - loop.whole,
    )  # fmt: skip


def attention_iteration(listing: Listing, name: Name) -> Iteration:
    """The main loop of an attention kernel of this project."""
    tiles = tiles_of(name)
    operands = len(PRODUCTS[name.bare].copies)
    matrix, copies = matrix_instructions(name, tiles), copied_pieces(name, tiles)
    try:
        return iteration_of(listing, matrix, copies, operands, tiles.scores_per_lane)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
