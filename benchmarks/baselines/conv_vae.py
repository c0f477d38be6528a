"""``conv-vae`` with torch alone; pixels are counts (beta-binomial)."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.vae import counts_log_prob


class ResidualBlock(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def sample(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mu + noise * torch.exp(0.5 * logvar)


def kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL of two diagonal Gaussians, (B,) in nats."""
    ratio = ((mu - prior_mu).square() + logvar.exp()) / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + ratio - 1).flatten(1).sum(1)


class ConvVAETwin(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        downsamplings = math.ceil(math.log2(max(1.0, config.image_size / 7)))
        widths = [config.width << i for i in range(downsamplings + 1)]
        coarse, size, details = widths[-1], config.image_size >> downsamplings, config.detail_channels
        encoder = [nn.Conv2d(config.channels, widths[0], 3, padding=1), ResidualBlock(widths[0])]
        decoder = [ResidualBlock(coarse)]
        for narrow, wide in itertools.pairwise(widths):
            encoder += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), ResidualBlock(wide)]
        for narrow, wide in reversed(list(itertools.pairwise(widths))):
            decoder += [nn.Conv2d(wide, 4 * narrow, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(narrow)]
        decoder += [nn.SiLU(), nn.Conv2d(widths[0], 2 * config.channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.posterior = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(coarse * size**2, 2 * config.latent_dim))
        self.canvas = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, coarse * size**2),
            nn.Unflatten(1, (coarse, size, size)),
            ResidualBlock(coarse),
        )
        self.detail_prior = nn.Sequential(nn.SiLU(), nn.Conv2d(coarse, 2 * details, 3, padding=1))
        self.detail_posterior = nn.Sequential(
            nn.Conv2d(2 * coarse, coarse, 3, padding=1), nn.SiLU(), nn.Conv2d(coarse, 2 * details, 3, padding=1)
        )
        self.add_details = nn.Conv2d(details, coarse, 3, padding=1)

    def noise(self, mu: Tensor) -> Tensor:
        return torch.randn_like(mu)

    def loss(self, phase, batch, context) -> dict[str, Tensor]:
        images = batch["images"]
        features = self.encoder(2 * images - 1)
        mu, logvar = self.posterior(features).chunk(2, dim=1)
        canvas = self.canvas(sample(mu, logvar, self.noise(mu)))
        prior_mu, prior_logvar = self.detail_prior(canvas).chunk(2, dim=1)
        detail_mu, detail_logvar = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        details = sample(detail_mu, detail_logvar, self.noise(detail_mu))
        total = kl(mu, logvar, torch.zeros_like(mu), torch.zeros_like(mu))
        total = total + kl(detail_mu, detail_logvar, prior_mu, prior_logvar)
        logits, spread = self.decoder(canvas + self.add_details(details)).chunk(2, dim=1)
        nll = -counts_log_prob(logits, spread, images, self.config.levels - 1).flatten(1).sum(1)
        warm = self.config.beta * min(1.0, context.step / max(1, self.config.kl_warmup))
        return {"loss": nll.mean() + warm * total.mean(), "nll": nll.mean(), "kl": total.mean()}
