"""Linear prediction of audio: cosine transforms of coefficients, and predictors of harmonic sounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_transform(n: int) -> Tensor:
    """The orthonormal DCT-II, (n, n); row k has k half waves."""
    angle = math.pi / n * torch.outer(torch.arange(n), torch.arange(n) + 0.5)
    scale = torch.full((n, 1), math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return scale * angle.cos()


def harmonic_predictors(count: int, reach: int) -> Tensor:
    """Coefficients (count, reach), float32, that predict harmonic sounds of ``count`` periods from the samples before.

    The periods are from ``reach`` samples to an eighth of it, evenly spaced in pitch. Each row is the least-squares
    prediction for random phases and amplitudes of 1 / harmonic, with a thousandth of noise.
    """
    period = reach * 8.0 ** -torch.linspace(0, 1, count, dtype=torch.float64)
    harmonic = torch.arange(1, reach // 2 + 2, dtype=torch.float64)
    power = torch.where(2 * harmonic <= period[:, None], harmonic**-2, 0)
    power[:, 0] = 1  # also where the period is below two samples
    lag = torch.arange(reach + 1, dtype=torch.float64)
    angle = 2 * math.pi * harmonic / period[:, None]
    covariance = (power[..., None] * (angle[..., None] * lag).cos()).sum(1)  # (count, lag)
    place = torch.arange(reach)
    matrix = covariance[:, (place[:, None] - place).abs()]
    matrix = matrix + 1e-3 * covariance[:, 0, None, None] * torch.eye(reach, dtype=torch.float64)
    predictors: Tensor = torch.linalg.solve(matrix, covariance[:, reach - place])
    return predictors.float()
