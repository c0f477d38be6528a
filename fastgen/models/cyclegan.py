"""CycleGAN: translation between two domains of images, learned without pairs.

Zhu, Park, Isola and Efros, "Unpaired image-to-image translation using cycle-consistent adversarial networks" (2017).
Two generators and one patch discriminator per domain minimize adversarial losses and the mean absolute errors

    b_to_a(a_to_b(a)) = a,  a_to_b(b_to_a(b)) = b        cycle consistency
    a_to_b(b) = b,          b_to_a(a) = a                identity

A generator is a residual network with reflection padding, instance normalization and ReLU:

    images -> 7x7 convolution -> [downsampling] -> [residual blocks] -> [upsampling] -> 7x7 convolution, tanh

The discriminators are those of pix2pix and are trained on a history of generated images. The paper's images have 256
pixels a side, two downsamplings, a cycle weight of 10 and instance normalization in the discriminators; the defaults
here suit small sets of images of 32 pixels and thousands of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.batch import Direction, is_reversed, require_images, require_same_batch
from fastgen.checks import require_count, require_not_negative, require_positive
from fastgen.losses.adversarial import AdversarialLoss
from fastgen.models.adversarial import Penalty, check_adversarial_options, discriminator_objective
from fastgen.models.base import (
    Batch,
    GenerativeModel,
    Images,
    Phase,
    Samples,
    StepContext,
    image_rows,
    option,
    to_pixels,
)
from fastgen.models.dcgan import init_weights
from fastgen.models.pix2pix import (
    PatchDiscriminator,
    PatchNorm,
    absolute_error,
    check_downsampling,
    check_patches,
)
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size

# Half the cycle weight, as in the paper's section 5.2. Without it, generators of flat drawings inverted colors.
KEEP_COLORS: Mapping[str, Any] = {"identity_weight": 2.5}


@dataclass(frozen=True)
class CycleGANConfig:
    """Hyperparameters of a CycleGAN.

    Raises:
        ValueError: a field is out of range.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "halvings": "num_downsamples",  # word-lint: ok
        "patch_halvings": "patch_num_downsamples",
    }

    image_size: int = option(32, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    loss: AdversarialLoss = option("least-squares", "adversarial objective")
    penalty: Penalty = option("none", "gradient penalty on the discriminators")
    penalty_weight: float = option(0.2, "weight of the gradient penalty (gamma, lambda)")
    penalty_every: int = option(1, "interval of the gradient penalty in steps; multiplies its weight")
    cycle_weight: float = option(5.0, "weight of the cycle consistency loss, for pixels in [-1, 1]")
    identity_weight: float = option(0.0, "weight of the identity loss, for pixels in [-1, 1]")
    generator_learning_rate: float = option(5e-4, "AdamW learning rate of the generators")
    discriminator_learning_rate: float = option(5e-4, "AdamW learning rate of the discriminators")
    beta1: float = option(0.5, "AdamW beta1")
    beta2: float = option(0.999, "AdamW beta2")
    critic_steps: int = option(1, "discriminator updates per generator update")
    width: int = option(16, "generator channels at full resolution; doubled at each downsampling")
    num_downsamples: int = option(1, "number of downsamplings by 2 in a generator")
    blocks: int = option(3, "number of residual blocks in a generator")
    patch_width: int = option(32, "discriminator channels at half resolution; doubled at each downsampling")
    patch_num_downsamples: int = option(2, "number of downsamplings in a discriminator; determines the patch size")
    patch_norm: PatchNorm = option("none", "normalization of the discriminators; instance in the paper")
    history: int = option(50, "number of generated images stored for each discriminator, per process; 0: none")

    def __post_init__(self) -> None:
        check_adversarial_options(self)
        for name in ("width", "num_downsamples"):
            require_positive(name, getattr(self, name))
        for name in ("blocks", "history"):
            require_count(name, getattr(self, name), 0)
        require_not_negative(cycle_weight=self.cycle_weight, identity_weight=self.identity_weight)
        check_downsampling(self.image_size, self.num_downsamples)
        check_patches(self)
        if self.image_size >> self.num_downsamples < 2:
            raise ValueError(
                f"image_size: expected at least {2 << self.num_downsamples}, as num_downsamples ="
                f" {self.num_downsamples}, got {self.image_size}"
            )


@dataclass(frozen=True)
class DirectionOptions:
    """Direction of a translation.

    Raises:
        ValueError: unknown direction.
    """

    direction: Direction = option("a-to-b", "direction of the translation; AtoB and BtoA mean the same")

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", "b-to-a" if is_reversed(self.direction) else "a-to-b")


def convolution(in_channels: int, out_channels: int, size: int) -> list[nn.Module]:
    """A convolution with reflection padding and instance normalization."""
    padding, norm = nn.ReflectionPad2d(size // 2), nn.InstanceNorm2d(out_channels)
    return [padding, nn.Conv2d(in_channels, out_channels, size, bias=False), norm]


class ResnetBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), with 3x3 convolutions. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [*convolution(channels, channels, 3), nn.ReLU(), *convolution(channels, channels, 3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class ResnetGenerator(nn.Sequential):
    """Images (B, C, S, S) in [-1, 1] -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: CycleGANConfig) -> None:
        widths = [config.width << i for i in range(config.num_downsamples + 1)]
        layers: list[nn.Module] = [*convolution(config.channels, widths[0], 7), nn.ReLU()]
        for in_channels, out_channels in itertools.pairwise(widths):
            downsample = nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)
            layers += [downsample, nn.InstanceNorm2d(out_channels), nn.ReLU()]
        layers += [ResnetBlock(widths[-1]) for _ in range(config.blocks)]
        for in_channels, out_channels in itertools.pairwise(widths[::-1]):
            upsample = nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, bias=False)
            layers += [upsample, nn.InstanceNorm2d(out_channels), nn.ReLU()]
        super().__init__(*layers, nn.ReflectionPad2d(3), nn.Conv2d(widths[0], config.channels, 7), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.children():  # torch.compile skips nn.Sequential.forward
            images = layer(images)
        return images


class History(nn.Module):
    """Store of generated images; a discriminator is trained on a mix of stored and new images.

    Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training" (2017), section
    2.3. Slots are sampled from torch's global generator, each at most once in a batch.

    Args:
        capacity: number of images in the store; 0: none.
        shape: (C, H, W) of an image.
    """

    images: Tensor
    filled: Tensor

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(capacity, *shape))
        self.register_buffer("filled", torch.zeros(capacity))

    @torch.no_grad()
    def exchange(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, with some images replaced by stored ones, which they replace in the store.

        An image whose slot is empty is stored and returned; any other one is exchanged with probability 1/2. If the
        batch is larger than the store, the rest is returned unchanged.
        """
        slots = torch.randperm(len(self.images), device=images.device)[: len(images)]
        new, rest = images[: len(slots)], images[len(slots) :]
        old, empty = self.images[slots].to(images.dtype), self.filled[slots] == 0
        exchanged = ~empty & (torch.rand(len(slots), device=images.device) < 0.5)
        stored = (exchanged | empty).view(-1, 1, 1, 1)
        self.images[slots] = torch.where(stored, new, old).to(self.images.dtype)
        self.filled[slots] = 1.0
        return torch.cat([torch.where(exchanged.view(-1, 1, 1, 1), old, new), rest])


@register_model
class CycleGAN(GenerativeModel):
    """Unpaired translation between two domains of images.

    Images a and b are (B, channels, image_size, image_size), floating, in [0, 1]; they are not paired.

    Example:
        >>> model = CycleGAN(CycleGANConfig(image_size=16, width=4, blocks=1, patch_width=4))
        >>> model.translate({"b": torch.rand(3, 1, 16, 16)}, DirectionOptions("b-to-a")).pixels.shape
        torch.Size([3, 1, 16, 16])
    """

    name, summary, kind = "cyclegan", "translation between two domains of images, learned without pairs", "domains"
    default_data = "textures"
    config_class, sampling_class = CycleGANConfig, DirectionOptions
    train_defaults: ClassVar = {"steps": 800, "batch_size": 4, "schedule": "linear", "average_decay": 0.99}
    sizes: ClassVar = {
        "medium": Size(800, 4),
        "large": Size(8_000, 1, train=LONG, model=KEEP_COLORS),
        "medium, gpu": Size(20_000, 4, train=LONG, model={"width": 32, "num_downsamples": 2, "blocks": 6}),
        "large, gpu": Size(
            100_000, 1, train=LONG, model={"width": 64, "num_downsamples": 2, "blocks": 6, **KEEP_COLORS}
        ),
    }
    averaged = ("a_to_b", "b_to_a")
    stores = ("history_a", "history_b")
    config: CycleGANConfig

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__(config)
        self.a_to_b, self.b_to_a = ResnetGenerator(config), ResnetGenerator(config)
        self.discriminator_a = PatchDiscriminator(config, config.channels)
        self.discriminator_b = PatchDiscriminator(config, config.channels)
        shape = (config.channels, config.image_size, config.image_size)
        self.history_a, self.history_b = History(config.history, shape), History(config.history, shape)
        self.apply(init_weights)

    def forward(self, images: Tensor, direction: Direction = "a-to-b") -> Tensor:
        """Images (B, C, S, S) of one domain in [0, 1] -> images (B, C, S, S) of the other in [0, 1]."""
        network, source = (self.b_to_a, "b") if is_reversed(direction) else (self.a_to_b, "a")
        return to_pixels(network(self._checked(source, images)))

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas, discriminators = (config.beta1, config.beta2), ("discriminator_a", "discriminator_b")
        rates = config.discriminator_learning_rate, config.generator_learning_rate
        return (
            Phase("discriminator", discriminators, rates[0], betas, repeats=config.critic_steps),
            Phase("generator", ("a_to_b", "b_to_a"), rates[1], betas),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``, summed over both domains; mean scores, "cycle" and "identity" as in ``score``."""
        a, b = self._both(batch)
        if phase == "generator":
            return self._generators_loss(a, b)
        with torch.no_grad():
            fake_a, fake_b = self.history_a.exchange(self.b_to_a(b)), self.history_b.exchange(self.a_to_b(a))
        values_a = discriminator_objective(self.discriminator_a, a, fake_a, self.config, context)
        values_b = discriminator_objective(self.discriminator_b, b, fake_b, self.config, context)
        both = {name: values_a[name] + values_b[name] for name in values_a}
        return {name: value if name == "loss" else value / 2 for name, value in both.items()}

    def _generators_loss(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        config, n = self.config, len(a)
        # Instance normalization is per image, so translations and identities are one batch.
        with_identity = config.identity_weight > 0
        out_b = self.a_to_b(torch.cat([a, b]) if with_identity else a)
        out_a = self.b_to_a(torch.cat([b, a]) if with_identity else b)
        fake_b, same_b, fake_a, same_a = out_b[:n], out_b[n:], out_a[:n], out_a[n:]
        scores = self.discriminator_a(fake_a), self.discriminator_b(fake_b)
        loss = sum((losses.generator_loss(each, config.loss) for each in scores), start=a.new_zeros(()))
        cycle = absolute_error(self.b_to_a(fake_b), a).mean() + absolute_error(self.a_to_b(fake_a), b).mean()
        values = {"fake": sum(each.detach().float().mean() for each in scores) / 2, "cycle": cycle.detach() / 4}
        loss = loss + config.cycle_weight * cycle
        if with_identity:
            identity = absolute_error(same_a, a).mean() + absolute_error(same_b, b).mean()
            loss = loss + config.identity_weight * identity
            values["identity"] = identity.detach() / 4
        return {"loss": loss, **values}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean absolute errors (B,) for pixels in [0, 1], over both domains: "cycle error", "identity error"."""
        a, b = self._both(batch)
        fake_a, fake_b = self.b_to_a(b), self.a_to_b(a)
        cycle = absolute_error(self.b_to_a(fake_b), a) + absolute_error(self.a_to_b(fake_a), b)
        identity = absolute_error(self.b_to_a(a), a) + absolute_error(self.a_to_b(b), b)
        return {"cycle error": cycle / 4, "identity error": identity / 4}

    @torch.no_grad()
    def translate(
        self, batch: Batch, options: DirectionOptions | None = None, *, generator: torch.Generator | None = None
    ) -> Images:
        """The translated images a or b of a batch, which needs only these; no noise. Default: a to b."""
        options = options or DirectionOptions()
        return Images(self(batch[options.direction[0]], options.direction))

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, their translations, and these translated back."""
        a, b = self._both(batch)
        fake_a, fake_b = self.b_to_a(b), self.a_to_b(a)
        cycles = {"a-b-a": (a, fake_b, self.b_to_a(fake_b)), "b-a-b": (b, fake_a, self.a_to_b(fake_a))}
        return {name: image_rows(*map(to_pixels, images)) for name, images in cycles.items()}

    def _both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        a, b = self._checked("a", batch["a"]), self._checked("b", batch["b"])
        require_same_batch("a", a, "b", b)
        return a, b

    def _checked(self, name: str, images: Tensor) -> Tensor:
        """Images (B, C, S, S) in [0, 1] -> [-1, 1]."""
        require_images(name, images, self.config.channels, self.config.image_size)
        return 2 * images - 1
