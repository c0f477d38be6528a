"""``stylegan`` in plain PyTorch: a modulated convolution has weights of its own for each image, in one grouped call."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines._gan import GANTwin

STD_GROUP = 4


def activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class EqualLinear(nn.Module):
    def __init__(self, inputs, outputs, rate=1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualConv2d(nn.Module):
    def __init__(self, inputs, outputs, size, bias=True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(inputs * size**2), size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class ModulatedConv2d(nn.Module):
    def __init__(self, inputs, outputs, size, style_dim, demodulate=True) -> None:
        super().__init__()
        self.convolution = EqualConv2d(inputs, outputs, size, bias=False)
        self.style = EqualLinear(style_dim, inputs)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        convolution = self.convolution
        weight = convolution.weight * convolution.scale * self.style(style)[:, None, :, None, None]
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, batch * channels, height, width)
        x = F.conv2d(x, weight.flatten(0, 1), padding=convolution.padding, groups=batch)
        return x.view(batch, -1, height, width)


class StyledLayer(nn.Module):
    def __init__(self, inputs, outputs, style_dim, upsamples) -> None:
        super().__init__()
        self.convolution = ModulatedConv2d(inputs, outputs, 3, style_dim)
        self.strength, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(outputs))
        self.upsamples = upsamples

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = self.convolution(upsample(x) if self.upsamples else x, style)
        return activation(x + self.strength * noise.view(-1, 1, *x.shape[2:]) + self.bias[:, None, None])


class Mapping(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        dims = [config.latent_dim] + [config.style_dim] * config.mapping_depth
        self.layers = nn.ModuleList(EqualLinear(*dims[i : i + 2], config.mapping_rate) for i in range(len(dims) - 1))
        self.register_buffer("average", torch.zeros(config.style_dim))

    def forward(self, z: Tensor) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = activation(layer(x))
        self.average.lerp_(x.detach().mean(dim=0), 0.005)
        return x


class Synthesis(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        sizes, widths, style_dim = config.sizes, config.widths, config.style_dim
        self.constant = nn.Parameter(torch.randn(widths[0], sizes[0], sizes[0]))
        self.layers = nn.ModuleList([StyledLayer(widths[0], widths[0], style_dim, False)])
        for i in range(len(widths) - 1):
            self.layers.append(StyledLayer(widths[i], widths[i + 1], style_dim, True))
            self.layers.append(StyledLayer(widths[i + 1], widths[i + 1], style_dim, False))
        self.images = nn.ModuleList(ModulatedConv2d(w, config.channels, 1, style_dim, demodulate=False) for w in widths)
        self.bias = nn.Parameter(torch.zeros(config.channels))
        self.pixels = [sizes[0] ** 2, *(size**2 for size in sizes[1:] for _ in range(2))]

    def forward(self, w: Tensor, noise: Tensor) -> Tensor:
        maps = noise.split(self.pixels, dim=1)
        x = self.layers[0](self.constant.expand(len(w), -1, -1, -1), w, maps[0])
        image = self.images[0](x, w)
        for i in range(1, len(self.layers), 2):
            x = self.layers[i + 1](self.layers[i](x, w, maps[i]), w, maps[i + 1])
            image = upsample(image) + self.images[i // 2 + 1](x, w)
        return image + self.bias[:, None, None]


class Generator(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.mapping, self.synthesis = Mapping(config), Synthesis(config)
        self.latent_dim = config.latent_dim

    def forward(self, noise: Tensor) -> Tensor:
        return self.synthesis(self.mapping(noise[:, : self.latent_dim]), noise[:, self.latent_dim :])


class Block(nn.Module):
    def __init__(self, inputs, outputs) -> None:
        super().__init__()
        self.conv1, self.conv2 = EqualConv2d(inputs, inputs, 3), EqualConv2d(inputs, outputs, 3)
        self.shortcut = EqualConv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(activation(self.conv2(activation(self.conv1(x)))), 2)
        return (y + self.shortcut(F.avg_pool2d(x, 2))) * math.sqrt(0.5)


class Discriminator(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        widths, coarse = config.widths[::-1], config.sizes[0]
        self.first = EqualConv2d(config.channels, widths[0], 1)
        self.blocks = nn.ModuleList(Block(*widths[i : i + 2]) for i in range(len(widths) - 1))
        self.last = EqualConv2d(widths[-1] + 1, widths[-1], 3)
        self.hidden, self.score = EqualLinear(widths[-1] * coarse**2, widths[-1]), EqualLinear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = activation(self.first(images))
        for block in self.blocks:
            x = block(x)
        batch, _, height, width = x.shape
        groups = batch // STD_GROUP if batch % STD_GROUP == 0 else 1
        deviation = (x.unflatten(0, (-1, groups)).var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))
        x = torch.cat([x, deviation.repeat(batch // groups).view(-1, 1, 1, 1).expand(-1, -1, height, width)], dim=1)
        return self.score(activation(self.hidden(activation(self.last(x)).flatten(1))))[:, 0]


class StyleGANTwin(GANTwin):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.generator, self.discriminator = Generator(config), Discriminator(config)
        self.register_buffer("path_length_mean", torch.zeros(()))

    def noise_dim(self) -> int:
        return self.config.latent_dim + sum(self.generator.synthesis.pixels)
