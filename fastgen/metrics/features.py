"""Named feature spaces for distances between sets of images.

Distances in different feature spaces are not comparable, so every metric is reported with the name of its space. The
classifier and rotation features are trained on the given images without any download, and are reproducible for the same
images, seed and number of threads.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.metrics._network import FeatureNetwork, NetworkConfig, rotate_quarters, train

BATCH_SIZE = 256  # images whose features are computed at once
HELD_OUT = 5  # every fifth image is held out to measure the accuracy, unless held-out images are given
MIN_IMAGES = 50


class FeatureSpace:
    """A feature extractor with a name.

    Args:
        name: name of the space, reported with every metric.
        dims: number of features D.
        network: module that maps images (B, C, S, S) in [0, 1] to features (B, D). It is set to eval mode.
        kind: "classifier", "rotations", "inception", or "module" for user-defined spaces.
        config: configuration of a trained feature network.
        accuracy: accuracy of a trained feature network on held-out images.

    Example:
        >>> space = FeatureSpace("pixels of 4x4 images", 16, nn.Flatten())
        >>> space(torch.rand(3, 1, 4, 4)).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        name: str,
        dims: int,
        network: nn.Module,
        *,
        kind: str = "module",
        config: NetworkConfig | None = None,
        accuracy: float | None = None,
    ) -> None:
        self.name = name
        self.dims = dims
        self.network = network.eval()
        self.kind = kind
        self.config = config
        self.accuracy = accuracy

    def __repr__(self) -> str:
        return f"FeatureSpace({self.name!r}, dims={self.dims})"

    def to(self, device: torch.device | str) -> FeatureSpace:
        """Moves the network to ``device`` and returns the feature space."""
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Computes features in batches, without gradients.

        Args:
            images: (B, C, S, S) in [0, 1].

        Returns:
            Features (B, D), float32, on the device of the network.

        Raises:
            TypeError: if images are not floating point.
            ValueError: if images have the wrong shape or range, or the network returns another shape.
        """
        features = self._in_batches(self.network, images)
        if features.shape != (len(images), self.dims):
            raise ValueError(f"network: expected features (B, {self.dims}), got {tuple(features.shape)}")
        return features

    def predict(self, images: Tensor) -> Tensor:
        """Predicts the classes of images.

        Args:
            images: (B, C, S, S) in [0, 1].

        Returns:
            Classes (B,), int64.

        Raises:
            ValueError: if the space was not trained on labels.
        """
        if self.kind != "classifier" or not isinstance(self.network, FeatureNetwork):
            raise ValueError(f"predict: expected a feature space trained on labels, got {self.name}")
        return self._in_batches(self.network.logits, images).argmax(1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the tensors and the JSON-serializable metadata for ``from_state``.

        Raises:
            ValueError: if the space is user-defined.
        """
        if self.kind == "module":
            raise ValueError(f"state: expected a feature space made by fastgen.metrics, got {self.name}")
        config = None if self.config is None else dataclasses.asdict(self.config)
        meta = {"kind": self.kind, "name": self.name, "dims": self.dims, "accuracy": self.accuracy, "config": config}
        tensors = {} if self.kind == "inception" else self.network.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, meta

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FeatureSpace:
        """Constructs a feature space from the return values of ``state``.

        Raises:
            ValueError: if tensors or metadata are invalid.
        """
        if meta.get("kind") == "inception":
            return inception_features()
        try:
            config = NetworkConfig(**meta["config"])
            if meta["kind"] not in ("classifier", "rotations"):
                raise ValueError(f"kind {meta['kind']!r}")
            with torch.random.fork_rng(devices=[]):
                network = FeatureNetwork(config).float()
            network.load_state_dict(dict(tensors))
            name, kind, accuracy = str(meta["name"]), str(meta["kind"]), float(meta["accuracy"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 200)
            raise ValueError(
                f"state: expected the state of a feature space, got one that fails to load: {reason}"
            ) from error
        return cls(name, config.dims, network, kind=kind, config=config, accuracy=accuracy)

    @torch.no_grad()
    def _in_batches(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        _check_images("images", images)
        if self.config is not None:
            expected = (self.config.channels, self.config.image_size, self.config.image_size)
            if tuple(images.shape[1:]) != expected:
                raise ValueError(f"images: expected (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        weights = next(self.network.parameters(), images)
        with torch.autocast(weights.device.type, enabled=False):
            return torch.cat([function(batch.to(weights.device).float()) for batch in images.split(BATCH_SIZE)])


def classifier_features(
    images: Tensor,
    labels: Tensor,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    data: str = "images",
    dims: int = 64,
    seed: int = 0,
    steps: int = 400,
) -> FeatureSpace:
    """Trains a small convolutional classifier and returns its feature space, which also has ``predict``.

    Args:
        images: training images (N, C, S, S) in [0, 1] with N >= 50.
        labels: classes (N,), int64, starting at 0.
        held_out: images and labels for measuring the accuracy. Default: a fifth of the training images, which are then
            not used for training.
        data: name of the data set, part of the name of the space.
        dims: number of features.
        seed: random seed of weights and batches.
        steps: number of training steps, with 128 images each.

    Returns:
        The feature space.

    Raises:
        TypeError: if images are not floating point, or labels are not int64.
        ValueError: if shapes or ranges are wrong, or there are fewer than 2 classes.
    """
    _check_images("images", images, MIN_IMAGES)
    _check_labels("labels", labels, images)
    labels = labels.to(images.device)
    if held_out is None:
        (images, labels), held_out = _hold_out(images, labels)
    _check_images("held_out", held_out[0])
    _check_labels("held_out", held_out[1], held_out[0])
    classes = int(labels.max()) + 1
    if not 2 <= classes <= len(images):
        raise ValueError(f"labels: expected from 2 classes to as many as images, {len(images)}, got {classes}")
    return _trained("classifier", data, images, labels, held_out, dims, classes, seed, steps)


def rotation_features(
    images: Tensor,
    *,
    held_out: Tensor | None = None,
    data: str = "images",
    dims: int = 64,
    seed: int = 0,
    steps: int = 400,
) -> FeatureSpace:
    """Trains a small convolutional network to predict rotations of images, and returns its feature space.

    Gidaris, Singh and Komodakis, "Unsupervised representation learning by predicting image rotations" (2018). No labels
    are required. If the accuracy is close to 25%, the images have no preferred orientation and the features are not
    meaningful.

    Args:
        images: training images (N, C, S, S) in [0, 1] with N >= 50.
        held_out: images for measuring the accuracy. Default: a fifth of the training images, which are then not used
            for training.
        data: name of the data set, part of the name of the space.
        dims: number of features.
        seed: random seed of weights and batches.
        steps: number of training steps, with 128 images each.

    Returns:
        The feature space.

    Raises:
        TypeError: if images are not floating point.
        ValueError: if shapes or ranges are wrong.
    """
    _check_images("images", images, MIN_IMAGES)
    if held_out is None:
        (images, _), (held_out, _) = _hold_out(images, images)
    _check_images("held_out", held_out)
    rotated = rotate_quarters(held_out.repeat_interleave(4, dim=0))
    return _trained("rotations", data, images, None, rotated, dims, 4, seed, steps)


def inception_features() -> FeatureSpace:
    """Feature space of Inception-v3 with torchvision's weights. Nothing is downloaded.

    The 2048 features after the global pooling, for images that are resized to 299x299 and, if grayscale, repeated to
    three channels. Published FID values use other weights of this network and are not comparable.

    Returns:
        The feature space.

    Raises:
        ImportError: if torchvision is not installed.
        FileNotFoundError: if the weights are not in torch.hub's cache.
        ValueError: if the checksum of the weights does not match.
    """
    from fastgen.metrics import _inception

    with torch.random.fork_rng(devices=[]):
        network = _inception.load()
    return FeatureSpace("inception-v3 (torchvision)", 2048, network, kind="inception")


def _trained(
    kind: str,
    data: str,
    images: Tensor,
    labels: Tensor | None,
    held_out: tuple[Tensor, Tensor],
    dims: int,
    classes: int,
    seed: int,
    steps: int,
) -> FeatureSpace:
    """Trains on labels, or rotations if ``labels`` is None, and measures the accuracy on held-out images."""
    if dims < 1 or steps < 2:
        raise ValueError(f"dims, steps: expected at least 1 and 2, got {dims} and {steps}")
    config = NetworkConfig(images.shape[1], images.shape[2], dims, classes)
    if held_out[0].shape[1:] != images.shape[1:]:
        raise ValueError(f"held_out: expected images {tuple(images.shape[1:])}, got {tuple(held_out[0].shape[1:])}")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(seed)
        network = FeatureNetwork(config).float().to(images.device)
        # Clone: inference tensors cannot be used in autograd.
        train(network, images.detach().clone().float(), None if labels is None else labels.clone(), steps)
    classifier = FeatureSpace("", dims, network, kind="classifier", config=config)
    features, predictions = classifier(images), classifier.predict(held_out[0])
    network.mean.copy_(features.mean(0))
    network.std.copy_(features.std(0).clamp(min=1e-6))
    accuracy = float((predictions == held_out[1].to(predictions.device)).double().mean())
    name = f"{kind}-{data}-{dims}d ({accuracy:.1%} held-out accuracy)"
    return FeatureSpace(name, dims, network, kind=kind, config=config, accuracy=accuracy)


def _hold_out(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Random split that is the same for every seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    rest, out = order[len(order) // HELD_OUT :], order[: len(order) // HELD_OUT]
    return (images[rest], labels[rest]), (images[out], labels[out])


def _check_images(name: str, images: Tensor, minimum: int = 1) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: expected images of floating point, got {got}")
    if images.ndim != 4 or images.shape[2] != images.shape[3] or not images.shape[1]:
        raise ValueError(f"{name}: expected images (B, C, S, S), got {tuple(images.shape)}")
    if len(images) < minimum:
        raise ValueError(f"{name}: expected at least {minimum} images, got {len(images)}")
    low, high = (float(end) for end in images.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name}: expected pixels in [0, 1], got {low:.4g} to {high:.4g}")


def _check_labels(name: str, labels: Tensor, images: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: expected labels of int64, got {got}")
    if labels.shape != images.shape[:1] or int(labels.min()) < 0:
        raise ValueError(
            f"{name}: expected labels ({len(images)},) from 0, got {tuple(labels.shape)} from {int(labels.min())}"
        )
