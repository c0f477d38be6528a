"""Pairwise covering sets of settings, where the full product is too large."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any


def covering(axes: list[Sequence[Any]], allowed: Callable[[Sequence[Any]], bool]) -> list[list[Any]]:
    """Points that contain every pair of values of different axes, where an allowed point contains both.

    Greedy, as in Cohen et al., "The AETG system" (1997): each point takes a pair that is missing and, of fifty random
    ways to complete it, the one with most missing pairs.
    """
    draw = random.Random(0)
    pairs = list(itertools.combinations(range(len(axes)), 2))
    missing = {(i, a, j, b) for i, j in pairs for a in range(len(axes[i])) for b in range(len(axes[j]))}
    points = []
    for i, a, j, b in sorted(missing):
        if (i, a, j, b) not in missing:
            continue
        best: tuple[int, list[int]] = (0, [])
        for _ in range(50):
            chosen = [draw.randrange(len(axis)) for axis in axes]
            chosen[i], chosen[j] = a, b
            if allowed([axis[c] for axis, c in zip(axes, chosen, strict=True)]):
                new = sum((k, chosen[k], m, chosen[m]) in missing for k, m in pairs)
                best = max(best, (new, chosen))
        if best[0] > 0:
            points.append(best[1])
            missing -= {(k, best[1][k], m, best[1][m]) for k, m in pairs}
    return [[axis[c] for axis, c in zip(axes, point, strict=True)] for point in points]
