"""Audio samples as 256 mu-law levels, and their probabilities under a mixture of logistics."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256


def mu_law(audio: Tensor) -> Tensor:
    """Samples in [-1, 1] -> levels, int64 in 0 .. 255, uniform in sign(x) log(1 + 255 |x|) / log 256 (ITU-T G.711)."""
    mu = LEVELS - 1
    audio = audio.clamp(-1, 1)
    compressed = audio.sign() * torch.log1p(mu * audio.abs()) / math.log1p(mu)
    return ((compressed + 1) * (0.5 * mu) + 0.5).floor().long()


def companded(levels: Tensor) -> Tensor:
    """Levels -> companded samples in [-1, 1], float32: 2 level / 255 - 1."""
    return 2 * levels.float() / (LEVELS - 1) - 1


def inverse_mu_law(levels: Tensor) -> Tensor:
    """Levels, or positions between levels -> samples in [-1, 1], float32."""
    mu = LEVELS - 1
    compressed = companded(levels)
    return compressed.sign() * torch.expm1(compressed.abs() * math.log1p(mu)) / mu


def level_borders() -> Tensor:
    """Borders of the levels' intervals, (257,) float32; the first and last stand for -inf and inf."""
    between = inverse_mu_law(torch.arange(LEVELS - 1) + 0.5)
    return torch.cat((torch.tensor([-1e6]), between, torch.tensor([1e6])))


def logistics_log_prob(center: Tensor, log_scale: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """log P(low < sample < high) of a mixture of logistics.

    Salimans et al., "PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood" (2017). The
    identity sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)) is accurate in both tails.

    Args:
        center, log_scale, weight: means, log scales and logits of the components, (..., components).
        low, high: ends of the interval, (...).
    """
    precision = torch.exp(-log_scale)
    below, above = (low[..., None] - center) * precision, (high[..., None] - center) * precision
    # Not from above - below, which is 0 in floating point if the center is far away.
    width = torch.log(-torch.expm1((low - high)[..., None] * precision))
    log_prob = F.logsigmoid(above) + F.logsigmoid(-below) + width
    return torch.logsumexp(log_prob + weight.log_softmax(-1), -1)


def logistics_level_logits(center: Tensor, log_scale: Tensor, weight: Tensor, borders: Tensor) -> Tensor:
    """``logistics_log_prob`` of all levels, (..., 256), with one sigmoid per border."""
    precision = torch.exp(-log_scale)[..., None, :]
    places = (borders[:, None] - center[..., None, :]) * precision
    width = torch.log(-torch.expm1((borders[:-1] - borders[1:])[:, None] * precision))
    tail = F.logsigmoid(places)
    log_prob = tail[..., 1:, :] + (tail - places)[..., :-1, :] + width
    return torch.logsumexp(log_prob + weight.log_softmax(-1)[..., None, :], -1)
