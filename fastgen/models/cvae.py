"""Conditional variational autoencoder (CVAE): a VAE whose networks receive the class of the image.

Sohn, Lee and Yan, "Learning structured output representation using deep conditional generative models" (2015). Encoder
and decoder receive an embedding of the label, so that z need not encode the class, and images of a given class can be
sampled:

    images, label -> encoder -> mu, logvar of z          z, label -> decoder -> p(pixel | z, label)

The loss is the negative ELBO of log p(images | label), in nats per image; see ``variational.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fastgen.batch import require_labels
from fastgen.checks import require_count, require_not_negative, require_positive, require_positive_number
from fastgen.models.base import Batch, Images, Phase, Samples, option, upcast
from fastgen.models.conditioning import LabeledLatentOptions, wanted_labels
from fastgen.models.registry import register_model
from fastgen.models.sizes import DECAY, Size
from fastgen.models.vae import mlp
from fastgen.models.variational import (
    Bound,
    Likelihood,
    VariationalAutoencoder,
    check_images,
    check_latents,
    check_likelihood,
    log_standard_normal,
    normal_noise,
    parameters_per_pixel,
    pixels_mean,
    sample_and_log_prob,
    sample_posterior,
)

NUM_STYLES = 8


@dataclass(frozen=True)
class CVAEConfig:
    """Hyperparameters of a CVAE.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    levels: int = option(17, "number of values of a pixel: counts 0 .. levels - 1", from_data=True)
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli requires two levels")
    beta: float = option(1.0, "weight of the KL in the loss")
    free_bits: float = option(0.0, "minimum of each latent dimension's mean KL in the loss, in nats")
    kl_warmup: int = option(230, "number of steps over which the weight of the KL grows to beta")
    latent_dim: int = option(8, "latent dimension")
    width: int = option(256, "units of each hidden layer")
    depth: int = option(2, "number of hidden layers of the encoder and of the decoder")
    learning_rate: float = option(1e-3, "AdamW learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay")
    classes: int = option(10, "number of classes of the images", from_data=True)
    label_dim: int = option(32, "dimension of the label embeddings")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "latent_dim", "width", "depth", "label_dim"):
            require_positive(name, getattr(self, name))
        check_likelihood(self.likelihood, self.levels)
        require_not_negative(beta=self.beta, free_bits=self.free_bits, weight_decay=self.weight_decay)
        require_count("kl_warmup", self.kl_warmup, 0, "a number of steps")
        require_positive_number(learning_rate=self.learning_rate)
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(f"classes: expected 2 or more (vae takes images without labels), got {self.classes!r}")


@register_model
class CVAE(VariationalAutoencoder):
    """Conditional variational autoencoder with fully connected layers.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1); labels (B,)
    int64, 0 .. classes - 1.

    Example:
        >>> model = CVAE(CVAEConfig(image_size=8, classes=10))
        >>> model(torch.zeros(5, 1, 8, 8), torch.arange(5)).kl.shape
        torch.Size([5])
        >>> model.draw(3, LabeledLatentOptions(label=7)).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "cvae"
    summary = "class-conditional variational autoencoder with fully connected layers"
    config_class, sampling_class = CVAEConfig, LabeledLatentOptions
    train_defaults: ClassVar = {"steps": 2246, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(8_000, passes=200, train=DECAY, model={"width": 512}),
        "large": Size(3_000, passes=200, train=DECAY, model={"latent_dim": 32}),
        "medium, gpu": Size(20_000, 128, passes=200, train=DECAY, model={"latent_dim": 16, "width": 1024}),
        "large, gpu": Size(20_000, 128, passes=200, train=DECAY, model={"latent_dim": 64, "width": 1024}),
    }
    config: CVAEConfig

    def __init__(self, config: CVAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        outputs = parameters_per_pixel(config.likelihood) * pixels
        self.encoder_label = nn.Embedding(config.classes, config.label_dim)
        self.encoder = mlp(pixels + config.label_dim, config.width, config.depth, 2 * config.latent_dim)
        self.decoder_label = nn.Embedding(config.classes, config.label_dim)
        self.decoder = mlp(config.latent_dim + config.label_dim, config.width, config.depth, outputs)

    def forward(
        self, images: Tensor, labels: Tensor, *, beta: float = 1.0, generator: torch.Generator | None = None
    ) -> Bound:
        """The loss, with one posterior sample per image.

        Args:
            images: (B, C, S, S) in [0, 1].
            labels: (B,) int64.
            beta: weight of the KL in the loss; nll and kl do not depend on it.
            generator: source of the noise, on the images' device; default torch's global one.

        Raises:
            TypeError, ValueError: images or labels of another dtype or shape than the config's.
        """
        mu, logvar = self.encode(images, labels)
        z, kl, kl_loss = sample_posterior(mu, logvar, self.config.free_bits, generator=generator)
        nll = -self.log_likelihood(self._pixel_parameters(z, labels), images)
        return Bound(nll.mean() + beta * kl_loss, nll, kl)

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        return (cast(Tensor, batch.get("labels")),)  # ``encode`` checks them

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", (), self.config.learning_rate, (0.9, 0.99), self.config.weight_decay),)

    def encode(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S), labels (B,) -> mu and logvar of z, (B, latent_dim) each."""
        check_images(images, self.config)
        require_labels("labels", labels, len(images), self.config.classes)
        inputs = torch.cat([2 * images.flatten(1) - 1, self.encoder_label(labels)], dim=1)
        mu, logvar = upcast(self.encoder(inputs)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """z (B, latent_dim), labels (B,) -> expected pixels (B, C, S, S) in [0, 1].

        Raises:
            TypeError, ValueError: z of another shape, or labels that are none.
        """
        check_latents(z, self.config)
        require_labels("labels", labels, len(z), self.config.classes)
        return pixels_mean(self._pixel_parameters(z, labels), self.config.likelihood)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (B, C, S, S), labels (B,) -> ``decode`` of their posterior means (B, C, S, S), without noise."""
        return self.decode(self.encode(images, labels)[0], labels)

    def log_weight(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z | label) - log q(z | images, label) of one posterior sample per image, in nats."""
        z, log_q = sample_and_log_prob(*self.encode(images, labels), generator=generator)
        return self.log_likelihood(self._pixel_parameters(z, labels), images) + log_standard_normal(z) - log_q

    @torch.no_grad()
    def draw(self, n: int, options: LabeledLatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior; if all classes are sampled, each has its own column.

        Raises:
            ValueError: n is not a positive integer, or there is no such class.
        """
        require_positive("n", n)
        labels, columns = wanted_labels(n, options.label, self.config.classes)
        z = normal_noise((n, self.config.latent_dim), next(self.decoder.parameters()), generator, options)
        return Images(self.decode(z, labels.to(self.device)), columns, labels)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Reconstructions, and styles: each row is a held-out image, then its z decoded with every label."""
        images, labels, classes = batch["images"][:NUM_STYLES], batch["labels"][:NUM_STYLES], self.config.classes
        z = self.encode(images, labels)[0]
        every_label = torch.arange(classes, device=z.device).repeat(len(z))
        decoded = self.decode(z.repeat_interleave(classes, dim=0), every_label).unflatten(0, (-1, classes))
        rows = torch.cat([images.to(decoded).unsqueeze(1), decoded], dim=1)
        return {**super().visualize(batch, generator=generator), "styles": Images(rows.flatten(0, 1), classes + 1)}

    def _pixel_parameters(self, z: Tensor, labels: Tensor) -> Tensor:
        """z, labels -> parameters of the distribution of each pixel, (B, parameters_per_pixel * C, S, S)."""
        size = self.config.image_size
        inputs = torch.cat([z, self.decoder_label(labels)], dim=1)
        return upcast(self.decoder(inputs)).view(len(z), -1, size, size)
