"""A model of one's own, as a user writes it: images are a learned mean plus noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.models import Batch, GenerativeModel, Images, Phase, StepContext, option


@dataclass(frozen=True)
class MeanConfig:
    image_size: int = option(8, "image size", from_data=True)
    channels: int = option(1, "image channels", from_data=True)
    noise: float = option(0.1, "standard deviation of the noise")


class Mean(GenerativeModel):
    name, summary, kind = "mean", "the mean image", "images"
    config_class = MeanConfig

    def __init__(self, config: MeanConfig) -> None:
        super().__init__(config)
        self.mean = nn.Parameter(torch.zeros(config.channels, config.image_size, config.image_size))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("mean", learning_rate=0.01),)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        images = batch["images"]
        return {"loss": (images + self.config.noise * torch.randn_like(images) - self.mean).square().mean()}

    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"squared error": (batch["images"] - self.mean).square().flatten(1).mean(1)}

    def draw(self, n: int, options: Any, *, generator: torch.Generator | None = None) -> Images:
        noise = torch.randn(n, *self.mean.shape, generator=generator).to(self.device)
        return Images((self.mean + self.config.noise * noise).clamp(0, 1))


class NoName(GenerativeModel):
    pass
