"""Style-based generative adversarial network (StyleGAN2).

Karras, Laine and Aila, "A style-based generator architecture for generative adversarial networks" (2019), and Karras et
al., "Analyzing and improving the image quality of StyleGAN" (2020). A mapping network turns z into a style w, which
scales the input channels of every convolution of a synthesis network; the synthesis starts from a learned constant and
adds noise to each feature map:

    mapping:        z / rms(z) -> [linear, LeakyReLU] -> w
    synthesis:      constant -> [convolutions modulated by w, noise, LeakyReLU; image, added to the upsampled one]
    discriminator:  images -> [convolutions, downsampling] -> minibatch std, convolution, linear -> logits (B,)

A modulated convolution has the weight ``w_i W_oi``, divided by its norm over i ("demodulation"). Weights are N(0, 1)
and scaled at run time ("equalized learning rate"); the mapping has a lower learning rate. The R1 penalty and the path
length penalty may be lazy (``penalty_every``, ``path_length_every``). Results differ from the authors' code:
downsampling is average pooling, not a filter of four taps, and AdamW's betas are not adapted to lazy penalties.

The paper trains on large images, with R1 in every 16th step, eight mapping layers with 1/100 of the learning rate,
style mixing and the path length penalty. The defaults here are for small images and small data sets: a strong R1 in
every step prevents mode collapse; style mixing and the path length penalty are off, as 8x8 images have four styles.
"""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgen import losses
from fastgen.checks import require_choice, require_not_negative, require_positive, require_positive_number
from fastgen.functional._autocast import without_autocast
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import (
    ImageGAN,
    Penalty,
    check_adversarial_options,
    eval_mode,
    feature_sizes,
    generator_objective,
)
from fastgen.models.base import Batch, Images, Samples, StepContext, at_most, option, to_pixels, upcast
from fastgen.models.interpolation import great_circles
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size
from fastgen.nn._sublayers import is_fusible

Output = Literal["skip", "residual"]

AVERAGE_STEP, STD_GROUP_SIZE, NUM_VISUALIZED = 0.005, 4, 8
GAIN = math.sqrt(2)  # of LeakyReLU, which then keeps the variance of its input
RATES = {"generator_learning_rate": 4e-3, "discriminator_learning_rate": 3e-3, "noise_rate": 0.03}


@dataclass(frozen=True)
class StyleGANConfig:
    """Architecture and training objective of a StyleGAN.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("non-saturating", "adversarial objective")
    penalty: Penalty = option("r1", "gradient penalty on the discriminator")
    penalty_weight: float = option(2.0, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    generator_learning_rate: float = option(3e-3, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(2e-3, "AdamW learning rate of the discriminator")
    beta1: float = option(0.0, "AdamW beta1")
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
    width: int = option(32, "number of channels at full resolution; doubled at each downsampling")
    style_dim: int = option(64, "dimension of the style w")
    mapping_depth: int = option(2, "number of layers of the mapping network")
    mapping_rate: float = option(0.1, "learning rate multiplier of the mapping network")
    noise_rate: float = option(1.0, "learning rate multiplier of the strength of the noise")
    output: Output = option("skip", "skip: sum of images of all resolutions; residual: image of the last feature map")
    style_mixing: float = option(0.0, "probability of style mixing: a second style from a random layer on")
    path_length_weight: float = option(0.0, "weight of the path length penalty, 2 in the paper; 0: none")
    path_length_every: int = option(8, "interval of the path length penalty in steps; multiplies its weight")
    minibatch_std: bool = option(True, "minibatch standard deviation as a feature map of the discriminator")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("latent_dim", "width", "style_dim", "mapping_depth", "path_length_every"):
            require_positive(name, getattr(self, name))
        feature_sizes(self.image_size)
        require_choice("output", self.output, get_args(Output))
        require_positive_number(mapping_rate=self.mapping_rate, noise_rate=self.noise_rate)
        if not 0 <= self.style_mixing <= 1:
            raise ValueError(f"style_mixing: expected a probability in [0, 1], got {self.style_mixing}")
        require_not_negative(path_length_weight=self.path_length_weight)

    @property
    def sizes(self) -> list[int]:
        """Heights of the feature maps, from the coarsest (4 to 7) up to the images'."""
        return feature_sizes(self.image_size)

    @property
    def widths(self) -> list[int]:
        """Channels of the feature maps of ``sizes``."""
        return [self.width << i for i in reversed(range(len(self.sizes)))]

    @property
    def style_layers(self) -> int:
        """Number of styles: two for each resolution. The second also modulates the layer that outputs its image."""
        return 2 * len(self.sizes)

    @property
    def noise_dims(self) -> list[int]:
        """Pixels of the noise of each convolution: one convolution at the coarsest resolution, two at the others."""
        first, *others = (size**2 for size in self.sizes)
        return [first, *(pixels for pixels in others for _ in range(2))]


@dataclass(frozen=True)
class StyleOptions:
    """Sampling options of a StyleGAN."""

    truncation: float = option(1.0, "truncation psi: scale of the styles' distance from their mean; lower: less varied")

    def __post_init__(self) -> None:
        if not 0 <= self.truncation <= 1:
            raise ValueError(f"truncation: expected a number in [0, 1], got {self.truncation}")


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def scaled_leaky_relu(x: Tensor) -> Tensor:
    """LeakyReLU that keeps the variance of its input."""
    return leaky_relu(x) * GAIN


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class ScaledLinear(nn.Module):
    """Linear layer with weights from N(0, 1), scaled by 1 / sqrt(in_features) at run time.

    rate: learning rate multiplier: weights and bias are stored divided by it and multiplied at run time.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / rate)
        self.bias = nn.Parameter(torch.full((out_features,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(in_features), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class ScaledConv2d(nn.Module):
    """Convolution with weights from N(0, 1), scaled by 1 / sqrt(fan_in) at run time; the initial bias is 0."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(in_channels * kernel_size**2), kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


def convolved(x: Tensor, convolution: nn.Module, gain: float) -> Tensor:
    """gain * convolution(x), with the factor on the weights where these may be read: they are fewer than the pixels."""
    if not isinstance(convolution, ScaledConv2d) or not is_fusible(convolution, ScaledConv2d.forward):
        return cast(Tensor, convolution(x)) * gain
    weight, bias = convolution.weight * (convolution.scale * gain), convolution.bias
    return F.conv2d(x, weight, None if bias is None else bias * gain, padding=convolution.padding)


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style: x (B, in_channels, H, W) -> (B, out_channels, H, W).

    demodulate: divide each output channel by the norm of its modulated weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, style_dim: int, *, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.convolution = ScaledConv2d(in_channels, out_channels, kernel_size, bias=False)
        self.style = ScaledLinear(style_dim, in_channels, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor, gain: float = 1.0) -> Tensor:
        """Scales the maps before and after one convolution, which equals a convolution with weights per image.

        gain: a factor of the output, if it is demodulated.
        """
        scale = self.style(style)
        scaled, convolution = x * scale[:, :, None, None], self.convolution
        if not self.demodulate:
            return cast(Tensor, convolution(scaled))
        if type(convolution).forward is not ScaledConv2d.forward or "forward" in vars(convolution):
            raise TypeError(
                "convolution: expected a ScaledConv2d, whose weights determine the demodulation, got"
                f" {type(convolution).__name__} or another forward; put adapters on style"
            )
        if is_fusible(convolution, ScaledConv2d.forward):
            weight = convolution.weight * convolution.scale
            y = F.conv2d(scaled, weight, convolution.bias, padding=convolution.padding)
        else:
            with parametrize.cached() if parametrize.is_parametrized(convolution) else nullcontext():
                y = convolution(scaled)  # before its weight is read: a hook may compute the weight
                weight = convolution.weight * convolution.scale
        with without_autocast(x.device):
            squares = upcast(weight).square().sum(dim=(2, 3))
            norm = gain * torch.rsqrt(F.linear(upcast(scale).square(), squares) + 1e-8)
        return y * norm.to(y.dtype)[:, :, None, None]


class StyledLayer(nn.Module):
    """Modulated 3x3 convolution, after upsampling if requested, then noise (B, H W) and LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, config: StyleGANConfig, *, upsample: bool) -> None:
        super().__init__()
        self.convolution = ModulatedConv2d(in_channels, out_channels, 3, config.style_dim)
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.upsamples, self.noise_gain = upsample, GAIN * config.noise_rate

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = self.convolution(upsample(x) if self.upsamples else x, style, GAIN)
        noise = (self.noise_gain * self.strength) * noise.view(-1, 1, *x.shape[2:])
        return leaky_relu(x + noise + (GAIN * self.bias)[:, None, None])


class Mapping(nn.Module):
    """z (B, latent_dim) -> w (B, style_dim). ``average`` is the running mean of w in training."""

    average: Tensor

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        dims = [config.latent_dim, *[config.style_dim] * config.mapping_depth]
        self.layers = nn.ModuleList(
            ScaledLinear(before, after, rate=config.mapping_rate) for before, after in itertools.pairwise(dims)
        )
        self.register_buffer("average", torch.zeros(config.style_dim))

    def forward(self, z: Tensor) -> Tensor:
        x = z * torch.rsqrt(upcast(z).square().mean(dim=1, keepdim=True) + 1e-8).to(z.dtype)
        for layer in self.layers:
            x = scaled_leaky_relu(layer(x))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(x.detach().mean(dim=0).to(self.average), AVERAGE_STEP)
        return x


class Synthesis(nn.Module):
    """Styles (B, layers, style_dim), noise (B, pixels of all maps) -> images (B, C, S, S), roughly in [-1, 1]."""

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        sizes, widths, style_dim = config.sizes, config.widths, config.style_dim
        self.noise_dims = config.noise_dims
        self.residual = config.output == "residual"
        self.constant = nn.Parameter(torch.randn(widths[0], sizes[0], sizes[0]))
        self.layers = nn.ModuleList([StyledLayer(widths[0], widths[0], config, upsample=False)])
        for before, after in itertools.pairwise(widths):
            self.layers.append(StyledLayer(before, after, config, upsample=True))
            self.layers.append(StyledLayer(after, after, config, upsample=False))
        self.images = nn.ModuleList(
            ModulatedConv2d(width, config.channels, 1, style_dim, demodulate=False)
            for width in (widths[-1:] if self.residual else widths)
        )
        self.shortcuts = nn.ModuleList(
            ScaledConv2d(before, after, 1, bias=False) for before, after in itertools.pairwise(widths) if self.residual
        )
        self.bias = nn.Parameter(torch.zeros(config.channels))

    def forward(self, styles: Tensor, noise: Tensor) -> Tensor:
        style, maps = styles.unbind(dim=1), noise.split(self.noise_dims, dim=1)
        x = self.layers[0](self.constant.expand(len(styles), -1, -1, -1), style[0], maps[0])
        image: Tensor | None = None if self.residual else self.images[0](x, style[1])
        for i in range(1, len(self.layers), 2):
            y = self.layers[i](x, style[i], maps[i])
            y = self.layers[i + 1](y, style[i + 1], maps[i + 1])
            if image is None:
                y = (y + upsample(self.shortcuts[i // 2](x))) * math.sqrt(0.5)
            else:
                image = upsample(image) + self.images[i // 2 + 1](y, style[i + 2])
            x = y
        image = self.images[0](x, style[-1]) if image is None else image
        return image + self.bias[:, None, None]


class StyleGANGenerator(nn.Module):
    """z (B, latent_dim), noise (B, pixels of all maps), from N(0, 1) -> images (B, C, S, S), roughly in [-1, 1]."""

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        self.mapping, self.synthesis = Mapping(config), Synthesis(config)
        self.style_layers, self.style_mixing = config.style_layers, config.style_mixing

    def forward(self, z: Tensor, noise: Tensor, truncation: Tensor | None = None) -> Tensor:
        images: Tensor = self.synthesis(self.styles(z, truncation), noise)
        return images

    def styles(self, z: Tensor, truncation: Tensor | None = None) -> Tensor:
        """(B, layers, style_dim). In training some images have the style of another z from a random layer on."""
        w = self.mapping(z)
        if truncation is not None:
            w = torch.lerp(self.mapping.average.to(w), w, truncation.to(w))
        styles: Tensor = w[:, None].expand(-1, self.style_layers, -1)
        if not (self.training and self.style_mixing):
            return styles
        other = self.mapping(torch.randn_like(z))
        chance, place = torch.rand(2, len(w), 1, 1, device=w.device).unbind()
        layer = torch.arange(self.style_layers, device=w.device)[:, None]
        mixed = (chance < self.style_mixing) & (layer > place * (self.style_layers - 1))
        return torch.where(mixed, other[:, None], styles)


class StyleGANDiscriminatorBlock(nn.Module):
    """Residual downsampling block: x (B, in_channels, H, W) -> (B, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ScaledConv2d(in_channels, in_channels, 3), ScaledConv2d(in_channels, out_channels, 3)
        self.shortcut = ScaledConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(shortcut + convolutions) / sqrt(2); the last LeakyReLU has this factor and its own gain, together 1."""
        y = leaky_relu(convolved(leaky_relu(convolved(x, self.conv1, GAIN)), self.conv2, 1.0))
        return F.avg_pool2d(y, 2) + convolved(F.avg_pool2d(x, 2), self.shortcut, 1 / GAIN)


class StyleGANDiscriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        widths, coarse_size = config.widths[::-1], config.sizes[0]
        self.minibatch_std = config.minibatch_std
        self.first = ScaledConv2d(config.channels, widths[0], 1)
        self.blocks = nn.ModuleList(
            StyleGANDiscriminatorBlock(before, after) for before, after in itertools.pairwise(widths)
        )
        self.last = ScaledConv2d(widths[-1] + int(self.minibatch_std), widths[-1], 3)
        self.hidden = ScaledLinear(widths[-1] * coarse_size**2, widths[-1])
        self.score = ScaledLinear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = leaky_relu(convolved(images, self.first, GAIN))
        for block in self.blocks:
            x = block(x)
        if self.minibatch_std:
            x = torch.cat([x, minibatch_std_map(x)], dim=1)
        x = leaky_relu(convolved(x, self.last, GAIN)).flatten(1)
        scores: Tensor = self.score(scaled_leaky_relu(self.hidden(x)))[:, 0]
        return scores


def minibatch_std_map(x: Tensor) -> Tensor:
    """(B, 1, H, W): standard deviation over groups of images, averaged over features and positions.

    Groups have STD_GROUP_SIZE images, or all of the batch if its size is no multiple.
    """
    batch, _, height, width = x.shape
    groups = batch // STD_GROUP_SIZE if batch % STD_GROUP_SIZE == 0 else 1
    variance = upcast(x).unflatten(0, (-1, groups)).var(dim=0, correction=0)
    mean: Tensor = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3)).to(x.dtype)
    return mean.repeat(batch // groups).view(-1, 1, 1, 1).expand(-1, -1, height, width)


@register_model
class StyleGAN(ImageGAN):
    """StyleGAN2: mapping network, modulated convolutions, noise at every layer.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1].

    Example:
        >>> model = StyleGAN(StyleGANConfig(image_size=8, width=8))
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 1, 8, 8])
        >>> model.draw(3, StyleOptions(truncation=0.7)).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "stylegan"
    summary = "style-based GAN: modulated convolutions, noise at every layer, path length penalty"
    config_class, sampling_class = StyleGANConfig, StyleOptions
    channels_last = True
    train_defaults: ClassVar = {"steps": 3705, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(10_000, 32, train=LONG, model={"width": 8, "generator_learning_rate": 1e-3}),
        "large": Size(9_000, 8, train=LONG, model={"width": 8, "penalty_weight": 0.1, "penalty_every": 4, **RATES}),
        "medium, gpu": Size(40_000, train=LONG, model={"generator_learning_rate": 1e-3}),
        "large, gpu": Size(80_000, train=LONG, model={"generator_learning_rate": 1e-3}),
    }
    config: StyleGANConfig
    generator: StyleGANGenerator
    path_length_mean: Tensor

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__(config)
        self.generator = StyleGANGenerator(config)
        self.discriminator = StyleGANDiscriminator(config)
        self.register_buffer("path_length_mean", torch.zeros(()))

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """The generator's images (B, C, S, S), roughly in [-1, 1], for z (B, latent_dim) from N(0, 1).

        noise: (B, sum(config.noise_dims)) from N(0, 1); sampled by torch's global generator by default.
        """
        noise = self.noise(len(z), sum(self.config.noise_dims)) if noise is None else noise
        images: Tensor = self.generator(z, noise)
        return images

    def latents(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """z (n, latent_dim) and the noise of all layers (n, pixels), from N(0, 1)."""
        latent_dim, pixels = self.config.latent_dim, sum(self.config.noise_dims)
        z, noise = self.noise(n, latent_dim + pixels, generator).split([latent_dim, pixels], dim=1)
        return z, noise

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``, "discriminator" or "generator", with mean scores and penalties for the log.

        Every ``path_length_every``-th generator step has the path length penalty, on half as many images and multiplied
        by ``path_length_every``, which keeps its mean over steps.
        """
        images, config = self.checked_images(batch), self.config
        z, noise = self.latents(len(images))
        if phase == "discriminator":
            with torch.no_grad():
                fake = self.generator(z, noise)
            return self.discriminator_loss(self.discriminator, images, fake, context)
        values = generator_objective(self.discriminator(self.augmentation(self.generator(z, noise))), config)
        if config.path_length_weight and context.step % config.path_length_every == 0:
            penalty = config.path_length_every * self.path_length_penalty(-(-len(images) // 2), context)
            values["loss"] = values["loss"] + config.path_length_weight * penalty
            values["path"] = penalty.detach()
        return values

    def path_length_penalty(self, n: int, context: StepContext) -> Tensor:
        """Path length penalty of n generated images; updates the running mean of path lengths."""
        z, noise = self.latents(n)
        styles = self.generator.styles(z)
        images = self.generator.synthesis(styles, noise)
        penalty, mean = losses.path_length_penalty(images, styles, self.path_length_mean, scaler=context.scaler)
        self.path_length_mean.copy_(mean)
        return penalty

    @torch.no_grad()
    def draw(self, n: int, options: StyleOptions, *, generator: torch.Generator | None = None) -> Images:
        """Samples n images, with styles truncated towards their mean by ``options.truncation``.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        truncation = torch.tensor(options.truncation) if options.truncation < 1 else None
        with eval_mode(self.generator):
            images = self.generator(*self.latents(n, generator), truncation)
        return Images(to_pixels(images))

    @torch.no_grad()
    def interpolate(
        self, rows: int, columns: int, options: StyleOptions, *, generator: torch.Generator | None = None
    ) -> Images:
        """As ``GenerativeModel.interpolate``, from z to z; the noise of a row stays the same."""
        require_positive("rows", rows)
        z, noise = self.latents(2 * rows, generator)
        truncation = torch.tensor(options.truncation) if options.truncation < 1 else None
        with eval_mode(self.generator):
            images = self.generator(great_circles(z, columns), noise[::2].repeat_interleave(columns, 0), truncation)
        return Images(to_pixels(images), columns)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Style mixing: coarse styles of one z per row, fine styles of one z per column; no mixing on the diagonal."""
        n, coarse = at_most(NUM_VISUALIZED, batch), self.config.style_layers // 2
        z, noise = self.latents(n, generator)
        with eval_mode(self.generator):
            w = self.generator.styles(z)
        styles = torch.cat([w.repeat_interleave(n, 0)[:, :coarse], w.repeat(n, 1, 1)[:, coarse:]], dim=1)
        return {"styles": Images(to_pixels(self.generator.synthesis(styles, noise.repeat_interleave(n, 0))), n)}
