"""How far a figure would move with other data: intervals by resampling what was measured.

scipy does the resampling of per-item values and the intervals of proportions; only resampling whole sets, as the
distances between distributions need it, is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_NUMBERS = 2**22  # numbers of resampled data in memory at once
MOST_JACKKNIFED = 10_000  # beyond, BCa's corrections, O(1/N), are not worth their O(N^2)
FEWEST_RESAMPLED = 10  # a set with fewer items is too often drawn as copies of a single one


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def mean(values: Tensor) -> Tensor:
    """Over the last dim."""
    return values.mean(-1)


def bootstrap_interval(
    values: Tensor | Sequence[Tensor],
    statistic: Callable[..., Tensor] = mean,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The statistic of the values, and its interval over other draws of as many items.

    Bias-corrected and accelerated (Efron, "Better bootstrap confidence intervals", 1987), by ``scipy.stats.bootstrap``;
    percentiles where that correction is not defined, or the items are more than 10,000.

    Args:
        values: (N,), or several such tensors whose items belong together: they are resampled as one.
        statistic: given as many tensors (..., N) float64, gives (...); default the mean.
        confidence: of the interval, between 0 and 1.
        resamples: how many.
        seed: of the resampling.

    Raises:
        ValueError: not of shape (N,), fewer than 2 items, values that are NaN or infinite.

    >>> bootstrap_interval(torch.tensor([3.0, 3.0, 3.0]))
    Interval(estimate=3.0, low=3.0, high=3.0)
    """
    from scipy.stats import bootstrap

    columns = [_column(column) for column in ([values] if isinstance(values, Tensor) else values)]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(f"values: expected one length of at least 2, got {sorted(lengths)}")
    _check_options(confidence, resamples, fewest=1)

    def on_arrays(*arrays: Any, axis: int = -1) -> Any:
        return statistic(*(torch.tensor(np.moveaxis(array, axis, -1)) for array in arrays)).numpy()

    estimate = float(on_arrays(*columns))
    if all(bool((column == column[0]).all()) for column in columns):
        return Interval(estimate, estimate, estimate)
    n = len(columns[0])
    method = "BCa" if n <= MOST_JACKKNIFED else "percentile"
    options: dict[str, Any] = {
        "n_resamples": resamples,
        "confidence_level": confidence,
        "batch": max(1, MOST_NUMBERS // n),
        "vectorized": True,
        "paired": len(columns) > 1,
    }
    with np.errstate(all="ignore"):
        found = bootstrap(columns, on_arrays, method=method, rng=np.random.default_rng(seed), **options)
        low, high = map(float, found.confidence_interval)
        if not (math.isfinite(low) and math.isfinite(high)):
            low, high = map(float, np.quantile(found.bootstrap_distribution, _ends(confidence)))
    return Interval(estimate, low, high)


def proportion_interval(hits: Tensor, *, confidence: float = 0.95) -> Interval:
    """The share of True among hits (N,) bool, with Wilson's score interval, which has width even at 0 and 1."""
    from scipy.stats import binomtest

    if not isinstance(hits, Tensor) or hits.dtype != torch.bool or hits.ndim != 1 or not len(hits):
        got = f"{hits.dtype} {tuple(hits.shape)}" if isinstance(hits, Tensor) else type(hits).__name__
        raise ValueError(f"hits: expected a bool tensor (N,), got {got}")
    _check_options(confidence, 1, fewest=1)
    found = binomtest(int(hits.sum()), len(hits))
    ends = found.proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(float(found.statistic), float(ends.low), float(ends.high))


def bootstrap_sets(
    statistic: Callable[..., Tensor],
    sizes: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """The statistic of whole sets, and its interval over other sets of the same sizes.

    A distance of finite sets is biased, and that of resampled ones twice. The interval takes the spread of the
    resampled statistic about its own mean and lays it around the estimate: it is one for the expected statistic at
    these sizes, whose own bias it does not remove.

    Args:
        statistic: given counts (R, n) float64 for each set, how often each of its items was drawn, gives (R,).
        sizes: n of each set, at least 10 each.
        confidence: of the interval, between 0 and 1.
        resamples: how many; each set is resampled on its own.
        seed: of the resampling.
    """
    _check_options(confidence, resamples, fewest=2)
    if min(sizes) < FEWEST_RESAMPLED:
        raise ValueError(f"sizes: expected at least {FEWEST_RESAMPLED} items in each set, got {tuple(sizes)}")
    estimate = float(statistic(*(torch.ones(1, n, dtype=torch.float64) for n in sizes)))
    rng = np.random.default_rng(seed)
    rows = max(1, MOST_NUMBERS // max(sizes))
    drawn = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        counts = (torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=count)).double() for n in sizes)
        drawn.append(statistic(*counts))
    values = torch.cat(drawn)
    spread = values - values.mean()
    low, high = torch.quantile(spread, torch.tensor(_ends(confidence), dtype=spread.dtype)).tolist()
    return Interval(estimate, estimate + low, estimate + high)


def _column(values: Tensor) -> Any:
    if not isinstance(values, Tensor) or values.ndim != 1:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"values: expected a tensor (N,), got {got}")
    column = values.detach().cpu().double()
    bad = int((~column.isfinite()).sum())
    if bad:
        raise ValueError(f"values: expected finite numbers, got {bad} of {len(column)} NaN or infinite")
    return column.numpy()


def _ends(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def _check_options(confidence: float, resamples: int, fewest: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    if not isinstance(resamples, int) or resamples < fewest:
        raise ValueError(f"resamples: expected a whole number of at least {fewest}, got {resamples!r}")
