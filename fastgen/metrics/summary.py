"""Metrics with interval, unit, feature space and number of items, and summaries of per-item values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.metrics.bootstrap import Interval, bootstrap_interval, proportion_interval
from fastgen.metrics.likelihood import bits_per_dim, perplexity

NATS = {
    "elbo": "ELBO",
    "iwae": "importance-weighted bound",
    "nll": "negative log-likelihood",
    "kl": "KL divergence",
}
"""Names of per-item values in nats. Other values keep their name and have no unit."""


@dataclass(frozen=True)
class Metric:
    """Value of a metric. ``str`` formats it as a line; ``dataclasses.asdict`` is JSON-serializable.

    Attributes:
        name: name of the metric.
        value: its value.
        low: lower end of the 95% confidence interval, or None.
        high: upper end of the 95% confidence interval, or None.
        unit: unit of the value, if any.
        space: name of the feature space, if any.
        n: number of items of each kind.
        note: remark for the reader.

    Example:
        >>> print(Metric("recall", 0.871, 0.83, 0.9, space="pixels", n={"generated": 1000, "held-out": 359}))
        recall  0.871 [0.830, 0.900]  in pixels, 1,000 generated against 359 held-out
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    space: str = ""
    n: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        digits = _digits(self.low, self.high)
        number = _format(self.value, digits)
        if self.low is not None and self.high is not None:
            number += f" [{_format(self.low, digits)}, {_format(self.high, digits)}]"
        parts = [self.name, f"{number} {self.unit}".rstrip()]
        where = [f"in {self.space}"] if self.space else []
        between = " against " if self.space else " of "
        where += [between.join(f"{count:,} {what}" for what, count in self.n.items())] if self.n else []
        if where:
            parts.append(", ".join(where))
        return "  ".join(parts) + (f" ({self.note})" if self.note else "")


def summarize(
    values: Mapping[str, Tensor],
    dims: int | None = None,
    tokens: int | Tensor | None = None,
    *,
    items: str = "held-out items",
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """Means of per-item values with confidence intervals, also in the usual units of likelihoods.

    Bits per dimension, nats per token and perplexity are computed from "iwae", otherwise "elbo", otherwise "nll": if
    there is a bound, "nll" is its reconstruction term only.

    Args:
        values: maps names to per-item values (N,). "elbo" and "iwae" are lower bounds of log p(x), "nll" and "kl" are
            costs, all in nats per item. "tokens" is the same as the argument ``tokens``. "characters" is the number of
            characters of the predicted tokens of each item and adds nats per character.
        dims: number of dimensions of an item, C * H * W for images. Adds bits per dimension.
        tokens: number of predicted tokens of an item, a number or (N,). Adds nats per token and perplexity.
        items: description of the items.
        resamples: number of bootstrap resamples.
        seed: random seed of the resampling.

    Returns:
        The metrics.

    Raises:
        ValueError: if values are not (N,), NaN or infinite; ``tokens`` or ``dims`` is below 1 or given without a
            likelihood.

    Example:
        >>> for metric in summarize({"nll": torch.tensor([8.0, 8.0])}, dims=4):
        ...     print(metric)
        negative log-likelihood  8 [8, 8] nats  2 held-out items
        bits per dimension  2.885 [2.885, 2.885] bits/dim  2 held-out items
    """
    values = dict(values)
    token_counts, characters = values.pop("tokens", None), values.pop("characters", None)
    tokens = token_counts if tokens is None else tokens
    metrics = []
    for name, column in values.items():
        try:
            interval = bootstrap_interval(column, resamples=resamples, seed=seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        unit = "nats" if name in NATS else ""
        metrics.append(_metric(NATS.get(name, name), interval, unit=unit, n={items: len(column)}))
    if dims is None and tokens is None:
        return metrics

    source = next((name for name in ("iwae", "elbo", "nll") if name in values), None)
    if source is None:
        raise ValueError(f"values: expected iwae, elbo or nll for bits and perplexity, got {sorted(values)}")
    nats = values[source].detach().cpu().double() * (1 if source == "nll" else -1)
    n, note = {items: len(nats)}, "" if source == "nll" else f"at most, by the {NATS[source]}"
    if dims is not None:
        interval = bootstrap_interval(bits_per_dim(nats, dims), resamples=resamples, seed=seed)
        metrics.append(_metric("bits per dimension", interval, unit="bits/dim", n=n, note=note))
    if tokens is not None:
        counts = torch.as_tensor(tokens).detach().cpu().double().expand(len(nats))
        if not bool((counts >= 1).all()):
            raise ValueError(f"tokens: expected at least 1 in each item, got {float(counts.min()):g}")
        interval = bootstrap_interval([nats, counts], _ratio, resamples=resamples, seed=seed)
        n = {"tokens": int(counts.sum()), **n}
        metrics.append(_metric("nats per token", interval, unit="nats/token", n=n, note=note))
        interval = Interval(*(perplexity(end) for end in (interval.estimate, interval.low, interval.high)))
        metrics.append(_metric("perplexity", interval, n=n, note=note))
    if characters is not None:
        counts = characters.detach().cpu().double()
        interval = bootstrap_interval([nats, counts], _ratio, resamples=resamples, seed=seed)
        n = {"characters": int(counts.sum()), **n}
        metrics.append(_metric("nats per character", interval, unit="nats/character", n=n, note=note))
    return metrics


def proportion(name: str, hits: Tensor, *, space: str = "", n: Mapping[str, int], note: str = "") -> Metric:
    """Proportion of True in hits (N,), with Wilson's interval."""
    return _metric(name, proportion_interval(hits), space=space, n=n, note=note)


def _ratio(cost: Tensor, count: Tensor) -> Tensor:
    return cost.sum(-1) / count.sum(-1)


def _metric(
    name: str, interval: Interval, *, unit: str = "", space: str = "", n: Mapping[str, int], note: str = ""
) -> Metric:
    return Metric(name, interval.estimate, interval.low, interval.high, unit, space, dict(n), note)


def _digits(low: float | None, high: float | None) -> int | None:
    """Number of decimals that shows half the width of the interval with two significant digits."""
    if low is None or high is None or not math.isfinite(high - low) or high <= low:
        return None
    return min(max(1 - math.floor(math.log10((high - low) / 2)), 0), 6)


def _format(number: float, digits: int | None) -> str:
    return f"{number:.4g}" if digits is None else f"{number:,.{digits}f}"
