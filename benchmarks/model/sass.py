"""Machine code of a kernel: the listing of nvdisasm, its basic blocks, its loops, and the path through the main loop.

The main loop of a kernel is its innermost loop with matrix instructions and a barrier of the block: one iteration is
one tile in shared memory. Where warps have tiles of their own, as in decoding, the loop has copies and no barrier. A
kernel whose block has one tile is read as a whole where the compiler has left no loop.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_SYMBOL = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_\S+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\S+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_[^)]*)\)")
_ENDS = {"BRA", "BRX", "EXIT", "RET", "JMP", "JMX", "KILL", "BREAK"}
MATRIX = ("HMMA", "HGMMA", "IMMA", "DMMA")
COPY = ("LDGSTS", "UBLKCP", "UTMALDG")


class Instruction(NamedTuple):
    address: int
    predicate: str  # "" or "@P0", "@!UP1"
    opcode: str  # with modifiers: "LDGSTS.E.BYPASS.128"
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_copy(self) -> bool:
        """Whether it copies a piece of a tile: 16 bytes per thread."""
        return self.base in COPY and (self.base != "LDGSTS" or "128" in self.opcode.split("."))

    @property
    def is_exponential(self) -> bool:
        return self.opcode.startswith("MUFU.EX2")


@dataclass
class Block:
    """Instructions with one entry and one exit. ``next``: numbers of the blocks that may follow."""

    instructions: list[Instruction]
    next: list[int] = field(default_factory=list)

    @cached_property
    def matrix(self) -> int:
        return sum(one.base in MATRIX for one in self.instructions)

    @cached_property
    def copies(self) -> int:
        return sum(one.is_copy for one in self.instructions)

    @cached_property
    def exponentials(self) -> int:
        return sum(one.is_exponential for one in self.instructions)


class Listing(NamedTuple):
    """The code of one symbol. ``labels``: position of the first instruction after each label."""

    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str, symbols: Container[str] | None = None) -> dict[str, Listing]:
    """The functions in a listing of ``nvdisasm -c``, or those among them that are named."""
    found: dict[str, Listing] = {}
    current: Listing | None = None
    for line in text.splitlines():
        if line.startswith(".text."):
            match = _SYMBOL.match(line)
            if match:
                wanted = symbols is None or match[1] in symbols
                current = found.setdefault(match[1], Listing([], {})) if wanted else None
        elif current is None:
            continue
        elif line.startswith(".L_"):
            match = _LABEL.match(line)
            if match:
                current.labels[match[1]] = len(current.instructions)
        else:
            match = _INSTRUCTION.match(line)
            if match:
                current.instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
    return found


def blocks_of(listing: Listing) -> list[Block]:
    """The basic blocks, in the order of their addresses. A call is an instruction like others, unless it is a jump."""
    code, labels = listing
    targets = {}
    starts = {0} | {place for place in labels.values() if place < len(code)}
    for place, one in enumerate(code):
        match = _TARGET.search(one.operands)
        target = labels.get(match[1]) if match else None
        if one.base in _ENDS or _is_jump(one, code, target):
            starts.add(place + 1)
            if target is not None:
                targets[place] = target
    order = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(order)}
    blocks = []
    for i, start in enumerate(order):
        end = order[i + 1] if i + 1 < len(order) else len(code)
        block, last = Block(code[start:end]), code[end - 1]
        falls_through = (last.base not in _ENDS and end - 1 not in targets) or bool(_condition(last))
        if end - 1 in targets and targets[end - 1] in number:
            block.next.append(number[targets[end - 1]])
        if falls_through and i + 1 < len(order) and i + 1 not in block.next:
            block.next.append(i + 1)
        blocks.append(block)
    return blocks


def _is_jump(one: Instruction, code: list[Instruction], target: int | None) -> bool:
    """Whether a call is a branch of the same function: ptxas leaves some loops that way, to a NOP."""
    return one.base == "CALL" and target is not None and target < len(code) and code[target].base == "NOP"


def _condition(one: Instruction) -> str:
    """The condition of a branch: its predicate, or that among its operands ("BRA.U UP0, ...")."""
    match = re.match(r"!?U?P\d", one.operands)
    return one.predicate or (match[0] if match else "")


@dataclass
class Loop:
    """A natural loop: blocks, the first of which is the only entry."""

    head: int
    members: set[int]
    inner: list[Loop] = field(default_factory=list)  # directly inside


def loops_of(blocks: list[Block]) -> list[Loop]:
    """All natural loops; loops with one head are one loop."""
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for following in block.next:
            before[following].append(i)
    dominators = _dominators(blocks, before)
    members: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in block.next:
            if dominators[i] is not None and head in dominators[i]:
                found = members.setdefault(head, {head})
                waiting = [i]
                while waiting:
                    one = waiting.pop()
                    if one not in found:
                        found.add(one)
                        waiting += before[one]
    loops = [Loop(head, found) for head, found in sorted(members.items(), key=lambda item: len(item[1]))]
    for i, loop in enumerate(loops):
        outer = next((other for other in loops[i + 1 :] if loop.head in other.members), None)
        if outer is not None:
            outer.inner.append(loop)
    return loops


def _dominators(blocks: list[Block], before: list[list[int]]) -> list[set[int]]:
    """Blocks on every path from the entry, for each block; empty where no path leads."""
    order, seen, waiting = [], {0}, [(0, iter(blocks[0].next))] if blocks else []
    while waiting:
        node, following = waiting[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                waiting.append((other, iter(blocks[other].next)))
                break
        else:
            order.append(node)
            waiting.pop()
    order.reverse()
    place = {node: i for i, node in enumerate(order)}
    parent: dict[int, int] = {0: 0}  # immediate dominators (Cooper, Harvey, Kennedy, 2001)
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [other for other in before[node] if other in parent]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while place[new] > place[other]:
                        new = parent[new]
                    while place[other] > place[new]:
                        other = parent[other]
            if parent.get(node) != new:
                parent[node] = new
                changed = True
    found: list[set[int]] = [set() for _ in blocks]
    for node in order:
        found[node] = ({node} | found[parent[node]]) if node else {0}
    return found


class Path(NamedTuple):
    """Instructions that a warp executes in one iteration of a loop; those of inner loops once, and in ``inner``."""

    straight: tuple[Instruction, ...]
    inner: tuple[Path, ...] = ()

    @property
    def matrix(self) -> int:
        return sum(one.base in MATRIX for one in self.straight)

    @property
    def copies(self) -> int:
        return sum(one.is_copy for one in self.straight)

    def total(self, what: str) -> int:
        return int(getattr(self, what)) + sum(one.total(what) for one in self.inner)

    def instructions(self) -> Iterable[Instruction]:
        yield from self.straight
        for one in self.inner:
            yield from one.instructions()


Key = tuple[int, int, int]
"""What distinguishes paths: matrix instructions, copies and exponentials, of which the last are 0 if not counted."""


@dataclass(frozen=True)
class MainLoop:
    """The main loop of a kernel.

    Attributes:
        whole: number of instructions in the loop, executed or not.
        branches: number of its branches.
        blocks: all its instructions, by basic block.
        paths: for each key of a path from head to back edge, the shortest such path. Inner loops count once.
    """

    whole: int
    branches: int
    blocks: tuple[tuple[Instruction, ...], ...]
    paths: dict[Key, Path]


CALL = 60  # instructions of a called division, which paths avoid


def main_loop(listing: Listing, exponentials: bool = False, barrier: bool = True) -> MainLoop | None:
    """The main loop of a kernel, or None if it has no loop with matrix instructions and a barrier.

    ``exponentials``: they distinguish paths, too. Without ``barrier``, the loop is the innermost one with matrix
    instructions and copies, where each warp has tiles of its own.
    """
    blocks = blocks_of(listing)
    needed = {"BAR", "SYNCS"} if barrier else set(COPY)
    for loop in loops_of(blocks):  # from the smallest
        bases = {one.base for i in loop.members for one in blocks[i].instructions}
        if bases & set(MATRIX) and bases & needed:
            ends = {i for i in loop.members if loop.head in blocks[i].next}
            return _main(blocks, loop, _paths(blocks, loop, ends, exponentials))
    return None


def whole_kernel(listing: Listing) -> MainLoop:
    """All of a kernel whose block has one tile, in the place of its main loop: paths from the entry to an exit.

    Exponentials distinguish them, too.
    """
    blocks = blocks_of(listing)
    loops = loops_of(blocks)
    outermost = [loop for loop in loops if not any(loop in other.inner for other in loops)]
    reached, waiting = {0}, [0]
    while waiting:
        following = set(blocks[waiting.pop()].next) - reached
        reached |= following
        waiting += following
    everything = Loop(0, reached, [loop for loop in outermost if loop.head in reached])
    ends = {i for i in reached if blocks[i].instructions[-1].base == "EXIT"}
    return _main(blocks, everything, _paths(blocks, everything, ends, exponentials=True))


def _main(blocks: list[Block], loop: Loop, paths: dict[Key, Path]) -> MainLoop:
    members = tuple(tuple(blocks[i].instructions) for i in sorted(loop.members))
    branches = sum(one.base in ("BRA", "BRX") for block in members for one in block)
    return MainLoop(sum(map(len, members)), branches, members, paths)


def paths_of(blocks: list[Block], loop: Loop) -> dict[Key, Path]:
    """The shortest paths through a loop, by key; exponentials distinguish them."""
    return _paths(blocks, loop, {i for i in loop.members if loop.head in blocks[i].next}, True)


def _cost(instructions: Iterable[Instruction]) -> int:
    return sum(CALL if one.base == "CALL" else 1 for one in instructions)


def _paths(blocks: list[Block], loop: Loop, last: set[int], exponentials: bool) -> dict[Key, Path]:
    """The shortest paths from the head to the end of one of the blocks ``last``, by key."""
    inside = {i: one for one in loop.inner for i in one.members}
    choices: dict[int, dict[Key, Path]] = {}
    for one in loop.inner:
        found = _paths(blocks, one, {i for i in one.members if one.head in blocks[i].next}, exponentials)
        most = max(key[0] for key in found)
        # One path per inner loop and number of copies, with all matrix instructions.
        choices[one.head] = {key: Path((), (path,)) for key, path in found.items() if key[0] == most}

    def node(i: int) -> int:
        return inside[i].head if i in inside else i

    def following(i: int) -> set[int]:
        members = inside[i].members if i in inside else {i}
        leaving = {after for member in members for after in blocks[member].next} - members
        return {node(after) for after in leaving if after in loop.members and after != loop.head}

    def ends(i: int) -> bool:
        return not last.isdisjoint(inside[i].members if i in inside else {i})

    def own(i: int) -> dict[Key, Path]:
        block = blocks[i]
        key = block.matrix, block.copies, block.exponentials if exponentials else 0
        return choices.get(i) or {key: Path(tuple(block.instructions))}

    order: list[int] = []
    seen: set[int] = set()
    waiting: list[tuple[int, bool]] = [(loop.head, False)]
    while waiting:
        i, done = waiting.pop()
        if done:
            order.append(i)
        elif i not in seen:
            seen.add(i)
            waiting.append((i, True))
            waiting += [(after, False) for after in following(i) if after not in seen]
    # best[i]: shortest paths from i on, by key, as (cost, list of nodes with the choice in each).
    Tail = tuple[int, tuple[tuple[int, Key], ...]]
    best: dict[int, dict[Key, Tail]] = {}
    for i in order:  # the last ones first
        tails: dict[Key, Tail] = {(0, 0, 0): (0, ())} if ends(i) else {}
        for after in following(i):
            for key, tail in best.get(after, {}).items():
                if key not in tails or tail[0] < tails[key][0]:
                    tails[key] = tail
        best[i] = {}
        for mine, path in own(i).items():
            cost = _cost(path.instructions())
            for key, tail in tails.items():
                both = mine[0] + key[0], mine[1] + key[1], mine[2] + key[2]
                entry = cost + tail[0], ((i, mine), *tail[1])
                if both not in best[i] or entry[0] < best[i][both][0]:
                    best[i][both] = entry
    found_paths = {}
    for key, (_, nodes) in best.get(loop.head, {}).items():
        straight: list[Instruction] = []
        inner: list[Path] = []
        for i, mine in nodes:
            part = own(i)[mine]
            straight += part.straight
            inner += part.inner
        found_paths[key] = Path(tuple(straight), tuple(inner))
    return found_paths
