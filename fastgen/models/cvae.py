"""A variational autoencoder that knows the class of a picture.

Sohn, Lee and Yan, "Learning structured output representation using deep conditional generative models" (2015): encoder
and decoder also see the label, so that z need not say what the label says, and pictures of a class can be asked for:

    images, label -> encoder -> mu, logvar of z          z, label -> decoder -> p(pixel | z, label)

The loss is the negative evidence lower bound of log p(images | label), in nats per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models._classes import LabelOptions, check_labels, wanted_labels
from fastgen.models._likelihoods import log_standard_normal
from fastgen.models._norms import widened
from fastgen.models.base import Batch, Images, Samples, option
from fastgen.models.variational import (
    Bound,
    DenseVAE,
    DenseVAEConfig,
    check_images,
    dense,
    normal_noise,
    sample_and_log_prob,
    sampled,
)

STYLES_SHOWN = 8


@dataclass(frozen=True)
class CVAEConfig(DenseVAEConfig):
    """Sizes of a CVAE and how it learns. ValueError names the field, what was expected and what came."""

    classes: int = option(10, "classes of the images", from_data=True)
    latent_dim: int = option(8, "numbers in z")
    label_dim: int = option(32, "numbers that a label is turned into")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(f"classes: expected 2 or more (vae takes images without labels), got {self.classes!r}")
        require_positive("label_dim", self.label_dim)


class CVAE(DenseVAE):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1); labels (B,)
    int64, 0 .. classes - 1.

    Example:
        >>> model = CVAE(CVAEConfig(image_size=8, classes=10))
        >>> model.draw(3, LabelOptions(label=7)).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "cvae"
    summary = "variational autoencoder that knows the class: draws the digit you ask for"
    config_class, sampling_class = CVAEConfig, LabelOptions
    train_defaults: ClassVar = {"epochs": 100.0, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    config: CVAEConfig

    def __init__(self, config: CVAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        self.encoder_label = nn.Embedding(config.classes, config.label_dim)
        self.encoder = dense(pixels + config.label_dim, config.width, config.depth, 2 * config.latent_dim)
        self.decoder_label = nn.Embedding(config.classes, config.label_dim)
        inputs = config.latent_dim + config.label_dim
        self.decoder = dense(inputs, config.width, config.depth, self._decoder_outputs())

    def bound(self, batch: Batch, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        images = batch["images"]
        mu, logvar, labels = self._posterior(batch)
        z, kl, paid = sampled(mu, logvar, self.config.free_bits, generator=generator)
        nll = -self._log_prob(self._decode(z, labels), images)
        return Bound(nll.mean() + beta * paid, nll, kl)

    @torch.no_grad()
    def log_weights(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z | label) - log q(z | images, label) of one posterior sample, in nats."""
        mu, logvar, labels = self._posterior(batch)
        z, log_q = sample_and_log_prob(mu, logvar, generator=generator)
        log_p = self._log_prob(self._decode(z, labels), batch["images"]) + log_standard_normal(z)
        return log_p - log_q

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Tensor:
        mu, _, labels = self._posterior(batch)
        return self._mean(self._decode(mu, labels))

    @torch.no_grad()
    def draw(self, n: int, options: LabelOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior; with all classes in turn, a row has one of each.

        Raises:
            ValueError: n is not a positive integer, or there is no such class.
        """
        require_positive("n", n)
        labels, columns = wanted_labels(n, options.label, self.config.classes)
        noise = normal_noise((n, self.config.latent_dim), next(self.decoder.parameters()), generator)
        return Images(self._mean(self._decode(noise, labels.to(self.device))), columns, labels)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Reconstructions, and styles: each row a held-out image, then its z under every label."""
        shown = super().visualize(batch, generator=generator)
        few = {name: batch[name][:STYLES_SHOWN] for name in ("images", "labels")}
        z, classes = self._posterior(few)[0], self.config.classes
        labels = torch.arange(classes, device=z.device).repeat(len(z))
        drawn = self._mean(self._decode(z.repeat_interleave(classes, dim=0), labels)).unflatten(0, (-1, classes))
        rows = torch.cat([few["images"].to(drawn).unsqueeze(1), drawn], dim=1)
        return {**shown, "styles": Images(rows.flatten(0, 1), classes + 1)}

    def _posterior(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """mu and logvar of z, (B, latent_dim) each, and the labels."""
        images = batch["images"]
        check_images(images, self.config)
        labels = check_labels(batch, self.config.classes)
        pixels = 2 * images.flatten(1) - 1
        mu, logvar = widened(self.encoder(torch.cat([pixels, self.encoder_label(labels)], dim=1))).chunk(2, dim=1)
        return mu, logvar, labels

    def _decode(self, z: Tensor, labels: Tensor) -> Tensor:
        parameters: Tensor = self.decoder(torch.cat([z, self.decoder_label(labels)], dim=1))
        return parameters
