"""``sagan`` in plain PyTorch: attention with 1x1 convolutions, bmm and softmax; torch's own spectral_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.baselines._gan import GANTwin


class SelfAttention(nn.Module):
    """Unfused: torch's fused attention has no double backward on the CPU, which the R1 penalty needs."""

    def __init__(self, channels) -> None:
        super().__init__()
        self.query = spectral_norm(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.key = spectral_norm(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.value = spectral_norm(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.out = spectral_norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        weights = F.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
        attended = torch.bmm(value, weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.out(attended)


class ConditionalBatchNorm(nn.Module):
    def __init__(self, channels, classes) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not classes)
        self.gain = nn.Embedding(classes, channels) if classes else None
        self.bias = nn.Embedding(classes, channels) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.norm(x)
        if labels is None:
            return x
        return self.gain(labels)[:, :, None, None] * x + self.bias(labels)[:, :, None, None]


class GeneratorBlock(nn.Module):
    def __init__(self, in_channels, out_channels, classes) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(in_channels, classes)
        self.norm2 = ConditionalBatchNorm(out_channels, classes)
        self.conv1 = spectral_norm(nn.Conv2d(in_channels, out_channels, 3, 1, 1))
        self.conv2 = spectral_norm(nn.Conv2d(out_channels, out_channels, 3, 1, 1))
        self.shortcut = spectral_norm(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), labels)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class DiscriminatorBlock(nn.Module):
    def __init__(self, in_channels, out_channels, downsample) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(in_channels, out_channels, 3, 1, 1))
        self.conv2 = spectral_norm(nn.Conv2d(out_channels, out_channels, 3, 1, 1))
        projected = in_channels != out_channels
        self.shortcut = spectral_norm(nn.Conv2d(in_channels, out_channels, 1)) if projected else nn.Identity()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x)))) + self.shortcut(x)
        return F.avg_pool2d(h, 2) if self.downsample else h


class Generator(nn.Module):
    def __init__(self, config, classes) -> None:
        super().__init__()
        sizes, widths = config.sizes, config.widths
        canvas = spectral_norm(nn.Linear(config.latent_dim, widths[0] * sizes[0] ** 2, bias=config.canvas_bias))
        self.canvas = nn.Sequential(canvas, nn.Unflatten(1, (widths[0], sizes[0], sizes[0])))
        self.blocks = nn.ModuleList(GeneratorBlock(*widths[i : i + 2], classes) for i in range(len(widths) - 1))
        self.attention_index = sizes.index(config.attention_at)
        self.attention = SelfAttention(widths[self.attention_index])
        image = spectral_norm(nn.Conv2d(widths[-1], config.channels, 3, 1, 1))
        self.image = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), image, nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.canvas(z)
        for i in range(len(self.blocks) + 1):
            if i:
                x = self.blocks[i - 1](x, labels)
            if i == self.attention_index:
                x = self.attention(x)
        return self.image(x)


class Discriminator(nn.Module):
    def __init__(self, config, classes) -> None:
        super().__init__()
        sizes, widths = config.sizes[::-1], config.widths[::-1]
        layers = [spectral_norm(nn.Conv2d(config.channels, widths[0], 3, 1, 1))]
        for i, size in enumerate(sizes):
            if size == config.attention_at:
                layers += [SelfAttention(widths[i])]
            downsample = i + 1 < len(sizes)
            layers += [DiscriminatorBlock(widths[i], widths[i + downsample], downsample)]
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.score = spectral_norm(nn.Linear(widths[-1], 1))
        self.embedding = spectral_norm(nn.Embedding(classes, widths[-1])) if classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.features(images).sum((2, 3))
        scores = self.score(h)[:, 0]
        return scores if labels is None else scores + (self.embedding(labels) * h).sum(1)


class SAGANTwin(GANTwin):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.generator = Generator(config, config.num_classes)
        self.discriminator = Discriminator(config, config.num_classes)

    def labels(self, batch) -> tuple[Tensor, ...]:
        return (batch["labels"],) if self.config.num_classes else ()
