"""Self-attention generative adversarial network (SAGAN), with or without classes.

Zhang, Goodfellow, Metaxas and Odena, "Self-attention generative adversarial networks" (2019): residual networks with
self-attention on one feature map and spectral normalization of every weight, trained with the hinge loss:

    generator:      z (B, latent_dim) -> coarse map -> [upsampling block, attention at one size] -> norm, ReLU,
                    convolution, tanh -> images
    discriminator:  images -> convolution -> [attention at one size, downsampling block] -> block, ReLU,
                    sum over positions h -> logits (B,)

With classes, the generator has class-conditional batch normalization and the discriminator's score is
``a(h) + <embedding(label), h>`` (Miyato and Koyama, "cGANs with projection discriminator", 2018). Spectral
normalization: Miyato et al., "Spectral normalization for generative adversarial networks" (2018). Its singular vectors
are buffers that each forward pass in training mode updates by one power iteration.

The paper trains on a million images with learning rates 1e-4 and 4e-4 and no penalty. The defaults here are for small
data sets, which the discriminator would memorize: one learning rate, and the R1 penalty (see ``adversarial.py``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgen.checks import require_count, require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import (
    ImageGAN,
    Penalty,
    check_adversarial_options,
    eval_mode,
    feature_sizes,
    generator_objective,
)
from fastgen.models.base import Batch, Images, Samples, StepContext, at_most, option, to_pixels
from fastgen.models.conditioning import LabeledLatentOptions, check_labels, wanted_labels
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size
from fastgen.nn import SelfAttention2d
from fastgen.nn._sublayers import is_fusible
from fastgen.nn.averaging import recomputed_buffers

NUM_ATTENTION, NUM_PLACES = 8, 6

LATENT_ALONE = {"canvas_bias": False}
"""Spectral normalization bounds the weights of the coarsest map, and not its bias: on 28x28 digits, the bias grew to
several times what the latent adds, and each class became one image."""


@dataclass(frozen=True)
class SAGANConfig:
    """Architecture and training objective of a SAGAN.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("hinge", "adversarial objective")
    penalty: Penalty = option("r1", "gradient penalty on the discriminator")
    penalty_weight: float = option(0.2, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    generator_learning_rate: float = option(1e-3, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(1e-3, "AdamW learning rate of the discriminator")
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
    classes: int = option(0, "number of classes; 0 for data without labels", from_data=True)
    conditional: bool = option(True, "class conditioning, if the data has classes")
    canvas_bias: bool = option(
        True, "a bias of each position of the coarsest map; without it, samples of large images are more diverse"
    )
    width: int = option(16, "number of channels at full resolution; doubled at each downsampling")
    attention_size: int = option(16, "maximum size of the feature map with attention; the largest map up to it is used")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("latent_dim", "width"):
            require_positive(name, getattr(self, name))
        require_count("classes", self.classes, 0)
        coarse_size = self.sizes[0]
        if self.attention_size < coarse_size:
            raise ValueError(
                f"attention_size: expected at least {coarse_size}, the smallest feature map of images of"
                f" {self.image_size}, got {self.attention_size}"
            )

    @property
    def sizes(self) -> list[int]:
        """Heights of the feature maps, from the coarsest (4 to 7) up to the images'."""
        return feature_sizes(self.image_size)

    @property
    def widths(self) -> list[int]:
        """Channels of the feature maps of ``sizes``."""
        return [self.width << i for i in reversed(range(len(self.sizes)))]

    @property
    def attention_at(self) -> int:
        """Size of the feature map with attention."""
        return max(size for size in self.sizes if size <= self.attention_size)

    @property
    def num_classes(self) -> int:
        """Number of classes that the networks are conditioned on; 0 if unconditional."""
        return self.classes if self.conditional else 0


def spectral_norm(module: nn.Module) -> nn.Module:
    """Spectral normalization of the weight, which is initialized orthogonal; the bias is initialized to 0."""
    nn.init.orthogonal_(cast(Tensor, module.weight))
    if isinstance(getattr(module, "bias", None), Tensor):
        nn.init.zeros_(cast(Tensor, module.bias))
    return parametrizations.spectral_norm(module)


def conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    """A spectrally normalized convolution that keeps the resolution."""
    return spectral_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))


class ConditionalBatchNorm(nn.Module):
    """Batch normalization, with a gain and a bias per class if there are classes. x (B, C, H, W), labels (B,)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not num_classes)
        self.gain = nn.Embedding(num_classes, channels) if num_classes else None
        self.bias = nn.Embedding(num_classes, channels) if num_classes else None
        if self.gain is not None and self.bias is not None:
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        gain, bias = self.gain(labels)[..., None, None], self.bias(labels)[..., None, None]
        return torch.addcmul(bias.to(x.dtype), gain.to(x.dtype), x)


class SAGANGeneratorBlock(nn.Module):
    """Residual upsampling block: x (B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(in_channels, num_classes)
        self.norm2 = ConditionalBatchNorm(out_channels, num_classes)
        self.conv1, self.conv2 = conv(in_channels, out_channels, 3), conv(out_channels, out_channels, 3)
        self.shortcut = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        h = upsample_then_conv(F.relu(self.norm1(x, labels)), self.conv1)
        h = self.conv2(F.relu(self.norm2(h, labels)))
        out: Tensor = h + F.interpolate(self.shortcut(x), scale_factor=2.0)
        return out


class SAGANDiscriminatorBlock(nn.Module):
    """Residual block: x (B, in_channels, H, W) -> (B, out_channels, H/2, W/2), or (H, W) without ``downsample``."""

    def __init__(self, in_channels: int, out_channels: int, *, downsample: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(in_channels, out_channels, 3), conv(out_channels, out_channels, 3)
        self.shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        h = F.relu(self.conv1(F.relu(x)))
        if self.downsample:
            h, x = conv_then_downsample(h, self.conv2), F.avg_pool2d(x, 2)
        else:
            h = self.conv2(h)
        out: Tensor = h + self.shortcut(x)
        return out


class SAGANGenerator(nn.Module):
    """z (B, latent_dim), labels (B,) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: SAGANConfig) -> None:
        super().__init__()
        sizes, widths = config.sizes, config.widths
        self.canvas = nn.Sequential(
            spectral_norm(nn.Linear(config.latent_dim, widths[0] * sizes[0] ** 2, bias=config.canvas_bias)),
            nn.Unflatten(1, (widths[0], sizes[0], sizes[0])),
        )
        self.blocks = nn.ModuleList(
            SAGANGeneratorBlock(before, after, config.num_classes) for before, after in itertools.pairwise(widths)
        )
        self.attention_index = sizes.index(config.attention_at)  # attention follows that many blocks
        self.attention = SelfAttention2d(widths[self.attention_index], spectral_norm=True)
        self.image = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), conv(widths[-1], config.channels, 3), nn.Tanh()
        )

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.canvas(z)
        if self.attention_index == 0:
            x = self.attention(x)
        for i, block in enumerate(self.blocks, 1):
            x = block(x, labels)
            if i == self.attention_index:
                x = self.attention(x)
        images: Tensor = self.image(x)
        return images


class SAGANDiscriminator(nn.Module):
    """Images (B, C, S, S) in [-1, 1], labels (B,) -> scores (B,), logits: high means real."""

    def __init__(self, config: SAGANConfig) -> None:
        super().__init__()
        sizes, widths = config.sizes[::-1], config.widths[::-1]
        layers = [conv(config.channels, widths[0], 3)]
        for i, size in enumerate(sizes):
            if size == config.attention_at:
                layers.append(SelfAttention2d(widths[i], spectral_norm=True))
            last = i == len(sizes) - 1
            layers.append(SAGANDiscriminatorBlock(widths[i], widths[-1 if last else i + 1], downsample=not last))
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.score = spectral_norm(nn.Linear(widths[-1], 1))
        self.embedding = spectral_norm(nn.Embedding(config.num_classes, widths[-1])) if config.num_classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.features(images).sum(dim=(2, 3))
        scores: Tensor = self.score(h)[:, 0]
        return scores if self.embedding is None else scores + (self.embedding(labels) * h).sum(dim=1)


@register_model
class SAGAN(ImageGAN):
    """SAGAN: residual networks with self-attention and spectral normalization, conditional if the data has classes.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1]; labels (B,) int64.

    Example:
        >>> model = SAGAN(SAGANConfig(image_size=8, width=8, classes=3))
        >>> model(torch.randn(2, 64), torch.tensor([0, 2])).shape
        torch.Size([2, 1, 8, 8])
        >>> model.draw(6, LabeledLatentOptions()).pixels.shape
        torch.Size([6, 1, 8, 8])
    """

    name = "sagan"
    summary = "GAN with self-attention and spectral normalization, with classes where there are any"
    config_class, sampling_class = SAGANConfig, LabeledLatentOptions
    train_defaults: ClassVar = {"steps": 1123, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(4_000, model={"width": 8, **LATENT_ALONE}),
        "large": Size(
            3_000, 16, train=LONG, model={"width": 8, "attention_size": 32, "penalty_every": 4, **LATENT_ALONE}
        ),
        "medium, gpu": Size(30_000, train=LONG, model={"width": 32, **LATENT_ALONE}),
        "large, gpu": Size(60_000, train=LONG, model={"width": 32, "attention_size": 32, **LATENT_ALONE}),
    }
    config: SAGANConfig

    def __init__(self, config: SAGANConfig) -> None:
        super().__init__(config)
        self.generator = SAGANGenerator(config)
        self.discriminator = SAGANDiscriminator(config)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The generator's images (B, C, S, S) in [-1, 1] for z (B, latent_dim) from N(0, 1) and labels (B,)."""
        images: Tensor = self.generator(z, labels)
        return images

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``, "discriminator" or "generator", with mean scores and the penalty for the log."""
        images, classes = self.checked_images(batch), self.config.num_classes
        labels = check_labels(batch, classes) if classes else None
        z = self.noise(len(images), self.config.latent_dim)
        if phase == "generator":
            return generator_objective(
                self.discriminator(self.augmentation(self.generator(z, labels)), labels), self.config
            )
        with torch.no_grad():
            fake = self.generator(z, labels)

        def discriminator(x: Tensor) -> Tensor:
            scores: Tensor = self.discriminator(x, labels)
            return scores

        return self.discriminator_loss(discriminator, images, fake, context)

    @torch.no_grad()
    def draw(self, n: int, options: LabeledLatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """Samples n images of the class ``options.label``, or of all classes in turn, one class per column.

        The generator's singular vectors are computed for its weights as they are, which are averages over training.

        Raises:
            ValueError: n is not a positive integer, or the label is no class.
        """
        require_positive("n", n)
        labels: Tensor | None = None
        columns: int | None = None
        if self.config.num_classes:
            labels, columns = wanted_labels(n, options.label, self.config.num_classes)
        elif options.label >= 0:
            raise ValueError(f"label: expected -1 for an unconditional model, got {options.label}")
        with eval_mode(self.generator), recomputed_buffers(self.generator):
            z = self.noise(n, self.config.latent_dim, generator, options)
            images = self.generator(z, None if labels is None else labels.to(self.device))
        return Images(to_pixels(images), columns, labels)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Attention: each row is a sample, then the places that a place of it attends to (white is the most), for
        places on its diagonal, each of which is marked in its copy of the sample below."""
        attention = cast(SelfAttention2d, self.generator.attention)
        recorded: list[Tensor] = []
        handle = attention.register_forward_pre_hook(lambda module, inputs: recorded.append(inputs[0]))
        try:
            pixels = self.draw(at_most(NUM_ATTENTION, batch), LabeledLatentOptions(), generator=generator).pixels
        finally:
            handle.remove()
        with eval_mode(self.generator), recomputed_buffers(self.generator):
            maps, places = attention_maps(attention, recorded[0], NUM_PLACES)
        size = pixels.size(-1)
        shown = F.interpolate(maps.flatten(0, 1).unsqueeze(1), (size, size)).unflatten(0, (-1, NUM_PLACES))
        shown = shown.expand(-1, -1, pixels.size(1), -1, -1)
        copies = pixels.unsqueeze(1).repeat(1, NUM_PLACES, 1, 1, 1)
        scale = size // recorded[0].size(-1)
        for i, place in enumerate(places):
            here = slice(place * scale, (place + 1) * scale)
            copies[:, i, :, here, here] = 1.0
        blank = torch.zeros_like(pixels).unsqueeze(1)
        rows = torch.stack([torch.cat([pixels.unsqueeze(1), shown], 1), torch.cat([blank, copies], 1)], 1)
        return {"attention": Images(rows.flatten(0, 2), NUM_PLACES + 1)}


def attention_maps(layer: SelfAttention2d, x: Tensor, places: int) -> tuple[Tensor, list[int]]:
    """What places on the diagonal of a feature map attend to, x (B, C, H, W) being the layer's input.

    Returns:
        Softmax weights of the keys, each divided by its maximum, (B, places, H, W), of the first head and without
        pooling; and the rows, which are also the columns, of the places.
    """
    query, key = (part(x).unflatten(1, (layer.num_heads, -1))[:, 0].flatten(2) for part in (layer.query, layer.key))
    size = x.size(-1)
    rows = [round((i + 0.5) * size / places - 0.5) for i in range(places)]
    chosen = query[:, :, [row * size + row for row in rows]]  # (B, D, places)
    weights = (layer.scale * chosen.transpose(1, 2) @ key).float().softmax(dim=2)
    return (weights / weights.amax(dim=2, keepdim=True)).unflatten(2, (size, size)), rows


# --------------------------------------------------------------------------------------------------
# Fused scales (Karras et al., "Progressive growing of GANs", 2018): a 3x3 convolution after upsampling or before
# downsampling by 2 is a 4x4 convolution of stride 2, at 4/9 of the cost.


def upsample_then_conv(x: Tensor, convolution: nn.Module) -> Tensor:
    """``convolution(F.interpolate(x, scale_factor=2))``: x (B, C, H, W) -> (B, D, 2H, 2W)."""
    if not _is_fusable(convolution):
        y: Tensor = convolution(F.interpolate(x, scale_factor=2.0))
        return y
    weight, bias = cast(Tensor, convolution.weight), cast("Tensor | None", convolution.bias)
    return F.conv_transpose2d(x, _kernel_4x4(weight).flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)


def conv_then_downsample(x: Tensor, convolution: nn.Module) -> Tensor:
    """``F.avg_pool2d(convolution(x), 2)``: x (B, C, 2H, 2W) -> (B, D, H, W)."""
    if not _is_fusable(convolution):
        return F.avg_pool2d(convolution(x), 2)
    weight, bias = cast(Tensor, convolution.weight), cast("Tensor | None", convolution.bias)
    return F.conv2d(x, 0.25 * _kernel_4x4(weight), bias, stride=2, padding=1)


def _kernel_4x4(weight: Tensor) -> Tensor:
    """Kernels (..., 3, 3) convolved with a 2x2 kernel of ones: (..., 4, 4)."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return rows[..., 1:] + rows[..., :-1]


def _is_fusable(module: nn.Module) -> bool:
    """Whether the module is a plain 3x3 convolution with zero padding; any other module is called."""
    if not isinstance(module, nn.Conv2d) or type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    usual = sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and module.groups == 1 and module.padding_mode == "zeros"
    return usual and is_fusible(module, nn.Conv2d.forward)
