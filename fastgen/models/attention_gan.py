"""DCGAN with attention gates in the generator.

The DCGAN (``dcgan.py``), whose generator multiplies each feature map by a learned map of itself and adds the result,
``x * map(x) + x``: the residual attention of Wang et al., "Residual attention network for image classification" (2017),
equation 1:

    generator:      z (B, latent_dim) -> coarse map -> [gate, norm, ReLU, upsampling convolution] -> tanh -> images
    discriminator:  that of the DCGAN

A gate comes before the norm, which removes what is common to all positions and keeps the differences between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models.adversarial import ImageGAN
from fastgen.models.base import Batch, Samples, at_most, image_rows, option
from fastgen.models.dcgan import DCGAN, DCGANConfig, DCGANDiscriminator, init_weights
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, SLOWER, Size
from fastgen.nn import AttentionGate2d

NUM_VISUALIZED, COLUMNS = 32, 16


@dataclass(frozen=True)
class AttentionGANConfig(DCGANConfig):
    """Architecture and training objective of an attention GAN: a DCGAN's, with gates.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    width: int = option(32, "number of channels at half resolution; doubled at each further downsampling")
    gate_width: int = option(16, "number of hidden channels of a gate")
    gate_stride: int = option(1, "stride of the gates: above 1 the maps have a lower resolution")
    gate_each_channel: bool = option(False, "one attention map per channel instead of one for all channels")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gate_width", "gate_stride"):
            require_positive(name, getattr(self, name))


class AttentionGANGenerator(nn.Sequential):
    """z (B, latent_dim) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, config: AttentionGANConfig) -> None:
        widths = config.widths[::-1]
        layers: list[nn.Module] = [
            nn.Unflatten(1, (config.latent_dim, 1, 1)),
            nn.ConvTranspose2d(config.latent_dim, widths[0], config.coarse_size, bias=False),
        ]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            out_channels = config.channels if last else widths[i + 1]
            gate = AttentionGate2d(
                width,
                hidden_channels=config.gate_width,
                map_channels=width if config.gate_each_channel else 1,
                stride=config.gate_stride,
            )
            convolution = nn.ConvTranspose2d(width, out_channels, 4, 2, 1, bias=last)
            layers += [gate, nn.BatchNorm2d(width), nn.ReLU(), convolution]
        super().__init__(*layers, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        for layer in self:
            z = layer(z)
        return z


@register_model
class AttentionGAN(DCGAN):
    """DCGAN with attention gates in the generator.

    Training images are (B, channels, image_size, image_size), floating point, in [0, 1].

    Example:
        >>> model = AttentionGAN(AttentionGANConfig(image_size=8, width=8))
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 1, 8, 8])
    """

    name = "attention-gan"
    summary = "DCGAN with attention gates in its generator"
    config_class = AttentionGANConfig
    train_defaults: ClassVar = {"steps": 2246, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(10_000, train=LONG, model=SLOWER),
        "large": Size(6_000, 32, train=LONG, model={"width": 16, **SLOWER}),
        "medium, gpu": Size(40_000, 128, train=LONG, model={"width": 64, **SLOWER}),
        "large, gpu": Size(60_000, 128, train=LONG, model={"width": 64, **SLOWER}),
    }
    config: AttentionGANConfig

    def __init__(self, config: AttentionGANConfig) -> None:
        ImageGAN.__init__(self, config)  # without the DCGAN's networks
        self.generator = AttentionGANGenerator(config)
        self.discriminator = DCGANDiscriminator(config)
        for layer in (*self.generator, *self.discriminator):
            if not isinstance(layer, AttentionGate2d):
                init_weights(layer)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of samples, each above a row with the last gate's maps (mean over channels; white is 1)."""
        last_gate = [layer for layer in self.generator.children() if isinstance(layer, AttentionGate2d)][-1]
        recorded: list[Tensor] = []
        handle = last_gate.map.register_forward_hook(lambda module, inputs, output: recorded.append(output))
        try:
            pixels = self.draw(at_most(NUM_VISUALIZED, batch), self.sampling_class(), generator=generator).pixels
        finally:
            handle.remove()
        maps = F.interpolate(recorded[0].float().mean(dim=1, keepdim=True), pixels.shape[2:]).expand_as(pixels)
        return {"gates": image_rows(pixels, maps, columns=COLUMNS)}
