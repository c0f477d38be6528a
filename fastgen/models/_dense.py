"""Networks of linear layers between vectors and images."""

from __future__ import annotations

import itertools
import math

from torch import nn

from fastgen.models.adversarial import NoiseGANConfig

SLOPE = 0.2


def generator_layers(config: NoiseGANConfig, inputs: int, width: int, depth: int) -> list[nn.Module]:
    """(B, inputs) -> images (B, C, S, S) in [-1, 1], by ``depth`` hidden layers of ``width``."""
    shape = (config.channels, config.image_size, config.image_size)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.LeakyReLU(SLOPE)]
    return [*layers, nn.Linear(width, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape)]


def discriminator_features(inputs: int, width: int, depth: int) -> list[nn.Module]:
    """(B, inputs) -> (B, width), by ``depth`` hidden layers."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(before, after), nn.LeakyReLU(SLOPE)]
    return layers
