"""Confidence intervals of metrics.

Intervals of per-item values and of proportions are computed by scipy. Resampling of whole sets, which distances between
distributions require, is implemented here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_ELEMENTS = 2**22  # elements of resampled data in memory at once
MAX_BCA_ITEMS = 10_000  # above, the O(1/N) corrections of BCa are not worth O(N^2) time
MIN_SET_SIZE = 10  # resamples of smaller sets are too often copies of a single item


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        estimate: the estimate.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    estimate: float
    low: float
    high: float


def mean(values: Tensor) -> Tensor:
    """Mean over the last dim."""
    return values.mean(-1)


def bootstrap_interval(
    values: Tensor | Sequence[Tensor],
    statistic: Callable[..., Tensor] = mean,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of a statistic of per-item values.

    Bias-corrected and accelerated bootstrap (BCa; Efron, "Better bootstrap confidence intervals", 1987) by
    ``scipy.stats.bootstrap``. Percentile intervals are used where BCa is not defined, and for more than 10,000 items.

    Args:
        values: values (N,), or several tensors (N,) whose items are paired and resampled together.
        statistic: function of one float64 tensor (..., N) per tensor in values that returns (...). Default: the mean.
        confidence: confidence level, between 0 and 1.
        resamples: number of bootstrap resamples.
        seed: random seed of the resampling.

    Returns:
        The statistic and its interval.

    Raises:
        ValueError: if a tensor is not (N,), has fewer than 2 items, or values are NaN or infinite.

    Example:
        >>> bootstrap_interval(torch.tensor([3.0, 3.0, 3.0]))
        Interval(estimate=3.0, low=3.0, high=3.0)
    """
    from scipy.stats import bootstrap

    columns = [_column(column) for column in ([values] if isinstance(values, Tensor) else values)]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(f"values: expected one length of at least 2, got {sorted(lengths)}")
    _check_options(confidence, resamples, minimum=1)

    def on_arrays(*arrays: Any, axis: int = -1) -> Any:
        return statistic(*(torch.tensor(np.moveaxis(array, axis, -1)) for array in arrays)).numpy()

    estimate = float(on_arrays(*columns))
    if all(bool((column == column[0]).all()) for column in columns):
        return Interval(estimate, estimate, estimate)
    n = len(columns[0])
    method = "BCa" if n <= MAX_BCA_ITEMS else "percentile"
    options: dict[str, Any] = {
        "n_resamples": resamples,
        "confidence_level": confidence,
        "batch": max(1, MAX_ELEMENTS // n),
        "vectorized": True,
        "paired": len(columns) > 1,
    }
    with np.errstate(all="ignore"):
        result = bootstrap(columns, on_arrays, method=method, rng=np.random.default_rng(seed), **options)
        low, high = map(float, result.confidence_interval)
        if not (math.isfinite(low) and math.isfinite(high)):
            low, high = map(float, np.quantile(result.bootstrap_distribution, _quantiles(confidence)))
    return Interval(estimate, low, high)


def proportion_interval(hits: Tensor, *, confidence: float = 0.95) -> Interval:
    """Proportion of True in a boolean tensor, with Wilson's score interval.

    Args:
        hits: boolean tensor (N,).
        confidence: confidence level, between 0 and 1.

    Returns:
        The proportion and its interval, which has nonzero width even for proportions 0 and 1.

    Raises:
        ValueError: if ``hits`` is not a non-empty boolean tensor (N,).

    Example:
        >>> proportion_interval(torch.tensor([True, True, False, True])).estimate
        0.75
    """
    from scipy.stats import binomtest

    if not isinstance(hits, Tensor) or hits.dtype != torch.bool or hits.ndim != 1 or not len(hits):
        got = f"{hits.dtype} {tuple(hits.shape)}" if isinstance(hits, Tensor) else type(hits).__name__
        raise ValueError(f"hits: expected a bool tensor (N,), got {got}")
    _check_options(confidence, 1, minimum=1)
    result = binomtest(int(hits.sum()), len(hits))
    interval = result.proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(float(result.statistic), float(interval.low), float(interval.high))


def bootstrap_sets(
    statistic: Callable[..., Tensor],
    sizes: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of a statistic of whole sets, such as a distance between distributions.

    Distances between finite sets are biased, and distances between resampled sets are biased more. Therefore the
    deviations of the resampled statistic from their mean are added to the estimate. The result is an interval of the
    expected statistic at the given set sizes; the bias at these sizes is not removed.

    Args:
        statistic: function of one float64 tensor (R, n) per set, with the number of times that each item is in each
            of R resamples, that returns (R,).
        sizes: number of items n of each set, at least 10.
        confidence: confidence level, between 0 and 1.
        resamples: number of bootstrap resamples. Sets are resampled independently.
        seed: random seed of the resampling.

    Returns:
        The statistic and its interval.

    Raises:
        ValueError: if a set has fewer than 10 items.
    """
    _check_options(confidence, resamples, minimum=2)
    if min(sizes) < MIN_SET_SIZE:
        raise ValueError(f"sizes: expected at least {MIN_SET_SIZE} items in each set, got {tuple(sizes)}")
    estimate = float(statistic(*(torch.ones(1, n, dtype=torch.float64) for n in sizes)))
    rng = np.random.default_rng(seed)
    rows = max(1, MAX_ELEMENTS // max(sizes))
    chunks = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        counts = (torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=count)).double() for n in sizes)
        chunks.append(statistic(*counts))
    values = torch.cat(chunks)
    deviations = values - values.mean()
    low, high = torch.quantile(deviations, torch.tensor(_quantiles(confidence), dtype=values.dtype)).tolist()
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


def _quantiles(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def _check_options(confidence: float, resamples: int, minimum: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    if not isinstance(resamples, int) or resamples < minimum:
        raise ValueError(f"resamples: expected a whole number of at least {minimum}, got {resamples!r}")
