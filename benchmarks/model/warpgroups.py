"""Times of kernels with products of warpgroups, simulated from their machine code, instruction by instruction.

Each warpgroup of a block has one warp on each quarter of a multiprocessor, and the quarters are alike: one of them is
simulated, with one warp of each consumer. A warp issues in order, when the operands of its next instruction are ready
and the pipe is free; ready warps take turns. Products are queued: they run in the order of their issue, each for

    max(N / 2, bytes / 128) clocks      m64nNk16; bytes: of its operands in shared memory, right operand once for all

which is 4096 FLOP per clock, or the bandwidth of shared memory. A wait for products (WARPGROUP.DEPBAR) ends when the
groups it names are complete. Named barriers pass a turn from one consumer to the next. The producer is assumed to keep
up; whether shared memory and L2 can is compared afterwards (:class:`Rates`).

The clocks of an iteration are the differences after the first few, when the consumers have found their order.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.model.chips import Chip
from benchmarks.model.iteration import pipe_of
from benchmarks.model.sass import Instruction

SHARED_BYTES = 128.0  # per clock
L2_BYTES = 32.0  # read, per clock and multiprocessor: an assumption, between 24 (measured by users) and 39 (5120 / 132)


@dataclass(frozen=True)
class Latencies:
    """Clocks from an instruction's issue until its result can be used: assumptions.

    ``product``: after the last clock of a product. ``branch``: of a taken branch, in which the warp does not issue.
    """

    arithmetic: float = 4.0
    uniform: float = 8.0
    special: float = 20.0
    shuffle: float = 24.0
    barrier: float = 24.0
    product: float = 24.0
    branch: float = 10.0

    def times(self, factor: float) -> Latencies:
        return Latencies(*(factor * value for value in vars(self).values()))


UNIFORM = ("S2UR", "R2UR", "S2R", "VOTEU")
NO_RESULT = {
    "BRA",
    "BSSY",
    "BSYNC",
    "WARPSYNC",
    "BAR",
    "WARPGROUP",
    "EXIT",
    "NOP",
    "STS",
    "STG",
    "ST",
    "DEPBAR",
    "FENCE",
}
_REGISTER = re.compile(r"\b(U?R)(\d+)\b|\b(U?P\d)\b")


class Product(NamedTuple):
    """An HGMMA: clocks of the tensor cores, and bytes that they read in shared memory."""

    clocks: float
    bytes: float
    left: int  # first register of the left operand; -1: in shared memory
    closes: bool  # a group of products


def product_of(one: Instruction) -> Product:
    """Of an instruction such as "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR16].tnspB, R24, gsb0".

    A group without products is closed by one that writes to RZ and takes no time.

    Raises:
        ValueError: it is of another shape.
    """
    if " RZ, gdesc" in f" {one.operands}":
        return Product(0.0, 0.0, -1, "gsb0" in one.operands)
    match = re.match(r"\.?64 ?x(\d+)x16\S* R\d+, (?:R(\d+)|gdesc)", one.opcode.removeprefix("HGMMA") + one.operands)
    if match is None:
        raise ValueError(f"unknown product {one.opcode} {one.operands}")
    columns = int(match[1])
    read = columns * 32 + (0 if match[2] else 64 * 32)
    return Product(max(columns / 2, read / SHARED_BYTES), read, int(match[2] or -1), "gsb0" in one.operands)


@dataclass
class _Decoded:
    """An instruction as the simulation needs it."""

    one: Instruction
    pipe: str
    product: Product | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    jumps: bool = False  # to the following instruction

    @property
    def turn(self) -> str:
        if self.one.base != "BAR":
            return ""
        return "pass" if ".ARV" in self.one.opcode else "take"


def decode(path: Sequence[Instruction]) -> list[_Decoded]:
    """The instructions of an iteration, in the order of execution."""
    found = []
    for place, one in enumerate(path):
        names = [f"{match[1]}{match[2]}" if match[1] else match[3] for match in _REGISTER.finditer(one.operands)]
        predicate = re.findall(r"U?P\d", one.predicate)
        product = product_of(one) if one.base == "HGMMA" else None
        writes: list[str] = []
        if product is not None:  # the accumulators are in flight; a descriptor is read from four registers
            of_descriptor = [f"UR{int(name[2:]) + i}" for name in names if name[:2] == "UR" for i in (1, 2, 3)]
            reads = names[1:] + of_descriptor
        elif one.base in NO_RESULT or one.opcode.startswith("SYNCS.ARRIVE"):
            reads = names
        else:
            count = 2 if one.base in ("ISETP", "FSETP", "UISETP", "PLOP3") else 1
            writes = names[:count]
            reads = names[count:] if count == 1 else names[1:]
            if one.opcode.endswith(".64") and names:
                writes.append(re.sub(r"\d+", lambda match: str(int(match[0]) + 1), names[0]))
        following = path[(place + 1) % len(path)].address
        found.append(
            _Decoded(one, pipe_of(one), product, (*reads, *predicate), tuple(writes), following != one.address + 16)
        )
    return found


def occupied(pipe: str, chip: Chip) -> float:
    """Clocks for which an instruction of a warp occupies a pipe of its quarter."""
    return {
        "special": chip.special_cycles, "fma": chip.fma_cycles, "imad": chip.imad_cycles, "alu": chip.alu_cycles,
        "shared": 4.0,
    }.get(pipe, 1.0)  # fmt: skip


@dataclass
class _Warp:
    place: int = 0  # in the path
    iteration: int = 0
    free: float = 0.0  # may issue from then on
    ready: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    open: float = 0.0  # end of the products of the group that is not closed
    groups: deque[float] = field(default_factory=deque)  # ends of closed groups
    turns: int = 0
    ends: list[float] = field(default_factory=list)  # of iterations


class Steady(NamedTuple):
    """An iteration of all consumers: each has one tile of its queries with one tile of keys.

    Attributes:
        clocks: of the iteration.
        tensor: clocks in which the tensor cores run products.
        busy: share of the clocks in which each pipe is occupied, and "issue".
    """

    clocks: float
    tensor: float
    busy: dict[str, float]


def simulate(
    path: Sequence[Instruction],
    groups: int,
    chip: Chip,
    latencies: Latencies | None = None,
    iterations: int = 12,
    queue: float = math.inf,
    greedy: bool = False,
) -> Steady:
    """One iteration in the long run.

    queue: clocks of products that may be ahead of a product when it issues. greedy: of several ready warps, the one
    that issued last goes first.

    Raises:
        ValueError: the path has no products, or the consumers wait for each other.
    """
    latency = latencies or Latencies()
    code = decode(path)
    if not any(one.product for one in code):
        raise ValueError("no products of warpgroups")
    takes = any(one.turn == "take" for one in code)
    warps = [_Warp() for _ in range(groups)]
    if takes:
        warps[0].turns = 1
    pipe_free: dict[str, float] = defaultdict(float)
    used: dict[str, float] = defaultdict(float)
    tensor_free, clock, last = 0.0, 0.0, 0
    warm = iterations // 3
    started: float | None = None

    def start(warp: _Warp, one: _Decoded) -> float:
        """When the warp's next instruction can issue; infinite if another warp has to issue first."""
        at = max([warp.free, *(warp.ready[name] for name in (*one.reads, *one.writes))])
        if one.turn == "take" and groups > 1 and warp.turns == 0:
            return math.inf
        if one.one.opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(one.one.operands.split(",")[1].strip(), 16)
            done = list(warp.groups)[: max(0, len(warp.groups) - pending)]
            at = max([at, *(end + latency.product for end in done)])
        if one.product is not None:
            at = max(at, tensor_free - queue)
        return max(at, pipe_free[one.pipe])

    while any(warp.iteration < iterations for warp in warps):
        choices = [
            (start(warp, code[warp.place]), (number - last - (not greedy)) % groups, number)
            for number, warp in enumerate(warps)
            if warp.iteration < iterations
        ]
        at, _, number = min((max(begin, clock), order, index) for begin, order, index in choices)
        if at == math.inf:
            raise ValueError("every consumer waits for its turn")
        warp, last = warps[number], number
        one = code[warp.place]
        clock = at + 1  # the quarter issues one instruction per clock
        duration = occupied(one.pipe, chip)
        counted = started is not None
        if one.pipe not in ("issue", "tensor"):
            pipe_free[one.pipe] = at + duration
        used["issue"] += counted
        used[one.pipe] += counted * (one.pipe not in ("issue", "tensor")) * duration
        warp.free = at + 1 + (latency.branch if one.jumps else 0.0)
        if one.product is not None:
            tensor_free = max(tensor_free, at) + one.product.clocks
            used["tensor"] += counted * one.product.clocks
            warp.open = tensor_free
            if one.product.closes:
                warp.groups.append(warp.open)
        elif one.turn == "take":
            warp.turns -= 1
            warp.free = at + latency.barrier
        elif one.turn == "pass":
            following = warps[(number + 1) % groups]
            following.turns += 1
            following.free = max(following.free, at)
        elif one.one.opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(one.one.operands.split(",")[1].strip(), 16)
            while len(warp.groups) > pending:
                warp.groups.popleft()
        after = {"special": latency.special, "shared": latency.shuffle}.get(one.pipe, latency.arithmetic)
        if one.one.base.startswith("U") or one.one.base in UNIFORM:
            after = latency.uniform
        if one.one.base == "SYNCS":
            after = latency.barrier
        for name in one.writes:
            warp.ready[name] = at + after
        warp.place += 1
        if warp.place == len(code):
            warp.place, warp.iteration = 0, warp.iteration + 1
            warp.ends.append(at)
            if started is None and all(other.iteration >= warm for other in warps):
                started = at
    clocks = sum((warp.ends[-1] - warp.ends[warm]) / (iterations - 1 - warm) for warp in warps) / groups
    tensor = groups * sum(one.product.clocks for one in code if one.product)
    assert started is not None
    span = max(warp.ends[-1] for warp in warps) - started
    return Steady(clocks, tensor, {pipe: value / span for pipe, value in used.items()})


@dataclass(frozen=True)
class Rates:
    """Clocks that an iteration takes at least, by what else it needs than issue slots."""

    shared: float
    l2: float

    @classmethod
    def of(cls, path: Sequence[Instruction], groups: int, copied_bytes: float) -> Rates:
        """``copied_bytes``: of the tiles that the producer copies in one iteration."""
        read = groups * sum(product_of(one).bytes for one in path if one.base == "HGMMA")
        return cls((read + copied_bytes) / SHARED_BYTES, copied_bytes / L2_BYTES)
