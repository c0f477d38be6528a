"""Conditional generative adversarial network of linear layers.

Mirza and Osindero, "Conditional generative adversarial nets" (2014): both networks receive the class of the image as a
learned vector beside their input:

    generator:      z, embedding(label) -> [linear, norm, LeakyReLU] -> linear, tanh -> images
    discriminator:  images, embedding(label) -> [linear, LeakyReLU] -> linear -> logits (B,)

With ``projection`` the class enters the discriminator after its features h instead, ``a(h) + <embedding(label), h>``:
Miyato and Koyama, "cGANs with projection discriminator" (2018). Both networks are trained as ``adversarial.py``
describes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import (
    ImageGAN,
    Penalty,
    check_adversarial_options,
    eval_mode,
    generator_objective,
)
from fastgen.models.base import Batch, Images, StepContext, option, to_pixels
from fastgen.models.conditioning import LabeledLatentOptions, check_labels, wanted_labels
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size


@dataclass(frozen=True)
class CGANConfig:
    """Architecture and training objective of a conditional GAN.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("non-saturating", "adversarial objective")
    penalty: Penalty = option("r1", "gradient penalty on the discriminator")
    penalty_weight: float = option(5.0, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    generator_learning_rate: float = option(5e-4, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(5e-4, "AdamW learning rate of the discriminator")
    beta1: float = option(0.5, "AdamW beta1")
    beta2: float = option(0.999, "AdamW beta2")
    critic_steps: int = option(1, "discriminator updates per generator update")
    augment: str = option(
        "",
        "differentiable augmentation of the discriminator's images, comma-separated: flip, color, translation, cutout",
    )
    augment_target: float = option(
        0.0, "adaptive augmentation (ADA): aim of the mean sign of the real scores, such as 0.6 (0: augment all images)"
    )
    latent_dim: int = option(64, "dimension of the latent z")
    classes: int = option(0, "number of classes", from_data=True)
    embedding_dim: int = option(16, "dimension of the class embedding")
    projection: bool = option(False, "projection discriminator: the class enters after the features, not as an input")
    width: int = option(256, "number of units per hidden layer")
    depth: int = option(3, "number of hidden layers of each network")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("latent_dim", "embedding_dim", "width", "depth"):
            require_positive(name, getattr(self, name))
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(
                f"classes: expected 2 or more (gan, dcgan and sagan take images without labels), got {self.classes!r}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size


class CGANGenerator(nn.Module):
    """z (B, latent_dim), labels (B,) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: CGANConfig) -> None:
        super().__init__()
        inputs, width, shape = config.latent_dim + config.embedding_dim, config.width, config.image_shape
        layers: list[nn.Module] = []
        for i in range(config.depth):
            layers += [nn.Linear(width if i else inputs, width), nn.LayerNorm(width), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(width, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape)]
        self.embedding = nn.Embedding(config.classes, config.embedding_dim)
        self.network = nn.Sequential(*layers)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.network(torch.cat([z, self.embedding(labels)], dim=1))
        return images


class CGANDiscriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1], labels (B,) -> scores (B,), logits: high means real."""

    def __init__(self, config: CGANConfig) -> None:
        super().__init__()
        self.projection = config.projection
        pixels, width = math.prod(config.image_shape), config.width
        inputs = pixels if config.projection else pixels + config.embedding_dim
        self.embedding = nn.Embedding(config.classes, width if config.projection else config.embedding_dim)
        layers: list[nn.Module] = []
        for i in range(config.depth):
            layers += [nn.Linear(width if i else inputs, width), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.score = nn.Linear(width, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x, embedded = images.flatten(1), self.embedding(labels)
        if self.projection:
            h = self.features(x)
            return torch.add(self.score(h)[:, 0], (embedded * h).sum(dim=1))
        scores: Tensor = self.score(self.features(torch.cat([x, embedded], dim=1)))[:, 0]
        return scores


@register_model
class CGAN(ImageGAN):
    """Conditional GAN of linear layers: generates images of a given class.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1]; labels (B,) int64.

    Example:
        >>> model = CGAN(CGANConfig(image_size=8, classes=3, width=16))
        >>> model(torch.randn(2, 64), torch.tensor([0, 2])).shape
        torch.Size([2, 1, 8, 8])
        >>> model.draw(6, LabeledLatentOptions(label=2)).pixels.shape
        torch.Size([6, 1, 8, 8])
    """

    name = "cgan"
    summary = "conditional GAN of linear layers: generates images of a given class"
    config_class, sampling_class = CGANConfig, LabeledLatentOptions
    train_defaults: ClassVar = {"steps": 3368, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(20_000, train=LONG),
        "large": Size(12_000, train=LONG),
        "medium, gpu": Size(60_000, 128, train=LONG, model={"width": 512}),
        "large, gpu": Size(60_000, 128, train=LONG, model={"width": 1024}),
    }
    config: CGANConfig

    def __init__(self, config: CGANConfig) -> None:
        super().__init__(config)
        self.generator = CGANGenerator(config)
        self.discriminator = CGANDiscriminator(config)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """The generator's images (B, C, S, S) in [-1, 1] for z (B, latent_dim) from N(0, 1) and labels (B,)."""
        images: Tensor = self.generator(z, labels)
        return images

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``, "discriminator" or "generator", with mean scores and the penalty for the log."""
        images, labels = self.checked_images(batch), check_labels(batch, self.config.classes)
        z = self.noise(len(images), self.config.latent_dim)
        if phase == "generator":
            return generator_objective(
                self.discriminator(self.augmentation(self.generator(z, labels)), labels), self.config
            )
        with torch.no_grad():
            fake = self.generator(z, labels)

        def discriminator(x: Tensor) -> Tensor:
            scores: Tensor = self.discriminator(x, labels)
            return scores

        return self.discriminator_loss(discriminator, images, fake, context)

    @torch.no_grad()
    def draw(self, n: int, options: LabeledLatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """Samples n images of the class ``options.label``, or of all classes in turn, one class per column.

        Raises:
            ValueError: n is not a positive integer, or the label is no class.
        """
        require_positive("n", n)
        labels, columns = wanted_labels(n, options.label, self.config.classes)
        with eval_mode(self.generator):
            images = self.generator(self.noise(n, self.config.latent_dim, generator, options), labels.to(self.device))
        return Images(to_pixels(images), columns, labels)
