"""The attention kernels in the model: their names, the sizes of their tiles, and the work of their warps.

The launch plan has the sizes. Most kernels have a warp for each 16 or 32 rows of a tile, and all warps do the same; the
others are in :func:`roles_of`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.model.iteration import Iteration, Role, iteration_of
from benchmarks.model.sass import Listing
from fastgen.backend import plans

STORED = {"BFloat16": 2, "Half": 2, "float": 4}


class Products(NamedTuple):
    """Matrix products of a tile: depth of those that give scores, width of those that take weights, in head dims."""

    plan: str  # its name in fastgen.backend.plans.attention_plan
    scores: str  # "kkv": two of depth key_dim, one of depth value_dim
    weights: str
    copies: str  # operands with one row per iterated row


FORWARD = Products("forward", "k", "v", "kv")
QUERY = Products("query", "kv", "k", "kv")
KEY_VALUE = Products("key_value", "kv", "vk", "kv")
TANGENT = Products("tangent", "kkk", "vv", "kkvv")
SECOND_ORDER_QUERY = Products("second order query", "kkkvv", "kk", "kkvv")
SECOND_ORDER_KEY_VALUE = Products("second order key_value", "kkkvv", "vkk", "kkv")
PRODUCTS = {
    "attention_forward": FORWARD,
    "attention_backward_query": QUERY,
    "attention_backward_key_value": KEY_VALUE,
    "attention_tangent": TANGENT,
    "attention_second_order_query": SECOND_ORDER_QUERY,
    "attention_second_order_key_value": SECOND_ORDER_KEY_VALUE,
    "attention_decode": FORWARD._replace(plan="decode"),
    "attention_forward_wide": FORWARD,
    "attention_backward_query_wide": QUERY,
    "attention_backward_key_value_wide": KEY_VALUE,
    "attention_tangent_wide": TANGENT,
    "attention_second_order_query_wide": SECOND_ORDER_QUERY,
    "attention_second_order_key_value_wide": SECOND_ORDER_KEY_VALUE,
    "attention_backward_one_head": KEY_VALUE._replace(plan="one head"),
    "attention_backward_one_tile": Products("one tile", "kv", "kvk", "kkvv"),
}
"""The kernels that the model knows; softcaps, missing tangents and the gradient of a mask are left out."""


class Name(NamedTuple):
    """A kernel's template arguments, from its demangled name.

    Attributes:
        dims: (key_dim, value_dim).
        rows: maximum of queries and of keys, of the one-tile kernel; 0: any number.
    """

    bare: str
    dtype: str
    dims: tuple[int, int]
    plain: bool
    rows: int = 0

    def __str__(self) -> str:
        rows, plain = f", {self.rows} rows" if self.rows else "", ", plain" if self.plain else ""
        return f"{self.bare}<{self.dtype}, {self.dims[0]}, {self.dims[1]}{rows}{plain}>"

    @property
    def is_wide(self) -> bool:
        return self.bare.endswith("_wide")

    @property
    def is_decode(self) -> bool:
        return self.bare == "attention_decode"

    @property
    def is_one_head(self) -> bool:
        return self.bare == "attention_backward_one_head"

    @property
    def owns_keys(self) -> bool:
        return "key_value" in self.bare or self.is_one_head


def name_of(demangled: str) -> Name | None:
    """The parts of an attention kernel's name, or None for other kernels."""
    one_tile = re.search(
        r"(attention_backward_one_tile)<(?:\w+::)*(\w+), (\d+), (\d+), \d+, \((?:\w+::)*OneTileKind\)([01])>", demangled
    )
    if one_tile is not None and one_tile[2] in STORED:
        dim = int(one_tile[3])
        return Name(one_tile[1], one_tile[2], (dim, dim), one_tile[5] == "0", int(one_tile[4]))
    one_head = re.search(r"(attention_backward_one_head)<(?:\w+::)*(\w+), (\d+)>", demangled)
    if one_head is not None and one_head[2] in STORED:
        return Name(one_head[1], one_head[2], (int(one_head[3]), int(one_head[3])), True)
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


def tiles_of(name: Name, plan: dict[str, Any] | None = None) -> Tiles:
    """The tiles of a kernel: in a launch plan, or where a block has all its warps."""
    products = PRODUCTS[name.bare]
    if plan is None:
        # With more shared memory, wide heads take kernels of their own.
        limits = plans.SHARED_LIMITS.values()
        queries = name.rows or (1 if name.is_decode else 4096)
        keys = name.rows or (256 if name.is_one_head else 4096)
        heads = 132 if name.is_one_head else 1
        plan = plans.attention_plan(
            1, heads, heads, queries, keys, *name.dims, element_size=STORED[name.dtype], multiprocessors=132,
            plain=name.plain, shared_limit=max(limits) if name.is_wide or name.is_one_head else min(limits),
        )[products.plan]  # fmt: skip
    if plan["tile"] != name.dims:
        raise ValueError(f"{name}: the launch plan takes the tile {plan['tile']}; is the CPU library of these sources?")
    owned, iterated = (plan["block_n"], plan["block_m"]) if name.owns_keys else (plan["block_m"], plan["block_n"])
    if name.is_decode:  # a warp has a tile of its own, and slices are parts of the keys
        return Tiles(1, owned, iterated, name.dims, plan["shared_bytes"])
    width = -(-max(name.dims) // plan["slices"]) if name.owns_keys else -(-_sliced(name, products) // plan["slices"])
    columns = min(name.dims[0], width), min(name.dims[1], width)
    return Tiles(plan["warps"], owned, iterated, columns, plan["shared_bytes"])


def _sliced(name: Name, products: Products) -> int:
    """Width of the output of a kernel that owns queries."""
    return name.dims["kv".index(products.weights[0])]


def _depth(name: Name) -> int:
    """Of a matrix instruction: m16n8k16, or m16n8k8 for float32 in one pass (TF32)."""
    return 16 if STORED[name.dtype] == 2 else 8


def _score_instructions(name: Name, rows: int, columns: int, products: str) -> int:
    """Matrix instructions for rows x columns scores of each of these products."""
    return rows // 16 * sum(columns // 8 * (name.dims["kv".index(one)] // _depth(name)) for one in products)


def _weight_instructions(name: Name, rows: int, inner: int, widths: list[int]) -> int:
    """Matrix instructions that multiply rows x inner weights by operands of these widths."""
    return rows // 16 * sum(inner // _depth(name) * (width // 8) for width in widths)


def matrix_instructions(name: Name, tiles: Tiles) -> int:
    """Those of one warp in one iteration, where all warps do the same."""
    products = PRODUCTS[name.bare]
    scores = _score_instructions(name, tiles.owned, tiles.iterated, products.scores)
    widths = [tiles.columns["kv".index(one)] for one in products.weights]
    return (scores + _weight_instructions(name, tiles.owned, tiles.iterated, widths)) // tiles.warps


def copied_pieces(name: Name, tiles: Tiles) -> float:
    """Pieces of 16 bytes that each thread copies per iteration."""
    products = PRODUCTS[name.bare]
    # A forward slice copies only its own columns of the values.
    widths = {"k": name.dims[0], "v": tiles.columns[1] if products.plan == "forward" else name.dims[1]}
    row = sum(widths[one] for one in products.copies) * STORED[name.dtype]
    return tiles.iterated * row / 16 / (32 * tiles.warps)


def roles_of(name: Name, tiles: Tiles) -> list[Role]:
    """What the warps of a block do in one iteration."""
    if name.rows:
        return _one_tile_roles(name, tiles)
    products, copies = PRODUCTS[name.bare], copied_pieces(name, tiles)
    if not (name.is_wide and products in (QUERY, KEY_VALUE)):
        matrix = matrix_instructions(name, tiles)
        if name.is_one_head:  # dQ: all queries of the tile, all keys
            matrix += _weight_instructions(name, tiles.iterated, tiles.owned, [name.dims[0]]) // tiles.warps
        return [Role(matrix, copies, len(products.copies))]
    # Half of the warps compute S, the others dP; then all multiply the weights.
    widths = [tiles.columns["kv".index(one)] for one in products.weights]
    weights = _weight_instructions(name, tiles.owned, tiles.iterated, widths) // tiles.warps

    def role(score: str, exponentials: float) -> Role:
        matrix = _score_instructions(name, tiles.owned, tiles.iterated, score) // (tiles.warps // 2)
        return Role(matrix + weights, copies, len(products.copies), int(exponentials), share=0.5)

    return [role("k", 2 * tiles.scores_per_lane), role("v", 0)]


def _one_tile_roles(name: Name, tiles: Tiles) -> list[Role]:
    """A warp has 16 queries with all keys, then 32 keys of dK or of dV with all queries; some have only one of them."""
    queries, keys, width = tiles.owned, tiles.iterated, name.dims[0]
    row_warps, column_warps = queries // 16, keys // 16
    rows = _score_instructions(name, 16, keys, "kv") + _weight_instructions(name, 16, keys, [width])
    columns = _weight_instructions(name, 32, queries, [width])
    copies = (queries + keys) * sum(name.dims) * STORED[name.dtype] / 16 / (32 * tiles.warps)
    both, all_warps, exponentials = min(row_warps, column_warps), tiles.warps, 16 * keys // 32
    roles = [Role(rows + columns, copies, 4, exponentials, share=both / all_warps)]
    if row_warps > both:
        roles.append(Role(rows, copies, 4, exponentials, share=(row_warps - both) / all_warps))
    if column_warps > both:
        roles.append(Role(columns, copies, 4, 0, unrolled=False, share=(column_warps - both) / all_warps))
    return roles


def attention_iteration(listing: Listing, name: Name, plan: dict[str, Any] | None = None) -> Iteration:
    """The main loop of an attention kernel of this project; ``plan``: as in :func:`tiles_of`."""
    tiles = tiles_of(name, plan)
    try:
        roles = roles_of(name, tiles)
        return iteration_of(listing, roles, tiles.scores_per_lane, barrier=not name.is_decode, once=name.rows > 0)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
