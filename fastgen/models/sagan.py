"""A generative adversarial network with self-attention, with or without classes.

Zhang, Goodfellow, Metaxas and Odena, "Self-attention generative adversarial networks" (2019): residual networks, both
with attention among the positions of one feature map and with spectral normalisation of every map, which play the
hinge game:

    z -> coarse map -> [block, twice the size, attention at one size] -> norm, ReLU, convolution, tanh -> images
    images -> convolution -> [attention at one size, block, half the size] -> block, ReLU, sum of positions h -> score

Classes enter the generator by batch normalisation with a gain and a bias for each class, and the score as
``a(h) + <embedding(label), h>`` (Miyato and Koyama, "cGANs with projection discriminator", 2018). Spectral
normalisation: Miyato et al., "Spectral normalization for generative adversarial networks" (2018). Its vectors are
buffers that each pass of training brings nearer to the singular vectors.

The paper has a million images, two learning rates (1e-4 and 4e-4) and no penalty. The defaults here are for few images,
which the discriminator would soon know by heart: one rate, and the R1 penalty of ``fastgen.losses``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgen.checks import require_count, require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models._conditional import ConditionalGAN
from fastgen.models._convolutions import halvings
from fastgen.models._convolve import convolve_then_halve, double_then_convolve
from fastgen.models.adversarial import NoiseGANConfig
from fastgen.models.base import option
from fastgen.models.conditioning import LabelOptions
from fastgen.nn import SelfAttention2d
from fastgen.nn.averaging import settled


@dataclass(frozen=True)
class SAGANConfig(NoiseGANConfig):
    """Sizes of a SAGAN and how it learns. ValueError names the field, what was expected and what came."""

    loss: AdversarialLoss = option("hinge", "the game")
    generator_learning_rate: float = option(1e-3, "of the generator's AdamW")
    discriminator_learning_rate: float = option(1e-3, "of the discriminator's AdamW")
    beta1: float = option(0.0, "of AdamW")
    beta2: float = option(0.99, "of AdamW")
    classes: int = option(0, "classes of the images; 0: none", from_data=True)
    conditional: bool = option(True, "learn the classes, where the images have some")
    width: int = option(16, "channels at full size; doubled at each halving")
    attention_size: int = option(16, "attention is at the largest feature map that is no larger than this")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("width", self.width)
        require_count("classes", self.classes, 0)
        coarse = self.image_size >> halvings(self.image_size)
        if self.attention_size < coarse:
            raise ValueError(
                f"attention_size: expected at least {coarse}, the smallest feature map of images of"
                f" {self.image_size}, got {self.attention_size}"
            )

    @property
    def sizes(self) -> list[int]:
        """Heights of the feature maps, from 4, 5, 6 or 7 up to the images'."""
        times = halvings(self.image_size)
        return [self.image_size >> i for i in reversed(range(times + 1))]

    @property
    def widths(self) -> list[int]:
        """Channels of the feature maps of ``sizes``."""
        return [self.width << i for i in reversed(range(len(self.sizes)))]

    @property
    def attention_at(self) -> int:
        """The size that ``attention_size`` chooses."""
        return max(size for size in self.sizes if size <= self.attention_size)


def spectral(module: nn.Module) -> nn.Module:
    """The map, orthogonal in the beginning, its largest singular value held at 1."""
    nn.init.orthogonal_(cast(Tensor, module.weight))
    if isinstance(getattr(module, "bias", None), Tensor):
        nn.init.zeros_(cast(Tensor, module.bias))
    return parametrizations.spectral_norm(module)


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation; with classes, each has a gain and a bias of its own. x (B, C, H, W), labels (B,)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not classes)
        self.gain = nn.Embedding(classes, channels) if classes else None
        self.bias = nn.Embedding(classes, channels) if classes else None
        if self.gain is not None and self.bias is not None:
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        gain, bias = self.gain(labels)[..., None, None], self.bias(labels)[..., None, None]
        return torch.addcmul(bias.to(x.dtype), gain.to(x.dtype), x)


class GeneratorBlock(nn.Module):
    """x (B, wide, H, W) -> (B, fine, 2H, 2W): convolutions after norm and ReLU, beside a 1x1 convolution of x."""

    def __init__(self, wide: int, fine: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(wide, classes), ConditionalBatchNorm(fine, classes)
        self.conv1, self.conv2 = spectral(nn.Conv2d(wide, fine, 3, 1, 1)), spectral(nn.Conv2d(fine, fine, 3, 1, 1))
        self.shortcut = spectral(nn.Conv2d(wide, fine, 1))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        h = double_then_convolve(F.relu(self.norm1(x, labels)), self.conv1)
        h = self.conv2(F.relu(self.norm2(h, labels)))
        out: Tensor = h + F.interpolate(self.shortcut(x), scale_factor=2.0)
        return out


class DiscriminatorBlock(nn.Module):
    """x (B, fine, H, W) -> (B, wide, H/2, W/2), or without halving: two convolutions, beside a 1x1 one of x."""

    def __init__(self, fine: int, wide: int, *, halve: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = spectral(nn.Conv2d(fine, wide, 3, 1, 1)), spectral(nn.Conv2d(wide, wide, 3, 1, 1))
        self.shortcut = spectral(nn.Conv2d(fine, wide, 1)) if fine != wide else nn.Identity()
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        h = F.relu(self.conv1(F.relu(x)))
        if self.halve:
            h, x = convolve_then_halve(h, self.conv2), F.avg_pool2d(x, 2)
        else:
            h = self.conv2(h)
        out: Tensor = h + self.shortcut(x)
        return out


class Generator(nn.Module):
    """z (B, latent_dim), labels (B,) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: SAGANConfig, classes: int) -> None:
        super().__init__()
        sizes, widths = config.sizes, config.widths
        self.canvas = nn.Sequential(
            spectral(nn.Linear(config.latent_dim, widths[0] * sizes[0] ** 2)),
            nn.Unflatten(1, (widths[0], sizes[0], sizes[0])),
        )
        self.blocks = nn.ModuleList(GeneratorBlock(wide, fine, classes) for wide, fine in itertools.pairwise(widths))
        self.place = sizes.index(config.attention_at)
        self.attention = SelfAttention2d(widths[self.place], spectral_norm=True)
        self.image = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), spectral(nn.Conv2d(widths[-1], config.channels, 3, 1, 1)), nn.Tanh()
        )

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.canvas(z)
        if self.place == 0:
            x = self.attention(x)
        for place, block in enumerate(self.blocks, 1):
            x = block(x, labels)
            if place == self.place:
                x = self.attention(x)
        images: Tensor = self.image(x)
        return images


class Discriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1], labels (B,) -> scores (B,), logits: high means real."""

    def __init__(self, config: SAGANConfig, classes: int) -> None:
        super().__init__()
        sizes, widths = config.sizes[::-1], config.widths[::-1]
        layers = [spectral(nn.Conv2d(config.channels, widths[0], 3, 1, 1))]
        for place, size in enumerate(sizes):
            if size == config.attention_at:
                layers.append(SelfAttention2d(widths[place], spectral_norm=True))
            last = place == len(sizes) - 1
            layers.append(DiscriminatorBlock(widths[place], widths[-1 if last else place + 1], halve=not last))
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.score = spectral(nn.Linear(widths[-1], 1))
        self.embedding = spectral(nn.Embedding(classes, widths[-1])) if classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.features(images).sum(dim=(2, 3))
        scores: Tensor = self.score(h)[:, 0]
        return scores if self.embedding is None else scores + (self.embedding(labels) * h).sum(dim=1)


class SAGAN(ConditionalGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1]; labels (B,) int64, where there are classes.

    Example:
        >>> model = SAGAN(SAGANConfig(image_size=8, width=8, classes=3))
        >>> model.draw(6, LabelOptions()).pixels.shape
        torch.Size([6, 1, 8, 8])
    """

    name = "sagan"
    summary = "GAN with self-attention and spectral normalisation, with classes where there are any"
    config_class, sampling_class = SAGANConfig, LabelOptions
    train_defaults: ClassVar = {"epochs": 50.0, "batch_size": 64, "average_decay": 0.998}
    config: SAGANConfig

    def __init__(self, config: SAGANConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator = Generator(config, self.classes), Discriminator(config, self.classes)

    @property
    def classes(self) -> int:
        return self.config.classes if self.config.conditional else 0

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """With the singular vectors of the generator's weights as they are, which training only follows."""
        with settled(self.generator):
            yield
