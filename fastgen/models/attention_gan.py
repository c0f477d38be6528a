"""A DCGAN whose generator looks at its own features.

The networks of the DCGAN (Radford, Metz and Chintala, 2016; see ``dcgan.py``); in the generator each feature map is
multiplied by a learned map of itself and added, ``x * map(x) + x``, the residual attention of Wang et al., "Residual
attention network for image classification" (2017), equation 1:

    z (B, latent_dim) -> coarse map -> [gate, norm, ReLU, twice the size] -> tanh -> images
    images -> half the size, LeakyReLU -> [half the size, norm, LeakyReLU] -> score

A gate stands before the norm, which takes out what is common to all positions: only differences pass. How both play is
in ``_adversarial.py``, their layers are in ``_convolutions.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_positive
from fastgen.models._convolutions import (
    ConvolutionalConfig,
    discriminator_features,
    discriminator_score,
    generator_layers,
    initialise,
)
from fastgen.models.adversarial import ImageGAN, Layers
from fastgen.models.base import Batch, Images, NoOptions, Samples, option
from fastgen.nn import AttentionGate2d

SHOWN, COLUMNS = 32, 16


@dataclass(frozen=True)
class AttentionGANConfig(ConvolutionalConfig):
    """Sizes of an attention GAN and how it learns. ValueError names the field, what was expected and what came."""

    width: int = option(32, "channels at half the size; doubled at each halving")
    gate_width: int = option(16, "channels between the convolutions of a gate")
    gate_stride: int = option(1, "above 1 the gates' maps are computed at a lower resolution")
    gate_each_channel: bool = option(False, "a map for every channel, not one for all of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gate_width", "gate_stride"):
            require_positive(name, getattr(self, name))


class AttentionGAN(ImageGAN):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1].

    Example:
        >>> model = AttentionGAN(AttentionGANConfig(image_size=8, width=8))
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "attention-gan"
    summary = "DCGAN with attention gates in its generator"
    config_class, sampling_class = AttentionGANConfig, NoOptions
    train_defaults: ClassVar = {"epochs": 100.0, "batch_size": 64, "average_decay": 0.998}
    config: AttentionGANConfig

    def __init__(self, config: AttentionGANConfig) -> None:
        super().__init__(config)

        def gate(channels: int) -> list[nn.Module]:
            maps = channels if config.gate_each_channel else 1
            width, stride = config.gate_width, config.gate_stride
            return [AttentionGate2d(channels, hidden_channels=width, map_channels=maps, stride=stride)]

        self.generator = Layers(*generator_layers(config, config.latent_dim, gate))
        self.discriminator = Layers(*discriminator_features(config, config.channels), *discriminator_score(config))
        for layer in (*self.generator.children(), *self.discriminator.children()):
            if not isinstance(layer, AttentionGate2d):
                initialise(layer)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of samples, each above the row of its last gate's map (the mean over channels), white for 1."""
        last = [layer for layer in self.generator.children() if isinstance(layer, AttentionGate2d)][-1]
        seen: list[Tensor] = []
        handle = last.map.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            pixels = self._draw(SHOWN, (), generator)
        finally:
            handle.remove()
        maps = F.interpolate(seen[0].float().mean(dim=1, keepdim=True), pixels.shape[2:]).expand_as(pixels)
        rows = [images.unflatten(0, (-1, COLUMNS)) for images in (pixels, maps)]
        return {"gates": Images(torch.stack(rows, dim=1).flatten(0, 2), COLUMNS)}
