"""Attention over its whole range: every pair of settings in CI, all of them behind a marker.

The full product is far too long for one run (hundreds of thousands of cases for each place), so FASTGEN_GRID=i/n takes
every n-th case from the i-th on; without it the marked test takes one in 5000.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.covering import covering
from tests.ops.attention_cases import (
    DIMS,
    DROPOUT,
    DTYPES,
    HEADS,
    LAYOUTS,
    LENGTHS,
    MASKS,
    SOFTCAPS,
    Case,
    check,
    check_second_order,
)

AXES = [DIMS, LENGTHS, LENGTHS, MASKS, DTYPES, HEADS, LAYOUTS, DROPOUT, SOFTCAPS]
# In CI: parts of a tile, one tile, and a little more than one and two of the longest.
FEWER_LENGTHS = (1, 3, 17, 64, 129, 257)
FIRST_ORDER_AXES = [DIMS, FEWER_LENGTHS, FEWER_LENGTHS, *AXES[3:]]


def products(dims: tuple[int, int], queries: int, keys: int) -> int:
    """What the kernels compute: tiles of 16 by 16 scores."""
    return max(dims) * (-(-queries // 16) * 16) * (-(-keys // 16) * 16)


def case_of(
    dims: Any, queries: int, keys: int, mask: str, dtype: Any, heads: Any, layout: str, dropout: float, softcap: float
) -> Case:
    batch = 2 if products(dims, queries, keys) < 200_000 else 1
    return Case(dtype, dims, queries, keys, mask, dropout, heads, layout, batch, softcap)


def affordable(point: Sequence[Any]) -> bool:
    """The emulator takes 25 us for a matrix instruction, and float32 needs six times as many: in CI, wide heads meet
    short lengths."""
    dims, queries, keys, _, dtype = point[:5]
    return products(dims, queries, keys) * (3 if dtype == torch.float32 else 1) <= 12 * 257 * 257


SECOND_ORDER_AXES = [
    # Each compiled tile, filled and not.
    [(5, 3), (8, 32), (24, 24), (64, 64), (32, 128), (72, 72), (96, 96), (20, 136), (128, 128), (256, 256)],
    (1, 3, 17, 40, 65),
    (1, 3, 17, 40, 65),
    *AXES[3:],
]


def affordable_second_order(point: Sequence[Any]) -> bool:
    """There are three times as many products, and more instructions between them."""
    dims, queries, keys, _, dtype = point[:5]
    return products(dims, queries, keys) * (3 if dtype == torch.float32 else 1) <= 64 * 65 * 65


def cost(point: Sequence[Any]) -> float:
    """What the emulator computes."""
    case = case_of(*point)
    return case.batch * case.heads[0] * products(*case[1:4]) * (3 if case.dtype == torch.float32 else 1)


PAIRS = [case_of(*point) for point in covering(FIRST_ORDER_AXES, affordable, cost)]
SECOND_ORDER_PAIRS = [
    case_of(*point)._replace(batch=1) for point in covering(SECOND_ORDER_AXES, affordable_second_order, cost)
]


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_every_pair_of_settings(case, attention_place):
    check(case, attention_place, zlib.crc32(str(case).encode()))


@pytest.mark.parametrize("case", SECOND_ORDER_PAIRS, ids=str)
def test_every_pair_of_settings_in_second_order(case, attention_place):
    check_second_order(case, attention_place, zlib.crc32(str(case).encode()))


@pytest.mark.parametrize("case", SECOND_ORDER_PAIRS, ids=str)
def test_every_pair_of_settings_in_second_order_with_the_helper_of_the_cpu(case):
    # With the gradient of a mask, second order is computed in PyTorch's tiles and tangents by a float32 kernel.
    tolerance = 2e-5 if case.dtype == torch.float32 else 0.0
    check_second_order(case, torch.device("cpu"), zlib.crc32(str(case).encode()), tolerance)


def share() -> list[Case]:
    first, step = map(int, os.environ.get("FASTGEN_GRID", "0/5000").split("/"))
    points = itertools.islice(itertools.product(*AXES), first, None, step)
    return [case_of(*point) for point in points]


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_the_full_product(attention_place, order):
    """All failures of the share at the end, each with its name."""
    cases, failures = share(), []
    for case in cases:
        try:
            (check, check_second_order)[order - 1](case, attention_place, zlib.crc32(str(case).encode()))
        except Exception as error:
            failures.append(f"{case}: {error}")
    print(f"{len(cases)} cases")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("pairs", "axes", "allowed"),
    [(PAIRS, FIRST_ORDER_AXES, affordable), (SECOND_ORDER_PAIRS, SECOND_ORDER_AXES, affordable_second_order)],
    ids=["first order", "second order"],
)
def test_the_selection_has_every_pair_that_ci_can_afford(pairs, axes, allowed):
    names = ("dims", "queries", "keys", "mask", "dtype", "heads", "layout", "dropout", "softcap")
    smallest = [axis[0] for axis in axes]
    for i, j in itertools.combinations(range(len(axes)), 2):
        met = {(getattr(case, names[i]), getattr(case, names[j])) for case in pairs}
        for a, b in itertools.product(axes[i], axes[j]):
            point = [*smallest]
            point[i], point[j] = a, b
            assert (a, b) in met or not allowed(point), f"{names[i]} {a} with {names[j]} {b}"
