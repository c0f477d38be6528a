"""Whether generated images copy training images: nearest training images in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.metrics.bootstrap import bootstrap_interval
from fastgen.metrics.distances import nearest
from fastgen.metrics.summary import Metric


def nearest_training(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """The training image nearest to each image.

    Args:
        images: images (N, C, H, W) in [0, 1].
        training: training images (T, C, H, W) in [0, 1].

    Returns:
        indices (N,) int64 of training images, and distances (N,) float64: the root mean square of the differences of
        pixels, from 0 to 1.

    Raises:
        ValueError: if shapes do not match, or there are no images.

    Example:
        >>> training = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        >>> nearest_training(torch.full((1, 1, 1, 1), 0.75), training)
        (tensor([1]), tensor([0.2500], dtype=torch.float64))
    """
    for name, stack in (("images", images), ("training", training)):
        if stack.ndim != 4 or not len(stack):
            raise ValueError(f"{name}: expected images (N, C, H, W), got {tuple(stack.shape)}")
    if images.shape[1:] != training.shape[1:]:
        raise ValueError(f"images: expected {tuple(training.shape[1:])} as training, got {tuple(images.shape[1:])}")
    indices = nearest(images.flatten(1), training.flatten(1))
    rows = zip(images.split(256), training.to(images.device)[indices].split(256), strict=True)
    distances = [(a.double() - b.double()).square().flatten(1).mean(1).sqrt() for a, b in rows]
    return indices.cpu(), torch.cat(distances).cpu()


def closer_than_held_out(
    held_out: Tensor, generated: Tensor, training: Tensor, *, resamples: int = 1000, seed: int = 0
) -> Metric:
    """Share of pairs of a generated and a held-out image in which the generated one is closer to the training data.

    0.5 if generated images are as far from the training data as held-out images, near 1 if they are copies of training
    images, and also above 0.5 if they are blurred or too much alike. It is the statistic of the Mann-Whitney test that
    Meehan et al. propose ("A non-parametric test to detect data-copying in generative models", 2020), over the whole
    space instead of cells, with distances of pixels (``nearest_training``). The interval is over generated images.

    Args:
        held_out: held-out images (N, C, H, W) in [0, 1].
        generated: generated images (M, C, H, W) in [0, 1], M > 1.
        training: training images (T, C, H, W) in [0, 1].
        resamples: bootstrap resamples of the interval; 0: no interval.
        seed: random seed of the resampling.

    Raises:
        ValueError: as ``nearest_training``.
    """
    real, made = (nearest_training(images, training)[1] for images in (held_out, generated))
    real = real.sort().values
    farther = len(real) - torch.searchsorted(real, made, right=True)
    equal = torch.searchsorted(real, made, right=True) - torch.searchsorted(real, made)
    wins = (farther + equal / 2).double() / len(real)
    name, n = "closer to training data than held-out images", {"generated": len(made)}
    note = "distances of pixels; 0.5: as far as held-out images"
    if not resamples:
        return Metric(name, float(wins.mean()), n=n, note=note)
    interval = bootstrap_interval(wins, resamples=resamples, seed=seed)
    return Metric(name, interval.estimate, interval.low, interval.high, n=n, note=note)
