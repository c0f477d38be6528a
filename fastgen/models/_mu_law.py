"""The 256 levels of a sample, spaced by the mu-law (ITU-T G.711), and their probabilities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256
SMALLEST, LARGEST = -10.0, 3.0
"""Logarithms of a scale; the smallest steps of the levels are 2e-4 wide."""


def mu_law(audio: Tensor) -> Tensor:
    """Levels (int64, 0 to 255) of samples in [-1, 1]: even steps of sign(x) log(1 + 255 |x|) / log 256."""
    mu = LEVELS - 1
    audio = audio.clamp(-1, 1)
    compressed = audio.sign() * torch.log1p(mu * audio.abs()) / math.log1p(mu)
    return ((compressed + 1) * (0.5 * mu) + 0.5).floor().long()


def heights(levels: Tensor) -> Tensor:
    """Compressed samples in [-1, 1], float32: 2 level / 255 - 1."""
    return 2 * levels.float() / (LEVELS - 1) - 1


def inverse_mu_law(levels: Tensor) -> Tensor:
    """Samples in [-1, 1], float32, of levels, or of what lies between two."""
    mu = LEVELS - 1
    compressed = heights(levels)
    return compressed.sign() * torch.expm1(compressed.abs() * math.log1p(mu)) / mu


def level_borders() -> Tensor:
    """(257,) float32: samples between which the levels lie; the first and last are as good as infinite."""
    between = inverse_mu_law(torch.arange(LEVELS - 1) + 0.5)
    return torch.cat((torch.tensor([-1e6]), between, torch.tensor([1e6])))


def logistics_log_prob(centre: Tensor, log_scale: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """log P(low < sample < high) of a mixture of logistic distributions (..., components); weight: logits.

    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), which keeps its digits in both tails (Salimans et
    al., "PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood", 2017, has the mixture).
    """
    precision = torch.exp(-log_scale)
    below, above = (low[..., None] - centre) * precision, (high[..., None] - centre) * precision
    # From the borders: above - below would be 0 where the centre is far away.
    width = torch.log(-torch.expm1((low - high)[..., None] * precision))
    log_prob = F.logsigmoid(above) + F.logsigmoid(-below) + width
    return torch.logsumexp(log_prob + weight.log_softmax(-1), -1)


def logistics_level_logits(centre: Tensor, log_scale: Tensor, weight: Tensor, borders: Tensor) -> Tensor:
    """log P (..., 256) of all levels, as above: what is above a level is below the next."""
    precision = torch.exp(-log_scale)[..., None, :]
    places = (borders[:, None] - centre[..., None, :]) * precision
    width = torch.log(-torch.expm1((borders[:-1] - borders[1:])[:, None] * precision))
    tail = F.logsigmoid(places)
    log_prob = tail[..., 1:, :] + (tail - places)[..., :-1, :] + width
    return torch.logsumexp(log_prob + weight.log_softmax(-1)[..., None, :], -1)
