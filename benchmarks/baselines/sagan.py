"""``sagan`` with torch alone: attention by 1x1 convolutions, bmm and softmax, spectral_norm of torch.nn.utils."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.baselines._gan import GANTwin


class SelfAttention(nn.Module):
    """torch's fused attention can't be differentiated twice on the CPU, as the R1 penalty has to."""

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
    def __init__(self, wide, fine, classes) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(wide, classes), ConditionalBatchNorm(fine, classes)
        self.conv1 = spectral_norm(nn.Conv2d(wide, fine, 3, 1, 1))
        self.conv2 = spectral_norm(nn.Conv2d(fine, fine, 3, 1, 1))
        self.shortcut = spectral_norm(nn.Conv2d(wide, fine, 1))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), labels)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class DiscriminatorBlock(nn.Module):
    def __init__(self, fine, wide, halve) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(fine, wide, 3, 1, 1))
        self.conv2 = spectral_norm(nn.Conv2d(wide, wide, 3, 1, 1))
        self.shortcut = spectral_norm(nn.Conv2d(fine, wide, 1)) if fine != wide else nn.Identity()
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x)))) + self.shortcut(x)
        return F.avg_pool2d(h, 2) if self.halve else h


class Generator(nn.Module):
    def __init__(self, config, classes) -> None:
        super().__init__()
        sizes, widths = config.sizes, config.widths
        canvas = spectral_norm(nn.Linear(config.latent_dim, widths[0] * sizes[0] ** 2))
        self.canvas = nn.Sequential(canvas, nn.Unflatten(1, (widths[0], sizes[0], sizes[0])))
        self.blocks = nn.ModuleList(GeneratorBlock(*widths[i : i + 2], classes) for i in range(len(widths) - 1))
        self.place = sizes.index(config.attention_at)
        self.attention = SelfAttention(widths[self.place])
        image = spectral_norm(nn.Conv2d(widths[-1], config.channels, 3, 1, 1))
        self.image = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), image, nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.canvas(z)
        for place in range(len(self.blocks) + 1):
            if place:
                x = self.blocks[place - 1](x, labels)
            if place == self.place:
                x = self.attention(x)
        return self.image(x)


class Discriminator(nn.Module):
    def __init__(self, config, classes) -> None:
        super().__init__()
        sizes, widths = config.sizes[::-1], config.widths[::-1]
        layers = [spectral_norm(nn.Conv2d(config.channels, widths[0], 3, 1, 1))]
        for place, size in enumerate(sizes):
            if size == config.attention_at:
                layers += [SelfAttention(widths[place])]
            halve = place + 1 < len(sizes)
            layers += [DiscriminatorBlock(widths[place], widths[place + halve], halve)]
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
        self.classes = config.classes if config.conditional else 0
        self.generator, self.discriminator = Generator(config, self.classes), Discriminator(config, self.classes)

    def labels(self, batch) -> tuple[Tensor, ...]:
        return (batch["labels"],) if self.classes else ()
