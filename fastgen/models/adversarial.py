"""Adversarial training of two networks: their objectives, the optimizer phases, and what image GANs share.

A generator G maps z from N(0, 1) to images in [-1, 1]. A discriminator D maps images to logits, high for real images. A
training step updates D, then G; ``fastgen.losses`` has the formulas of both losses and of the penalties:

    discriminator:  discriminator_loss(D(real), D(G(z))) + penalty_weight * penalty     (``critic_steps`` times)
    generator:      generator_loss(D(G(z)))

Real and generated images are separate batches of D, so batch normalization normalizes each by its own statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.batch import require_images
from fastgen.checks import (
    require_choice,
    require_not_negative,
    require_positive,
    require_positive_number,
    require_probability,
)
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES
from fastgen.models.augmentation import Augmentation, check_augment_options, parse_augment
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, StepContext, to_pixels
from fastgen.models.conditioning import tempered_noise
from fastgen.models.interpolation import great_circles, row_labels
from fastgen.models.sizes import FEW_ITEMS, DataSize
from fastgen.nn.averaging import recomputed_buffers

Penalty = Literal["none", "r1", "gradient", "dragan"]

MAX_COARSE_SIZE = 7
FEW_AUGMENT = "color,translation,cutout"


def check_adversarial_options(config: Any) -> None:
    """Checks the options of a config from ``image_size`` to ``critic_steps``, which every adversarial config has.

    Raises:
        ValueError: an option is out of range; the message names it.
    """
    for name in ("image_size", "channels", "penalty_every", "critic_steps"):
        require_positive(name, getattr(config, name))
    require_choice("loss", config.loss, ADVERSARIAL_LOSSES)
    require_choice("penalty", config.penalty, get_args(Penalty))
    require_not_negative(penalty_weight=config.penalty_weight)
    require_positive_number(
        generator_learning_rate=config.generator_learning_rate,
        discriminator_learning_rate=config.discriminator_learning_rate,
    )
    for name in ("beta1", "beta2"):
        require_probability(name, getattr(config, name))
    if hasattr(config, "augment"):
        check_augment_options(config)


def feature_sizes(image_size: int) -> list[int]:
    """Heights of the feature maps, from the coarsest (4 to 7) up to ``image_size``, each twice the previous one.

    Raises:
        ValueError: image_size is not 4, 5, 6 or 7 times a power of 2, or less than 8.
    """
    num_downsamples = math.ceil(math.log2(max(1.0, image_size / MAX_COARSE_SIZE)))
    if image_size < 8 or image_size % (1 << num_downsamples):
        raise ValueError(
            f"image_size: expected at least 8, and 4 to {MAX_COARSE_SIZE} times a power of 2"
            f" (8, 20, 28, 32, 64, ...), got {image_size}"
        )
    return [image_size >> i for i in reversed(range(num_downsamples + 1))]


def generator_objective(fake_scores: Tensor, config: Any) -> dict[str, Tensor]:
    """The generator's "loss" (``config.loss``) and the mean score of "fake" images, from their scores (B, ...)."""
    return {"loss": losses.generator_loss(fake_scores, config.loss), "fake": fake_scores.detach().float().mean()}


def discriminator_objective(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    config: Any,
    context: StepContext,
    observe: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """The discriminator's "loss" with its gradient penalty, the mean scores "real" and "fake", and the "penalty".

    The penalty is computed in every ``penalty_every``-th step and multiplied by ``penalty_every``, which keeps its mean
    over steps. These steps run without torch.compile, whose code has no double backward.

    Args:
        discriminator: images (B, C, S, S) -> scores (B, ...). The penalty is on the mean over the scores of an image.
        real, fake: images in [-1, 1], detached from the generator.
        config: has ``loss``, ``penalty``, ``penalty_weight`` and ``penalty_every``.
        observe: called with the scores of the real images.
    """
    penalized = config.penalty != "none" and context.step % config.penalty_every == 0

    def image_scores(images: Tensor) -> Tensor:
        return _per_image(discriminator(images))

    if penalized and config.penalty == "r1" and not real.requires_grad:
        real = real.view_as(real).requires_grad_()  # a view keeps forward-mode tangents
    with torch.compiler.set_stance("force_eager") if penalized else nullcontext():
        real_scores, fake_scores = discriminator(real), discriminator(fake)
        if observe is not None:
            observe(real_scores)
        loss = losses.discriminator_loss(real_scores, fake_scores, config.loss)
        values = {"real": real_scores.detach().float().mean(), "fake": fake_scores.detach().float().mean()}
        if penalized:
            if config.penalty == "r1":
                penalty = losses.r1_penalty(_per_image(real_scores), real, scaler=context.scaler)
            elif config.penalty == "gradient":
                penalty = losses.gradient_penalty(image_scores, real, fake.to(real.dtype), scaler=context.scaler)
            else:
                penalty = losses.dragan_penalty(image_scores, real, scaler=context.scaler)
            if config.penalty_every > 1:
                penalty = config.penalty_every * penalty
            loss = loss + config.penalty_weight * penalty
            values["penalty"] = penalty.detach()
    return {"loss": loss, **values}


def _per_image(scores: Tensor) -> Tensor:
    """Scores (B, ...) -> their means (B,)."""
    return scores if scores.dim() == 1 else scores.flatten(1).mean(1)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; its previous mode is restored at the end."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


class ImageGAN(GenerativeModel):
    """Base class of GANs that generate images from noise.

    A subclass defines the networks ``generator`` and ``discriminator``, ``loss``, ``draw`` and ``forward``.
    """

    kind = "images"
    default_data = "digits"
    averaged = ("generator",)
    generator: nn.Module
    discriminator: nn.Module
    augmentation: Augmentation

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        augmentation = Augmentation(parse_augment(config.augment), config.augment_target)
        if augmentation.names:
            self.augmentation = augmentation
        else:  # no submodule: the networks are the only ones
            object.__setattr__(self, "augmentation", augmentation)

    @classmethod
    def suggested(cls, data: DataSize, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As ``GenerativeModel.suggested``; with few images, the input of the discriminator is augmented."""
        few = data.scale != "small" and data.items < FEW_ITEMS
        return super().suggested(data, given) | ({"model.augment": FEW_AUGMENT} if few else {})

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas, repeats = (config.beta1, config.beta2), config.critic_steps
        return (
            Phase("discriminator", ("discriminator",), config.discriminator_learning_rate, betas, repeats=repeats),
            Phase("generator", ("generator",), config.generator_learning_rate, betas),
        )

    def discriminator_loss(
        self, discriminator: Callable[[Tensor], Tensor], images: Tensor, fake: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """As ``discriminator_objective``, for images in [0, 1]; both batches are augmented before the discriminator."""
        augmentation = self.augmentation
        if not augmentation.names:
            return discriminator_objective(discriminator, 2 * images - 1, fake, self.config, context)

        def augmented(x: Tensor) -> Tensor:
            return discriminator(augmentation(x))

        values = discriminator_objective(
            augmented, 2 * images - 1, fake, self.config, context, observe=augmentation.observe
        )
        return values | augmentation.values()

    def noise(self, n: int, dim: int, generator: torch.Generator | None = None, options: Any = None) -> Tensor:
        """(n, dim) values from N(0, 1), or N(0, temperature^2) with sampling options that have a ``temperature``.

        A CPU generator gives the same values on every device.
        """
        weight = next(self.generator.parameters())
        device = weight.device if generator is None else generator.device
        return tempered_noise(torch.randn(n, dim, generator=generator, device=device).to(weight), options)

    @torch.no_grad()
    def interpolate(self, rows: int, columns: int, options: Any, *, generator: torch.Generator | None = None) -> Images:
        """As ``GenerativeModel.interpolate``, from noise z to noise z."""
        require_positive("rows", rows)
        z = great_circles(self.noise(2 * rows, self.config.latent_dim, generator, options), columns)
        classes = int(getattr(self.config, "num_classes", getattr(self.config, "classes", 0)))
        labels = row_labels(rows, columns, options.label, classes) if classes else None
        with eval_mode(self.generator), recomputed_buffers(self.generator):
            images = self.generator(z) if labels is None else self.generator(z, labels.to(self.device))
        return Images(to_pixels(images), columns, labels)

    def checked_images(self, batch: Batch) -> Tensor:
        """The batch's images (B, C, S, S) in [0, 1].

        Raises:
            TypeError, ValueError: wrong dtype, shape or range.
        """
        require_images("images", batch["images"], self.config.channels, self.config.image_size)
        return batch["images"]


# --------------------------------------------------------------------------------------------------
# Imported by the image-to-image models
