"""A variational autoencoder of dense layers.

Kingma and Welling, "Auto-encoding variational Bayes" (2014): a vector z with prior N(0, 1) says what is in a picture,

    images -> encoder -> mu, logvar of z          z -> decoder -> p(pixel | z)

and the loss is the negative evidence lower bound -E log p(images | z) + beta KL(q(z | images) || p(z)), in nats per
image. beta: Higgins et al., "beta-VAE" (2017); 1 is the bound. Free bits: each number of z may cost so many nats for
nothing, on average over the batch, so that none falls silent (Kingma et al., "Improved variational inference with
inverse autoregressive flow", 2016, appendix C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.checks import require_positive
from fastgen.models._likelihoods import log_standard_normal
from fastgen.models._norms import widened
from fastgen.models.base import Batch, Images, NoOptions
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


@dataclass(frozen=True)
class VAEConfig(DenseVAEConfig):
    """Sizes of a VAE and how it learns. ValueError names the field, what was expected and what came."""


class VAE(DenseVAE):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1).

    Example:
        >>> model = VAE(VAEConfig(image_size=8, levels=17))
        >>> model.bound({"images": torch.zeros(5, 1, 8, 8)}).kl.shape
        torch.Size([5])
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "vae"
    summary = "variational autoencoder of dense layers"
    config_class = VAEConfig
    train_defaults: ClassVar = {"epochs": 150.0, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        self.encoder = dense(pixels, config.width, config.depth, 2 * config.latent_dim)
        self.decoder = dense(config.latent_dim, config.width, config.depth, self._decoder_outputs())

    def bound(self, batch: Batch, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        images = batch["images"]
        z, kl, paid = sampled(*self._posterior(images), self.config.free_bits, generator=generator)
        nll = -self._log_prob(self.decoder(z), images)
        return Bound(nll.mean() + beta * paid, nll, kl)

    @torch.no_grad()
    def log_weights(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z) - log q(z | images) of one posterior sample, in nats.

        Its mean is the ELBO; logs of means of K such weights bound log p(images) tighter (Burda, Grosse and
        Salakhutdinov, "Importance weighted autoencoders", 2016).
        """
        images = batch["images"]
        mu, logvar = self._posterior(images)
        z, log_q = sample_and_log_prob(mu, logvar, generator=generator)
        log_p = self._log_prob(self.decoder(z), images) + log_standard_normal(z)
        return log_p - log_q

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Tensor:
        return self._mean(self.decoder(self._posterior(batch["images"])[0]))

    @torch.no_grad()
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior."""
        require_positive("n", n)
        noise = normal_noise((n, self.config.latent_dim), next(self.decoder.parameters()), generator)
        return Images(self._mean(self.decoder(noise)))

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of z, (B, latent_dim) each."""
        check_images(images, self.config)
        mu, logvar = widened(self.encoder(2 * images.flatten(1) - 1)).chunk(2, dim=1)
        return mu, logvar
