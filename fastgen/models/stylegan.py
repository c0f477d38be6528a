"""A style-based generative adversarial network.

Karras, Laine and Aila, "A style-based generator architecture for generative adversarial networks" (2019), and Karras et
al., "Analyzing and improving the image quality of StyleGAN" (2020). A mapping network turns z into a style w, which
scales the inputs of every convolution of a network that starts from a learned constant; noise is added to each map:

    z / rms(z) -> [linear, LeakyReLU] -> w
    constant -> [convolution modulated by w, noise, LeakyReLU; an image, added to the one of half the size] -> image
    images -> [convolutions, half the size] -> standard deviation over the batch, convolution, linear -> score

A modulated convolution has the weight ``w_i W_oi``, divided by its norm over i ("demodulation"). Weights are N(0, 1)
and scaled where they are used, the same learning rate serves all of them; the mapping's is smaller. The R1 penalty and
that of path lengths may come every few steps only. As here maps are halved by means, not by filters of four, and
Adam's betas are not adapted to lazy penalties, figures are not those of the authors' code.

The paper has large images: R1 in every 16th step, eight layers of mapping that learn a hundredth as fast, mixed styles
and the penalty of path lengths. The defaults are for small and few ones, where a strong R1 in every step keeps samples
from being all alike, and styles, of four layers only at 8x8, are neither mixed nor penalised.
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
from fastgen.models._convolutions import SLOPE, feature_sizes
from fastgen.models._norms import inverse_rms, widened
from fastgen.models.adversarial import ImageGAN, NoiseGANConfig
from fastgen.models.base import Batch, Images, Samples, StepContext, option, to_pixels
from fastgen.nn._sublayers import is_fusible

Output = Literal["skip", "residual"]

AVERAGE_STEP = 0.005
GROUP = 4
SHOWN = 8


@dataclass(frozen=True)
class StyleGANConfig(NoiseGANConfig):
    """Sizes of a StyleGAN and how it learns. ValueError names the field, what was expected and what came."""

    penalty_weight: float = option(2.0, "what the penalty is multiplied by (gamma, lambda)")
    generator_learning_rate: float = option(3e-3, "of the generator's AdamW")
    discriminator_learning_rate: float = option(2e-3, "of the discriminator's AdamW")
    beta1: float = option(0.0, "of AdamW")
    beta2: float = option(0.99, "of AdamW")
    width: int = option(32, "channels at full size; doubled at each halving")
    style_dim: int = option(64, "numbers in w")
    mapping_depth: int = option(2, "layers of the mapping network")
    mapping_rate: float = option(0.1, "the mapping's learning rate, in parts of the generator's")
    output: Output = option("skip", "skip: images of all sizes are added; residual: maps are, the last makes the image")
    style_mixing: float = option(0.0, "probability that an image's styles change from one z's to another's on the way")
    path_length_weight: float = option(0.0, "of the penalty of uneven path lengths, 2 in the paper; 0: none")
    path_length_every: int = option(8, "steps from one such penalty to the next; its weight is multiplied by as much")
    minibatch_std: bool = option(True, "the discriminator sees how much the images of a batch differ")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "style_dim", "mapping_depth", "path_length_every"):
            require_positive(name, getattr(self, name))
        feature_sizes(self.image_size)
        require_choice("output", self.output, get_args(Output))
        require_positive_number(mapping_rate=self.mapping_rate)
        if not 0 <= self.style_mixing <= 1:
            raise ValueError(f"style_mixing: expected a probability in [0, 1], got {self.style_mixing}")
        require_not_negative(path_length_weight=self.path_length_weight)

    @property
    def sizes(self) -> list[int]:
        """Heights of the feature maps, from 4, 5, 6 or 7 up to the images'."""
        return feature_sizes(self.image_size)

    @property
    def widths(self) -> list[int]:
        """Channels of the feature maps of ``sizes``."""
        return [self.width << i for i in reversed(range(len(self.sizes)))]

    @property
    def style_layers(self) -> int:
        """Layers that a style modulates one by one: two for each size, with what makes an image of the second."""
        return 2 * len(self.sizes)

    @property
    def noise_dims(self) -> list[int]:
        """Pixels of the noise of each convolution: one of the first size, two of each other."""
        first, *others = (size**2 for size in self.sizes)
        return [first, *(pixels for pixels in others for _ in range(2))]


@dataclass(frozen=True)
class StyleOptions:
    """How samples are drawn. ValueError names the field, what was expected and what came."""

    truncation: float = option(1.0, "psi: how far styles go from their mean; less is more alike and more usual")

    def __post_init__(self) -> None:
        if not 0 <= self.truncation <= 1:
            raise ValueError(f"truncation: expected a number in [0, 1], got {self.truncation}")


def activated(x: Tensor) -> Tensor:
    """LeakyReLU that keeps the size of its input."""
    return F.leaky_relu(x, SLOPE) * math.sqrt(2)


class ScaledLinear(nn.Module):
    """A linear map whose weights are N(0, 1), divided by the root of ``inputs`` in use; ``rate``: of its learning."""

    def __init__(self, inputs: int, outputs: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class ScaledConv2d(nn.Module):
    """A convolution whose weights are N(0, 1), divided by the root of their inputs in use; its bias begins at 0."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(inputs * kernel_size**2), kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels a style scales: x (B, inputs, H, W) -> (B, outputs, H, W).

    demodulate: divide each output channel by the norm of its weights after that.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, style_dim: int, *, demodulate: bool = True) -> None:
        super().__init__()
        self.convolution = ScaledConv2d(inputs, outputs, kernel_size, bias=False)
        self.style = ScaledLinear(style_dim, inputs, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Maps are scaled before and after one convolution for all, not weights for each image: the same numbers."""
        scale = self.style(style)
        scaled, convolution = x * scale[:, :, None, None], self.convolution
        if not self.demodulate:
            return cast(Tensor, convolution(scaled))
        if type(convolution).forward is not ScaledConv2d.forward or "forward" in vars(convolution):
            raise TypeError(
                "convolution: expected a ScaledConv2d, whose weights tell the size of its output, got"
                f" {type(convolution).__name__} or another forward; put adapters on style"
            )
        if is_fusible(convolution, ScaledConv2d.forward):
            weight = convolution.weight * convolution.scale
            y = F.conv2d(scaled, weight, convolution.bias, padding=convolution.padding)
        else:
            with parametrize.cached() if parametrize.is_parametrized(convolution) else nullcontext():
                y = convolution(scaled)  # first: a hook may be what makes the weight
                weight = convolution.weight * convolution.scale
        with torch.autocast(x.device.type, enabled=False):
            squares = widened(weight).square().sum(dim=(2, 3))
            norm = torch.rsqrt(F.linear(widened(scale).square(), squares) + 1e-8)
        return y * norm.to(y.dtype)[:, :, None, None]


class StyledLayer(nn.Module):
    """A modulated 3x3 convolution, of x doubled where asked, with noise (B, H W) added and LeakyReLU."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, *, double: bool) -> None:
        super().__init__()
        self.convolution = ModulatedConv2d(inputs, outputs, 3, style_dim)
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.doubles = double

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = self.convolution(doubled(x) if self.doubles else x, style)
        return activated(x + self.strength * noise.view(-1, 1, *x.shape[2:]) + self.bias[:, None, None])


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Mapping(nn.Module):
    """z (B, latent_dim) -> w (B, style_dim). ``average`` is the running mean of w in training."""

    average: Tensor

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        widths = [config.latent_dim, *[config.style_dim] * config.mapping_depth]
        self.layers = nn.ModuleList(
            ScaledLinear(before, after, rate=config.mapping_rate) for before, after in itertools.pairwise(widths)
        )
        self.register_buffer("average", torch.zeros(config.style_dim))

    def forward(self, z: Tensor) -> Tensor:
        x = z * inverse_rms(z, 1e-8)
        for layer in self.layers:
            x = activated(layer(x))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(x.detach().mean(dim=0).to(self.average), AVERAGE_STEP)
        return x


class Synthesis(nn.Module):
    """Styles (B, layers, style_dim), noise (B, pixels of all maps) -> images (B, C, S, S), about in [-1, 1]."""

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        sizes, widths, style_dim = config.sizes, config.widths, config.style_dim
        self.noise_dims = config.noise_dims
        self.residual = config.output == "residual"
        self.constant = nn.Parameter(torch.randn(widths[0], sizes[0], sizes[0]))
        pairs = [(widths[0], widths[0]), *itertools.pairwise(widths)]
        self.layers = nn.ModuleList([StyledLayer(widths[0], widths[0], style_dim, double=False)])
        for wide, fine in pairs[1:]:
            self.layers.append(StyledLayer(wide, fine, style_dim, double=True))
            self.layers.append(StyledLayer(fine, fine, style_dim, double=False))
        painted = widths[-1:] if self.residual else widths
        self.images = nn.ModuleList(
            ModulatedConv2d(width, config.channels, 1, style_dim, demodulate=False) for width in painted
        )
        self.shortcuts = nn.ModuleList(
            ScaledConv2d(wide, fine, 1, bias=False) for wide, fine in pairs[1:] if self.residual
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
                y = (y + doubled(self.shortcuts[i // 2](x))) * math.sqrt(0.5)
            else:
                image = doubled(image) + self.images[i // 2 + 1](y, style[i + 2])
            x = y
        image = self.images[0](x, style[-1]) if image is None else image
        return image + self.bias[:, None, None]


class Generator(nn.Module):
    """z and noise, as one (B, latent_dim + pixels of all maps) of N(0, 1) -> images (B, C, S, S), about in [-1, 1]."""

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        self.mapping, self.synthesis = Mapping(config), Synthesis(config)
        self.latent_dim, self.style_layers, self.style_mixing = (
            config.latent_dim,
            config.style_layers,
            config.style_mixing,
        )

    def forward(self, numbers: Tensor, truncation: Tensor | None = None) -> Tensor:
        images: Tensor = self.synthesis(self.styles(numbers, truncation), self.noise(numbers))
        return images

    def styles(self, numbers: Tensor, truncation: Tensor | None = None) -> Tensor:
        """(B, layers, style_dim); in training some change from one z's to another's at a layer."""
        w = self.mapping(numbers[:, : self.latent_dim])
        if truncation is not None:
            w = torch.lerp(self.mapping.average.to(w), w, truncation.to(w))
        styles: Tensor = w[:, None].expand(-1, self.style_layers, -1)
        if not (self.training and self.style_mixing):
            return styles
        other = self.mapping(torch.randn_like(numbers[:, : self.latent_dim]))
        chance, place = torch.rand(2, len(w), 1, 1, device=w.device).unbind()
        layer = torch.arange(self.style_layers, device=w.device)[:, None]
        changed = (chance < self.style_mixing) & (layer > place * (self.style_layers - 1))
        return torch.where(changed, other[:, None], styles)

    def noise(self, numbers: Tensor) -> Tensor:
        return numbers[:, self.latent_dim :]


class DiscriminatorBlock(nn.Module):
    """x (B, fine, H, W) -> (B, wide, H/2, W/2): two convolutions, beside a 1x1 one of x."""

    def __init__(self, fine: int, wide: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ScaledConv2d(fine, fine, 3), ScaledConv2d(fine, wide, 3)
        self.shortcut = ScaledConv2d(fine, wide, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(activated(self.conv2(activated(self.conv1(x)))), 2)
        out: Tensor = (y + self.shortcut(F.avg_pool2d(x, 2))) * math.sqrt(0.5)
        return out


class Discriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> scores (B,), logits: high means real."""

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        widths, coarse = config.widths[::-1], config.sizes[0]
        self.minibatch_std = config.minibatch_std
        self.first = ScaledConv2d(config.channels, widths[0], 1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(fine, wide) for fine, wide in itertools.pairwise(widths))
        self.last = ScaledConv2d(widths[-1] + int(self.minibatch_std), widths[-1], 3)
        self.hidden = ScaledLinear(widths[-1] * coarse**2, widths[-1])
        self.score = ScaledLinear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = activated(self.first(images))
        for block in self.blocks:
            x = block(x)
        if self.minibatch_std:
            x = torch.cat([x, differences(x)], dim=1)
        scores: Tensor = self.score(activated(self.hidden(activated(self.last(x)).flatten(1))))[:, 0]
        return scores


def differences(x: Tensor) -> Tensor:
    """(B, 1, H, W): the standard deviation over images, meaned over all else, in groups of GROUP or of all images."""
    batch, _, height, width = x.shape
    groups = batch // GROUP if batch % GROUP == 0 else 1
    variance = widened(x).unflatten(0, (-1, groups)).var(dim=0, correction=0)
    mean: Tensor = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3)).to(x.dtype)
    return mean.repeat(batch // groups).view(-1, 1, 1, 1).expand(-1, -1, height, width)


class StyleGAN(ImageGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1].

    Example:
        >>> model = StyleGAN(StyleGANConfig(image_size=8, width=8))
        >>> model.draw(3, StyleOptions(truncation=0.7)).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "stylegan"
    summary = "style-based GAN: modulated convolutions, noise at every layer, path length penalty"
    config_class, sampling_class = StyleGANConfig, StyleOptions
    train_defaults: ClassVar = {"epochs": 165.0, "batch_size": 64, "average_decay": 0.998}
    config: StyleGANConfig
    generator: Generator
    path_length_mean: Tensor

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator = Generator(config), Discriminator(config)
        self.register_buffer("path_length_mean", torch.zeros(()))

    @property
    def noise_dim(self) -> int:
        return self.config.latent_dim + sum(self.config.noise_dims)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """As that of its base; the generator's with the penalty of "path" lengths, of half as many images, at times.

        Each penalty comes times its interval: its mean over all steps is that of the penalty.
        """
        values, config = super().loss(phase, batch, context), self.config
        if phase == "generator" and config.path_length_weight and context.step % config.path_length_every == 0:
            numbers = self._noise(-(-len(batch["images"]) // 2))
            styles = self.generator.styles(numbers)
            images = self.generator.synthesis(styles, self.generator.noise(numbers))
            spread, mean = losses.path_length_penalty(images, styles, self.path_length_mean, scaler=context.scaler)
            self.path_length_mean.copy_(mean)
            penalty = config.path_length_every * spread
            values["loss"] = values["loss"] + config.path_length_weight * penalty
            values["path"] = penalty.detach()
        return values

    @torch.no_grad()
    def draw(self, n: int, options: StyleOptions, *, generator: torch.Generator | None = None) -> Images:
        """n images.

        Raises:
            ValueError: n is not a positive integer.
        """
        truncation = (torch.tensor(options.truncation),) if options.truncation < 1 else ()
        return Images(self._draw(n, truncation, generator))

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Mixed styles: each row has its coarser half from one z, each column its finer half; the diagonal has one."""
        network = self.generator
        was_training = network.training
        network.eval()
        numbers = self._noise(SHOWN, generator)
        w = network.styles(numbers)
        network.train(was_training)
        rows, columns = w.repeat_interleave(SHOWN, 0), w.repeat(SHOWN, 1, 1)
        half = self.config.style_layers // 2
        styles = torch.cat([rows[:, :half], columns[:, half:]], dim=1)
        pixels = network.synthesis(styles, network.noise(numbers).repeat_interleave(SHOWN, 0))
        return {"styles": Images(to_pixels(pixels), SHOWN)}
