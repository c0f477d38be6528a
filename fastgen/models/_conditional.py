"""What conditional adversarial networks share: labels (B,) that both networks are given, and which class is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen._checks import require_positive, require_shape, require_tensor
from fastgen.models._adversarial import AdversarialConfig, ImageGAN
from fastgen.models._base import Batch, Images, option

MOST_COLUMNS = 32


@dataclass(frozen=True)
class ConditionalConfig(AdversarialConfig):
    """An ``AdversarialConfig`` with classes."""

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


@dataclass(frozen=True)
class LabelOptions:
    """Which class is drawn. ValueError names the field, what was expected and what came."""

    label: int = option(-1, "class that is drawn, 0, 1, ...; -1: all classes in turn")

    def __post_init__(self) -> None:
        if isinstance(self.label, bool) or not isinstance(self.label, int) or self.label < -1:
            raise ValueError(f"label: expected a class 0, 1, ... or -1 for all in turn, got {self.label!r}")


class ConditionalGAN(ImageGAN):
    """An ``ImageGAN`` whose networks take labels (B,) int64 from 0 to ``classes`` - 1, unless that is 0."""

    sampling_class = LabelOptions

    @property
    def classes(self) -> int:
        """How many there are; 0: the networks know of none."""
        classes: int = self.config.classes
        return classes

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        if not self.classes:
            return ()
        labels = batch.get("labels")
        require_tensor("labels", labels)
        assert labels is not None
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected an int64 tensor, got {labels.dtype}")
        require_shape("labels", labels, (len(batch["images"]),), "(B,)")
        return (labels,)

    @torch.no_grad()
    def draw(self, n: int, options: LabelOptions, *, generator: torch.Generator | None = None) -> Images:
        """n images of ``options.label``; of all classes in turn each fills a column of its own.

        Raises:
            ValueError: n is not a positive integer, or there is no such class.
        """
        require_positive("n", n)
        classes = self.classes
        if options.label >= classes:
            expected = f"-1 or a class below {classes}" if classes else "-1, as the model knows no classes"
            raise ValueError(f"label: expected {expected}, got {options.label}")
        if not classes:
            return Images(self._draw(n, (), generator))
        in_turn = options.label < 0
        labels = torch.arange(n) % classes if in_turn else torch.full((n,), options.label)
        pixels = self._draw(n, (labels.to(self.device),), generator)
        return Images(pixels, classes if in_turn and classes <= min(n, MOST_COLUMNS) else None)
