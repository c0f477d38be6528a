"""``dcgan`` in plain PyTorch."""

from __future__ import annotations

from torch import nn

from benchmarks.baselines._gan import GANTwin


def generator(latent_dim, widths, coarse_size, channels) -> nn.Sequential:
    layers = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, widths[-1], coarse_size, bias=False)]
    for i in reversed(range(1, len(widths))):
        layers += [nn.BatchNorm2d(widths[i]), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[i], widths[i - 1], 4, 2, 1, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.ConvTranspose2d(widths[0], channels, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers)


def discriminator(widths, coarse_size, channels) -> nn.Sequential:
    layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, len(widths)):
        layers += [nn.Conv2d(widths[i - 1], widths[i], 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, coarse_size), nn.Flatten(0))


class DCGANTwin(GANTwin):
    def __init__(self, config) -> None:
        super().__init__(config)
        widths = [config.width * 2**i for i in range(config.num_downsamples)]
        self.generator = generator(config.latent_dim, widths, config.coarse_size, config.channels)
        self.discriminator = discriminator(widths, config.coarse_size, config.channels)
