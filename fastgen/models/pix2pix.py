"""pix2pix: image-to-image translation learned from pairs of images.

Isola, Zhu, Zhou and Efros, "Image-to-image translation with conditional adversarial networks" (2017). The generator is
a U-Net; the discriminator scores patches of an image, conditioned on the input:

    inputs -> [downsampling convolution, norm] -> ... -> [upsampling convolution, norm, skip connection] -> 3x3, tanh
    inputs, images -> scores of patches

    generator loss = adversarial_weight * adversarial loss + l1_weight * |output - target|

The noise is dropout in the coarse maps of the decoder, also at inference. Unlike in the paper, the last map is
concatenated with the input and the network is initialized near the identity: in small images much of the detail is in
single pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import losses
from fastgen.batch import require_images, require_same_batch
from fastgen.checks import require_choice, require_not_negative, require_positive, require_probability
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import Penalty, check_adversarial_options, discriminator_objective
from fastgen.models.base import (
    Batch,
    GenerativeModel,
    Images,
    NoOptions,
    Phase,
    Samples,
    StepContext,
    image_rows,
    option,
    to_pixels,
    upcast,
)
from fastgen.models.dcgan import init_weights
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size

Norm = Literal["batch", "instance"]
PatchNorm = Literal["instance", "none"]

MAX_DROPOUT_MAPS = 3  # the coarsest maps of the decoder, up to a quarter of the resolution


@dataclass(frozen=True)
class Pix2PixConfig:
    """Hyperparameters of a Pix2Pix.

    Raises:
        ValueError: a field is out of range.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "halvings": "num_downsamples",  # word-lint: ok
        "patch_halvings": "patch_num_downsamples",
    }

    image_size: int = option(32, "height and width of the images", from_data=True)
    channels: int = option(3, "number of color channels of the targets", from_data=True)
    input_channels: int = option(1, "number of color channels of the inputs", from_data=True)
    loss: AdversarialLoss = option("least-squares", "adversarial objective")
    penalty: Penalty = option("none", "gradient penalty on the discriminator")
    penalty_weight: float = option(0.2, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    adversarial_weight: float = option(1.0, "weight of the adversarial loss in the generator's loss")
    l1_weight: float = option(100.0, "weight of the mean absolute error, for pixels in [-1, 1]")
    generator_learning_rate: float = option(1e-3, "AdamW learning rate of the generator")
    discriminator_learning_rate: float = option(5e-4, "AdamW learning rate of the discriminator")
    beta1: float = option(0.5, "AdamW beta1")
    beta2: float = option(0.999, "AdamW beta2")
    critic_steps: int = option(1, "discriminator updates per generator update")
    width: int = option(32, "generator channels at half resolution; doubled at each downsampling, up to 8 times")
    num_downsamples: int = option(4, "number of downsamplings by 2 in the generator")
    norm: Norm = option("batch", "normalization of the generator")
    dropout: float = option(0.5, "dropout probability in the coarse maps of the decoder; 0: no noise")
    patch_width: int = option(32, "discriminator channels at half resolution; doubled at each downsampling")
    patch_num_downsamples: int = option(2, "number of downsamplings in the discriminator; determines the patch size")
    patch_norm: PatchNorm = option("none", "normalization of the discriminator; instance in the paper")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("input_channels", "width", "num_downsamples"):
            require_positive(name, getattr(self, name))
        require_choice("norm", self.norm, get_args(Norm))
        require_probability("dropout", self.dropout)
        require_not_negative(l1_weight=self.l1_weight, adversarial_weight=self.adversarial_weight)
        check_downsampling(self.image_size, self.num_downsamples)
        check_patches(self)

    @property
    def widths(self) -> list[int]:
        """Channels of the encoder's maps at 1/2, 1/4, ... of the resolution."""
        return [self.width << min(i, 3) for i in range(self.num_downsamples)]

    @property
    def dropout_shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of the decoder's maps with dropout, from the coarsest up."""
        count = min(MAX_DROPOUT_MAPS, self.num_downsamples - 2) if self.dropout else 0
        coarse = self.image_size >> self.num_downsamples
        return [(self.widths[-2 - i], coarse << i + 1, coarse << i + 1) for i in range(count)]


def check_downsampling(image_size: int, num_downsamples: int) -> None:
    """Raises ValueError unless images of this size can be downsampled so many times."""
    if image_size % 2**num_downsamples:
        raise ValueError(
            f"image_size: expected a multiple of {2**num_downsamples}, as num_downsamples = {num_downsamples},"
            f" got {image_size}"
        )


def check_patches(config: Any) -> None:
    """Raises ValueError unless the config's options of a PatchDiscriminator are in range and fit the images."""
    for name in ("patch_width", "patch_num_downsamples"):
        require_positive(name, getattr(config, name))
    require_choice("patch_norm", config.patch_norm, get_args(PatchNorm))
    min_size = 3 << config.patch_num_downsamples
    if config.image_size < min_size:
        raise ValueError(
            f"image_size: expected at least {min_size}, as patch_num_downsamples = {config.patch_num_downsamples},"
            f" got {config.image_size}"
        )


class UNet(nn.Module):
    """Generator: inputs (B, input_channels, S, S) and dropout masks (B, C, h, w) -> (B, channels, S, S) in [-1, 1].

    The first and the coarsest map of the encoder and the last map of the decoder are not normalized.
    """

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__()
        widths, self.input_channels = config.widths, config.input_channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.down_norms, self.up_norms = nn.ModuleList(), nn.ModuleList()
        for i, (in_channels, out_channels) in enumerate(zip([config.input_channels, *widths], widths, strict=False)):
            plain = i in (0, len(widths) - 1)
            self.down.append(nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=plain))
            self.down_norms.append(nn.Identity() if plain else self._norm(config.norm, out_channels))
        for i, (in_channels, out_channels) in enumerate(zip(widths[::-1], [*widths[::-1][1:], widths[0]], strict=True)):
            plain, joined_channels = i == len(widths) - 1, in_channels * (1 if i == 0 else 2)
            self.up.append(nn.ConvTranspose2d(joined_channels, out_channels, 4, 2, 1, bias=plain))
            self.up_norms.append(nn.Identity() if plain else self._norm(config.norm, out_channels))
        self.image = nn.Conv2d(widths[0] + config.input_channels, config.channels, 3, padding=1)

    @staticmethod
    def _norm(kind: Norm, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels, affine=True)

    @torch.no_grad()
    def init_identity(self) -> None:
        """Make the output near tanh(inputs), or tanh of their mean over channels if the numbers of channels differ."""
        center = self.image.weight[:, -self.input_channels :, 1, 1]
        center += torch.eye(self.input_channels) if len(center) == self.input_channels else 1 / self.input_channels

    def forward(self, inputs: Tensor, dropout_masks: Sequence[Tensor]) -> Tensor:
        x, skips = inputs, []
        for i, (convolution, norm) in enumerate(zip(self.down, self.down_norms, strict=True)):
            x = norm(convolution(x if i == 0 else F.leaky_relu(x, 0.2)))
            skips.append(x)
        for i, (convolution, norm) in enumerate(zip(self.up, self.up_norms, strict=True)):
            x = norm(convolution(F.relu(x if i == 0 else torch.cat([x, skips[-1 - i]], dim=1))))
            if i < len(dropout_masks):
                x = x * dropout_masks[i].to(x.dtype)
        return torch.tanh(self.image(torch.cat([F.relu(x), inputs], dim=1)))


class PatchDiscriminator(nn.Sequential):
    """Images (B, in_channels, S, S) in [-1, 1] -> scores (B, h, w) of overlapping patches, logits: high means real.

    h = w = S / 2^n - 2 for n = patch_num_downsamples. The receptive field of a score is 34 pixels for n = 2, 70 for
    n = 3. Instance normalization hides the total contrast of an image from the discriminator.
    """

    def __init__(self, config: Any, in_channels: int) -> None:
        widths = [config.patch_width << i for i in range(config.patch_num_downsamples + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, len(widths)):
            stride = 2 if i < config.patch_num_downsamples else 1
            norm = [nn.InstanceNorm2d(widths[i])] if config.patch_norm == "instance" else []
            convolution = nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=not norm)
            layers += [convolution, *norm, nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1), nn.Flatten(1, 2))

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.children():  # torch.compile skips nn.Sequential.forward
            images = layer(images)
        return images


def absolute_error(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of each image, (B,), float32 at least."""
    images = upcast(images)
    return (images - targets).abs().flatten(1).mean(1)


@register_model
class Pix2Pix(GenerativeModel):
    """Image-to-image translation learned from pairs.

    Inputs are (B, input_channels, S, S), targets (B, channels, S, S), floating, in [0, 1]; S is image_size.

    Example:
        >>> model = Pix2Pix(Pix2PixConfig(image_size=16, width=4, patch_width=4))
        >>> model.translate({"inputs": torch.rand(5, 1, 16, 16)}).pixels.shape
        torch.Size([5, 3, 16, 16])
    """

    name, summary, kind = "pix2pix", "image-to-image translation learned from pairs", "pairs"
    default_data = "photos"
    config_class, sampling_class = Pix2PixConfig, NoOptions
    train_defaults: ClassVar = {"steps": 600, "batch_size": 16, "schedule": "linear", "average_decay": 0.99}
    sizes: ClassVar = {
        "medium": Size(600, 16),
        "large": Size(8_000, 8, train=LONG, model={"width": 24}),
        "medium, gpu": Size(10_000, 16, train=LONG, model={"width": 64, "patch_width": 64}),
        "large, gpu": Size(40_000, 16, train=LONG, model={"width": 64, "patch_width": 64}),
    }
    averaged = ("generator",)
    config: Pix2PixConfig

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__(config)
        self.generator = UNet(config)
        self.discriminator = PatchDiscriminator(config, config.input_channels + config.channels)
        self.apply(init_weights)
        self.generator.init_identity()

    def forward(self, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Inputs (B, input_channels, S, S) in [0, 1] -> images (B, channels, S, S) in [0, 1].

        In training mode, batch normalization uses the statistics of the batch. Dropout is applied in both modes; its
        noise comes from ``generator``, by default torch's global one.
        """
        return to_pixels(self._generate(self._checked("inputs", inputs, self.config.input_channels), generator))

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas, repeats = (config.beta1, config.beta2), config.critic_steps
        return (
            Phase("discriminator", ("discriminator",), config.discriminator_learning_rate, betas, repeats=repeats),
            Phase("generator", ("generator",), config.generator_learning_rate, betas),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``; mean scores of "real" and "fake" pairs, "l1" as in ``score``, the "penalty"."""
        config = self.config
        inputs, targets = self._pairs(batch)
        if phase == "generator":
            fake = self._generate(inputs)
            scores = self.discriminator(torch.cat([inputs, fake.to(inputs.dtype)], dim=1))
            l1 = absolute_error(fake, targets).mean()
            loss = config.adversarial_weight * losses.generator_loss(scores, config.loss) + config.l1_weight * l1
            return {"loss": loss, "fake": scores.detach().float().mean(), "l1": l1.detach() / 2}
        with torch.no_grad():
            fake = self._generate(inputs).to(inputs.dtype)

        def discriminator(images: Tensor) -> Tensor:
            scores: Tensor = self.discriminator(torch.cat([inputs, images], dim=1))
            return scores

        return discriminator_objective(discriminator, targets, fake, config, context)

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """l1 (B,): mean absolute error for pixels in [0, 1]."""
        inputs, targets = self._pairs(batch)
        return {"l1": absolute_error(self._generate_eval(inputs, generator), targets) / 2}

    @torch.no_grad()
    def translate(
        self, batch: Batch, options: NoOptions | None = None, *, generator: torch.Generator | None = None
    ) -> Images:
        """The translated inputs of a batch, in evaluation mode; the batch needs no targets."""
        inputs = self._checked("inputs", batch["inputs"], self.config.input_channels)
        return Images(to_pixels(self._generate_eval(inputs, generator)))

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out inputs, their translations, and their targets."""
        outputs = self.translate(batch, generator=generator).pixels
        return {"translations": image_rows(batch["inputs"], outputs, batch["targets"])}

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = self._checked("inputs", batch["inputs"], self.config.input_channels)
        require_same_batch("inputs", inputs, "targets", batch["targets"])
        return inputs, self._checked("targets", batch["targets"], self.config.channels)

    def _checked(self, name: str, images: Tensor, channels: int) -> Tensor:
        """Images (B, channels, S, S) in [0, 1] -> [-1, 1]."""
        require_images(name, images, channels, self.config.image_size)
        return 2 * images - 1

    def _generate(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs (B, input_channels, S, S) in [-1, 1] -> images (B, channels, S, S) in [-1, 1]."""
        keep, shapes = 1 - self.config.dropout, self.config.dropout_shapes
        counts = [math.prod(shape) for shape in shapes]
        device = inputs.device if generator is None else generator.device
        kept = torch.rand(len(inputs), sum(counts), generator=generator, device=device) < keep
        parts = (kept / keep).to(inputs).split(counts, dim=1)
        masks = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)] if shapes else []
        images: Tensor = self.generator(inputs, masks)
        return images

    def _generate_eval(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """``_generate`` in evaluation mode: batch normalization uses its running statistics."""
        was_training = self.generator.training
        self.generator.eval()
        try:
            return self._generate(inputs, generator)
        finally:
            self.generator.train(was_training)
