"""Comparison and timing utilities of fastgen's tests and benchmarks, also for users."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROUNDING_ULPS = 4


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error. NaN and infinities must be at the same positions.

    Args:
        actual: result under test, of any shape.
        exact: reference result of the same shape.

    Returns:
        ``max |actual - exact|`` over the finite elements, 0 if there are none.

    Raises:
        AssertionError: if shapes or positions of NaN and infinities differ.

    Example:
        >>> largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.5
    """
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
    """Asserts that the error is at most twice the error of the plain PyTorch formula in the same dtype.

    A rounding tolerance of a few units in the last place of the largest value is added.

    Args:
        actual: result under test.
        plain: result of the plain formula in the dtype of ``actual``.
        exact: result of the formula in float64.
        name: name of the result in the error message.
        allowance: additional absolute tolerance, for example if large terms cancel.

    Raises:
        AssertionError: if the error is larger.

    Example:
        >>> x = torch.randn(8)
        >>> assert_accurate(x.half().exp(), x.half().exp(), x.half().double().exp())
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
    calls: dict[str, Callable[[], Any]],
    rounds: int = 15,
    warmup: int = 2,
    synchronize: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times calls alternately, so that changes of the machine's speed affect all calls equally.

    The order is reversed in every other round, because a call affects the caches of the next one.

    Args:
        calls: maps names to functions without arguments.
        rounds: number of timed rounds.
        warmup: number of untimed calls of each function.
        synchronize: whether to synchronize with the CUDA device before and after each call.
        clock: what measures the time, in seconds; ``time.process_time`` measures CPU time of all threads together,
            which other processes disturb less.

    Returns:
        Maps names to the times of all rounds, in seconds.

    Example:
        >>> sorted(interleaved_times({"a": lambda: None, "b": lambda: None}, rounds=3))
        ['a', 'b']
    """

    def once(call: Callable[[], Any]) -> float:
        if synchronize:
            torch.cuda.synchronize()
        start = clock()
        call()
        if synchronize:
            torch.cuda.synchronize()
        return clock() - start

    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            times[name].append(once(calls[name]))
    return times


def median_ratio(slower: Iterable[float], faster: Iterable[float]) -> float:
    """Median of the elementwise ratios of two sequences of times.

    Args:
        slower: numerators.
        faster: denominators, as many.

    Returns:
        ``median(slower / faster)``.

    Example:
        >>> median_ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
        3.0
    """
    return median(a / b for a, b in zip(slower, faster, strict=True))
