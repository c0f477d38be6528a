"""What conditional adversarial networks share: labels (B,) that both networks are given, and which class is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models.adversarial import ImageGAN, NoiseGANConfig
from fastgen.models.base import Batch, Images, option
from fastgen.models.conditioning import LabelOptions, check_labels, wanted_labels


@dataclass(frozen=True)
class ConditionalConfig(NoiseGANConfig):
    """An ``NoiseGANConfig`` with classes."""

    classes: int = option(0, "classes of the images", from_data=True)
    embedding_dim: int = option(16, "numbers that tell the generator the class")
    projection: bool = option(False, "the discriminator meets the class after its features, not before")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("embedding_dim", self.embedding_dim)
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(
                f"classes: expected 2 or more (gan, dcgan and sagan take images without labels), got {self.classes!r}"
            )


class LabelledGenerator(nn.Module):
    """network(z, embedding(label)): z (B, latent_dim), labels (B,) -> images. It takes latent_dim + embedding_dim."""

    def __init__(self, config: ConditionalConfig, network: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.classes, config.embedding_dim)
        self.network = network

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.network(torch.cat([z, self.embedding(labels)], dim=1))
        return images


class ConditionalGAN(ImageGAN):
    """An ``ImageGAN`` whose networks take labels (B,) int64 from 0 to ``classes`` - 1, unless that is 0."""

    sampling_class = LabelOptions

    @property
    def classes(self) -> int:
        """How many there are; 0: the networks know of none."""
        classes: int = self.config.classes
        return classes

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        return (check_labels(batch, self.classes),) if self.classes else ()

    @torch.no_grad()
    def draw(self, n: int, options: LabelOptions, *, generator: torch.Generator | None = None) -> Images:
        """n images of ``options.label``; of all classes in turn each fills a column of its own.

        Raises:
            ValueError: n is not a positive integer, or there is no such class.
        """
        require_positive("n", n)
        if not self.classes:
            if options.label >= 0:
                raise ValueError(f"label: expected -1, as the model knows no classes, got {options.label}")
            return Images(self._draw(n, (), generator))
        labels, columns = wanted_labels(n, options.label, self.classes)
        return Images(self._draw(n, (labels.to(self.device),), generator), columns, labels)
