"""Conditional deep convolutional generative adversarial network.

The DCGAN (``dcgan.py``) with the class as a second input of both networks, after Mirza and Osindero, "Conditional
generative adversarial nets" (2014): the generator receives a learned vector beside z, the discriminator a learned map
as one more channel of the images:

    generator:      z, embedding(label) -> coarse map -> [norm, ReLU, upsampling convolution] -> tanh -> images
    discriminator:  images, map(label) -> [downsampling convolution, norm, LeakyReLU] -> logits (B,)

With ``projection`` the class enters the discriminator after its features h instead, ``a(h) + <embedding(label), h>``:
Miyato and Koyama, "cGANs with projection discriminator" (2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models.adversarial import ImageGAN, eval_mode, generator_objective
from fastgen.models.base import Batch, Images, StepContext, option, to_pixels
from fastgen.models.conditioning import LabeledLatentOptions, check_labels, wanted_labels
from fastgen.models.dcgan import INITIAL_STD, DCGANConfig, DCGANGenerator, discriminator_features, init_weights
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, SLOWER, Size


@dataclass(frozen=True)
class CDCGANConfig(DCGANConfig):
    """Architecture and training objective of a conditional DCGAN: a DCGAN's, with classes.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    width: int = option(32, "number of channels at half resolution; doubled at each further downsampling")
    classes: int = option(0, "number of classes", from_data=True)
    embedding_dim: int = option(16, "dimension of the generator's class embedding")
    projection: bool = option(False, "projection discriminator: the class enters after the features, not as a map")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("embedding_dim", self.embedding_dim)
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(
                f"classes: expected 2 or more (gan, dcgan and sagan take images without labels), got {self.classes!r}"
            )


class CDCGANGenerator(nn.Module):
    """z (B, latent_dim), labels (B,) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: CDCGANConfig) -> None:
        super().__init__()
        network = DCGANGenerator(config, config.latent_dim + config.embedding_dim)
        self.embedding = nn.Embedding(config.classes, config.embedding_dim)
        self.network = network

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.network(torch.cat([z, self.embedding(labels)], dim=1))
        return images


class CDCGANDiscriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1], labels (B,) -> scores (B,), logits: high means real."""

    def __init__(self, config: CDCGANConfig) -> None:
        super().__init__()
        self.projection = config.projection
        in_channels = config.channels if config.projection else config.channels + 1
        feature_dim = config.widths[-1] * config.coarse_size**2
        self.embedding = nn.Embedding(config.classes, feature_dim if config.projection else config.image_size**2)
        self.features = nn.Sequential(*discriminator_features(config, in_channels), nn.Flatten())
        self.score = nn.Linear(feature_dim, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        embedded = self.embedding(labels)
        if self.projection:
            h = self.features(images)
            return torch.add(self.score(h)[:, 0], (embedded * h).sum(dim=1))
        label_map = embedded.view(-1, 1, *images.shape[2:])
        scores: Tensor = self.score(self.features(torch.cat([images, label_map], dim=1)))[:, 0]
        return scores


@register_model
class CDCGAN(ImageGAN):
    """Conditional DCGAN: generates images of a given class.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1]; labels (B,) int64.

    Example:
        >>> model = CDCGAN(CDCGANConfig(image_size=8, classes=3, width=8))
        >>> model(torch.randn(2, 64), torch.tensor([0, 2])).shape
        torch.Size([2, 1, 8, 8])
        >>> model.draw(6, LabeledLatentOptions(label=2)).pixels.shape
        torch.Size([6, 1, 8, 8])
    """

    name = "cdcgan"
    summary = "conditional DCGAN: generates images of a given class"
    config_class, sampling_class = CDCGANConfig, LabeledLatentOptions
    channels_last = True
    train_defaults: ClassVar = {"steps": 1123, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(10_000, train=LONG, model=SLOWER),
        "large": Size(8_000, 32, train=LONG, model={"width": 24, "penalty_every": 4, **SLOWER}),
        "medium, gpu": Size(40_000, 128, train=LONG, model={"width": 64, **SLOWER}),
        "large, gpu": Size(60_000, 128, train=LONG, model={"width": 64, "latent_dim": 128, **SLOWER}),
    }
    config: CDCGANConfig

    def __init__(self, config: CDCGANConfig) -> None:
        super().__init__(config)
        self.generator = CDCGANGenerator(config)
        self.discriminator = CDCGANDiscriminator(config)
        self.apply(init_weights)
        if config.projection:
            nn.init.normal_(self.discriminator.embedding.weight, std=INITIAL_STD)

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
