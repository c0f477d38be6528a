"""Features of torchvision's Inception-v3, if torchvision and the weights are available locally."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 299


class InceptionFeatures(nn.Module):
    """Maps images (B, C, S, S) in [0, 1] with C = 1 or 3 to features (B, 2048)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images: expected 1 or 3 channels, got {images.shape[1]}")
        images = images.expand(-1, 3, -1, -1)
        images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = self.network(2 * images - 1)
        return features


def load() -> InceptionFeatures:
    """See ``fastgen.metrics.inception_features``."""
    try:
        from torchvision.models import Inception_V3_Weights, inception_v3
    except ImportError as error:
        raise ImportError("inception_features needs torchvision, which is not installed") from error
    weights: Any = Inception_V3_Weights.IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected torchvision's weights of Inception-v3, got no file")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(file.stem.rpartition("-")[2]):  # the file name ends with a prefix of the digest
        raise ValueError(f"{file}: expected the weights that torchvision names, got a file of SHA-256 {digest}")
    network = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False)
    # weights_only: unpickle tensors only.
    network.load_state_dict(weights.get_state_dict(progress=False, weights_only=True))
    network.fc = nn.Identity()
    return InceptionFeatures(network.eval())
