"""Machine code of a kernel: the listing of nvdisasm, its basic blocks, its loops, and the path through the main loop.

The main loop of a kernel is its innermost loop with matrix instructions and a barrier of the block: one iteration is
one tile in shared memory. Kernels of the unit tests have none.
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
    """The basic blocks, in the order of their addresses. A call is an instruction like others."""
    code, labels = listing
    targets = {}
    starts = {0} | {place for place in labels.values() if place < len(code)}
    for place, one in enumerate(code):
        if one.base in _ENDS:
            starts.add(place + 1)
            match = _TARGET.search(one.operands)
            if match and match[1] in labels:
                targets[place] = labels[match[1]]
    order = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(order)}
    blocks = []
    for i, start in enumerate(order):
        end = order[i + 1] if i + 1 < len(order) else len(code)
        block, last = Block(code[start:end]), code[end - 1]
        falls_through = last.base not in _ENDS or bool(_condition(last))
        if end - 1 in targets and targets[end - 1] in number:
            block.next.append(number[targets[end - 1]])
        if falls_through and i + 1 < len(order) and i + 1 not in block.next:
            block.next.append(i + 1)
        blocks.append(block)
    return blocks


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


@dataclass(frozen=True)
class MainLoop:
    """The main loop of a kernel.

    Attributes:
        whole: number of instructions in the loop, executed or not.
        branches: number of its branches.
        blocks: all its instructions, by basic block.
        paths: for each number of (matrix instructions, copies) on a path from head to back edge, the shortest such
            path. Inner loops count once.
    """

    whole: int
    branches: int
    blocks: tuple[tuple[Instruction, ...], ...]
    paths: dict[tuple[int, int], Path]


CALL = 60  # instructions of a called division, which paths avoid


def main_loop(listing: Listing) -> MainLoop | None:
    """The main loop of a kernel, or None if it has no loop with matrix instructions and a barrier."""
    blocks = blocks_of(listing)
    for loop in loops_of(blocks):  # from the smallest
        bases = {one.base for i in loop.members for one in blocks[i].instructions}
        if bases & set(MATRIX) and bases & {"BAR", "SYNCS"}:
            members = tuple(tuple(blocks[i].instructions) for i in sorted(loop.members))
            branches = sum(one.base in ("BRA", "BRX") for block in members for one in block)
            return MainLoop(sum(len(block) for block in members), branches, members, _paths(blocks, loop))
    return None


def _cost(instructions: Iterable[Instruction]) -> int:
    return sum(CALL if one.base == "CALL" else 1 for one in instructions)


def _paths(blocks: list[Block], loop: Loop) -> dict[tuple[int, int], Path]:
    """The shortest paths from the head to a back edge, by numbers of matrix instructions and copies."""
    inside = {i: one for one in loop.inner for i in one.members}
    choices: dict[int, dict[tuple[int, int], Path]] = {}
    for one in loop.inner:
        found = _paths(blocks, one)
        most = max(matrix for matrix, _ in found)
        # One path per inner loop and number of copies, with all matrix instructions.
        choices[one.head] = {key: Path((), (path,)) for key, path in found.items() if key[0] == most}

    def node(i: int) -> int:
        return inside[i].head if i in inside else i

    def following(i: int) -> set[int]:
        members = inside[i].members if i in inside else {i}
        leaving = {after for member in members for after in blocks[member].next} - members
        return {node(after) for after in leaving if after in loop.members and after != loop.head}

    def ends(i: int) -> bool:
        members = inside[i].members if i in inside else {i}
        return any(loop.head in blocks[member].next for member in members)

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
    # best[i]: shortest paths from i on, by (matrix, copies), as (cost, list of nodes with the choice in each).
    Tail = tuple[int, tuple[tuple[int, tuple[int, int]], ...]]
    best: dict[int, dict[tuple[int, int], Tail]] = {}
    for i in order:  # the last ones first
        tails: dict[tuple[int, int], Tail] = {(0, 0): (0, ())} if ends(i) else {}
        for after in following(i):
            for key, tail in best.get(after, {}).items():
                if key not in tails or tail[0] < tails[key][0]:
                    tails[key] = tail
        own = choices.get(i) or {(blocks[i].matrix, blocks[i].copies): Path(tuple(blocks[i].instructions))}
        best[i] = {}
        for mine, path in own.items():
            cost = _cost(path.instructions())
            for key, tail in tails.items():
                both = mine[0] + key[0], mine[1] + key[1]
                entry = cost + tail[0], ((i, mine), *tail[1])
                if both not in best[i] or entry[0] < best[i][both][0]:
                    best[i][both] = entry
    found_paths = {}
    for key, (_, nodes) in best.get(loop.head, {}).items():
        straight: list[Instruction] = []
        inner: list[Path] = []
        for i, mine in nodes:
            part = choices[i][mine] if i in choices else Path(tuple(blocks[i].instructions))
            straight += part.straight
            inner += part.inner
        found_paths[key] = Path(tuple(straight), tuple(inner))
    return found_paths
