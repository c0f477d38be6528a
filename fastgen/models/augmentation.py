"""Random augmentation of images: of the training data, or of what a GAN's discriminator gets.

Zhao et al., "Differentiable augmentation for data-efficient GAN training" (2020): a discriminator whose inputs, real
and generated, are augmented can't memorize a small dataset, and the generator, whose gradient passes through the
augmentation, does not learn to generate augmented images. Every transformation is affine in the pixels, hence twice
differentiable, so that a gradient penalty may be computed through it. Transformations, with random numbers of their own
for each image:

    flip          left to right, with probability 1/2
    color         brightness: plus U(-0.5, 0.5); saturation: times U(0, 2) around the mean of the channels of a pixel;
                  contrast: times U(0.5, 1.5) around the mean of the image. Of the range [-1, 1].
    translation   by up to 1/8 of the size in each direction; what enters is 0, gray
    cutout        a square of half the size is 0

The ranges are those of the paper's code. With adaptive augmentation (ADA: Karras et al., "Training generative
adversarial networks with limited data", 2020) each transformation is applied to an image with a probability p, which
rises while the discriminator overfits: while the mean sign of the scores of real images is above ``augment_target``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BRIGHTNESS, SATURATION, CONTRAST = (-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)
SHIFT, CUTOUT = 1 / 8, 1 / 2
MILD = 0.4
"""Strength of color changes of training data, which the model learns."""

ADAPTATION, SIGN_DECAY = 100_000, 0.9
"""ADA: images in which p may rise from 0 to 1 (five times as fast as in the paper, whose runs have 25 million images),
and the decay of the mean sign."""


class Draws:
    """Random numbers of one call, on the device of the generator, else on that of the images."""

    def __init__(self, images: Tensor, generator: torch.Generator | None, strength: float) -> None:
        self.images, self.generator, self.strength = images, generator, strength

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, 1, 1, 1) float32."""
        device = self.images.device if self.generator is None else self.generator.device
        drawn = torch.rand(len(self.images), 1, 1, 1, generator=self.generator, device=device)
        return (low + (high - low) * drawn).to(self.images.device)

    def color(self, low: float, high: float, neutral: float) -> Tensor:
        """As ``uniform``, in the images' dtype; a range around ``neutral`` shrinks with the strength."""
        return (neutral + self.strength * (self.uniform(low, high) - neutral)).to(self.images.dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """(B, 1, 1, 1) int64, low to high, both included."""
        return self.uniform(low, high + 1).floor().long().clamp(low, high)


def _flip(images: Tensor, draw: Draws) -> Tensor:
    return torch.where(draw.uniform() < 0.5, images.flip(-1), images)


def _color(images: Tensor, draw: Draws) -> Tensor:
    images = images + draw.color(*BRIGHTNESS, neutral=0.0)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * draw.color(*SATURATION, neutral=1.0)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * draw.color(*CONTRAST, neutral=1.0)


def _translation(images: Tensor, draw: Draws) -> Tensor:
    for dim in (2, 3):
        size = images.size(dim)
        most = max(1, int(size * SHIFT + 0.5))
        shape = [1, 1, 1, 1]
        shape[dim] = size
        source = torch.arange(size, device=images.device).view(shape) - draw.integers(-most, most)
        inside = (source >= 0) & (source < size)
        images = images.gather(dim, source.clamp(0, size - 1).expand(images.shape))
        images = torch.where(inside, images, torch.zeros((), dtype=images.dtype, device=images.device))
    return images


def _cutout(images: Tensor, draw: Draws) -> Tensor:
    kept = None
    for dim in (2, 3):
        size = images.size(dim)
        side = max(1, int(size * CUTOUT + 0.5))
        shape = [1, 1, 1, 1]
        shape[dim] = size
        first = draw.integers(0, size - side % 2) - side // 2
        place = torch.arange(size, device=images.device).view(shape) - first
        cut = (place >= 0) & (place < side)
        kept = cut if kept is None else kept & cut
    assert kept is not None
    return torch.where(kept, torch.zeros((), dtype=images.dtype, device=images.device), images)


TRANSFORMATIONS: Mapping[str, Callable[[Tensor, Draws], Tensor]] = {
    "flip": _flip,
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
"""By name, in the order in which they are applied."""


def parse_augment(text: str) -> tuple[str, ...]:
    """Names of transformations, comma-separated, in the order in which they are applied.

    Raises:
        ValueError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TRANSFORMATIONS]
    if unknown:
        raise ValueError(f"augment: expected some of {', '.join(TRANSFORMATIONS)}, got {', '.join(unknown)}")
    return tuple(name for name in TRANSFORMATIONS if name in names)


def augment(
    images: Tensor,
    names: tuple[str, ...],
    *,
    probability: Tensor | float = 1.0,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images with random transformations, differentiable.

    Args:
        images: (B, C, S, S) in [-1, 1]; a result may be beyond.
        names: as from ``parse_augment``.
        probability: share of the images that a transformation is applied to.
        strength: of changes of color, 0 to 1.
        generator: source of the random numbers; default torch's global one of the images' device.

    Example:
        >>> augment(torch.zeros(2, 3, 8, 8), ("flip", "translation")).shape
        torch.Size([2, 3, 8, 8])
    """
    draw = Draws(images, generator, strength)
    for name in names:
        changed = TRANSFORMATIONS[name](images, draw)
        if isinstance(probability, Tensor) or probability < 1:
            changed = torch.where(draw.uniform() < probability, changed, images)
        images = changed
    return images


def check_augment_options(config: Any) -> None:
    """Checks ``augment`` and ``augment_target`` of a config. Raises ValueError; names the option."""
    names = parse_augment(config.augment)
    if not 0 <= config.augment_target < 1:
        raise ValueError(f"augment_target: expected a number in [0, 1), got {config.augment_target}")
    if config.augment_target and not names:
        raise ValueError(f"augment_target: expected 0 without augment, got {config.augment_target}")
    if config.augment_target and config.loss == "wasserstein":
        raise ValueError(
            "augment_target: expected 0 with the Wasserstein loss, whose scores have no sign that says real, "
            f"got {config.augment_target}"
        )


class Augmentation(nn.Module):
    """``augment`` with a probability, which is 1, or with a ``target`` adapted (ADA) and kept in a buffer.

    Args:
        names: as from ``parse_augment``; without any, images stay as they are.
        target: of the mean sign of the real scores; 0: all images are augmented.
    """

    def __init__(self, names: tuple[str, ...], target: float = 0.0) -> None:
        super().__init__()
        self.names, self.target = names, target
        self.probability: Tensor
        self.sign: Tensor
        if target:
            self.register_buffer("probability", torch.zeros(()))
            self.register_buffer("sign", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return augment(images, self.names, probability=self.probability if self.target else 1.0)

    @torch.no_grad()
    def observe(self, real_scores: Tensor) -> None:
        """Adapts p to the scores (B, ...) of the real images of a step."""
        if self.target:
            mean = real_scores.detach().float().sign().mean()
            self.sign.lerp_(mean, 1 - SIGN_DECAY)
            change = torch.sign(self.sign - self.target) * (len(real_scores) / ADAPTATION)
            self.probability.copy_((self.probability + change).clamp(0, 1))

    def values(self) -> dict[str, Tensor]:
        """Values for the log: p, where it is adapted."""
        return {"augment": self.probability.clone()} if self.target else {}


def augment_batch(batch: Mapping[str, Tensor], names: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """A training batch whose images, in [0, 1], are augmented; the two of a pair by the same numbers.

    Pixels that enter by translation, and those that are cut out, have the value at the image's border, so that no gray
    frame is learned; those beyond [0, 1] are clamped.
    """
    out = dict(batch)
    for part, group in enumerate((("images",), ("inputs", "targets"), ("a",), ("b",))):
        for name in group:
            if name in batch:
                generator = torch.Generator().manual_seed((seed + part) % 2**63)
                images = batch[name].float()
                border = _border(images)
                moved = augment(2 * (images - border), names, strength=MILD, generator=generator)
                out[name] = (moved / 2 + border).clamp(0, 1).to(batch[name].dtype)
    return out


def _border(images: Tensor) -> Tensor:
    """(B, C, 1, 1): the median of the pixels along the edges."""
    edges = [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]]
    return torch.cat(edges, -1).median(-1).values[:, :, None, None]
