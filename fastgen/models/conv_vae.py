"""Convolutional variational autoencoder with two levels of latents.

z, a vector with the prior N(0, 1), encodes the content of an image. The details, a small feature map, encode the rest;
the prior of the details is predicted from z, so that samples of both fit together:

    images    -> encoder -> features                features -> posterior of z
    z         -> canvas  -> prior of the details    canvas, features -> posterior of the details
    canvas + details -> decoder -> p(pixel | z, details)

Encoder and decoder are residual convolutional networks, with optional self-attention at the coarsest resolution. The
loss is the negative ELBO, in nats per image; see ``variational.py``. Kingma and Welling, "Auto-encoding variational
Bayes" (2014); for the learned prior, Soenderby et al., "Ladder variational autoencoders" (2016).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_count, require_not_negative, require_positive, require_shape
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
    log_normal,
    log_standard_normal,
    normal_noise,
    parameters_per_pixel,
    pixels_mean,
    sample_and_log_prob,
    sample_posterior,
)
from fastgen.nn import AttentionBlock2d

MAX_COARSE_SIZE = 7


@dataclass(frozen=True)
class ConvVAEConfig:
    """Hyperparameters of a ConvVAE.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    levels: int = option(17, "number of values of a pixel: counts 0 .. levels - 1", from_data=True)
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli requires two levels")
    beta: float = option(1.0, "weight of the KL in the loss")
    free_bits: float = option(0.0, "minimum of the mean KL of each latent channel in the loss, in nats")
    kl_warmup: int = option(230, "number of steps over which the weight of the KL grows to beta")
    latent_dim: int = option(4, "dimension of z")
    detail_channels: int = option(2, "channels of the map of details")
    width: int = option(16, "channels at full resolution; doubled at each downsampling")
    hidden_dim: int = option(128, "hidden units between z and the canvas")
    attention: bool = option(False, "self-attention at the coarsest resolution of encoder and decoder")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "latent_dim", "detail_channels", "width", "hidden_dim"):
            require_positive(name, getattr(self, name))
        check_likelihood(self.likelihood, self.levels)
        require_not_negative(beta=self.beta, free_bits=self.free_bits)
        require_count("kl_warmup", self.kl_warmup, 0, "a number of steps")
        if self.image_size < 4 or self.coarse_size << self.num_downsamples != self.image_size:
            raise ValueError(
                f"image_size: expected 4 to {MAX_COARSE_SIZE} times a power of 2 (8, 20, 28, 32, 64, ...)"
                f", got {self.image_size}"
            )

    @property
    def num_downsamples(self) -> int:
        """Number of downsamplings by 2, to a size of at most MAX_COARSE_SIZE."""
        return math.ceil(math.log2(max(1.0, self.image_size / MAX_COARSE_SIZE)))

    @property
    def coarse_size(self) -> int:
        """Height and width of the coarsest feature map."""
        return self.image_size >> self.num_downsamples


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with 3x3 convolutions and GroupNorm. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, channels), channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(math.gcd(8, channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


def downsampling(widths: list[int]) -> list[nn.Module]:
    """Layers (B, widths[0], S, S) -> (B, widths[-1], S / 2^n, S / 2^n), each with a residual block."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in itertools.pairwise(widths):
        layers += [nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), ResidualBlock(out_channels)]
    return layers


def upsampling(widths: list[int]) -> list[nn.Module]:
    """Layers (B, widths[0], S, S) -> (B, widths[-1], S * 2^n, S * 2^n), each with a residual block."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in itertools.pairwise(widths):
        convolution = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        layers += [convolution, nn.PixelShuffle(2), ResidualBlock(out_channels)]
    return layers


@torch.no_grad()
def zero_init(layer: nn.Module) -> nn.Module:
    """Set weight and bias to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def attention(channels: int) -> AttentionBlock2d:
    """Self-attention between positions, initialized as the identity."""
    block = AttentionBlock2d(channels, num_groups=math.gcd(8, channels))
    zero_init(block.out)
    return block


@register_model
class ConvVAE(VariationalAutoencoder):
    """Convolutional variational autoencoder with two levels of latents.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1).

    Example:
        >>> model = ConvVAE(ConvVAEConfig(image_size=8, levels=17))
        >>> model(torch.zeros(5, 1, 8, 8)).kl.shape
        torch.Size([5])
        >>> model.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    name = "conv-vae"
    summary = "convolutional variational autoencoder for images whose pixels are counts"
    config_class, sampling_class = ConvVAEConfig, LatentOptions
    train_defaults: ClassVar = {"steps": 1123, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    # At the learning rate of small images the posterior of larger ones diverges in the first steps.
    sizes: ClassVar = {
        "medium": Size(5_000, passes=200, train=DECAY, model={"latent_dim": 8, "width": 8}),
        "large": Size(
            1_700, 32, passes=200, train={**DECAY, "learning_rate": 1e-3}, model={"latent_dim": 16, "width": 8}
        ),
        "medium, gpu": Size(
            20_000, 128, passes=200, train={**DECAY, "learning_rate": 1e-3}, model={"latent_dim": 16, "width": 32}
        ),
        "large, gpu": Size(
            30_000, 128, passes=200, train={**DECAY, "learning_rate": 1e-3}, model={"latent_dim": 32, "width": 32}
        ),
    }
    config: ConvVAEConfig

    def __init__(self, config: ConvVAEConfig) -> None:
        super().__init__(config)
        widths = [config.width << i for i in range(config.num_downsamples + 1)]
        coarse, size, details = widths[-1], config.coarse_size, config.detail_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, widths[0], 3, padding=1),
            ResidualBlock(widths[0]),
            *downsampling(widths),
            *([attention(coarse)] if config.attention else []),
        )
        self.posterior = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(coarse * size**2, 2 * config.latent_dim))
        self.canvas = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, coarse * size**2),
            nn.Unflatten(1, (coarse, size, size)),
            ResidualBlock(coarse),
        )
        # The last layers of prior and posterior of the details are zero-initialized: their KL starts at 0.
        self.detail_prior = nn.Sequential(nn.SiLU(), zero_init(nn.Conv2d(coarse, 2 * details, 3, padding=1)))
        self.detail_posterior = nn.Sequential(
            nn.Conv2d(2 * coarse, coarse, 3, padding=1),
            nn.SiLU(),
            zero_init(nn.Conv2d(coarse, 2 * details, 3, padding=1)),
        )
        self.add_details = nn.Conv2d(details, coarse, 3, padding=1)
        self.decoder = nn.Sequential(
            ResidualBlock(coarse),
            *([attention(coarse)] if config.attention else []),
            *upsampling(widths[::-1]),
            nn.SiLU(),
            nn.Conv2d(widths[0], parameters_per_pixel(config.likelihood) * config.channels, 3, padding=1),
        )

    def forward(self, images: Tensor, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        """The loss, with one posterior sample per image.

        Args:
            images: (B, C, S, S) in [0, 1].
            beta: weight of the KL in the loss; nll and kl do not depend on it.
            generator: source of the noise, on the images' device; default torch's global one.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        features, free_bits = self._features(images), self.config.free_bits
        z, kl, kl_loss = sample_posterior(*self._z_posterior(features), free_bits, generator=generator)
        canvas = self.canvas(z)
        prior_mu, prior_logvar = self._detail_prior(canvas)
        mu, logvar = self._detail_posterior(canvas, features)
        details, detail_kl, detail_kl_loss = sample_posterior(
            mu, logvar, free_bits, prior_mu=prior_mu, prior_logvar=prior_logvar, generator=generator
        )
        nll = -self.log_likelihood(self._pixel_parameters(canvas, details), images)
        return Bound(nll.mean() + beta * (kl_loss + detail_kl_loss), nll, kl + detail_kl)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", learning_rate=4e-3, betas=(0.9, 0.99)),)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parameters of the posterior of images (B, C, S, S).

        Returns:
            mu and logvar of z, (B, latent_dim) each; mu and logvar of the details given z = mu,
            (B, detail_channels, coarse_size, coarse_size) each.
        """
        features = self._features(images)
        mu, logvar = self._z_posterior(features)
        detail_mu, detail_logvar = self._detail_posterior(self.canvas(mu), features)
        return mu, logvar, detail_mu, detail_logvar

    def decode(self, z: Tensor, details: Tensor | None = None) -> Tensor:
        """Expected pixels (B, C, S, S) in [0, 1].

        Args:
            z: (B, latent_dim).
            details: (B, detail_channels, coarse_size, coarse_size); default: the mean of their prior given z.

        Raises:
            ValueError: z or details of another shape.
        """
        check_latents(z, self.config)
        if details is not None:
            shape = (len(z), self.config.detail_channels, self.config.coarse_size, self.config.coarse_size)
            require_shape("details", details, shape, "(B, detail_channels, coarse_size, coarse_size)")
        canvas = self.canvas(z)
        details = self._detail_prior(canvas)[0] if details is None else details
        return pixels_mean(self._pixel_parameters(canvas, details), self.config.likelihood)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> ``decode`` of their posterior means (B, C, S, S), without noise."""
        mu, _, detail_mu, _ = self.encode(images)
        return self.decode(mu, detail_mu)

    def log_weight(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z, details) - log q(z, details | images) of one posterior sample per image, in nats."""
        features = self._features(images)
        mu, logvar = self._z_posterior(features)
        z, log_q = sample_and_log_prob(mu, logvar, generator=generator)
        canvas = self.canvas(z.to(mu.dtype))
        prior_mu, prior_logvar = self._detail_prior(canvas)
        mu, logvar = self._detail_posterior(canvas, features)
        details, log_q_details = sample_and_log_prob(mu, logvar, generator=generator)
        log_p = self.log_likelihood(self._pixel_parameters(canvas, details.to(mu.dtype)), images)
        log_p = log_p + log_standard_normal(z) + log_normal(details, prior_mu, prior_logvar)
        return log_p - log_q - log_q_details

    @torch.no_grad()
    def draw(self, n: int, options: LatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        z = normal_noise((n, self.config.latent_dim), next(self.parameters()), generator, options)
        canvas = self.canvas(z)
        mu, logvar = self._detail_prior(canvas)
        details = mu + normal_noise(tuple(mu.shape), mu, generator, options) * torch.exp(0.5 * logvar)
        return Images(pixels_mean(self._pixel_parameters(canvas, details), self.config.likelihood))

    def _features(self, images: Tensor) -> Tensor:
        """Images -> features (B, coarse channels, coarse_size, coarse_size)."""
        check_images(images, self.config)
        features: Tensor = self.encoder(2 * images - 1)
        return features

    def _z_posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.posterior(features).chunk(2, dim=1)
        return mu, logvar

    def _detail_prior(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.detail_prior(canvas).chunk(2, dim=1)
        return mu, logvar

    def _detail_posterior(self, canvas: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        return mu, logvar

    def _pixel_parameters(self, canvas: Tensor, details: Tensor) -> Tensor:
        """-> parameters of the distribution of each pixel, (B, parameters_per_pixel * C, S, S), float32 at least."""
        return upcast(self.decoder(canvas + self.add_details(details)))
