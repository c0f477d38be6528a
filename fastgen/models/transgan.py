"""A generative adversarial network of Transformers, without a convolution that looks beyond one place.

Jiang, Chang and Wang, "TransGAN: two pure Transformers can make one strong GAN, and that can scale up" (2021). Both
networks are blocks of attention and a perceptron on grids of tokens, each token a place of the image; sizes change
between stages, by pixel shuffling in the generator and by means in the discriminator, whose last stage has a token of
its own for the score:

    z -> linear -> coarse grid -> [blocks, pixel shuffle to twice the size] -> blocks -> linear, tanh -> images
    images -> linear of each patch -> [blocks, half the size] -> class token beside the grid -> blocks -> score

Attention is among all tokens of a grid up to ``window``, with a learned bias for each relative position; in larger
grids it is within windows, shifted in every second block (Liu et al., "Swin Transformer", 2021; the paper's own are
not shifted). Tokens are halved in width where their size doubles, by a linear map before the shuffle; the paper's
become a quarter. It plays with a gradient penalty and with augmented images, which are left out here: the default is
R1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_choice, require_positive
from fastgen.models._convolutions import feature_sizes
from fastgen.models._norms import inverse_rms
from fastgen.models.adversarial import ImageGAN, Layers, NoiseGANConfig
from fastgen.models.base import NoOptions, option
from fastgen.nn import TransformerEncoderLayer, WindowAttention2d

Summary = Literal["token", "mean"]

POSITION_STD = 0.1
"""Of what tells places apart in the beginning; with the 0.02 of large Transformers the discriminator is slow to."""


@dataclass(frozen=True)
class TransGANConfig(NoiseGANConfig):
    """Sizes of a TransGAN and how it learns. ValueError names the field, what was expected and what came."""

    penalty_weight: float = option(0.3, "what the penalty is multiplied by (gamma, lambda)")
    generator_learning_rate: float = option(1e-3, "of the generator's AdamW")
    discriminator_learning_rate: float = option(1e-3, "of the discriminator's AdamW")
    penalty_every: int = option(4, "steps from one penalty to the next; its weight is multiplied by as much")
    beta2: float = option(0.99, "of AdamW")
    width: int = option(32, "numbers in a token at full size; doubled at each halving")
    num_heads: int = option(2, "of the attention; a divisor of width")
    generator_depth: int = option(1, "blocks of the generator at each size; windows overlap from 2 on")
    discriminator_depth: int = option(3, "blocks of the discriminator at each size; likewise")
    mlp_ratio: int = option(2, "units of a perceptron for each number of a token")
    window: int = option(8, "height and width of the largest grid or window whose tokens attend to each other")
    patch_size: int = option(2, "pixels on the side of the discriminator's tokens")
    summary: Summary = option("token", "what is scored at last: a token of its own, or the mean of all")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "num_heads", "generator_depth", "discriminator_depth", "mlp_ratio", "window"):
            require_positive(name, getattr(self, name))
        require_choice("summary", self.summary, get_args(Summary))
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of width, {self.width}, got {self.num_heads}")
        patches = [self.image_size // size for size in reversed(self.sizes)]
        if self.patch_size not in patches:
            raise ValueError(
                f"patch_size: expected {' or '.join(map(str, patches))} for images of {self.image_size}, got"
                f" {self.patch_size}"
            )

    @property
    def sizes(self) -> list[int]:
        """Heights of the grids, from 4, 5, 6 or 7 up to the images'."""
        return feature_sizes(self.image_size)

    @property
    def widths(self) -> list[int]:
        """Numbers in a token of the grids of ``sizes``."""
        return [self.width << i for i in reversed(range(len(self.sizes)))]


class TokenNorm(nn.Module):
    """Every token divided by the root of its mean square, times a learned gain. x (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * inverse_rms(x, 1e-6) * self.gain[:, None, None]


class Block(nn.Module):
    """Attention and a perceptron, each of the norm of its input and added to it. x (B, C, S, S), of one size S."""

    def __init__(self, config: TransGANConfig, channels: int, size: int, *, shifted: bool) -> None:
        super().__init__()
        window = min(config.window, size)
        self.norm1, self.norm2 = TokenNorm(channels), TokenNorm(channels)
        self.attention = WindowAttention2d(channels, config.num_heads, window, shift=window // 2 if shifted else 0)
        hidden = config.mlp_ratio * channels
        self.perceptron = Layers(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.perceptron(self.norm2(x))
        return out


class Positions(nn.Module):
    """Adds a learned vector for each place. x (B, C, S, S)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(POSITION_STD * torch.randn(channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def stage(config: TransGANConfig, channels: int, size: int, depth: int) -> list[nn.Module]:
    blocks = [Block(config, channels, size, shifted=i % 2 == 1) for i in range(depth)]
    return [Positions(channels, size), *blocks]


def generator_layers(config: TransGANConfig) -> list[nn.Module]:
    """z (B, latent_dim) -> images (B, C, S, S) in [-1, 1]."""
    sizes, widths = config.sizes, config.widths
    layers: list[nn.Module] = [
        nn.Linear(config.latent_dim, widths[0] * sizes[0] ** 2),
        nn.Unflatten(1, (widths[0], sizes[0], sizes[0])),
        *stage(config, widths[0], sizes[0], config.generator_depth),
    ]
    for (wide, fine), size in zip(itertools.pairwise(widths), sizes[1:], strict=True):
        layers += [nn.Conv2d(wide, 4 * fine, 1), nn.PixelShuffle(2)]
        layers += stage(config, fine, size, config.generator_depth)
    return [*layers, TokenNorm(widths[-1]), nn.Conv2d(widths[-1], config.channels, 1), nn.Tanh()]


class Discriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__()
        places = [
            (width, size)
            for width, size in zip(config.widths, config.sizes, strict=True)
            if size * config.patch_size <= config.image_size
        ][::-1]
        channels, depth = places[-1][0], config.discriminator_depth
        layers: list[nn.Module] = [nn.Conv2d(config.channels, places[0][0], config.patch_size, config.patch_size)]
        for (fine, size), (wide, _) in itertools.pairwise(places):
            layers += [*stage(config, fine, size, depth), nn.Conv2d(fine, wide, 1), nn.AvgPool2d(2)]
        self.grid = Layers(*layers, Positions(*places[-1]))
        self.token: nn.Parameter | None = None
        if config.summary == "token":
            self.token = nn.Parameter(POSITION_STD * torch.randn(channels))
        self.blocks = nn.ModuleList(
            TransformerEncoderLayer(
                channels, config.num_heads, config.mlp_ratio * channels, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.score = nn.LayerNorm(channels), nn.Linear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.grid(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = x.mean(dim=1) if self.token is None else x[:, 0]
        scores: Tensor = self.score(self.norm(x))[:, 0]
        return scores


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Xavier's uniform weights, biases of 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TransGAN(ImageGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1].

    Example:
        >>> model = TransGAN(TransGANConfig(image_size=8, width=8))
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "transgan"
    summary = "GAN of two Transformers: attention on grids of tokens, in windows where they are large"
    config_class, sampling_class = TransGANConfig, NoOptions
    train_defaults: ClassVar = {"epochs": 100.0, "batch_size": 64, "average_decay": 0.998}
    config: TransGANConfig

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator = Layers(*generator_layers(config)), Discriminator(config)
        self.apply(initialise)
