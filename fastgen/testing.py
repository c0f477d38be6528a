"""Tolerances, comparison and timing, shared by fastgen's tests and benchmarks and open to its users."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROUNDING_ULPS = 4


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual - exact|; NaN and infinities must stand in the same places."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    if actual.shape != exact.shape:
        raise AssertionError(f"expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    finite = exact.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        raise AssertionError(f"{int((actual.isfinite() != finite).sum())} values are finite on one side only")
    if not torch.equal(actual[~finite].nan_to_num(nan=0.5), exact[~finite].nan_to_num(nan=0.5)):
        raise AssertionError("infinities or NaN differ")
    return float((actual[finite] - exact[finite]).abs().max()) if bool(finite.any()) else 0.0


def assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result", allowance: float = 0.0) -> None:
    """The rule for low precision: at most twice the error of the plain PyTorch formula in the same dtype.

    Args:
        actual: the result under test. plain: the formula in actual's dtype. exact: the formula in float64.
        allowance: what is granted besides, where large terms cancel for instance.

    A rounding allowance of a few units in the last place of the largest value is added.

    Raises:
        AssertionError: the error is larger; the message gives both.
    """
    error, peer = largest_error(actual, exact), largest_error(plain, exact)
    finite = exact.detach()[exact.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    allowance += ROUNDING_ULPS * torch.finfo(actual.dtype).eps * size
    if error > 2 * peer + allowance:
        raise AssertionError(
            f"{name}: largest error {error:.3e}, the plain formula's {peer:.3e} in {actual.dtype};"
            f" allowed {2 * peer + allowance:.3e}"
        )


def interleaved_times(
    calls: dict[str, Callable[[], Any]], rounds: int = 15, warmup: int = 2, synchronize: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn so that a drift of the machine's speed meets all alike.

    The order turns too: what ran just before leaves caches and memory behind that help or hinder the next.
    """

    def once(call: Callable[[], Any]) -> float:
        if synchronize:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if synchronize:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(once(calls[name]))
    return times


def median_ratio(slower: Iterable[float], faster: Iterable[float]) -> float:
    """Median over the rounds of slower / faster, pair by pair."""
    return median(a / b for a, b in zip(slower, faster, strict=True))
