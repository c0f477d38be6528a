"""The convolutional networks of the DCGAN, which others vary. Radford, Metz and Chintala (2016); see ``dcgan.py``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from fastgen.checks import require_choice, require_positive
from fastgen.models.adversarial import NoiseGANConfig
from fastgen.models.base import option

Norm = Literal["batch", "layer", "none"]

LARGEST_COARSE_SIZE = 7
SLOPE = 0.2
INITIAL_STD = 0.02


def halvings(image_size: int) -> int:
    """Times the size is halved until it is at most LARGEST_COARSE_SIZE.

    Raises:
        ValueError: it can't be halved so often, or is less than 8.
    """
    times = math.ceil(math.log2(max(1.0, image_size / LARGEST_COARSE_SIZE)))
    if image_size < 8 or image_size % (1 << times):
        raise ValueError(
            f"image_size: expected at least 8, and 4 to {LARGEST_COARSE_SIZE} times a power of 2"
            f" (8, 20, 28, 32, 64, ...), got {image_size}"
        )
    return times


def feature_sizes(image_size: int) -> list[int]:
    """Heights of the feature maps, from 4, 5, 6 or 7 up to the images'. Raises ValueError: as ``halvings``."""
    return [image_size >> i for i in reversed(range(halvings(image_size) + 1))]


def require_norm(norm: str, penalty: str) -> None:
    """Raises ValueError: an unknown norm, or one that mixes samples under a penalty of each alone."""
    require_choice("discriminator_norm", norm, get_args(Norm))
    if penalty == "gradient" and norm == "batch":
        raise ValueError(
            "discriminator_norm: expected layer or none with penalty gradient, which is of each sample alone,"
            " got 'batch'"
        )


@dataclass(frozen=True)
class ConvolutionalConfig(NoiseGANConfig):
    """An ``NoiseGANConfig`` with the sizes of both networks."""

    width: int = option(64, "channels at half the size; doubled at each halving")
    discriminator_norm: Norm = option("batch", "of the discriminator's features")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("width", self.width)
        halvings(self.image_size)
        require_norm(self.discriminator_norm, self.penalty)

    @property
    def halvings(self) -> int:
        """Times the size is halved: until it is at most LARGEST_COARSE_SIZE, and twice at least where that goes."""
        return max(halvings(self.image_size), 2 if self.image_size % 4 == 0 else 1)

    @property
    def coarse_size(self) -> int:
        return self.image_size >> self.halvings


def generator_layers(
    config: ConvolutionalConfig, inputs: int, extra: Callable[[int], list[nn.Module]] = lambda channels: []
) -> list[nn.Module]:
    """z (B, inputs) -> images (B, C, S, S) in [-1, 1]. extra: channels -> layers before each norm."""
    widths = [config.width << i for i in reversed(range(config.halvings))]
    layers: list[nn.Module] = [
        nn.Unflatten(1, (inputs, 1, 1)),
        nn.ConvTranspose2d(inputs, widths[0], config.coarse_size, bias=False),
    ]
    for wide, fine in itertools.pairwise(widths):
        layers += [*extra(wide), nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, fine, 4, 2, 1, bias=False)]
    layers += [*extra(widths[-1]), nn.BatchNorm2d(widths[-1]), nn.ReLU()]
    layers += [nn.ConvTranspose2d(widths[-1], config.channels, 4, 2, 1), nn.Tanh()]
    return layers


def discriminator_features(config: ConvolutionalConfig, inputs: int) -> list[nn.Module]:
    """(B, inputs, S, S) -> (B, width 2^(halvings - 1), coarse_size, coarse_size)."""
    widths = [config.width << i for i in range(config.halvings)]
    layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 4, 2, 1), nn.LeakyReLU(SLOPE)]
    for fine, wide in itertools.pairwise(widths):
        norm = _norm(config.discriminator_norm, wide)
        convolution = nn.Conv2d(fine, wide, 4, 2, 1, bias=isinstance(norm, nn.Identity))
        layers += [convolution, norm, nn.LeakyReLU(SLOPE)]
    return layers


def discriminator_score(config: ConvolutionalConfig) -> list[nn.Module]:
    """Those features -> scores (B,)."""
    return [nn.Conv2d(config.width << config.halvings - 1, 1, config.coarse_size), nn.Flatten(0)]


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), those of batch normalisation from N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)
