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
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastgen import functional
from fastgen._checks import require_floating, require_positive, require_shape, require_tensor
from fastgen.models._base import Batch, Exhibit, GenerativeModel, Images, Moment, NoOptions, Phase, option
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
from fastgen.models._residual import ResidualBlock
from fastgen.nn import GaussianLatent

__all__ = [
    "ConvVAE",
    "ConvVAEConfig",
    "VAELoss",
    "beta_binomial_log_prob",
    "beta_binomial_parameters",
    "binomial_log_prob",
]

Likelihood = Literal["beta-binomial", "binomial", "bernoulli"]

LARGEST_COARSE_SIZE = 7
PAIRS_IN_A_ROW = 16


@dataclass(frozen=True)
class ConvVAEConfig:
    """Sizes of a ConvVAE. ValueError names the field, what was expected and what came."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    levels: int = option(17, "values a pixel can have: counts 0 .. levels - 1", from_data=True)
    latent_dim: int = option(4, "numbers in z")
    detail_channels: int = option(2, "channels of the map of details")
    width: int = option(16, "channels at full size; doubled at each halving")
    hidden_dim: int = option(128, "units between z and the canvas")
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli is for images of two levels")
    kl_warmup: int = option(230, "steps over which the KL's weight grows to 1")

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "channels",
            "levels",
            "latent_dim",
            "detail_channels",
            "width",
            "hidden_dim",
        ):
            require_positive(name, getattr(self, name))
        if self.kl_warmup < 0:
            raise ValueError(f"kl_warmup: expected a number of steps >= 0, got {self.kl_warmup}")
        if self.levels < 2:
            raise ValueError(f"levels: expected at least 2, got {self.levels}")
        if self.likelihood not in get_args(Likelihood):
            raise ValueError(f"likelihood: expected one of {get_args(Likelihood)}, got {self.likelihood!r}")
        if self.likelihood == "bernoulli" and self.levels != 2:
            raise ValueError(f"levels: expected 2 with likelihood 'bernoulli', got {self.levels}")
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


class VAELoss(NamedTuple):
    """loss: scalar, the mean of nll + beta kl. nll, kl: (B,) in nats per image; -(nll + kl) is the ELBO."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


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
        self.encoder = nn.Sequential(*encoder)
        self.posterior = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(coarse * size**2, 2 * config.latent_dim))
        self.latent = GaussianLatent()

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

        decoder: list[nn.Module] = [ResidualBlock(coarse)]
        for wide, fine in itertools.pairwise(reversed(widths)):
            decoder += [nn.Conv2d(wide, 4 * fine, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(fine)]
        per_pixel = numbers_per_pixel(config.likelihood)
        decoder += [nn.SiLU(), nn.Conv2d(widths[0], per_pixel * config.channels, 3, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    def forward(self, images: Tensor, *, beta: float = 1.0, generator: torch.Generator | None = None) -> VAELoss:
        """The loss, from one posterior sample per image.

        Args:
            images: (B, C, S, S), see the class.
            beta: weight of the KL in the loss; 1 is the ELBO, less only warms up. nll and kl don't use it.
            generator: source of the noise, on the images' device; default torch's global one.

        Raises:
            TypeError: images that are not floating. ValueError: another shape than the config's.
        """
        features = self._encode(images)
        z, kl = self.latent(self.posterior(features), generator=generator)
        canvas = self.canvas(z)
        prior_mu, prior_logvar = self.detail_prior(canvas).chunk(2, dim=1)
        mu, logvar = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        details, detail_kl = functional.reparameterize_kl(
            mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, generator=generator
        )
        nll = -self._log_prob(self._decode(canvas, details), images)
        kl = kl + detail_kl
        return VAELoss((nll + beta * kl).mean(), nll, kl)

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
        weight = self.add_details.weight
        noise = _normal((n, self.config.latent_dim), weight, generator)
        canvas = self.canvas(noise)
        mu, logvar = self.detail_prior(canvas).chunk(2, dim=1)
        details = mu + _normal(tuple(mu.shape), mu, generator) * torch.exp(0.5 * logvar)
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

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        out: VAELoss = self(batch["images"], beta=min(1.0, moment.step / max(1, self.config.kl_warmup)))
        return {"loss": out.loss, "nll": out.nll.mean(), "kl": out.kl.mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        out: VAELoss = self(batch["images"], generator=generator)
        return {"elbo": -(out.nll + out.kl), "nll": out.nll, "kl": out.kl}

    @torch.no_grad()
    def log_weights(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z, details) - log q(z, details | images) of one posterior sample, in nats.

        Its mean is the ELBO; logs of means of K such weights bound log p(images) tighter (Burda, Grosse and
        Salakhutdinov, "Importance weighted autoencoders", 2016).
        """
        images = batch["images"]
        features = self._encode(images)
        posterior = self.posterior(features).chunk(2, dim=1)
        z = functional.reparameterize(*posterior, generator=generator)
        canvas = self.canvas(z)
        detail_prior = self.detail_prior(canvas).chunk(2, dim=1)
        detail_posterior = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        details = functional.reparameterize(*detail_posterior, generator=generator)
        log_p = self._log_prob(self._decode(canvas, details), images)
        log_p = log_p + log_standard_normal(z) + log_normal(details, *detail_prior)
        return log_p - log_normal(z, *posterior) - log_normal(details, *detail_posterior)

    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        return Images(self.sample(n, generator=generator))

    def show(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Exhibit]:
        """Rows of held-out images, each above the row of its reconstructions."""
        originals = batch["images"]
        columns = min(PAIRS_IN_A_ROW, len(originals))
        originals = originals[: len(originals) // columns * columns]
        rows = [images.unflatten(0, (-1, columns)) for images in (originals, self.reconstruct(originals))]
        return {"reconstructions": Images(torch.stack(rows, dim=1).flatten(0, 2), columns)}

    def _encode(self, images: Tensor) -> Tensor:
        config = self.config
        require_tensor("images", images)
        require_floating("images", images)
        expected = (*images.shape[:1], config.channels, config.image_size, config.image_size)
        require_shape("images", images, expected, "(B, C, S, S)")
        features: Tensor = self.encoder(2 * images - 1)
        return features

    def _decode(self, canvas: Tensor, details: Tensor) -> Tensor:
        """Parameters of the pixels' distribution, float32 whatever autocast chose."""
        parameters: Tensor = self.decoder(canvas + self.add_details(details))
        return parameters.float()

    def _log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        return pixels_log_prob(parameters, images, self.config.likelihood, self.config.levels)

    def _mean(self, parameters: Tensor) -> Tensor:
        return pixels_mean(parameters, self.config.likelihood)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device).to(like)
