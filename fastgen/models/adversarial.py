"""What generative adversarial networks of images share: the two players' phases, their losses, noise and drawing.

A model of this family is an ``ImageGAN`` with two networks, ``generator`` (z -> images in [-1, 1]) and
``discriminator`` (images -> scores (B,), logits: high means real), and an ``NoiseGANConfig``.

The game that both play and the penalty of the discriminator's slope are those of ``fastgen.losses``. Real and
generated images pass through the discriminator in batches of their own, each normalised by its own statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES, AdversarialLoss
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, StepContext, option, to_pixels

Penalty = Literal["none", "r1", "gradient", "dragan"]


class Layers(nn.Sequential):
    """``nn.Sequential`` that torch.compile sees: torch's own forward is left out of its graphs."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@dataclass(frozen=True)
class AdversarialConfig:
    """The images, and how both networks learn. ValueError names the field, what was expected and what came."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    loss: AdversarialLoss = option("non-saturating", "the game")
    penalty: Penalty = option("r1", "of the discriminator's slope")
    penalty_weight: float = option(0.2, "what the penalty is multiplied by (gamma, lambda)")
    penalty_every: int = option(1, "steps from one penalty to the next; its weight is multiplied by as much")
    generator_learning_rate: float = option(5e-4, "of the generator's AdamW")
    discriminator_learning_rate: float = option(5e-4, "of the discriminator's AdamW")
    beta1: float = option(0.5, "of AdamW")
    beta2: float = option(0.999, "of AdamW")
    critic_steps: int = option(1, "updates of the discriminator for one of the generator")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "penalty_every", "critic_steps"):
            require_positive(name, getattr(self, name))
        require_choice("loss", self.loss, ADVERSARIAL_LOSSES)
        require_choice("penalty", self.penalty, get_args(Penalty))
        require_not_negative(penalty_weight=self.penalty_weight)
        require_positive_number(
            generator_learning_rate=self.generator_learning_rate,
            discriminator_learning_rate=self.discriminator_learning_rate,
        )
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))

    def penalised(self, step: int) -> bool:
        """Whether the discriminator's loss has the penalty in ``step``."""
        return self.penalty != "none" and step % self.penalty_every == 0


@dataclass(frozen=True)
class NoiseGANConfig(AdversarialConfig):
    """A ``AdversarialConfig`` of images that are made from z."""

    latent_dim: int = option(64, "numbers in z")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("latent_dim", self.latent_dim)


def judge(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    config: AdversarialConfig,
    context: StepContext,
) -> dict[str, Tensor]:
    """What a discriminator minimises, under "loss", and mean scores of "real" and "fake" images, the "penalty".

    The penalty is there in its own steps only, times their interval: its mean over all steps is that of the penalty.
    Code of torch.compile can't be differentiated twice, so these steps don't use it. Scores may be of patches: the
    penalty is that of their mean.

    Args:
        discriminator: images (B, C, S, S) -> scores (B, ...). real, fake: images in [-1, 1].
    """
    penalised = config.penalised(context.step)

    def mean_scores(images: Tensor) -> Tensor:
        return _of_image(discriminator(images))

    if penalised and config.penalty == "r1" and not real.requires_grad:
        real = real.view_as(real).requires_grad_()  # of its own, with the tangents that the images may have
    with torch.compiler.set_stance("force_eager") if penalised else nullcontext():
        real_scores, fake_scores = discriminator(real), discriminator(fake)
        loss = losses.discriminator_loss(real_scores, fake_scores, config.loss)
        values = {"real": real_scores.detach().float().mean(), "fake": fake_scores.detach().float().mean()}
        if penalised:
            scaler = context.scaler
            compute: dict[str, Callable[[], Tensor]] = {
                "r1": lambda: losses.r1_penalty(_of_image(real_scores), real, scaler=scaler),
                "gradient": lambda: losses.gradient_penalty(mean_scores, real, fake.to(real.dtype), scaler=scaler),
                "dragan": lambda: losses.dragan_penalty(mean_scores, real, scaler=scaler),
            }
            penalty = config.penalty_every * compute[config.penalty]()
            loss = loss + config.penalty_weight * penalty
            values["penalty"] = penalty.detach()
    return {"loss": loss, **values}


def _of_image(scores: Tensor) -> Tensor:
    """Scores (B, ...) -> their means (B,)."""
    return scores if scores.dim() == 1 else scores.flatten(1).mean(1)


class ImageGAN(GenerativeModel):
    """The model described at the top of this file. Its class defines ``generator`` and ``discriminator``."""

    kind = "images"
    default_data = "digits"
    averaged = ("generator",)
    generator: nn.Module
    discriminator: nn.Module

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        return (
            Phase(
                "discriminator",
                ("discriminator",),
                config.discriminator_learning_rate,
                betas,
                repeats=config.critic_steps,
            ),
            Phase("generator", ("generator",), config.generator_learning_rate, betas),
        )

    @property
    def noise_dim(self) -> int:
        """Normal numbers that the generator makes an image of."""
        latent_dim: int = self.config.latent_dim
        return latent_dim

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        """What of the batch both networks are given beside z and images."""
        return ()

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """What ``phase`` minimises, and what people watch: see ``judge``."""
        real, given = self._checked(batch["images"]), self.conditions(batch)
        if phase == "generator":
            scores = self.discriminator(self.generator(self._noise(len(real)), *given), *given)
            return {"loss": losses.generator_loss(scores, self.config.loss), "fake": scores.detach().float().mean()}
        with torch.no_grad():
            fake = self.generator(self._noise(len(real)), *given)

        def discriminator(images: Tensor) -> Tensor:
            scores: Tensor = self.discriminator(images, *given)
            return scores

        return judge(discriminator, 2 * real - 1, fake, self.config, context)

    @torch.no_grad()
    def draw(self, n: int, options: Any, *, generator: torch.Generator | None = None) -> Images:
        """n images, each normalised by the statistics of training, whatever the others are.

        Raises:
            ValueError: n is not a positive integer.
        """
        return Images(self._draw(n, (), generator))

    def drawing(self) -> AbstractContextManager[None]:
        """Around the generator in ``draw``, for a model that has something to prepare."""
        return nullcontext()

    def _draw(self, n: int, given: tuple[Tensor, ...], generator: torch.Generator | None) -> Tensor:
        """Images (n, C, S, S) in [0, 1]."""
        require_positive("n", n)
        was_training = self.generator.training
        self.generator.eval()
        try:
            with self.drawing():
                pixels: Tensor = self.generator(self._noise(n, generator), *given)
        finally:
            self.generator.train(was_training)
        return to_pixels(pixels)

    def _noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        weight = next(self.generator.parameters())
        device = weight.device if generator is None else generator.device
        return torch.randn(n, self.noise_dim, generator=generator, device=device).to(weight)

    def _checked(self, images: Tensor) -> Tensor:
        require_images("images", images, self.config.channels, self.config.image_size)
        return images
