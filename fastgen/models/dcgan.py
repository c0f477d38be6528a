"""Deep convolutional generative adversarial network (DCGAN).

Radford, Metz and Chintala, "Unsupervised representation learning with deep convolutional generative adversarial
networks" (2016): strided convolutions instead of pooling; batch normalization except in the first layer of the
discriminator and the last of the generator; ReLU in the generator, LeakyReLU in the discriminator; weights from
N(0, 0.02):

    generator:      z (B, latent_dim) -> coarse map -> [norm, ReLU, upsampling convolution] -> tanh -> images
    discriminator:  images -> [downsampling convolution, norm, LeakyReLU] -> logits (B,)

Both networks are trained as ``adversarial.py`` describes, by default with the R1 penalty, which the paper does not use.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastgen.checks import require_choice, require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import (
    ImageGAN,
    Penalty,
    check_adversarial_options,
    eval_mode,
    feature_sizes,
    generator_objective,
)
from fastgen.models.base import Batch, Images, StepContext, option, to_pixels
from fastgen.models.conditioning import LatentOptions
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, SLOWER, Size

Norm = Literal["batch", "layer", "none"]

INITIAL_STD = 0.02


@dataclass(frozen=True)
class DCGANConfig:
    """Architecture and training objective of a DCGAN.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("non-saturating", "adversarial objective")
    penalty: Penalty = option("r1", "gradient penalty on the discriminator")
    penalty_weight: float = option(0.2, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    generator_learning_rate: float = option(5e-4, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(5e-4, "AdamW learning rate of the discriminator")
    beta1: float = option(0.5, "AdamW beta1")
    beta2: float = option(0.999, "AdamW beta2")
    critic_steps: int = option(1, "discriminator updates per generator update")
    augment: str = option(
        "",
        "differentiable augmentation of the discriminator's images, comma-separated: flip, color, translation, cutout",
    )
    augment_target: float = option(
        0.0, "adaptive augmentation (ADA): aim of the mean sign of the real scores, such as 0.6 (0: augment all images)"
    )
    latent_dim: int = option(64, "dimension of the latent z")
    width: int = option(64, "number of channels at half resolution; doubled at each further downsampling")
    discriminator_norm: Norm = option("batch", "normalization of the discriminator's features")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("latent_dim", "width"):
            require_positive(name, getattr(self, name))
        feature_sizes(self.image_size)
        require_choice("discriminator_norm", self.discriminator_norm, get_args(Norm))
        if self.penalty == "gradient" and self.discriminator_norm == "batch":
            raise ValueError(
                "discriminator_norm: expected layer or none with penalty gradient, which is computed per sample,"
                " got 'batch'"
            )

    @property
    def num_downsamples(self) -> int:
        """Number of downsamplings to a coarse map of at most 7x7; at least 2 if image_size is divisible by 4."""
        return max(len(feature_sizes(self.image_size)) - 1, 2 if self.image_size % 4 == 0 else 1)

    @property
    def coarse_size(self) -> int:
        """Height of the coarsest feature map."""
        return self.image_size >> self.num_downsamples

    @property
    def widths(self) -> list[int]:
        """Channels of the feature maps, from half resolution down to the coarsest."""
        return [self.width << i for i in range(self.num_downsamples)]


class DCGANGenerator(nn.Sequential):
    """z (B, in_channels) -> images (B, C, S, S) in [-1, 1]. ``in_channels`` is latent_dim by default."""

    def __init__(self, config: DCGANConfig, in_channels: int | None = None) -> None:
        in_channels, widths = in_channels or config.latent_dim, config.widths[::-1]
        layers: list[nn.Module] = [
            nn.Unflatten(1, (in_channels, 1, 1)),
            nn.ConvTranspose2d(in_channels, widths[0], config.coarse_size, bias=False),
        ]
        for before, after in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], config.channels, 4, 2, 1), nn.Tanh()]
        super().__init__(*layers)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self:
            z = layer(z)
        return z


class DCGANDiscriminator(nn.Sequential):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: DCGANConfig) -> None:
        score = nn.Conv2d(config.widths[-1], 1, config.coarse_size)
        super().__init__(*discriminator_features(config, config.channels), score, nn.Flatten(0))

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


def discriminator_features(config: DCGANConfig, in_channels: int) -> list[nn.Module]:
    """(B, in_channels, S, S) -> (B, widths[-1], coarse_size, coarse_size)."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, config.width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after in itertools.pairwise(config.widths):
        norm = {"batch": nn.BatchNorm2d(after), "layer": nn.GroupNorm(1, after), "none": nn.Identity()}
        convolution = nn.Conv2d(before, after, 4, 2, 1, bias=config.discriminator_norm == "none")
        layers += [convolution, norm[config.discriminator_norm], nn.LeakyReLU(0.2)]
    return layers


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Weights from N(0, 0.02), gains of batch normalization from N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)


@register_model
class DCGAN(ImageGAN):
    """DCGAN: convolutional generator and discriminator.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1].

    Example:
        >>> model = DCGAN(DCGANConfig(image_size=8, width=8))
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 1, 8, 8])
        >>> model.draw(3, LatentOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "dcgan"
    summary = "deep convolutional generative adversarial network"
    config_class = DCGANConfig
    channels_last = True
    sampling_class = LatentOptions
    train_defaults: ClassVar = {"steps": 3368, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(12_000, train=LONG, model={"width": 32, **SLOWER}),
        "large": Size(8_000, 32, train=LONG, model={"width": 24, "penalty_every": 4, **SLOWER}),
        "medium, gpu": Size(40_000, 128, train=LONG, model={"width": 64, **SLOWER}),
        "large, gpu": Size(60_000, 128, train=LONG, model={"width": 64, "latent_dim": 128, **SLOWER}),
    }
    config: DCGANConfig

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__(config)
        self.generator = DCGANGenerator(config)
        self.discriminator = DCGANDiscriminator(config)
        self.apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        """The generator's images (B, C, S, S) in [-1, 1] for z (B, latent_dim) from N(0, 1)."""
        images: Tensor = self.generator(z)
        return images

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``, "discriminator" or "generator", with mean scores and the penalty for the log."""
        images = self.checked_images(batch)
        z = self.noise(len(images), self.config.latent_dim)
        if phase == "generator":
            return generator_objective(self.discriminator(self.augmentation(self.generator(z))), self.config)
        with torch.no_grad():
            fake = self.generator(z)
        return self.discriminator_loss(self.discriminator, images, fake, context)

    @torch.no_grad()
    def draw(self, n: int, options: LatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """Samples n images, normalized by the running statistics of training.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        with eval_mode(self.generator):
            images = self.generator(self.noise(n, self.config.latent_dim, generator, options))
        return Images(to_pixels(images))
