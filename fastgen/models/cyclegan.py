"""Two domains of images, each translated into the other, learnt without pairs.

Zhu, Park, Isola and Efros, "Unpaired image-to-image translation using cycle-consistent adversarial networks" (2017):
two generators, each playing against a discriminator of patches of the domain it draws, so that

    b_to_a(a_to_b(a)) = a,  a_to_b(b_to_a(b)) = b        cycle: there and back again
    a_to_b(b) = b,          b_to_a(a) = a                identity: what is there already stays

are small in mean absolute difference. A generator halves the size, passes residual blocks and doubles it again:

    images -> 7x7 convolution -> [half the size] -> [x + two convolutions of x] -> [twice the size] -> 7x7, tanh

with instance normalisation and ReLU after each convolution, and reflected borders. The discriminators are shown images
of a store beside new ones (``_translation.py``).

The paper's images have 256 pixels a side, are halved twice, and have cycles of weight 10; its discriminators are
normalised, too. The defaults here are for few images of 32 pixels, and steps by the thousand, not the hundred thousand.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.batch import require_same_batch
from fastgen.checks import require_choice, require_count, require_not_negative
from fastgen.models._convolutions import initialise
from fastgen.models._translation import (
    History,
    PatchDiscriminator,
    TranslationConfig,
    Translator,
    difference,
    rows,
)
from fastgen.models.adversarial import Layers, judge
from fastgen.models.base import Batch, Images, Samples, StepContext, option, to_pixels

Direction = Literal["a-to-b", "b-to-a"]


@dataclass(frozen=True)
class CycleGANConfig(TranslationConfig):
    """Sizes of a CycleGAN and how it learns. ValueError names the field, what was expected and what came."""

    blocks: int = option(3, "residual blocks of a generator")
    cycle_weight: float = option(5.0, "of the difference after there and back again, in pixels from -1 to 1")
    identity_weight: float = option(0.0, "of the difference of what is in the domain already")
    history: int = option(50, "generated images that are kept for a discriminator, in each process; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(cycle_weight=self.cycle_weight, identity_weight=self.identity_weight)
        for name in ("blocks", "history"):
            require_count(name, getattr(self, name), 0)
        if self.image_size >> self.halvings < 2:
            raise ValueError(
                f"image_size: expected at least {2 << self.halvings}, as halvings = {self.halvings},"
                f" got {self.image_size}"
            )


@dataclass(frozen=True)
class DirectionOptions:
    """Which way images are translated. ValueError names the field, what was expected and what came."""

    direction: Direction = option("a-to-b", "a-to-b or b-to-a")

    def __post_init__(self) -> None:
        require_choice("direction", self.direction, get_args(Direction))


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, each with instance normalisation, a ReLU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = Layers(*_convolution(channels, channels, 3), nn.ReLU(), *_convolution(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(size // 2), nn.Conv2d(inputs, outputs, size, bias=False), nn.InstanceNorm2d(outputs)]


def generator(config: CycleGANConfig) -> Layers:
    """(B, C, S, S) -> the same, in [-1, 1]."""
    widths = [config.width << i for i in range(config.halvings + 1)]
    layers: list[nn.Module] = [*_convolution(config.channels, widths[0], 7), nn.ReLU()]
    for fine, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(fine, wide, 3, 2, 1, bias=False), nn.InstanceNorm2d(wide), nn.ReLU()]
    layers += [Residual(widths[-1]) for _ in range(config.blocks)]
    for fine, wide in reversed(list(itertools.pairwise(widths))):
        layers += [nn.ConvTranspose2d(wide, fine, 4, 2, 1, bias=False), nn.InstanceNorm2d(fine), nn.ReLU()]
    return Layers(*layers, nn.ReflectionPad2d(3), nn.Conv2d(widths[0], config.channels, 7), nn.Tanh())


class CycleGAN(Translator):
    """The model described at the top of this file.

    Images a and b are (B, channels, image_size, image_size), floating, in [0, 1]; they have nothing to do with each
    other.

    Example:
        >>> model = CycleGAN(CycleGANConfig(image_size=16, width=4, blocks=1, patch_width=4))
        >>> model.translate({"b": torch.rand(3, 1, 16, 16)}, DirectionOptions("b-to-a")).pixels.shape
        torch.Size([3, 1, 16, 16])
    """

    name, summary, kind = "cyclegan", "translates between two domains of images, without pairs", "domains"
    default_data = "textures"
    config_class, sampling_class = CycleGANConfig, DirectionOptions
    train_defaults: ClassVar = {"epochs": 2.0, "batch_size": 4, "schedule": "linear", "average_decay": 0.99}
    generators = averaged = ("a_to_b", "b_to_a")
    discriminators = ("discriminator_a", "discriminator_b")
    stores = ("history_a", "history_b")
    config: CycleGANConfig

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__(config)
        self.a_to_b, self.b_to_a = generator(config), generator(config)
        self.discriminator_a = PatchDiscriminator(config, config.channels)
        self.discriminator_b = PatchDiscriminator(config, config.channels)
        shape = (config.channels, config.image_size, config.image_size)
        self.history_a, self.history_b = History(config.history, shape), History(config.history, shape)
        self.apply(initialise)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """What ``phase`` minimises, summed over both domains; mean scores, "cycle" and "identity" as in ``score``."""
        a, b = self._both(batch)
        if phase == "generator":
            return self._generators_loss(a, b)
        with torch.no_grad():
            fake_a, fake_b = self.history_a.exchange(self.b_to_a(b)), self.history_b.exchange(self.a_to_b(a))
        of_a = judge(self.discriminator_a, a, fake_a, self.config, context)
        of_b = judge(self.discriminator_b, b, fake_b, self.config, context)
        both = {name: of_a[name] + of_b[name] for name in of_a}
        return {name: value if name == "loss" else value / 2 for name, value in both.items()}

    def _generators_loss(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        config, n = self.config, len(a)
        # What has instance normalisation takes images together: fakes, and what is in the domain already.
        with_identity = config.identity_weight > 0
        fake_b, same_b = _cut(self.a_to_b(torch.cat([a, b]) if with_identity else a), n)
        fake_a, same_a = _cut(self.b_to_a(torch.cat([b, a]) if with_identity else b), n)
        scores = self.discriminator_a(fake_a), self.discriminator_b(fake_b)
        loss = sum((losses.generator_loss(each, config.loss) for each in scores), start=a.new_zeros(()))
        cycle = difference(self.b_to_a(fake_b), a).mean() + difference(self.a_to_b(fake_a), b).mean()
        values = {"fake": sum(each.detach().float().mean() for each in scores) / 2, "cycle": cycle.detach() / 4}
        loss = loss + config.cycle_weight * cycle
        if with_identity:
            identity = difference(same_a, a).mean() + difference(same_b, b).mean()
            loss = loss + config.identity_weight * identity
            values["identity"] = identity.detach() / 4
        return {"loss": loss, **values}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean absolute differences (B,) of pixels from 0 to 1, over both domains: "cycle error", "identity error"."""
        a, b = self._both(batch)
        fake_a, fake_b = self.b_to_a(b), self.a_to_b(a)
        cycle = difference(self.b_to_a(fake_b), a) + difference(self.a_to_b(fake_a), b)
        identity = difference(self.b_to_a(a), a) + difference(self.a_to_b(b), b)
        return {"cycle error": cycle / 4, "identity error": identity / 4}

    @torch.no_grad()
    def translate(self, batch: Batch, options: DirectionOptions, *, generator: torch.Generator | None = None) -> Images:
        """Images a as b would have them, or b as a. The batch needs only those that are translated; no noise."""
        source = options.direction[0]
        network = self.a_to_b if source == "a" else self.b_to_a
        return Images(to_pixels(network(self._checked(source, batch[source], self.config.channels))))

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, their translations, and these translated back."""
        a, b = self._both(batch)
        fake_a, fake_b = self.b_to_a(b), self.a_to_b(a)
        there = {"a-b-a": (a, fake_b, self.b_to_a(fake_b)), "b-a-b": (b, fake_a, self.a_to_b(fake_a))}
        return {name: rows(*map(to_pixels, images)) for name, images in there.items()}

    def _both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        channels = self.config.channels
        a, b = (self._checked(name, batch[name], channels) for name in "ab")
        require_same_batch("a", a, "b", b)
        return a, b


def _cut(images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return images[:n], images[n:]
