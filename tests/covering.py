"""Pairwise covering sets of settings, where the full product is too large."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def covering(
    axes: list[Sequence[Any]],
    allowed: Callable[[Sequence[Any]], bool],
    cost: Callable[[Sequence[Any]], float] | None = None,
) -> list[list[Any]]:
    """Points that contain every pair of values of different axes, where an allowed point contains both.

    Greedy, as in Cohen et al., "The AETG system" (1997): each point takes a pair that is missing and, of fifty random
    ways to complete it, the one with most missing pairs.

    With ``cost``, of a point: as long as every pair remains, points are left out and values replaced by those that cost
    less, the most expensive points first.
    """
    draw = random.Random(0)
    pairs = list(itertools.combinations(range(len(axes)), 2))
    missing = {(i, a, j, b) for i, j in pairs for a in range(len(axes[i])) for b in range(len(axes[j]))}
    points: list[list[int]] = []

    def values(point: Sequence[int]) -> list[Any]:
        return [axis[c] for axis, c in zip(axes, point, strict=True)]

    for i, a, j, b in sorted(missing):
        if (i, a, j, b) not in missing:
            continue
        best: tuple[int, list[int]] = (0, [])
        for _ in range(50):
            chosen = [draw.randrange(len(axis)) for axis in axes]
            chosen[i], chosen[j] = a, b
            if allowed(values(chosen)):
                new = sum((k, chosen[k], m, chosen[m]) in missing for k, m in pairs)
                best = max(best, (new, chosen))
        if best[0] > 0:
            points.append(best[1])
            missing -= {(k, best[1][k], m, best[1][m]) for k, m in pairs}
    if cost is not None:
        points = _cheaper(points, axes, lambda point: allowed(values(point)), lambda point: cost(values(point)))
    return [values(point) for point in points]


def _cheaper(
    points: list[list[int]],
    axes: list[Sequence[Any]],
    allowed: Callable[[list[int]], bool],
    cost: Callable[[list[int]], float],
) -> list[list[int]]:
    """The points without those that no pair needs, each with the cheapest values of the axes that none needs."""
    times = Counter(pair for point in points for pair in _pairs(point))
    kept = []
    for point in sorted(points, key=cost, reverse=True):
        needed = {pair for pair in _pairs(point) if times[pair] == 1}
        times.subtract(_pairs(point))
        if not needed:
            continue
        best = point
        for axis in set(range(len(axes))) - {axis for i, _, j, _ in needed for axis in (i, j)}:
            others = ([*best[:axis], value, *best[axis + 1 :]] for value in range(len(axes[axis])))
            best = min([best, *filter(allowed, others)], key=cost)
        times.update(_pairs(best))
        kept.append(best)
    return kept


def _pairs(point: Sequence[int]) -> list[tuple[int, int, int, int]]:
    return [(i, point[i], j, point[j]) for i, j in itertools.combinations(range(len(point)), 2)]
