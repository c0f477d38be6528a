"""One row of the table, and how it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from fastgen.testing import median_ratio

Call = Callable[[], Any]

SECONDS = 1.5  # of measured calls for a row
FEWEST, MOST = 5, 25  # rounds
NOISE = 0.03
"""What the times of two calls of one kernel differ by: PyTorch's own kernel serves some rows, whose target is 1."""


@dataclass(frozen=True)
class Row:
    """``target``: PyTorch's time over fastgen's should be at least this. ``make``: fastgen's call and PyTorch's."""

    name: str
    shape: str
    peer: str
    target: float
    make: Callable[[], tuple[Call, Call]]


def is_short(ratio: float, target: float) -> bool:
    return ratio < target * (1 - NOISE)


def measure(row: Row, threads: int) -> dict[str, Any]:
    """Median and quartiles in ms of interleaved calls, and the median of their ratios.

    On one thread the CPU time of the process, which other processes hardly change; on more the elapsed time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    try:
        calls = row.make()
        for call in calls:
            call()
        times: tuple[list[float], list[float]] = [], []
        end = time.monotonic() + SECONDS
        while len(times[0]) < FEWEST or (len(times[0]) < MOST and time.monotonic() < end):
            order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
            for which in order:
                start = clock()
                calls[which]()
                times[which].append(clock() - start)
    finally:
        torch.set_num_threads(before)
    ratio = median_ratio(times[1], times[0])
    found: dict[str, Any] = {"name": row.name, "shape": row.shape, "threads": threads, "peer": row.peer}
    for who, measured in zip(("fastgen", "pytorch"), times, strict=True):
        low, _, high = quantiles(measured, n=4)
        found[f"{who}_ms"] = median(measured) * 1e3
        found[f"{who}_quartiles_ms"] = [low * 1e3, high * 1e3]
    return found | {"rounds": len(times[0]), "ratio": ratio, "target": row.target, "short": is_short(ratio, row.target)}
