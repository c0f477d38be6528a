"""A convolutional variational autoencoder for images whose pixels are counts.

Two latents. z, a vector, says what is in the picture and has the prior N(0, 1). The details, a small map,
say how it is drawn; their prior is predicted from z, so that samples of both fit together:

    images    -> encode   -> features                 features -> posterior of z
    z         -> canvas   -> prior of the details     features, canvas -> posterior of the details
    canvas + details -> decode -> p(pixel | z, details), a distribution over counts 0 .. levels - 1

The loss is the negative evidence lower bound of the counts themselves, a probability mass function, so it
bounds -log p(images) in nats and can be compared between models (Kingma and Welling, "Auto-encoding
variational Bayes", 2014; for a learned prior, Soenderby et al., "Ladder variational autoencoders", 2016).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models._likelihoods import (
    beta_binomial_log_prob,
    beta_binomial_parameters,
    binomial_log_prob,
    log_normal,
    log_standard_normal,
    numbers_per_pixel,
    pixels_log_prob,
    pixels_mean,
)
from fastgen.models._norms import widened
from fastgen.models._residual import ResidualBlock
from fastgen.models.base import Batch, GenerativeModel, Images, NoOptions, Phase, Samples, StepContext, option
from fastgen.models.variational import (
    Bound,
    VAEConfigBase,
    above_each_other,
    check_images,
    normal_noise,
    sample_and_log_prob,
    sampled,
)
from fastgen.nn import AttentionBlock2d

__all__ = [
    "ConvVAE",
    "ConvVAEConfig",
    "beta_binomial_log_prob",
    "beta_binomial_parameters",
    "binomial_log_prob",
]

LARGEST_COARSE_SIZE = 7


@dataclass(frozen=True)
class ConvVAEConfig(VAEConfigBase):
    """Sizes of a ConvVAE. ValueError names the field, what was expected and what came."""

    latent_dim: int = option(4, "numbers in z")
    detail_channels: int = option(2, "channels of the map of details")
    width: int = option(16, "channels at full size; doubled at each halving")
    hidden_dim: int = option(128, "units between z and the canvas")
    attention: bool = option(False, "let the positions of the smallest map attend to each other, on both ways")
    free_bits: float = option(0.0, "nats that each number of z and each channel of the details may cost for nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent_dim", "detail_channels", "width", "hidden_dim"):
            require_positive(name, getattr(self, name))
        if self.image_size < 4 or self.coarse_size << self.halvings != self.image_size:
            raise ValueError(
                f"image_size: expected 4 to {LARGEST_COARSE_SIZE} times a power of 2 (8, 20, 28, 32, 64, ...)"
                f", got {self.image_size}"
            )

    @property
    def halvings(self) -> int:
        """Times the size is halved: until it is at most LARGEST_COARSE_SIZE."""
        return math.ceil(math.log2(max(1.0, self.image_size / LARGEST_COARSE_SIZE)))

    @property
    def coarse_size(self) -> int:
        return self.image_size >> self.halvings


def _attention(channels: int) -> AttentionBlock2d:
    """As the identity in the beginning."""
    block = AttentionBlock2d(channels, num_groups=math.gcd(8, channels))
    for parameter in block.out.parameters():
        nn.init.zeros_(parameter)
    return block


def _zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """Starts at 0, where the posterior of the details equals their prior."""
    nn.init.zeros_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


class ConvVAE(GenerativeModel):
    """The model described at the top of this file.

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
    kind = "images"
    default_data = "digits"
    config_class = ConvVAEConfig
    train_defaults: ClassVar = {"epochs": 50.0, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    config: ConvVAEConfig

    def __init__(self, config: ConvVAEConfig) -> None:
        super().__init__(config)
        widths = [config.width << i for i in range(config.halvings + 1)]
        coarse, size = widths[-1], config.coarse_size

        encoder: list[nn.Module] = [
            nn.Conv2d(config.channels, widths[0], 3, padding=1),
            ResidualBlock(widths[0]),
        ]
        for fine, wide in itertools.pairwise(widths):
            encoder += [nn.Conv2d(fine, wide, 4, stride=2, padding=1), ResidualBlock(wide)]
        if config.attention:
            encoder.append(_attention(coarse))
        self.encoder = nn.Sequential(*encoder)
        self.posterior = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(coarse * size**2, 2 * config.latent_dim))

        self.canvas = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, coarse * size**2),
            nn.Unflatten(1, (coarse, size, size)),
            ResidualBlock(coarse),
        )
        details = config.detail_channels
        self.detail_prior = nn.Sequential(nn.SiLU(), _zeroed(nn.Conv2d(coarse, 2 * details, 3, padding=1)))
        self.detail_posterior = nn.Sequential(
            nn.Conv2d(2 * coarse, coarse, 3, padding=1),
            nn.SiLU(),
            _zeroed(nn.Conv2d(coarse, 2 * details, 3, padding=1)),
        )
        self.add_details = nn.Conv2d(details, coarse, 3, padding=1)

        decoder: list[nn.Module] = [ResidualBlock(coarse), *([_attention(coarse)] if config.attention else [])]
        for wide, fine in itertools.pairwise(reversed(widths)):
            decoder += [nn.Conv2d(wide, 4 * fine, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(fine)]
        per_pixel = numbers_per_pixel(config.likelihood)
        decoder += [nn.SiLU(), nn.Conv2d(widths[0], per_pixel * config.channels, 3, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    def forward(self, images: Tensor, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        """The loss, from one posterior sample per image.

        Args:
            images: (B, C, S, S), see the class.
            beta: weight of the KL in the loss; 1 is the ELBO, less only warms up. nll and kl don't use it.
            generator: source of the noise, on the images' device; default torch's global one.

        Raises:
            TypeError: images that are not floating. ValueError: another shape than the config's.
        """
        features = self._encode(images)
        free_bits = self.config.free_bits
        z_mu, z_logvar = self.posterior(features).chunk(2, dim=1)
        z, kl, paid = sampled(z_mu, z_logvar, free_bits, generator=generator)
        canvas = self.canvas(z)
        prior_mu, prior_logvar = self.detail_prior(canvas).chunk(2, dim=1)
        mu, logvar = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        details, detail_kl, detail_paid = sampled(
            mu, logvar, free_bits, prior_mu=prior_mu, prior_logvar=prior_logvar, generator=generator
        )
        nll = -self._log_prob(self._decode(canvas, details), images)
        return Bound(nll.mean() + beta * (paid + detail_paid), nll, kl + detail_kl)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n images (n, C, S, S) from the prior: the expected pixels, in [0, 1], of latents drawn from it.

        Args:
            n: how many.
            generator: source of the latents, on any device; a CPU one draws the same for every device.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        noise = normal_noise((n, self.config.latent_dim), next(self.parameters()), generator)
        canvas = self.canvas(noise)
        mu, logvar = self.detail_prior(canvas).chunk(2, dim=1)
        details = mu + normal_noise(tuple(mu.shape), mu, generator) * torch.exp(0.5 * logvar)
        return self._mean(self._decode(canvas, details))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The expected pixels (B, C, S, S), in [0, 1], of the images' posterior means: the same on each call.

        Raises: as ``forward``.
        """
        features = self._encode(images)
        canvas = self.canvas(self.posterior(features).chunk(2, dim=1)[0])
        details = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)[0]
        return self._mean(self._decode(canvas, details))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", learning_rate=4e-3, betas=(0.9, 0.99)),)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        out: Bound = self(batch["images"], beta=self.config.warm_beta(context.step))
        return {"loss": out.loss, "nll": out.nll.mean(), "kl": out.kl.mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        out: Bound = self(batch["images"], generator=generator)
        return {"elbo": -(out.nll + out.kl), "nll": out.nll, "kl": out.kl}

    @torch.no_grad()
    def log_weights(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z, details) - log q(z, details | images) of one posterior sample, in nats.

        Its mean is the ELBO; logs of means of K such weights bound log p(images) tighter (Burda, Grosse and
        Salakhutdinov, "Importance weighted autoencoders", 2016).
        """
        images = batch["images"]
        features = self._encode(images)
        mu, logvar = self.posterior(features).chunk(2, dim=1)
        z, log_q = sample_and_log_prob(mu, logvar, generator=generator)
        canvas = self.canvas(z.to(mu.dtype))
        prior_mu, prior_logvar = widened(self.detail_prior(canvas)).chunk(2, dim=1)
        mu, logvar = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        details, log_q_details = sample_and_log_prob(mu, logvar, generator=generator)
        log_p = self._log_prob(self._decode(canvas, details.to(mu.dtype)), images)
        log_p = log_p + log_standard_normal(z) + log_normal(details, prior_mu, prior_logvar)
        return log_p - log_q - log_q_details

    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        return Images(self.sample(n, generator=generator))

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, each above the row of its reconstructions."""
        return {"reconstructions": above_each_other(batch["images"], self.reconstruct(batch["images"]))}

    def _encode(self, images: Tensor) -> Tensor:
        check_images(images, self.config)
        features: Tensor = self.encoder(2 * images - 1)
        return features

    def _decode(self, canvas: Tensor, details: Tensor) -> Tensor:
        """Parameters of the pixels' distribution, float32 at least whatever autocast chose."""
        parameters: Tensor = self.decoder(canvas + self.add_details(details))
        return widened(parameters)

    def _log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        return pixels_log_prob(parameters, images, self.config.likelihood, self.config.levels)

    def _mean(self, parameters: Tensor) -> Tensor:
        return pixels_mean(parameters, self.config.likelihood)
