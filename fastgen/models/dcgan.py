"""A deep convolutional generative adversarial network.

Radford, Metz and Chintala, "Unsupervised representation learning with deep convolutional generative adversarial
networks" (2016): strided convolutions in place of pooling, batch normalisation except in the discriminator's first
layer and the generator's last, ReLU in the generator and LeakyReLU in the discriminator, weights from N(0, 0.02):

    z (B, latent_dim) -> coarse map -> [norm, ReLU, twice the size] -> tanh -> images
    images -> half the size, LeakyReLU -> [half the size, norm, LeakyReLU] -> score

The game that both play and the penalty of the discriminator's slope are those of ``fastgen.losses``. Real and
generated images pass through the discriminator in batches of their own, each normalised by its own statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen._checks import require_floating, require_positive, require_probability, require_shape, require_tensor
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES, AdversarialLoss
from fastgen.models._base import Batch, GenerativeModel, Images, Moment, NoOptions, Phase, option

Penalty = Literal["none", "r1", "gradient", "dragan"]
Norm = Literal["batch", "layer", "none"]

LARGEST_COARSE_SIZE = 7
SLOPE = 0.2
INITIAL_STD = 0.02


@dataclass(frozen=True)
class DCGANConfig:
    """Sizes of a DCGAN and how it learns. ValueError names the field, what was expected and what came."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    latent_dim: int = option(64, "numbers in z")
    width: int = option(64, "channels at half the size; doubled at each halving")
    discriminator_norm: Norm = option("batch", "of the discriminator's features")
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
        for name in ("image_size", "channels", "latent_dim", "width", "penalty_every", "critic_steps"):
            require_positive(name, getattr(self, name))
        if self.image_size < 8 or self.coarse_size << self.halvings != self.image_size:
            raise ValueError(
                f"image_size: expected at least 8, and 4 to {LARGEST_COARSE_SIZE} times a power of 2"
                f" (8, 20, 28, 32, 64, ...), got {self.image_size}"
            )
        choices = {"discriminator_norm": get_args(Norm), "loss": ADVERSARIAL_LOSSES, "penalty": get_args(Penalty)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.penalty == "gradient" and self.discriminator_norm == "batch":
            raise ValueError(
                "discriminator_norm: expected layer or none with penalty gradient, which is of each sample alone,"
                " got 'batch'"
            )
        if not 0 <= self.penalty_weight < math.inf:
            raise ValueError(f"penalty_weight: expected a number >= 0, got {self.penalty_weight}")
        for name in ("generator_learning_rate", "discriminator_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))

    @property
    def halvings(self) -> int:
        """Times the size is halved: until it is at most LARGEST_COARSE_SIZE, and twice at least where that goes."""
        needed = math.ceil(math.log2(max(1.0, self.image_size / LARGEST_COARSE_SIZE)))
        return max(needed, 2 if self.image_size % 4 == 0 else 1)

    @property
    def coarse_size(self) -> int:
        return self.image_size >> self.halvings


class Generator(nn.Sequential):
    """z (B, latent_dim) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: DCGANConfig) -> None:
        widths = [config.width << i for i in reversed(range(config.halvings))]
        layers: list[nn.Module] = [
            nn.Unflatten(1, (config.latent_dim, 1, 1)),
            nn.ConvTranspose2d(config.latent_dim, widths[0], config.coarse_size, bias=False),
        ]
        for wide, fine in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, fine, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], config.channels, 4, 2, 1), nn.Tanh()]
        super().__init__(*layers)


class Discriminator(nn.Sequential):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: DCGANConfig) -> None:
        widths = [config.width << i for i in range(config.halvings)]
        layers: list[nn.Module] = [nn.Conv2d(config.channels, widths[0], 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for fine, wide in itertools.pairwise(widths):
            norm = _norm(config.discriminator_norm, wide)
            convolution = nn.Conv2d(fine, wide, 4, 2, 1, bias=isinstance(norm, nn.Identity))
            layers += [convolution, norm, nn.LeakyReLU(SLOPE)]
        layers += [nn.Conv2d(widths[-1], 1, config.coarse_size), nn.Flatten(0)]
        super().__init__(*layers)


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)


class DCGAN(GenerativeModel):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1].

    Example:
        >>> model = DCGAN(DCGANConfig(image_size=8, width=8))
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "dcgan"
    summary = "deep convolutional generative adversarial network"
    kind = "images"
    default_data = "digits"
    config_class = DCGANConfig
    train_defaults: ClassVar = {"epochs": 150.0, "batch_size": 64, "average_decay": 0.998}
    averaged = ("generator",)
    config: DCGANConfig

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator = Generator(config), Discriminator(config)
        self.apply(_initialise)

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

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """What ``phase`` minimises, and what people watch: mean scores of "real" and "fake" images, the "penalty".

        The penalty is there in its own steps only, times their interval: its mean over all steps is that of the
        penalty. Code of torch.compile can't be differentiated twice, so these steps don't use it.
        """
        real = self._checked(batch["images"])
        if phase == "generator":
            scores = self.discriminator(self.generator(self._noise(len(real))))
            return {"loss": losses.generator_loss(scores, self.config.loss), "fake": scores.detach().float().mean()}
        config = self.config
        penalised = config.penalty != "none" and moment.step % config.penalty_every == 0
        with torch.no_grad():
            fake = self.generator(self._noise(len(real)))
        with torch.compiler.set_stance("force_eager") if penalised else nullcontext():
            return self._discriminator_loss(2 * real - 1, fake, moment, penalised)

    def _discriminator_loss(self, real: Tensor, fake: Tensor, moment: Moment, penalised: bool) -> dict[str, Tensor]:
        config = self.config
        if penalised and config.penalty == "r1":
            real.requires_grad_()
        real_scores, fake_scores = self.discriminator(real), self.discriminator(fake)
        loss = losses.discriminator_loss(real_scores, fake_scores, config.loss)
        values = {"real": real_scores.detach().float().mean(), "fake": fake_scores.detach().float().mean()}
        if penalised:
            compute: dict[str, Callable[[], Tensor]] = {
                "r1": lambda: losses.r1_penalty(real_scores, real, scaler=moment.scaler),
                "gradient": lambda: losses.gradient_penalty(
                    self.discriminator, real, fake.to(real.dtype), scaler=moment.scaler
                ),
                "dragan": lambda: losses.dragan_penalty(self.discriminator, real, scaler=moment.scaler),
            }
            penalty = config.penalty_every * compute[config.penalty]()
            loss = loss + config.penalty_weight * penalty
            values["penalty"] = penalty.detach()
        return {"loss": loss, **values}

    @torch.no_grad()
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        """n images, each normalised by the statistics of training, whatever the others are.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        was_training = self.generator.training
        self.generator.eval()
        try:
            pixels = self.generator(self._noise(n, generator))
        finally:
            self.generator.train(was_training)
        return Images((0.5 * pixels.float() + 0.5).clamp(0, 1))

    def _noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        weight = next(self.generator.parameters())
        device = weight.device if generator is None else generator.device
        return torch.randn(n, self.config.latent_dim, generator=generator, device=device).to(weight)

    def _checked(self, images: Tensor) -> Tensor:
        config = self.config
        require_tensor("images", images)
        require_floating("images", images)
        require_shape(
            "images", images, (*images.shape[:1], config.channels, config.image_size, config.image_size), "(B, C, S, S)"
        )
        return images
