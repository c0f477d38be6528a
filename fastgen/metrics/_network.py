"""Small convolutional network of the trained feature spaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 128
MAX_FEATURE_MAP = 16  # larger images are downsampled to this size by the first convolution
PEAK_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class NetworkConfig:
    """Configuration of a feature network.

    Attributes:
        channels: number of image channels.
        image_size: height and width of the images.
        dims: number of features.
        classes: number of classes in training.
    """

    channels: int
    image_size: int
    dims: int
    classes: int


class FeatureNetwork(nn.Module):
    """Maps images (B, C, S, S) in [0, 1] to features (B, dims), standardized over the training images.

    The features are the activations before the last ReLU and the linear classification head.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size, width, stride = config.image_size, 32, 1
        while -(-size // stride) > MAX_FEATURE_MAP:
            stride *= 2
        kernel = max(3, 2 * stride - 1)
        layers: list[nn.Module] = [nn.BatchNorm2d(config.channels, affine=False)]
        layers += _conv_bn_relu(config.channels, width, kernel, stride)
        size = -(-size // stride)
        while size > 4:
            layers += _conv_bn_relu(width, 2 * width, 3, 2)
            size, width = -(-size // 2), 2 * width
        layers += _conv_bn_relu(width, width, 3, 1)
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
        """Class logits (B, classes)."""
        scores: Tensor = self.head(F.relu(self.body(images)))
        return scores


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


def train(network: FeatureNetwork, images: Tensor, labels: Tensor | None, steps: int) -> None:
    """Trains the network to predict labels (N,), or rotations by multiples of 90 degrees if ``labels`` is None.

    Uses AdamW, a one-cycle learning rate and random shifts by up to an eighth of the image, with torch's global random
    number generator. The network is in eval mode afterwards.
    """
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    size = images.shape[-1]
    max_shift = size // 8
    batch = min(BATCH, len(images))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images))
        chosen, order = order[:batch].to(images.device), order[batch:]
        inputs = images[chosen]
        if labels is None:
            inputs, rotations = rotate_quarters(inputs)
        x, y = torch.randint(2 * max_shift + 1, (2,)).tolist()
        inputs = F.pad(inputs, (max_shift,) * 4, mode="replicate")[..., y : y + size, x : x + size]
        targets = rotations if labels is None else labels[chosen]
        loss = F.cross_entropy(network.logits(inputs), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def rotate_quarters(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates image i of (B, C, S, S) by 90 * (i % 4) degrees; returns the images and the number of rotations (B,)."""
    rotations = torch.arange(len(images), device=images.device) % 4
    rotated = images.clone()
    for k in range(4):
        rotated[k::4] = images[k::4].rot90(k, (2, 3))
    return rotated, rotations
