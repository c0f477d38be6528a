"""Generative adversarial network of two Transformers (TransGAN).

Jiang, Chang and Wang, "TransGAN: two pure Transformers can make one strong GAN, and that can scale up" (2021). Both
networks are Transformer blocks on grids of tokens, one token per position of the feature map. The resolution changes
between stages, by pixel shuffle in the generator and by average pooling in the discriminator, whose last stage has a
class token for the score:

    generator:      z (B, latent_dim) -> linear -> coarse grid -> [blocks, pixel shuffle] -> blocks -> linear, tanh:
                    pixels, or patches of ``generator_patch_size``
    discriminator:  patch embedding of images -> [blocks, average pooling] -> class token and grid -> blocks -> score

Attention is global on grids up to ``window`` and windowed on larger ones, shifted in every second block (Liu et al.,
"Swin Transformer", 2021; the paper's windows are not shifted), with a learned relative position bias. Upsampling halves
the token width by a linear map before the pixel shuffle; the paper quarters it. The paper's gradient penalty and
differentiable augmentation are left out: the default penalty is R1 (see ``adversarial.py``).

With the defaults for images above 32 pixels on a CPU it has not reached good samples yet: on 1,500 images of 64x64 the
discriminator's scores fell to chance after 500 steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
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
from fastgen.models.base import Batch, Images, NoOptions, StepContext, option, to_pixels, upcast
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size
from fastgen.nn import TransformerEncoderLayer, WindowAttention2d

Summary = Literal["token", "mean"]

POSITION_STD = 0.1
"""Standard deviation of initial position embeddings. The discriminator learns slowly with the usual 0.02."""

LARGE = {
    "width": 16,
    "patch_size": 4,
    "generator_patch_size": 4,
    "generator_depth": 2,
    "discriminator_depth": 1,
    "penalty_every": 16,
    "generator_learning_rate": 2e-4,
    "discriminator_learning_rate": 4e-4,
}
"""For images above 32 pixels on a CPU. A token for each pixel would leave time for a width of 8 only."""


@dataclass(frozen=True)
class TransGANConfig:
    """Architecture and training objective of a TransGAN.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("non-saturating", "adversarial objective")
    penalty: Penalty = option("r1", "gradient penalty on the discriminator")
    penalty_weight: float = option(0.3, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(4, "interval of the gradient penalty in steps; multiplies its weight")
    generator_learning_rate: float = option(1e-3, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(1e-3, "AdamW learning rate of the discriminator")
    beta1: float = option(0.5, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")
    critic_steps: int = option(1, "discriminator updates per generator update")
    augment: str = option(
        "",
        "differentiable augmentation of the discriminator's images, comma-separated: flip, color, translation, cutout",
    )
    augment_target: float = option(
        0.0, "adaptive augmentation (ADA): aim of the mean sign of the real scores, such as 0.6 (0: augment all images)"
    )
    latent_dim: int = option(64, "dimension of the latent z")
    width: int = option(32, "token width at full resolution; doubled at each downsampling")
    num_heads: int = option(2, "number of attention heads; a divisor of width")
    generator_depth: int = option(1, "blocks of the generator per resolution; windows are shifted from 2 on")
    discriminator_depth: int = option(3, "blocks of the discriminator per resolution; windows are shifted from 2 on")
    mlp_ratio: int = option(2, "ratio of MLP width to token width")
    window: int = option(8, "height and width of the attention windows; smaller grids have global attention")
    patch_size: int = option(2, "height and width of the discriminator's patches in pixels")
    generator_patch_size: int = option(1, "height and width of the patches that a token of the generator becomes")
    summary: Summary = option("token", "input of the discriminator's head: class token or mean of all tokens")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("latent_dim", "width", "num_heads", "generator_depth", "discriminator_depth", "mlp_ratio"):
            require_positive(name, getattr(self, name))
        require_positive("window", self.window)
        require_choice("summary", self.summary, get_args(Summary))
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of width, {self.width}, got {self.num_heads}")
        patches = [self.image_size // size for size in reversed(self.sizes)]
        for name in ("patch_size", "generator_patch_size"):
            if getattr(self, name) not in patches:
                raise ValueError(
                    f"{name}: expected {' or '.join(map(str, patches))} for images of {self.image_size}, got"
                    f" {getattr(self, name)}"
                )

    @property
    def sizes(self) -> list[int]:
        """Heights of the grids, from the coarsest (4 to 7) up to the images'."""
        return feature_sizes(self.image_size)

    @property
    def widths(self) -> list[int]:
        """Token widths of the grids of ``sizes``."""
        return [self.width << i for i in reversed(range(len(self.sizes)))]

    def grids(self, patch_size: int) -> list[tuple[int, int]]:
        """(width, height) of the grids, from the coarsest up to that of patches."""
        largest = self.image_size // patch_size
        return [grid for grid in zip(self.widths, self.sizes, strict=True) if grid[1] <= largest]


class TokenNorm(nn.Module):
    """RMSNorm of each token. x (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        inverse_rms = torch.rsqrt(upcast(x).square().mean(dim=1, keepdim=True) + 1e-6).to(x.dtype)
        return x * inverse_rms * self.gain[:, None, None]


class Block(nn.Module):
    """Pre-norm Transformer block: attention and MLP, each with a residual connection. x (B, C, size, size)."""

    def __init__(self, config: TransGANConfig, channels: int, size: int, *, shifted: bool) -> None:
        super().__init__()
        window, hidden = min(config.window, size), config.mlp_ratio * channels
        self.norm1, self.norm2 = TokenNorm(channels), TokenNorm(channels)
        self.attention = WindowAttention2d(channels, config.num_heads, window, shift=window // 2 if shifted else 0)
        self.perceptron = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.perceptron(self.norm2(x))
        return out


class PositionEmbedding(nn.Module):
    """Adds a learned vector to each position. x (B, C, size, size)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(POSITION_STD * torch.randn(channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def stage(config: TransGANConfig, channels: int, size: int, depth: int) -> list[nn.Module]:
    """Position embedding and ``depth`` blocks on a grid of one size."""
    blocks = [Block(config, channels, size, shifted=i % 2 == 1) for i in range(depth)]
    return [PositionEmbedding(channels, size), *blocks]


class TransGANGenerator(nn.Sequential):
    """z (B, latent_dim) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: TransGANConfig) -> None:
        depth, patch = config.generator_depth, config.generator_patch_size
        grids = config.grids(patch)
        (width, coarse), (last, _) = grids[0], grids[-1]
        layers: list[nn.Module] = [
            nn.Linear(config.latent_dim, width * coarse**2),
            nn.Unflatten(1, (width, coarse, coarse)),
            *stage(config, width, coarse, depth),
        ]
        for (before, _), (after, size) in itertools.pairwise(grids):
            layers += [nn.Conv2d(before, 4 * after, 1), nn.PixelShuffle(2), *stage(config, after, size, depth)]
        pixels = [nn.Conv2d(last, config.channels * patch**2, 1), nn.PixelShuffle(patch)]
        super().__init__(*layers, TokenNorm(last), *(pixels if patch > 1 else pixels[:1]), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        for layer in self:
            z = layer(z)
        return z


class TransGANDiscriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__()
        depth, grids = config.discriminator_depth, config.grids(config.patch_size)[::-1]
        width = grids[-1][0]
        layers: list[nn.Module] = [nn.Conv2d(config.channels, grids[0][0], config.patch_size, config.patch_size)]
        for (before, size), (after, _) in itertools.pairwise(grids):
            layers += [*stage(config, before, size, depth), nn.Conv2d(before, after, 1), nn.AvgPool2d(2)]
        self.grid = nn.Sequential(*layers, PositionEmbedding(*grids[-1]))
        self.token: nn.Parameter | None = None
        if config.summary == "token":
            self.token = nn.Parameter(POSITION_STD * torch.randn(width))
        hidden = config.mlp_ratio * width
        self.blocks = nn.ModuleList(
            TransformerEncoderLayer(width, config.num_heads, hidden, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.grid(images).flatten(2).transpose(1, 2)  # (B, tokens, width)
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = x.mean(dim=1) if self.token is None else x[:, 0]
        scores: Tensor = self.score(self.norm(x))[:, 0]
        return scores


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Xavier uniform weights, biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_model
class TransGAN(ImageGAN):
    """TransGAN: Transformer generator and discriminator.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1].

    Example:
        >>> model = TransGAN(TransGANConfig(image_size=8, width=8))
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 1, 8, 8])
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "transgan"
    summary = "GAN of two Transformers: attention on grids of tokens, in windows where they are large"
    config_class, sampling_class = TransGANConfig, NoOptions
    channels_last = True
    train_defaults: ClassVar = {"steps": 2246, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(5_000, 32, train=LONG, model={"width": 16, "discriminator_depth": 2, "patch_size": 4}),
        "large": Size(3_000, 16, train=LONG, model=LARGE),
        "medium, gpu": Size(40_000, train=LONG, model={"patch_size": 4}),
        "large, gpu": Size(60_000, train=LONG, model={"patch_size": 4}),
    }
    config: TransGANConfig

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__(config)
        self.generator = TransGANGenerator(config)
        self.discriminator = TransGANDiscriminator(config)
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
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        """Samples n images.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        with eval_mode(self.generator):
            images = self.generator(self.noise(n, self.config.latent_dim, generator))
        return Images(to_pixels(images))
