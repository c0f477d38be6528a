"""What models that turn images into images share: how both players learn, what judges patches, a store of images.

Such a model has ``translate`` in place of ``draw``: there is nothing to draw without an image to begin with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastgen.batch import require_images
from fastgen.checks import require_choice, require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models._convolutions import SLOPE
from fastgen.models.adversarial import AdversarialConfig, Layers, Penalty
from fastgen.models.base import GenerativeModel, Images, Phase, image_rows, option

PatchNorm = Literal["instance", "none"]


@dataclass(frozen=True)
class TranslationConfig(AdversarialConfig):
    """A ``AdversarialConfig`` whose discriminators judge patches."""

    image_size: int = option(32, "height and width of the images", from_data=True)
    loss: AdversarialLoss = option("least-squares", "the game")
    penalty: Penalty = option("none", "of the discriminators' slope")
    width: int = option(16, "channels of a generator at full size; doubled at each halving")
    halvings: int = option(1, "times a generator halves the size")
    patch_width: int = option(32, "channels of a discriminator at half the size; doubled at each halving")
    patch_halvings: int = option(2, "times a discriminator halves the size: what a score sees grows with it")
    patch_norm: PatchNorm = option(
        "none", "of a discriminator's features; instance: each image by itself, as published"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "halvings", "patch_width", "patch_halvings"):
            require_positive(name, getattr(self, name))
        require_choice("patch_norm", self.patch_norm, get_args(PatchNorm))
        if self.image_size % 2**self.halvings:
            raise ValueError(
                f"image_size: expected a multiple of {2**self.halvings}, as halvings = {self.halvings},"
                f" got {self.image_size}"
            )
        least = 3 << self.patch_halvings
        if self.image_size < least:
            raise ValueError(
                f"image_size: expected at least {least}, as patch_halvings = {self.patch_halvings},"
                f" got {self.image_size}"
            )


class PatchDiscriminator(Layers):
    """Images (B, inputs, S, S) in [-1, 1] -> scores (B, h, w) of patches that overlap, logits: high means real.

    Isola et al., "Image-to-image translation with conditional adversarial networks" (2017). h = w = S / 2^halvings - 2;
    a score sees 34 pixels for 2 halvings, 70 for 3. Normalisation hides from it how much detail there is in all.
    """

    def __init__(self, config: TranslationConfig, inputs: int) -> None:
        widths = [config.patch_width << i for i in range(config.patch_halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for i in range(1, len(widths)):
            stride = 2 if i < config.patch_halvings else 1
            norm = [nn.InstanceNorm2d(widths[i])] if config.patch_norm == "instance" else []
            convolution = nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=not norm)
            layers += [convolution, *norm, nn.LeakyReLU(SLOPE)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1), nn.Flatten(1, 2))


class History(nn.Module):
    """A store of generated images, from which a discriminator is shown old ones among the new.

    Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training" (2017), section
    2.3. Places are drawn from torch's global generator, each at most once in a batch.

    Args:
        capacity: images in the store; 0: none is kept.
        shape: (C, H, W) of an image.
    """

    images: Tensor
    filled: Tensor

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(capacity, *shape))
        self.register_buffer("filled", torch.zeros(capacity))

    @torch.no_grad()
    def exchange(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, of which some are replaced by images of the store, and stored in their place.

        An image whose place is empty is stored and returned; any other one is exchanged with probability 1/2. Of a
        batch larger than the store the rest is returned as it is.
        """
        places = torch.randperm(len(self.images), device=images.device)[: len(images)]
        new, rest = images[: len(places)], images[len(places) :]
        old, empty = self.images[places].to(images.dtype), self.filled[places] == 0
        exchanged = ~empty & (torch.rand(len(places), device=images.device) < 0.5)
        stored = (exchanged | empty).view(-1, 1, 1, 1)
        self.images[places] = torch.where(stored, new, old).to(self.images.dtype)
        self.filled[places] = 1.0
        return torch.cat([torch.where(exchanged.view(-1, 1, 1, 1), old, new), rest])


class Translator(GenerativeModel):
    """A model with several generators and discriminators, by name; its config is a ``TranslationConfig``."""

    generators: tuple[str, ...]
    discriminators: tuple[str, ...]

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas, repeats = (config.beta1, config.beta2), config.critic_steps
        return (
            Phase("discriminator", self.discriminators, config.discriminator_learning_rate, betas, repeats=repeats),
            Phase("generator", self.generators, config.generator_learning_rate, betas),
        )

    def _checked(self, name: str, images: Tensor, channels: int) -> Tensor:
        """Images (B, channels, S, S) in [0, 1] -> [-1, 1]."""
        require_images(name, images, channels, self.config.image_size)
        return 2 * images - 1


def difference(images: Tensor, others: Tensor) -> Tensor:
    """(B,) mean absolute difference, float32 at least."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return (wide - others).abs().flatten(1).mean(1)


def rows(*stacks: Tensor) -> Images:
    """Rows of images (B, C, S, S) in [0, 1], C 1 or as in the others, each above the row of its counterparts."""
    channels = max(stack.size(1) for stack in stacks)
    return image_rows(*(stack.expand(-1, channels, -1, -1) for stack in stacks))
