"""Images translated into others, learnt from pairs.

Isola, Zhu, Zhou and Efros, "Image-to-image translation with conditional adversarial networks" (2017): a U-Net whose
output is to be near the target in mean absolute difference, and to look right to a discriminator that is shown patches
of it beside its input:

    input -> [half the size] -> ... -> [twice the size, joined with the map of that size on the way down] -> 3x3, tanh
    input, image -> scores of patches

Noise enters as dropout in the coarse maps on the way up, also when images are drawn. Each map is normalised, but the
first, the coarsest and the last. The last is joined with the input itself, unlike the paper's, and the network begins
by passing that on: detail of single pixels is much of a small image. The loss is
``adversarial_weight * game + l1_weight * |output - target|``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import losses
from fastgen.batch import require_same_batch
from fastgen.checks import require_choice, require_not_negative, require_positive, require_probability
from fastgen.models._convolutions import SLOPE, initialise
from fastgen.models._translation import PatchDiscriminator, TranslationConfig, Translator, difference, rows
from fastgen.models.adversarial import judge
from fastgen.models.base import Batch, Images, NoOptions, Samples, StepContext, option, to_pixels

Norm = Literal["batch", "instance"]
NOISY = 3
"""Most maps on the way up with dropout: the coarsest ones, up to a quarter of the size."""


@dataclass(frozen=True)
class Pix2PixConfig(TranslationConfig):
    """Sizes of a Pix2Pix and how it learns. ValueError names the field, what was expected and what came."""

    channels: int = option(3, "colour channels of the targets", from_data=True)
    input_channels: int = option(1, "colour channels of the inputs", from_data=True)
    width: int = option(32, "channels of the generator at half the size; doubled at each halving, to 8 times at most")
    halvings: int = option(4, "times the generator halves the size")
    norm: Norm = option("batch", "of the generator's maps; instance: each image by itself")
    generator_learning_rate: float = option(1e-3, "of the generator's AdamW")
    dropout: float = option(0.5, "probability of dropping, in the coarse maps on the way up; 0: no noise")
    l1_weight: float = option(100.0, "of the mean absolute difference, in pixels from -1 to 1")
    adversarial_weight: float = option(1.0, "of the game, in the generator's loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("input_channels", self.input_channels)
        require_choice("norm", self.norm, get_args(Norm))
        require_probability("dropout", self.dropout)
        require_not_negative(l1_weight=self.l1_weight, adversarial_weight=self.adversarial_weight)

    @property
    def widths(self) -> list[int]:
        """Channels of the maps on the way down, of half the size, a quarter, ..."""
        return [self.width << min(i, 3) for i in range(self.halvings)]

    @property
    def noisy(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of the maps with dropout."""
        count = min(NOISY, self.halvings - 2) if self.dropout else 0
        coarse = self.image_size >> self.halvings
        return [(self.widths[-2 - i], coarse << i + 1, coarse << i + 1) for i in range(count)]


class UNet(nn.Module):
    """Images (B, input_channels, S, S) and factors (B, C, h, w) of the config's noisy maps -> (B, channels, S, S)."""

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__()
        widths, self.inputs = config.widths, config.input_channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.down_norms, self.up_norms = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(zip([config.input_channels, *widths], widths, strict=False)):
            plain = i in (0, len(widths) - 1)
            self.down.append(nn.Conv2d(before, after, 4, 2, 1, bias=plain))
            self.down_norms.append(nn.Identity() if plain else _norm(config.norm, after))
        ups = [*widths[::-1][1:], widths[0]]
        for i, (before, after) in enumerate(zip(widths[::-1], ups, strict=True)):
            last = i == len(ups) - 1
            self.up.append(nn.ConvTranspose2d(before * (1 if i == 0 else 2), after, 4, 2, 1, bias=last))
            self.up_norms.append(nn.Identity() if last else _norm(config.norm, after))
        self.image = nn.Conv2d(widths[0] + config.input_channels, config.channels, 3, padding=1)

    @torch.no_grad()
    def pass_input_on(self) -> None:
        """The output begins near tanh(input), or of its channels' mean where the output has another number."""
        middle = self.image.weight[:, -self.inputs :, 1, 1]
        middle += torch.eye(self.inputs) if len(middle) == self.inputs else 1 / self.inputs

    def forward(self, images: Tensor, factors: Sequence[Tensor]) -> Tensor:
        x, seen = images, []
        for i, (convolution, norm) in enumerate(zip(self.down, self.down_norms, strict=True)):
            x = norm(convolution(x if i == 0 else F.leaky_relu(x, SLOPE)))
            seen.append(x)
        for i, (convolution, norm) in enumerate(zip(self.up, self.up_norms, strict=True)):
            joined = x if i == 0 else torch.cat([x, seen[-1 - i]], dim=1)
            x = norm(convolution(F.relu(joined)))
            if i < len(factors):
                x = x * factors[i].to(x.dtype)
        return torch.tanh(self.image(torch.cat([F.relu(x), images], dim=1)))


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels, affine=True)


class Pix2Pix(Translator):
    """The model described at the top of this file.

    Inputs are (B, input_channels, S, S), targets (B, channels, S, S), floating, in [0, 1]; S is image_size.

    Example:
        >>> model = Pix2Pix(Pix2PixConfig(image_size=16, width=4, patch_width=4))
        >>> model.translate({"inputs": torch.rand(5, 1, 16, 16)}, NoOptions()).pixels.shape
        torch.Size([5, 3, 16, 16])
    """

    name, summary, kind = "pix2pix", "translates images into others, learnt from pairs", "pairs"
    default_data = "photos"
    config_class, sampling_class = Pix2PixConfig, NoOptions
    train_defaults: ClassVar = {"epochs": 3.0, "batch_size": 16, "schedule": "linear", "average_decay": 0.99}
    generators = averaged = ("generator",)
    discriminators = ("discriminator",)
    config: Pix2PixConfig

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__(config)
        self.generator = UNet(config)
        self.discriminator = PatchDiscriminator(config, config.input_channels + config.channels)
        self.apply(initialise)
        self.generator.pass_input_on()

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """What ``phase`` minimises; mean scores of "real" and "fake" pairs, "l1" as in ``score``, the "penalty"."""
        config = self.config
        inputs, targets = self._pairs(batch)
        if phase == "generator":
            fake = self._generate(inputs)
            scores = self.discriminator(torch.cat([inputs, fake.to(inputs.dtype)], dim=1))
            l1 = difference(fake, targets).mean()
            loss = config.adversarial_weight * losses.generator_loss(scores, config.loss) + config.l1_weight * l1
            return {"loss": loss, "fake": scores.detach().float().mean(), "l1": l1.detach() / 2}
        with torch.no_grad():
            fake = self._generate(inputs).to(inputs.dtype)

        def discriminator(images: Tensor) -> Tensor:
            scores: Tensor = self.discriminator(torch.cat([inputs, images], dim=1))
            return scores

        return judge(discriminator, targets, fake, config, context)

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """l1 (B,): mean absolute difference of pixels from 0 to 1."""
        inputs, targets = self._pairs(batch)
        return {"l1": difference(self._drawn(inputs, generator), targets) / 2}

    @torch.no_grad()
    def translate(self, batch: Batch, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        """What becomes of the inputs; the batch needs no targets."""
        inputs = self._checked("inputs", batch["inputs"], self.config.input_channels)
        return Images(to_pixels(self._drawn(inputs, generator)))

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out inputs, what becomes of them, and their targets."""
        outputs = self.translate(batch, NoOptions(), generator=generator).pixels
        return {"translations": rows(batch["inputs"], outputs, batch["targets"])}

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = self._checked("inputs", batch["inputs"], self.config.input_channels)
        require_same_batch("inputs", inputs, "targets", batch["targets"])
        return inputs, self._checked("targets", batch["targets"], self.config.channels)

    def _drawn(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Each image normalised by the statistics of training, whatever the others are."""
        was_training = self.generator.training
        self.generator.eval()
        try:
            return self._generate(inputs, generator)
        finally:
            self.generator.train(was_training)

    def _generate(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, channels, S, S) in [-1, 1]."""
        keep, shapes = 1 - self.config.dropout, self.config.noisy
        counts = [math.prod(shape) for shape in shapes]
        device = inputs.device if generator is None else generator.device
        kept = torch.rand(len(inputs), sum(counts), generator=generator, device=device) < keep
        parts = (kept / keep).to(inputs).split(counts, dim=1)
        factors = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)] if shapes else []
        images: Tensor = self.generator(inputs, factors)
        return images
