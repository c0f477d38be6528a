"""Named feature spaces: what distances between sets of images are measured in.

A figure without the name of its space means nothing: Frechet distances in two spaces can't be compared. The two spaces
that are trained here are made from the data at hand, need no download, and are the same again for the same images,
seed and number of threads.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.metrics._network import FeatureNetwork, NetworkConfig, quarter_turns, train

BLOCK = 256  # images whose features are computed at once
HELD_OUT = 5  # one image in this many measures accuracy, where no others are given
FEWEST_IMAGES = 50


class FeatureSpace:
    """A network with a name.

    >>> space = FeatureSpace("pixels of 4x4 images", 16, nn.Flatten())
    >>> space(torch.rand(3, 1, 4, 4)).shape
    torch.Size([3, 16])

    Args:
        name: printed beside every figure.
        dims: D of the features.
        network: images (B, C, S, S) in [0, 1] -> (B, D); set to ``eval``.
        kind: "classifier", "rotations" or "inception", for those made below.
        config: of a network trained here.
        accuracy: its share of right answers on held-out images.
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
        """Moves the network to where features are to be computed; returns itself."""
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) float32, on the device of the network. Block by block; no gradients."""
        features = self._blocks(self.network, images)
        if features.shape != (len(images), self.dims):
            raise ValueError(f"network: expected features (B, {self.dims}), got {tuple(features.shape)}")
        return features

    def predict(self, images: Tensor) -> Tensor:
        """Classes (B,) int64; only where the space was trained on labels, else ValueError."""
        if self.kind != "classifier" or not isinstance(self.network, FeatureNetwork):
            raise ValueError(f"predict: expected a feature space trained on labels, got {self.name}")
        return self._blocks(self.network.logits, images).argmax(1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what goes into JSON, from which ``from_state`` makes the same space again."""
        if self.kind == "module":
            raise ValueError(f"state: expected a feature space made by fastgen.metrics, got {self.name}")
        config = None if self.config is None else dataclasses.asdict(self.config)
        meta = {"kind": self.kind, "name": self.name, "dims": self.dims, "accuracy": self.accuracy, "config": config}
        tensors = {} if self.kind == "inception" else self.network.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, meta

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FeatureSpace:
        """What ``state`` returned, perhaps read from files. Anything else: ValueError."""
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
            raise ValueError(f"state: expected that of a feature space, got one that fails: {reason}") from error
        return cls(name, config.dims, network, kind=kind, config=config, accuracy=accuracy)

    @torch.no_grad()
    def _blocks(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        _check_images("images", images)
        if self.config is not None:
            wanted = (self.config.channels, self.config.image_size, self.config.image_size)
            if tuple(images.shape[1:]) != wanted:
                raise ValueError(f"images: expected (B, {', '.join(map(str, wanted))}), got {tuple(images.shape)}")
        weights = next(self.network.parameters(), images)
        with torch.autocast(weights.device.type, enabled=False):
            return torch.cat([function(block.to(weights.device).float()) for block in images.split(BLOCK)])


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
    """A small convolutional network, trained to name the classes of the images. Its ``predict`` names them, too.

    Args:
        images: (N, C, S, S) in [0, 1], at least 50.
        labels: (N,) int64, from 0.
        held_out: images and labels to measure its accuracy on; default: every fifth of those given, then not trained
            on.
        data: what the images are, for the name.
        dims: of the features.
        seed: of weights and batches.
        steps: of training, 128 images each.
    """
    _check_images("images", images, FEWEST_IMAGES)
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
    """A small convolutional network, trained to tell by which quarter turn an image was rotated: needs no labels.

    Gidaris, Singh and Komodakis, "Unsupervised representation learning by predicting image rotations", 2018. Where
    its accuracy is near 25%, the images have no upright and its features little meaning. Arguments as of
    ``classifier_features``.
    """
    _check_images("images", images, FEWEST_IMAGES)
    if held_out is None:
        (images, _), (held_out, _) = _hold_out(images, images)
    _check_images("held_out", held_out)
    turned = quarter_turns(held_out.repeat_interleave(4, dim=0))
    return _trained("rotations", data, images, None, turned, dims, 4, seed, steps)


def inception_features() -> FeatureSpace:
    """Inception-v3 with torchvision's weights, where both are on this machine; nothing is downloaded.

    2048 features after the pooling, from images brought to 299x299 pixels, grey ones in three equal channels. Published
    Frechet distances use other weights of this network, so they can't be compared.

    Raises:
        ImportError: no torchvision. FileNotFoundError: no weights. ValueError: a file of weights that was changed.
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
    """Trains on classes, or quarter turns where there are no labels; names the space after what it then knows."""
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
        # Clones: tensors made in inference mode have no place in autograd.
        train(network, images.detach().clone().float(), None if labels is None else labels.clone(), steps)
    guesser = FeatureSpace("", dims, network, kind="classifier", config=config)
    features, guesses = guesser(images), guesser.predict(held_out[0])
    network.mean.copy_(features.mean(0))
    network.std.copy_(features.std(0).clamp(min=1e-6))
    accuracy = float((guesses == held_out[1].to(guesses.device)).double().mean())
    name = f"{kind}-{data}-{dims}d ({accuracy:.1%} held-out accuracy)"
    return FeatureSpace(name, dims, network, kind=kind, config=config, accuracy=accuracy)


def _hold_out(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same images for every seed; shuffled, as data may be sorted."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    rest, out = order[len(order) // HELD_OUT :], order[: len(order) // HELD_OUT]
    return (images[rest], labels[rest]), (images[out], labels[out])


def _check_images(name: str, images: Tensor, fewest: int = 1) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: expected images of floating point, got {got}")
    if images.ndim != 4 or images.shape[2] != images.shape[3] or not images.shape[1]:
        raise ValueError(f"{name}: expected images (B, C, S, S), got {tuple(images.shape)}")
    if len(images) < fewest:
        raise ValueError(f"{name}: expected at least {fewest} images, got {len(images)}")
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
