"""The small convolutional network behind the feature spaces that are trained here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 128
LARGEST_MAP = 16  # the first convolution brings larger images down to this
PEAK_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class NetworkConfig:
    """channels, image_size: of the images. dims: of the features. classes: told apart while training."""

    channels: int
    image_size: int
    dims: int
    classes: int


class FeatureNetwork(nn.Module):
    """Images (B, C, S, S) in [0, 1] -> features (B, dims), of mean 0 and variance 1 over the images it was trained on.

    The features are what the last, linear layer sees, before their ReLU.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size, width, stride = config.image_size, 32, 1
        while -(-size // stride) > LARGEST_MAP:
            stride *= 2
        kernel = max(3, 2 * stride - 1)
        layers: list[nn.Module] = [nn.BatchNorm2d(config.channels, affine=False)]
        layers += _convolution(config.channels, width, kernel, stride)
        size = -(-size // stride)
        while size > 4:
            layers += _convolution(width, 2 * width, 3, 2)
            size, width = -(-size // 2), 2 * width
        layers += _convolution(width, width, 3, 1)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, config.dims))
        self.head = nn.Linear(config.dims, config.classes)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(config.dims))
        self.register_buffer("std", torch.ones(config.dims))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return (features - self.mean) / self.std

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes)"""
        scores: Tensor = self.head(F.relu(self.body(images)))
        return scores


def _convolution(channels: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


def train(network: FeatureNetwork, images: Tensor, labels: Tensor | None, steps: int) -> None:
    """On classes (N,), or on quarter turns where there are none; leaves the network in ``eval``.

    AdamW, one cycle of the learning rate, images shifted by up to an eighth. Randomness is torch's global one.
    """
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, total_steps=steps)
    size = images.shape[-1]
    reach = size // 8
    batch = min(BATCH, len(images))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images))
        chosen, order = order[:batch].to(images.device), order[batch:]
        inputs = images[chosen]
        if labels is None:
            inputs, turns = quarter_turns(inputs)
        x, y = torch.randint(2 * reach + 1, (2,)).tolist()
        inputs = F.pad(inputs, (reach,) * 4, mode="replicate")[..., y : y + size, x : x + size]
        loss = F.cross_entropy(network.logits(inputs), turns if labels is None else labels[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()


def quarter_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S), each turned once, twice, thrice or not, in quarters; and the turns (B,)."""
    turns = torch.arange(len(images), device=images.device) % 4
    turned = images.clone()
    for k in range(4):
        turned[k::4] = images[k::4].rot90(k, (2, 3))
    return turned, turns
