"""A conditional deep convolutional generative adversarial network.

The networks of the DCGAN (Radford, Metz and Chintala, 2016; see ``dcgan.py``), each given the class of the image, after
Mirza and Osindero, "Conditional generative adversarial nets" (2014): the generator as a learned vector beside z, the
discriminator as a learned map that is one more channel of the images:

    z, embedding(label) -> coarse map -> [norm, ReLU, twice the size] -> tanh -> images
    images, map(label) -> half the size, LeakyReLU -> [half the size, norm, LeakyReLU] -> score

With ``projection`` the discriminator's features h of the images meet the class at their end,
``score = a(h) + <embedding(label), h>``: Miyato and Koyama, "cGANs with projection discriminator" (2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.models._conditional import ConditionalConfig, ConditionalGAN, LabelledGenerator
from fastgen.models._convolutions import (
    INITIAL_STD,
    ConvolutionalConfig,
    discriminator_features,
    generator_layers,
    initialise,
)
from fastgen.models.adversarial import Layers
from fastgen.models.base import option
from fastgen.models.conditioning import LabelOptions


@dataclass(frozen=True)
class CDCGANConfig(ConvolutionalConfig, ConditionalConfig):
    """Sizes of a conditional DCGAN and how it learns. ValueError names the field, what was expected and what came."""

    width: int = option(32, "channels at half the size; doubled at each halving")


class Discriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1], labels (B,) -> scores (B,), logits: high means real."""

    def __init__(self, config: CDCGANConfig) -> None:
        super().__init__()
        size, self.projection = config.image_size, config.projection
        features = (config.width << config.halvings - 1) * config.coarse_size**2
        self.embedding = nn.Embedding(config.classes, features if config.projection else size**2)
        inputs = config.channels + (0 if config.projection else 1)
        self.features = Layers(*discriminator_features(config, inputs), nn.Flatten())
        self.score = nn.Linear(features, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        given = self.embedding(labels)
        if not self.projection:
            images = torch.cat([images, given.view(-1, 1, *images.shape[2:])], dim=1)
        h = self.features(images)
        scores: Tensor = self.score(h)[:, 0]
        return scores + (given * h).sum(dim=1) if self.projection else scores


class CDCGAN(ConditionalGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1]; labels (B,) int64.

    Example:
        >>> model = CDCGAN(CDCGANConfig(image_size=8, classes=3, width=8))
        >>> model.draw(6, LabelOptions(label=2)).pixels.shape
        torch.Size([6, 1, 8, 8])
    """

    name = "cdcgan"
    summary = "conditional DCGAN: draws the class it is asked for"
    config_class, sampling_class = CDCGANConfig, LabelOptions
    train_defaults: ClassVar = {"epochs": 50.0, "batch_size": 64, "average_decay": 0.998}
    config: CDCGANConfig

    def __init__(self, config: CDCGANConfig) -> None:
        super().__init__(config)
        network = Layers(*generator_layers(config, config.latent_dim + config.embedding_dim))
        self.generator, self.discriminator = LabelledGenerator(config, network), Discriminator(config)
        self.apply(initialise)
        if config.projection:
            nn.init.normal_(self.discriminator.embedding.weight, std=INITIAL_STD)
