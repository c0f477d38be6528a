"""A generative adversarial network of linear layers.

Goodfellow et al., "Generative adversarial nets" (2014), with the generator's loss that does not saturate (section 3):
binary cross-entropy of logits, for both:

    z -> [linear, norm, LeakyReLU] -> linear, tanh -> images
    images -> [linear, LeakyReLU] -> linear -> score

The R1 penalty of ``fastgen.losses``, which the paper had not, is there against samples that are all alike.
The discriminator may be that of the DCGAN instead (``dcgan.py``), without normalisation. How both play is in
``_adversarial.py``, their layers are in ``_dense.py`` and ``_convolutions.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from fastgen.checks import require_choice, require_positive
from fastgen.models._convolutions import ConvolutionalConfig, discriminator_score, initialise
from fastgen.models._convolutions import discriminator_features as convolutional_features
from fastgen.models._dense import discriminator_features, generator_layers
from fastgen.models.adversarial import ImageGAN, Layers, NoiseGANConfig
from fastgen.models.base import NoOptions, option

DiscriminatorKind = Literal["dense", "convolutional"]


@dataclass(frozen=True)
class GANConfig(NoiseGANConfig):
    """Sizes of a GAN and how it learns. ValueError names the field, what was expected and what came."""

    penalty_weight: float = option(4.0, "what the penalty is multiplied by (gamma, lambda)")
    beta1: float = option(0.0, "of AdamW")
    beta2: float = option(0.99, "of AdamW")
    width: int = option(256, "of the hidden layers")
    depth: int = option(3, "hidden layers of each network")
    discriminator: DiscriminatorKind = option("dense", "which discriminator")
    convolution_width: int = option(64, "of a convolutional one: channels at half the size, doubled at each halving")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "depth", "convolution_width"):
            require_positive(name, getattr(self, name))
        require_choice("discriminator", self.discriminator, get_args(DiscriminatorKind))
        if self.discriminator == "convolutional":
            self.convolutions()

    def convolutions(self) -> ConvolutionalConfig:
        """Of a convolutional discriminator. Raises ValueError: an image size that it can't have."""
        width = self.convolution_width
        return ConvolutionalConfig(self.image_size, self.channels, width=width, discriminator_norm="none")

    @property
    def pixels(self) -> int:
        return math.prod((self.channels, self.image_size, self.image_size))


class GAN(ImageGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1].

    Example:
        >>> model = GAN(GANConfig(image_size=9, width=8))
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 9, 9])
    """

    name = "gan"
    summary = "generative adversarial network of linear layers"
    config_class, sampling_class = GANConfig, NoOptions
    train_defaults: ClassVar = {"epochs": 150.0, "batch_size": 64, "average_decay": 0.998}
    config: GANConfig

    def __init__(self, config: GANConfig) -> None:
        super().__init__(config)
        self.generator = Layers(*generator_layers(config, config.latent_dim, config.width, config.depth))
        if config.discriminator == "dense":
            features = discriminator_features(config.pixels, config.width, config.depth)
            self.discriminator = Layers(nn.Flatten(), *features, nn.Linear(config.width, 1), nn.Flatten(0))
        else:
            convolutions = config.convolutions()
            self.discriminator = Layers(
                *convolutional_features(convolutions, config.channels), *discriminator_score(convolutions)
            )
            self.discriminator.apply(initialise)
