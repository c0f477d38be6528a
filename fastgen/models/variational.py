"""What variational autoencoders of dense layers share: nets, checks, the loss of a bound, what is scored and shown."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastgen import functional
from fastgen.batch import require_images
from fastgen.checks import (
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
)
from fastgen.models._likelihoods import (
    Likelihood,
    check_likelihood,
    log_standard_normal,
    numbers_per_pixel,
    pixels_log_prob,
    pixels_mean,
)
from fastgen.models._norms import widened
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, Samples, StepContext, option

PAIRS_IN_A_ROW = 16


class Bound(NamedTuple):
    """loss: scalar. nll, kl: (B,) in nats per image; -(nll + kl) is the ELBO, or an unbiased estimate of it."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


@dataclass(frozen=True)
class VAEConfigBase:
    """The images, how their pixels are distributed and how the KL counts, in every variational autoencoder here."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    levels: int = option(17, "values a pixel can have: counts 0 .. levels - 1", from_data=True)
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli is for images of two levels")
    beta: float = option(1.0, "weight of the KL in the loss")
    free_bits: float = option(0.0, "nats that each number of z may cost for nothing, on average over the batch")
    kl_warmup: int = option(230, "steps over which the KL's weight grows to beta")

    def __post_init__(self) -> None:
        require_positive("image_size", self.image_size)
        require_positive("channels", self.channels)
        check_likelihood(self.likelihood, self.levels)
        require_not_negative(beta=self.beta, free_bits=self.free_bits)
        require_count("kl_warmup", self.kl_warmup, 0, "a number of steps")

    def warm_beta(self, step: int) -> float:
        """Weight of the KL in ``step``."""
        return self.beta * min(1.0, step / max(1, self.kl_warmup))


@dataclass(frozen=True)
class DenseVAEConfig(VAEConfigBase):
    """A ``VAEConfigBase`` with sizes of dense layers. ValueError names the field, what was expected and what came."""

    latent_dim: int = option(10, "numbers in z")
    width: int = option(256, "units of a layer")
    depth: int = option(2, "layers of the encoder, and of the decoder")
    learning_rate: float = option(1e-3, "of AdamW")
    weight_decay: float = option(0.1, "of AdamW")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent_dim", "width", "depth"):
            require_positive(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)
        require_not_negative(weight_decay=self.weight_decay)


def sampled(
    mu: Tensor,
    logvar: Tensor,
    free_bits: float,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample z of N(mu, exp(logvar)), its KL (B,) in nats, and what of that a loss has to pay: one number.

    That is the mean of the KL over the batch; with free bits, the sum over channels of their means, where these are
    above ``free_bits``, so that no channel falls silent (Kingma et al., "Improved variational inference with inverse
    autoregressive flow", 2016, appendix C).

    Args:
        mu, logvar, prior_mu, prior_logvar: (B, C, *); no prior: N(0, 1).
    """
    if not free_bits:
        z, kl = functional.reparameterize_kl(
            mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, generator=generator
        )
        return z, kl, kl.mean()
    # A row of its own for each channel: its KL stands alone.
    rows = [None if t is None else t.reshape(mu.size(0) * mu.size(1), -1) for t in (mu, logvar, prior_mu, prior_logvar)]
    mus, logvars = cast(Tensor, rows[0]), cast(Tensor, rows[1])
    z, kl = functional.reparameterize_kl(mus, logvars, prior_mu=rows[2], prior_logvar=rows[3], generator=generator)
    kl = kl.view(mu.shape[:2])
    return z.view(mu.shape), kl.sum(1), kl.mean(0).clamp(min=free_bits).sum()


def sample_and_log_prob(
    mu: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A sample z of N(mu, exp(logvar)) and log N(z; mu, exp(logvar)), (B,) in nats, both float32 at least.

    The density is that of the noise: z - mu has lost its digits where the deviation is small beside mu.
    """
    mu, logvar = widened(mu), widened(logvar)
    zero = torch.zeros_like(mu)
    noise = functional.reparameterize(zero, zero, generator=generator)
    log_density = log_standard_normal(noise) - 0.5 * logvar.flatten(1).sum(dim=1)
    return mu + noise * torch.exp(0.5 * logvar), log_density


def check_images(images: Tensor, config: Any) -> None:
    """Raises TypeError, ValueError unless images are (B, channels, image_size, image_size), floating, in [0, 1]."""
    require_images("images", images, config.channels, config.image_size)


def dense(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """``depth`` layers of ``width`` units with LayerNorm and SiLU, and a linear one."""
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def normal_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """N(0, 1) of ``like``'s dtype and device. A CPU generator gives the same noise to every device."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device).to(like)


def above_each_other(*stacks: Tensor) -> Images:
    """Rows of images (B, C, H, W), each above the row of its counterparts; what does not fill a row is left out."""
    count = len(stacks[0])
    columns = min(PAIRS_IN_A_ROW, count)
    rows = [images[: count // columns * columns].unflatten(0, (-1, columns)) for images in stacks]
    return Images(torch.stack(rows, dim=1).flatten(0, 2), columns)


class DenseVAE(GenerativeModel):
    """A model that has ``bound`` and ``reconstruct``; its config is a ``DenseVAEConfig``."""

    kind = "images"
    default_data = "digits"

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", (), self.config.learning_rate, (0.9, 0.99), self.config.weight_decay),)

    def bound(self, batch: Batch, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        """The loss, from one posterior sample per image. beta: weight of the KL in the loss; nll and kl don't use it.

        Raises:
            TypeError, ValueError: images (or labels) of another dtype or shape than the config's.
        """
        raise NotImplementedError

    def reconstruct(self, batch: Batch) -> Tensor:
        """The expected pixels (B, C, S, S), in [0, 1], of the images' posterior means: the same on each call."""
        raise NotImplementedError

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss, whose KL grows to beta in the first ``kl_warmup`` steps; nll and kl in nats per image."""
        out = self.bound(batch, beta=self.config.warm_beta(context.step))
        return {"loss": out.loss, "nll": out.nll.mean(), "kl": out.kl.mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """elbo, nll and kl (B,) in nats, from one posterior sample per image."""
        out = self.bound(batch, generator=generator)
        return {"elbo": -(out.nll + out.kl), "nll": out.nll, "kl": out.kl}

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, each above the row of its reconstructions."""
        return {"reconstructions": above_each_other(batch["images"], self.reconstruct(batch))}

    def _decoder_outputs(self) -> int:
        config = self.config
        count: int = numbers_per_pixel(config.likelihood) * config.channels * config.image_size**2
        return count

    def _as_map(self, parameters: Tensor) -> Tensor:
        """What a dense decoder gave, as a map of pixels, float32 at least."""
        wide = widened(parameters)
        size: int = self.config.image_size
        return wide.view(len(wide), -1, size, size)

    def _log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        return pixels_log_prob(self._as_map(parameters), images, self.config.likelihood, self.config.levels)

    def _mean(self, parameters: Tensor) -> Tensor:
        return pixels_mean(self._as_map(parameters), self.config.likelihood)
