"""Likelihoods in the units of the field. Natural logarithms throughout; nats unless a name says bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def bits_per_dim(nats: Number, dims: int) -> Number:
    """-log p(x) in nats per item -> bits per dimension. ``dims``: numbers in an item, C * H * W of an image."""
    if not isinstance(dims, int) or dims < 1:
        raise ValueError(f"dims: expected a whole number of at least 1, got {dims!r}")
    return nats / (dims * math.log(2))


def perplexity(nats_per_token: Number) -> Number:
    """exp of the mean -log p(token), in nats; inf where that overflows."""
    if isinstance(nats_per_token, Tensor):
        return nats_per_token.exp()
    return math.inf if nats_per_token >= 709 else math.exp(nats_per_token)  # of NaN: NaN


class ImportanceWeightedBound:
    """Running log(1/K sum_k w_k) for each of B items, in float64 and O(B) memory.

    With w_k = p(x, z_k) / q(z_k | x) its expectation is a lower bound on log p(x) in nats, equal to the ELBO for
    K = 1 and no looser for each further sample (Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders",
    2016).

    >>> bound = ImportanceWeightedBound()
    >>> for log_weights in ([0.0, -1.0], [0.0, -1.0]):
    ...     bound.update(torch.tensor(log_weights))
    >>> bound.value()
    tensor([ 0., -1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.samples = 0
        self._total: Tensor | None = None

    def update(self, log_weights: Tensor) -> None:
        """One more sample of each item: log weights (B,) in nats; -inf is a weight of 0. NaN or +inf: ValueError."""
        if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
            got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
            raise TypeError(f"log_weights: expected a tensor of floating point, got {got}")
        wanted = "(B,)" if self._total is None else str(tuple(self._total.shape))
        if log_weights.ndim != 1 or (self._total is not None and log_weights.shape != self._total.shape):
            raise ValueError(f"log_weights: expected shape {wanted} for each sample, got {tuple(log_weights.shape)}")
        bad = int((log_weights.isnan() | log_weights.isposinf()).sum())
        if bad:
            raise ValueError(f"log_weights: expected numbers below +inf, got {bad} of {len(log_weights)} NaN or +inf")
        weights = log_weights.detach().cpu().double()
        self._total = weights if self._total is None else torch.logaddexp(self._total, weights)
        self.samples += 1

    def value(self) -> Tensor:
        """The bound (B,), float64 on the CPU."""
        if self._total is None:
            raise ValueError("log_weights: expected at least one sample, got none")
        return self._total - math.log(self.samples)


def importance_weighted_bound(log_weights: Tensor | Iterable[Tensor]) -> Tensor:
    """The bound of ``ImportanceWeightedBound`` in one call.

    Args:
        log_weights: (K, B), or K tensors (B,), say from a generator expression that draws them one by one.

    Returns:
        (B,) float64 on the CPU, in nats.
    """
    if isinstance(log_weights, Tensor) and log_weights.ndim != 2:
        raise ValueError(f"log_weights: expected shape (K, B), got {tuple(log_weights.shape)}")
    bound = ImportanceWeightedBound()
    for sample in log_weights:
        bound.update(sample)
    return bound.value()
