"""A deep convolutional generative adversarial network.

Radford, Metz and Chintala, "Unsupervised representation learning with deep convolutional generative adversarial
networks" (2016): strided convolutions in place of pooling, batch normalisation except in the discriminator's first
layer and the generator's last, ReLU in the generator and LeakyReLU in the discriminator, weights from N(0, 0.02):

    z (B, latent_dim) -> coarse map -> [norm, ReLU, twice the size] -> tanh -> images
    images -> half the size, LeakyReLU -> [half the size, norm, LeakyReLU] -> score

How both play is in ``_adversarial.py``, their layers are in ``_convolutions.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastgen.models._convolutions import (
    ConvolutionalConfig,
    discriminator_features,
    discriminator_score,
    generator_layers,
    initialise,
)
from fastgen.models.adversarial import ImageGAN, Layers
from fastgen.models.base import NoOptions


@dataclass(frozen=True)
class DCGANConfig(ConvolutionalConfig):
    """Sizes of a DCGAN and how it learns. ValueError names the field, what was expected and what came."""


class DCGAN(ImageGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1].

    Example:
        >>> model = DCGAN(DCGANConfig(image_size=8, width=8))
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "dcgan"
    summary = "deep convolutional generative adversarial network"
    config_class = DCGANConfig
    sampling_class = NoOptions
    train_defaults: ClassVar = {"epochs": 150.0, "batch_size": 64, "average_decay": 0.998}
    config: DCGANConfig

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__(config)
        self.generator = Layers(*generator_layers(config, config.latent_dim))
        self.discriminator = Layers(*discriminator_features(config, config.channels), *discriminator_score(config))
        self.apply(initialise)
