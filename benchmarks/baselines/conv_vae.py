"""``conv-vae`` in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_CONCENTRATION = 500.0


class Residual(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def downsampling(widths) -> list[nn.Module]:
    layers = []
    for i in range(len(widths) - 1):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1), Residual(widths[i + 1])]
    return layers


def upsampling(widths) -> list[nn.Module]:
    layers = []
    for i in reversed(range(len(widths) - 1)):
        layers += [nn.Conv2d(widths[i + 1], 4 * widths[i], 3, padding=1), nn.PixelShuffle(2), Residual(widths[i])]
    return layers


class ConvVAETwin(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        widths = [config.width << i for i in range(config.num_downsamples + 1)]
        coarse, size, details = widths[-1], config.coarse_size, config.detail_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, widths[0], 3, padding=1), Residual(widths[0]), *downsampling(widths)
        )
        self.posterior = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(coarse * size**2, 2 * config.latent_dim))
        self.canvas = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, coarse * size**2),
            nn.Unflatten(1, (coarse, size, size)),
            Residual(coarse),
        )
        self.detail_prior = nn.Sequential(nn.SiLU(), nn.Conv2d(coarse, 2 * details, 3, padding=1))
        self.detail_posterior = nn.Sequential(
            nn.Conv2d(2 * coarse, coarse, 3, padding=1), nn.SiLU(), nn.Conv2d(coarse, 2 * details, 3, padding=1)
        )
        self.add_details = nn.Conv2d(details, coarse, 3, padding=1)
        self.decoder = nn.Sequential(
            Residual(coarse),
            *upsampling(widths),
            nn.SiLU(),
            nn.Conv2d(widths[0], 2 * config.channels, 3, padding=1),
        )

    def noise(self, mu: Tensor) -> Tensor:
        return torch.randn_like(mu)

    def loss(self, phase, batch, context) -> dict[str, Tensor]:
        images, trials = batch["images"], self.config.levels - 1
        features = self.encoder(2 * images - 1)
        mu, logvar = self.posterior(features).chunk(2, dim=1)
        z = mu + self.noise(mu) * torch.exp(0.5 * logvar)
        kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(1)

        canvas = self.canvas(z)
        prior_mu, prior_logvar = self.detail_prior(canvas).chunk(2, dim=1)
        mu, logvar = self.detail_posterior(torch.cat([canvas, features], dim=1)).chunk(2, dim=1)
        details = mu + self.noise(mu) * torch.exp(0.5 * logvar)
        variances = (logvar.exp() + (mu - prior_mu).square()) * torch.exp(-prior_logvar)
        kl = kl + 0.5 * (variances - 1 + prior_logvar - logvar).flatten(1).sum(1)

        logits, spread = self.decoder(canvas + self.add_details(details)).chunk(2, dim=1)
        total = F.softplus(spread + 3).clamp(max=MAX_CONCENTRATION)
        alpha, beta = total * torch.sigmoid(logits) + 1e-6, total * torch.sigmoid(-logits) + 1e-6
        counts = (images * trials).round()
        log_prob = (
            math.lgamma(trials + 1) - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
            + torch.lgamma(counts + alpha) + torch.lgamma(trials - counts + beta) - torch.lgamma(trials + alpha + beta)
            + torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
        )  # fmt: skip
        nll = -log_prob.flatten(1).sum(1)
        warm = self.config.beta * min(1.0, context.step / max(1, self.config.kl_warmup))
        return {"loss": nll.mean() + warm * kl.mean(), "nll": nll.mean(), "kl": kl.mean()}
