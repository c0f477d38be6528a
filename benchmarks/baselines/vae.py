"""``vae`` with torch alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_CONCENTRATION = 500.0


def dense(inputs, width, depth, outputs) -> nn.Sequential:
    layers = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.LayerNorm(width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def counts_log_prob(logits: Tensor, spread: Tensor, images: Tensor, trials: int) -> Tensor:
    """log probability of each pixel's count, beta-binomial."""
    total = F.softplus(spread + 3).clamp(max=MAX_CONCENTRATION)
    alpha, beta = total * torch.sigmoid(logits) + 1e-6, total * torch.sigmoid(-logits) + 1e-6
    counts = (images * trials).round()
    return (
        math.lgamma(trials + 1) - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
        + torch.lgamma(counts + alpha) + torch.lgamma(trials - counts + beta) - torch.lgamma(trials + alpha + beta)
        + torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    )  # fmt: skip


class VAETwin(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.image_size**2
        self.encoder = dense(pixels, config.width, config.depth, 2 * config.latent_dim)
        self.decoder = dense(config.latent_dim, config.width, config.depth, 2 * pixels)

    def noise(self, mu: Tensor) -> Tensor:
        return torch.randn_like(mu)

    def loss(self, phase, batch, context) -> dict[str, Tensor]:
        images, trials = batch["images"], self.config.levels - 1
        mu, logvar = self.encoder(2 * images.flatten(1) - 1).chunk(2, dim=1)
        z = mu + self.noise(mu) * torch.exp(0.5 * logvar)
        kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(1)

        parameters = self.decoder(z).view(len(images), -1, *images.shape[2:])
        logits, spread = parameters.chunk(2, dim=1)
        log_prob = counts_log_prob(logits, spread, images, trials)
        nll = -log_prob.flatten(1).sum(1)
        warm = self.config.beta * min(1.0, context.step / max(1, self.config.kl_warmup))
        return {"loss": nll.mean() + warm * kl.mean(), "nll": nll.mean(), "kl": kl.mean()}
