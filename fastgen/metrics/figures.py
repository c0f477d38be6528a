"""Figures that say what they are: number, interval, unit, feature space, and of how many items."""

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
"""Scores that are nats, and what they are called; any other keeps its name and has no unit."""


@dataclass(frozen=True)
class Figure:
    """One number to report. ``str`` gives the line; ``dataclasses.asdict`` what goes into JSON.

    low, high: the ends of its 95% interval, None where none was asked for. space: of the features it was measured
    in, if any. n: how many items of which kind. note: what a reader must know beside it.

    >>> print(Figure("recall", 0.871, 0.83, 0.9, space="pixels", n={"generated": 1000, "held-out": 359}))
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
        number = _written(self.value, digits)
        if self.low is not None and self.high is not None:
            number += f" [{_written(self.low, digits)}, {_written(self.high, digits)}]"
        parts = [self.name, f"{number} {self.unit}".rstrip()]
        where = [f"in {self.space}"] if self.space else []
        between = " against " if self.space else " of "
        where += [between.join(f"{count:,} {what}" for what, count in self.n.items())] if self.n else []
        if where:
            parts.append(", ".join(where))
        return "  ".join(parts) + (f" ({self.note})" if self.note else "")


def summarise(
    values: Mapping[str, Tensor],
    dims: int | None = None,
    tokens: int | Tensor | None = None,
    *,
    items: str = "held-out items",
    resamples: int = 1000,
    seed: int = 0,
) -> list[Figure]:
    """Means of what a model gave for each item, and the units that papers report them in.

    bits/dim, nats per token and perplexity come from the bound where there is one ("iwae", else "elbo"), as "nll" is
    then only the reconstruction's share, and from "nll" otherwise.

    Args:
        values: name -> (N,). "elbo" and "iwae" are bounds on log p(x), "nll" and "kl" costs, in nats per item. "tokens"
            is taken as the argument below; "characters" are those of an item's predicted tokens, and add nats per
            character.
        dims: numbers in an item, C * H * W of an image: adds bits/dim.
        tokens: predicted tokens in an item, one number or (N,): adds nats per token and perplexity.
        items: what they are, for the line.
        resamples, seed: of the intervals.

    Raises:
        ValueError: values of other shapes, NaN or infinite; tokens or dims below 1, or without a likelihood.
    """
    values = dict(values)
    counted, characters = values.pop("tokens", None), values.pop("characters", None)
    tokens = counted if tokens is None else tokens
    figures = []
    for name, column in values.items():
        try:
            found = bootstrap_interval(column, resamples=resamples, seed=seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        unit = "nats" if name in NATS else ""
        figures.append(_figure(NATS.get(name, name), found, unit=unit, n={items: len(column)}))
    if dims is None and tokens is None:
        return figures

    source = next((name for name in ("iwae", "elbo", "nll") if name in values), None)
    if source is None:
        raise ValueError(f"values: expected iwae, elbo or nll for bits and perplexity, got {sorted(values)}")
    nats = values[source].detach().cpu().double() * (1 if source == "nll" else -1)
    n, note = {items: len(nats)}, "" if source == "nll" else f"at most, by the {NATS[source]}"
    if dims is not None:
        found = bootstrap_interval(bits_per_dim(nats, dims), resamples=resamples, seed=seed)
        figures.append(_figure("bits per dimension", found, unit="bits/dim", n=n, note=note))
    if tokens is not None:
        counts = torch.as_tensor(tokens).detach().cpu().double().expand(len(nats))
        if not bool((counts >= 1).all()):
            raise ValueError(f"tokens: expected at least 1 in each item, got {float(counts.min()):g}")
        found = bootstrap_interval([nats, counts], _ratio, resamples=resamples, seed=seed)
        n = {"tokens": int(counts.sum()), **n}
        figures.append(_figure("nats per token", found, unit="nats/token", n=n, note=note))
        found = Interval(*(perplexity(end) for end in (found.estimate, found.low, found.high)))
        figures.append(_figure("perplexity", found, n=n, note=note))
    if characters is not None:
        found = bootstrap_interval([nats, characters.detach().cpu().double()], _ratio, resamples=resamples, seed=seed)
        n = {"characters": int(characters.sum()), **n}
        figures.append(_figure("nats per character", found, unit="nats/character", n=n, note=note))
    return figures


def share(name: str, hits: Tensor, *, space: str = "", n: Mapping[str, int], note: str = "") -> Figure:
    """The share of True among hits (N,), with Wilson's interval."""
    return _figure(name, proportion_interval(hits), space=space, n=n, note=note)


def _ratio(cost: Tensor, count: Tensor) -> Tensor:
    return cost.sum(-1) / count.sum(-1)


def _figure(
    name: str, found: Interval, *, unit: str = "", space: str = "", n: Mapping[str, int], note: str = ""
) -> Figure:
    return Figure(name, found.estimate, found.low, found.high, unit, space, dict(n), note)


def _digits(low: float | None, high: float | None) -> int | None:
    """Decimals that show half the interval's width to two figures."""
    if low is None or high is None or not math.isfinite(high - low) or high <= low:
        return None
    return min(max(1 - math.floor(math.log10((high - low) / 2)), 0), 6)


def _written(number: float, digits: int | None) -> str:
    return f"{number:.4g}" if digits is None else f"{number:,.{digits}f}"
