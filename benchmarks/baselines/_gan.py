"""The adversarial training of both GANs, with the R1 penalty in every discriminator step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GANTwin(nn.Module):
    """A subclass defines ``generator`` and ``discriminator``, which take ``labels(batch)`` as further inputs."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config

    def labels(self, batch) -> tuple[Tensor, ...]:
        return ()

    def noise_dim(self) -> int:
        return self.config.latent_dim

    def loss(self, phase, batch, context) -> dict[str, Tensor]:
        images, labels, config = batch["images"], self.labels(batch), self.config
        hinge, noise = config.loss == "hinge", torch.randn(len(images), self.noise_dim(), device=images.device)
        if phase == "generator":
            scores = self.discriminator(self.generator(noise, *labels), *labels)
            return {"loss": -scores.mean() if hinge else F.softplus(-scores).mean(), "fake": scores.detach().mean()}
        with torch.no_grad():
            fake = self.generator(noise, *labels)
        real = (2 * images - 1).requires_grad_()
        real_scores, fake_scores = self.discriminator(real, *labels), self.discriminator(fake, *labels)
        if hinge:
            loss = F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()
        else:
            loss = F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()
        (gradient,) = torch.autograd.grad(real_scores.sum(), real, create_graph=True)
        penalty = 0.5 * gradient.square().flatten(1).sum(1).mean()
        values = {"real": real_scores.detach().mean(), "fake": fake_scores.detach().mean(), "penalty": penalty.detach()}
        return {"loss": loss + config.penalty_weight * penalty, **values}
