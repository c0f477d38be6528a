"""What a warp executes in one iteration of a main loop, by the pipes of a multiprocessor.

The listing has the instructions; its reader says how many products and copies an iteration has. Together they give
the path through the loop, and how often the inner loops run: as often as makes the number of matrix instructions that
of the tile's products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.model.sass import MATRIX, Instruction, Key, Listing, MainLoop, Path, main_loop, whole_kernel

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
            softcaps, divisions and products, besides the path.
        branches: branches in the loop.
        scores_per_lane: scores of the tile per thread.
        outside: instructions outside the loop.
        barriers: between threads of a block; each one separates phases that do not overlap. 0: none.
        longest: where warps differ, the one that executes most; the numbers above are the average then.
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
    barriers: int = 1
    longest: Iteration | None = None

    @property
    def per_score(self) -> float:
        """Instructions of a thread for each of its scores."""
        return self.instructions / self.scores_per_lane


class Role(NamedTuple):
    """What some warps of a block do in one iteration.

    Attributes:
        matrix: matrix instructions of a warp.
        copies: pieces of 16 bytes that a thread copies.
        operands: that are copied: at least as many copies are in the code.
        exponentials: of a thread; None: other paths do not differ in them.
        unrolled: of several paths, the one with most matrix instructions in the code is taken; otherwise the one with
            fewest.
        share: of the warps.
    """

    matrix: int
    copies: float
    operands: int
    exponentials: int | None = None
    unrolled: bool = True
    share: float = 1.0


@dataclass
class _Sum:
    pipes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    instructions: float = 0
    shared: float = 0
    copied: float = 0
    exponentials: float = 0
    barriers: float = 0

    def add(self, path: Path, times: float, of_matrix: float, of_copies: float) -> None:
        for one in path.straight:
            self.instructions += times
            self.pipes[pipe_of(one)] += times
            self.shared += times * shared_bytes(one)
            self.copied += times * shared_bytes(one) * (one.base == "LDGSTS")
            self.exponentials += times * one.is_exponential
            self.barriers += times * one.opcode.startswith("BAR.SYNC")
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


def _chosen(loop: MainLoop, role: Role) -> tuple[Path, float, float] | None:
    """The path of a role, and how often its inner loops of products and of copies run."""
    keys: list[Key] = [key for key in loop.paths if role.exponentials in (None, key[2])]
    # Of products a whole number of times; else, an unrolled loop that is left in its middle.
    for whole in (True, False):
        for product_count in sorted({key[0] for key in keys}, reverse=role.unrolled):
            fitting = sorted(key for key in keys if key[0] == product_count and key[1] >= role.operands)
            # Exactly as many copies as expected; else, those that are not in a loop and of which some are left out.
            for exact in (True, False):
                for key in fitting:
                    path = loop.paths[key]
                    of_matrix = _trips(path.matrix, product_count, role.matrix)
                    of_copies = _trips(path.copies, key[1], role.copies)
                    if not exact and path.copies == key[1]:
                        of_copies = 1.0
                    if of_matrix is None or of_copies is None:
                        continue
                    if of_matrix == int(of_matrix) if whole else of_matrix > 1:
                        return path, of_matrix, of_copies
    return None


def iteration_of(
    listing: Listing, roles: Sequence[Role], scores: float, barrier: bool = True, once: bool = False
) -> Iteration:
    """The main loop of a kernel whose warps have ``roles``.

    The path of a role is the shortest one that has its matrix instructions and copies the next tile. Branches around
    rare work are taken, such as masks, the rescaling of an output, the search for the next tile and divisions; inner
    loops run as often as these numbers require. ``scores``: of a thread; ``barrier``: see :func:`sass.main_loop`;
    ``once``: a kernel without a main loop is one iteration.

    Raises:
        ValueError: there is no such path.
    """
    loop = main_loop(listing, any(role.exponentials is not None for role in roles), barrier)
    if loop is None and once:
        loop = whole_kernel(listing)
    if loop is None:
        raise ValueError(f"no loop with matrix instructions and {'a barrier' if barrier else 'copies'}")
    rare = [_is_rare(block) for block in loop.blocks]
    code = {one.address: one for block, is_rare in zip(loop.blocks, rare, strict=True) if not is_rare for one in block}
    found = []
    for role in roles:
        chosen = _chosen(loop, role)
        if chosen is None:
            raise ValueError(f"no path is that of {role}, but there are {sorted(loop.paths)}")
        path, of_matrix, of_copies = chosen
        total = _Sum()
        total.add(path, 1, of_matrix, of_copies)
        found.append(total)
        for one in path.instructions():
            code.pop(one.address, None)
    # Where only some of the warps compute scores, only those apply masks.
    masking = sum(role.share for role in roles if role.exponentials != 0)
    more = masking * sum(one.base not in MATRIX for one in code.values())

    def iteration(sums: Sequence[_Sum], shares: Sequence[float], longest: Iteration | None) -> Iteration:
        def mean(values: Iterable[float]) -> float:
            return float(sum(share * value for share, value in zip(shares, values, strict=True)))

        pipes = {pipe: mean(one.pipes[pipe] for one in sums) for one in sums for pipe in one.pipes}
        instructions = mean(one.instructions for one in sums)
        return Iteration(
            instructions, pipes, mean(one.shared for one in sums), mean(one.copied for one in sums),
            mean(one.exponentials for one in sums), loop.whole, round(instructions + more), loop.branches, scores,
            len(listing.instructions) - loop.whole, round(max(one.barriers for one in sums)), longest,
        )  # fmt: skip

    if len(roles) == 1:
        return iteration(found, [1.0], None)
    longest = iteration([max(found, key=lambda one: one.instructions)], [1.0], None)
    return iteration(found, [role.share for role in roles], longest)
