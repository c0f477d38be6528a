"""A conditional generative adversarial network of linear layers.

Mirza and Osindero, "Conditional generative adversarial nets" (2014): both networks are given the class of the image,
as a learned vector that is joined to what they see:

    z, embedding(label) -> [linear, norm, LeakyReLU] -> linear, tanh -> images
    images, embedding(label) -> [linear, LeakyReLU] -> linear -> score

With ``projection`` the discriminator's features h of the images meet the class at their end,
``score = a(h) + <embedding(label), h>``: Miyato and Koyama, "cGANs with projection discriminator" (2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models._conditional import ConditionalConfig, ConditionalGAN, LabelledGenerator
from fastgen.models._dense import discriminator_features, generator_layers
from fastgen.models.adversarial import Layers
from fastgen.models.base import option
from fastgen.models.conditioning import LabelOptions


@dataclass(frozen=True)
class CGANConfig(ConditionalConfig):
    """Sizes of a conditional GAN and how it learns. ValueError names the field, what was expected and what came."""

    penalty_weight: float = option(5.0, "what the penalty is multiplied by (gamma, lambda)")
    width: int = option(256, "of the hidden layers")
    depth: int = option(3, "hidden layers of each network")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "depth"):
            require_positive(name, getattr(self, name))

    @property
    def pixels(self) -> int:
        return math.prod((self.channels, self.image_size, self.image_size))


class Discriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1], labels (B,) -> scores (B,), logits: high means real."""

    def __init__(self, config: CGANConfig) -> None:
        super().__init__()
        joined = 0 if config.projection else config.embedding_dim
        self.projection = config.projection
        self.embedding = nn.Embedding(config.classes, config.width if config.projection else config.embedding_dim)
        self.features = Layers(*discriminator_features(config.pixels + joined, config.width, config.depth))
        self.score = nn.Linear(config.width, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x, given = images.flatten(1), self.embedding(labels)
        h = self.features(x if self.projection else torch.cat([x, given], dim=1))
        scores: Tensor = self.score(h)[:, 0]
        return scores + (given * h).sum(dim=1) if self.projection else scores


class CGAN(ConditionalGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1]; labels (B,) int64.

    Example:
        >>> model = CGAN(CGANConfig(image_size=8, classes=3, width=16))
        >>> model.draw(6, LabelOptions(label=2)).pixels.shape
        torch.Size([6, 1, 8, 8])
    """

    name = "cgan"
    summary = "conditional GAN of linear layers: draws the class it is asked for"
    config_class, sampling_class = CGANConfig, LabelOptions
    train_defaults: ClassVar = {"epochs": 150.0, "batch_size": 64, "average_decay": 0.998}
    config: CGANConfig

    def __init__(self, config: CGANConfig) -> None:
        super().__init__(config)
        inputs = config.latent_dim + config.embedding_dim
        network = Layers(*generator_layers(config, inputs, config.width, config.depth))
        self.generator, self.discriminator = LabelledGenerator(config, network), Discriminator(config)
