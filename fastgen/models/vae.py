"""Variational autoencoder (VAE) with fully connected layers.

Kingma and Welling, "Auto-encoding variational Bayes" (2014). Both networks are multilayer perceptrons; z has the prior
N(0, 1):

    images -> encoder -> mu, logvar of z          z -> decoder -> p(pixel | z)

The loss is -E log p(images | z) + beta KL(q(z | images) || p(z)), in nats per image; see ``variational.py``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.checks import require_count, require_not_negative, require_positive, require_positive_number
from fastgen.models.base import Images, Phase, option, upcast
from fastgen.models.conditioning import LatentOptions
from fastgen.models.registry import register_model
from fastgen.models.sizes import DECAY, Size
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


@dataclass(frozen=True)
class VAEConfig:
    """Hyperparameters of a VAE.

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
    latent_dim: int = option(10, "latent dimension")
    width: int = option(256, "units of each hidden layer")
    depth: int = option(2, "number of hidden layers of the encoder and of the decoder")
    learning_rate: float = option(1e-3, "AdamW learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "latent_dim", "width", "depth"):
            require_positive(name, getattr(self, name))
        check_likelihood(self.likelihood, self.levels)
        require_not_negative(beta=self.beta, free_bits=self.free_bits, weight_decay=self.weight_decay)
        require_count("kl_warmup", self.kl_warmup, 0, "a number of steps")
        require_positive_number(learning_rate=self.learning_rate)


def mlp(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` units with LayerNorm and SiLU, and a linear layer."""
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(in_features, out_features), nn.LayerNorm(out_features), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


@register_model
class VAE(VariationalAutoencoder):
    """Variational autoencoder with fully connected layers.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1).

    Example:
        >>> model = VAE(VAEConfig(image_size=8, levels=17))
        >>> model(torch.zeros(5, 1, 8, 8)).kl.shape
        torch.Size([5])
        >>> model.draw(3, LatentOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "vae"
    summary = "variational autoencoder with fully connected layers"
    config_class, sampling_class = VAEConfig, LatentOptions
    train_defaults: ClassVar = {"steps": 3368, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(8_000, passes=200, train=DECAY, model={"latent_dim": 20, "width": 512}),
        "large": Size(3_000, passes=200, train=DECAY, model={"latent_dim": 32}),
        "medium, gpu": Size(20_000, 128, passes=200, train=DECAY, model={"latent_dim": 20, "width": 1024}),
        "large, gpu": Size(20_000, 128, passes=200, train=DECAY, model={"latent_dim": 64, "width": 1024}),
    }
    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        outputs = parameters_per_pixel(config.likelihood) * pixels
        self.encoder = mlp(pixels, config.width, config.depth, 2 * config.latent_dim)
        self.decoder = mlp(config.latent_dim, config.width, config.depth, outputs)

    def forward(self, images: Tensor, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        """The loss, with one posterior sample per image.

        Args:
            images: (B, C, S, S) in [0, 1].
            beta: weight of the KL in the loss; nll and kl do not depend on it.
            generator: source of the noise, on the images' device; default torch's global one.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        mu, logvar = self.encode(images)
        z, kl, kl_loss = sample_posterior(mu, logvar, self.config.free_bits, generator=generator)
        nll = -self.log_likelihood(self._pixel_parameters(z), images)
        return Bound(nll.mean() + beta * kl_loss, nll, kl)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", (), self.config.learning_rate, (0.9, 0.99), self.config.weight_decay),)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) -> mu and logvar of z, (B, latent_dim) each."""
        check_images(images, self.config)
        mu, logvar = upcast(self.encoder(2 * images.flatten(1) - 1)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) -> expected pixels (B, C, S, S) in [0, 1]. ValueError: another shape."""
        check_latents(z, self.config)
        return pixels_mean(self._pixel_parameters(z), self.config.likelihood)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> ``decode`` of their posterior means (B, C, S, S), without noise."""
        return self.decode(self.encode(images)[0])

    def log_weight(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z) - log q(z | images) of one posterior sample per image, in nats."""
        z, log_q = sample_and_log_prob(*self.encode(images), generator=generator)
        return self.log_likelihood(self._pixel_parameters(z), images) + log_standard_normal(z) - log_q

    @torch.no_grad()
    def draw(self, n: int, options: LatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        z = normal_noise((n, self.config.latent_dim), next(self.decoder.parameters()), generator, options)
        return Images(self.decode(z))

    def _pixel_parameters(self, z: Tensor) -> Tensor:
        """z -> parameters of the distribution of each pixel, (B, parameters_per_pixel * C, S, S)."""
        size = self.config.image_size
        return upcast(self.decoder(z)).view(len(z), -1, size, size)
