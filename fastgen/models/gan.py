"""Generative adversarial network of linear layers.

Goodfellow et al., "Generative adversarial nets" (2014), with the non-saturating generator loss of section 3. Both
losses are the binary cross-entropy of logits:

    generator:      z (B, latent_dim) -> [linear, norm, LeakyReLU] -> linear, tanh -> images
    discriminator:  images -> [linear, LeakyReLU] -> linear -> logits (B,)

The discriminator may be the DCGAN's instead (``dcgan.py``), without normalization. Both networks are trained as
``adversarial.py`` describes. The R1 penalty, which the paper does not use, prevents mode collapse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastgen.checks import require_choice, require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import (
    ImageGAN,
    Penalty,
    check_adversarial_options,
    eval_mode,
    generator_objective,
)
from fastgen.models.base import Batch, Images, StepContext, option, to_pixels
from fastgen.models.conditioning import LatentOptions
from fastgen.models.dcgan import DCGANConfig, DCGANDiscriminator, init_weights
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size

DiscriminatorKind = Literal["dense", "convolutional"]


@dataclass(frozen=True)
class GANConfig:
    """Architecture and training objective of a GAN.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("non-saturating", "adversarial objective")
    penalty: Penalty = option("r1", "gradient penalty on the discriminator")
    penalty_weight: float = option(4.0, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    generator_learning_rate: float = option(5e-4, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(5e-4, "AdamW learning rate of the discriminator")
    beta1: float = option(0.0, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")
    critic_steps: int = option(1, "discriminator updates per generator update")
    augment: str = option(
        "",
        "differentiable augmentation of the discriminator's images, comma-separated: flip, color, translation, cutout",
    )
    augment_target: float = option(
        0.0, "adaptive augmentation (ADA): aim of the mean sign of the real scores, such as 0.6 (0: augment all images)"
    )
    latent_dim: int = option(64, "dimension of the latent z")
    width: int = option(256, "number of units per hidden layer")
    depth: int = option(3, "number of hidden layers of each network")
    discriminator: DiscriminatorKind = option("dense", "architecture of the discriminator")
    convolution_width: int = option(
        64, "number of channels of a convolutional discriminator at half resolution; doubled at each downsampling"
    )

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("latent_dim", "width", "depth", "convolution_width"):
            require_positive(name, getattr(self, name))
        require_choice("discriminator", self.discriminator, get_args(DiscriminatorKind))
        if self.discriminator == "convolutional":
            self.convolutional()

    def convolutional(self) -> DCGANConfig:
        """Architecture of the convolutional discriminator.

        Raises:
            ValueError: image_size is not 4 to 7 times a power of 2.
        """
        return DCGANConfig(
            image_size=self.image_size,
            channels=self.channels,
            width=self.convolution_width,
            discriminator_norm="none",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size


class GANGenerator(nn.Sequential):
    """z (B, latent_dim) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: GANConfig) -> None:
        width, shape = config.width, config.image_shape
        layers: list[nn.Module] = []
        for i in range(config.depth):
            layers += [nn.Linear(width if i else config.latent_dim, width), nn.LayerNorm(width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(width, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape))

    def forward(self, z: Tensor) -> Tensor:
        for layer in self:
            z = layer(z)
        return z


class GANDiscriminator(nn.Sequential):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: GANConfig) -> None:
        width, pixels = config.width, math.prod(config.image_shape)
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(config.depth):
            layers += [nn.Linear(width if i else pixels, width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(width, 1), nn.Flatten(0))

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


@register_model
class GAN(ImageGAN):
    """GAN of linear layers.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1].

    Example:
        >>> model = GAN(GANConfig(image_size=9, width=8))
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 1, 9, 9])
        >>> model.draw(3, LatentOptions()).pixels.shape
        torch.Size([3, 1, 9, 9])
    """

    name = "gan"
    summary = "generative adversarial network of linear layers"
    config_class, sampling_class = GANConfig, LatentOptions
    train_defaults: ClassVar = {"steps": 3368, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(20_000, train=LONG),
        "large": Size(12_000, train=LONG),
        "medium, gpu": Size(60_000, 128, train=LONG, model={"width": 512}),
        "large, gpu": Size(60_000, 128, train=LONG, model={"width": 1024}),
    }
    config: GANConfig

    def __init__(self, config: GANConfig) -> None:
        super().__init__(config)
        self.generator = GANGenerator(config)
        if config.discriminator == "dense":
            self.discriminator = GANDiscriminator(config)
        else:
            self.discriminator = DCGANDiscriminator(config.convolutional()).apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        """The generator's images (B, C, S, S) in [-1, 1] for z (B, latent_dim) from N(0, 1)."""
        images: Tensor = self.generator(z)
        return images

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``, "discriminator" or "generator", with mean scores and the penalty for the log."""
        images = self.checked_images(batch)
        z = self.noise(len(images), self.config.latent_dim)
        if phase == "generator":
            return generator_objective(self.discriminator(self.augmentation(self.generator(z))), self.config)
        with torch.no_grad():
            fake = self.generator(z)
        return self.discriminator_loss(self.discriminator, images, fake, context)

    @torch.no_grad()
    def draw(self, n: int, options: LatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """Samples n images.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        with eval_mode(self.generator):
            images = self.generator(self.noise(n, self.config.latent_dim, generator, options))
        return Images(to_pixels(images))
