"""Likelihoods in bits per dimension and perplexity, and importance-weighted bounds. Likelihoods are in nats."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def bits_per_dim(nats: Number, dims: int) -> Number:
    """Converts a negative log-likelihood in nats per item to bits per dimension.

    Args:
        nats: -log p(x) in nats per item, a number or a tensor of any shape.
        dims: number of dimensions of an item, C * H * W for images.

    Returns:
        ``nats / (dims * log 2)``.

    Raises:
        ValueError: if ``dims`` is not a positive integer.

    Example:
        >>> round(bits_per_dim(64 * math.log(2), 64), 6)
        1.0
    """
    if not isinstance(dims, int) or dims < 1:
        raise ValueError(f"dims: expected a whole number of at least 1, got {dims!r}")
    return nats / (dims * math.log(2))


def perplexity(nats_per_token: Number) -> Number:
    """Perplexity, the exponential of the mean negative log-likelihood of a token.

    Args:
        nats_per_token: mean of -log p(token) in nats, a number or a tensor of any shape.

    Returns:
        ``exp(nats_per_token)``; inf on overflow.

    Example:
        >>> round(perplexity(math.log(50)), 6)
        50.0
    """
    if isinstance(nats_per_token, Tensor):
        return nats_per_token.exp()
    return math.inf if nats_per_token >= 709 else math.exp(nats_per_token)  # NaN is propagated


class ImportanceWeightedBound:
    """Streaming importance-weighted bound ``log(1/K sum_k w_k)`` of B items, in float64 with O(B) memory.

    Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016). With ``w_k = p(x, z_k) / q(z_k | x)``,
    the expectation is a lower bound of log p(x) in nats. It is the ELBO for K = 1 and does not decrease with K.

    Attributes:
        samples: number of samples K so far.

    Example:
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
        """Adds one sample of each item.

        Args:
            log_weights: ``log w_k`` (B,) in nats; -inf is a weight of 0.

        Raises:
            TypeError: if log weights are not a floating-point tensor.
            ValueError: if the shape differs between calls, or log weights are NaN or +inf.
        """
        if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
            got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
            raise TypeError(f"log_weights: expected a tensor of floating point, got {got}")
        expected = "(B,)" if self._total is None else str(tuple(self._total.shape))
        if log_weights.ndim != 1 or (self._total is not None and log_weights.shape != self._total.shape):
            raise ValueError(f"log_weights: expected shape {expected} for each sample, got {tuple(log_weights.shape)}")
        bad = int((log_weights.isnan() | log_weights.isposinf()).sum())
        if bad:
            raise ValueError(f"log_weights: expected numbers below +inf, got {bad} of {len(log_weights)} NaN or +inf")
        weights = log_weights.detach().cpu().double()
        self._total = weights if self._total is None else torch.logaddexp(self._total, weights)
        self.samples += 1

    def value(self) -> Tensor:
        """Returns the bound (B,), float64 on the CPU."""
        if self._total is None:
            raise ValueError("log_weights: expected at least one sample, got none")
        return self._total - math.log(self.samples)


def importance_weighted_bound(log_weights: Tensor | Iterable[Tensor]) -> Tensor:
    """Importance-weighted bound of log p(x); see ``ImportanceWeightedBound``.

    Args:
        log_weights: ``log w_k`` (K, B) in nats, or an iterable of K tensors (B,).

    Returns:
        The bound (B,) in nats, float64 on the CPU.

    Raises:
        TypeError: if log weights are not floating-point tensors.
        ValueError: if shapes do not match, there is no sample, or log weights are NaN or +inf.
    """
    if isinstance(log_weights, Tensor) and log_weights.ndim != 2:
        raise ValueError(f"log_weights: expected shape (K, B), got {tuple(log_weights.shape)}")
    bound = ImportanceWeightedBound()
    for sample in log_weights:
        bound.update(sample)
    return bound.value()
