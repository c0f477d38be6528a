"""Evaluation of image-to-image translation, paired and unpaired.

Each metric is also computed for the input images, as a baseline without translation.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.metrics.bootstrap import Interval, bootstrap_interval
from fastgen.metrics.features import FeatureSpace
from fastgen.metrics.images import FLOOR, FRECHET, class_agreement, distance_metric
from fastgen.metrics.summary import Metric

WINDOW, SIGMA = 11, 1.5  # window size of the structural similarity and standard deviation of its Gaussian, in pixels
C1, C2 = 0.01**2, 0.03**2  # constants of the structural similarity for pixels in [0, 1]
MIN_SQUARED_ERROR = 1e-12  # limits the peak signal-to-noise ratio to 120 dB


def evaluate_domains(
    real: Tensor,
    translated: Tensor,
    before: Tensor,
    space: FeatureSpace,
    *,
    name: str,
    training: Tensor,
    label: int | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> list[Metric]:
    """Evaluates unpaired image translation by Frechet distances to held-out images of the target domain.

    Distances are computed for the translated images, for the images before translation (a baseline), and for training
    images of the target domain (the value that a perfect translation would reach).

    Args:
        real: held-out images (N, C, S, S) of the target domain, in [0, 1].
        translated: translated images (M, C, S, S).
        before: images (M, C, S, S) of the source domain that were translated.
        space: feature space.
        name: name of the direction, part of the names of the metrics.
        training: training images (T, C, S, S) of the target domain, of which M are used.
        label: class of the target domain. If the space is a classifier, adds the fraction of images that it assigns to
            this class.
        resamples: number of bootstrap resamples; 0 omits the intervals.
        seed: random seed of the resampling and of the choice of training images.

    Returns:
        The metrics.

    Raises:
        ValueError: see ``evaluate_images``.
    """
    features = space(real)
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[: len(translated)]
    sets = {
        f"{FRECHET.name}, {name}": (FRECHET, "translated", translated),
        f"{FRECHET.name}, {name}, not translated": (FRECHET, "images", before),
        f"{FLOOR.name}, {name}": (FLOOR, "training", training[chosen.to(training.device)]),
    }
    metrics = []
    for title, (distance, what, images) in sets.items():
        n = {what: len(images), "held-out": len(features)}
        metric = distance_metric(distance, features, space(images), space, n, resamples, seed)
        metrics.append(dataclasses.replace(metric, name=title))
    if label is not None and space.kind == "classifier":
        for what, images in (("", translated), (", not translated", before)):
            metric = class_agreement(images, torch.full((len(images),), label), space)
            metrics.append(
                dataclasses.replace(metric, name=f"class agreement, {name}{what}", n={"images": len(images)})
            )
    return metrics


def evaluate_pairs(
    outputs: Tensor,
    targets: Tensor,
    inputs: Tensor,
    space: FeatureSpace | None = None,
    *,
    training: Tensor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> list[Metric]:
    """Evaluates paired image translation by absolute error, peak signal-to-noise ratio and structural similarity.

    The metrics are also computed for the inputs (a baseline), which are converted to grayscale if their number of
    channels differs from the targets.

    Args:
        outputs: translated images (N, C, S, S) in [0, 1].
        targets: target images (N, C, S, S) in [0, 1].
        inputs: input images (N, C_in, S, S) in [0, 1].
        space: feature space. With ``training``, adds Frechet distances, see ``evaluate_domains``.
        training: target images (T, C, S, S) of the training set.
        resamples: number of bootstrap resamples of Frechet distances; 0 omits their intervals.
        seed: random seed of the resampling.

    Returns:
        The metrics.

    Raises:
        ValueError: if outputs and targets have different shapes, or inputs another number of images or size.
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs: expected the shape of targets {tuple(targets.shape)}, got {tuple(outputs.shape)}")
    if inputs.shape[:1] + inputs.shape[2:] != targets.shape[:1] + targets.shape[2:]:
        raise ValueError(
            f"inputs: expected as many images as targets, of their size, {tuple(targets.shape)} with any channels, got"
            f" {tuple(inputs.shape)}"
        )
    baseline = inputs if inputs.size(1) == targets.size(1) else inputs.mean(1, keepdim=True).expand_as(targets)
    metrics = []
    for images, what in ((outputs, ""), (baseline, ", input as it is")):
        n = {"held-out items": len(images)}
        error = (images - targets).flatten(1).double()
        columns = {
            "absolute error": (bootstrap_interval(error.abs().mean(1), seed=seed), ""),
            "peak signal-to-noise ratio": (bootstrap_interval(error.square().mean(1), _decibels, seed=seed), "dB"),
            "structural similarity": (bootstrap_interval(structural_similarity(images, targets), seed=seed), ""),
        }
        metrics += [_metric(name + what, interval, unit, n) for name, (interval, unit) in columns.items()]
    if space is not None and training is not None:
        metrics += evaluate_domains(
            targets, outputs, baseline, space, name="targets", training=training, resamples=resamples, seed=seed
        )
    return metrics


def structural_similarity(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (SSIM) of pairs of images.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): means, variances and
    covariance are computed with a Gaussian window of 11 pixels (S, if the images are smaller) for each channel.

    Args:
        images: (N, C, S, S) in [0, 1].
        others: images to compare with, of the same shape.

    Returns:
        Similarities (N,), float64; 1 for equal images.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> images = torch.rand(2, 3, 16, 16)
        >>> bool((structural_similarity(images, images) > 0.999).all())
        True
    """
    if images.shape != others.shape:
        raise ValueError(f"others: expected the shape of images {tuple(images.shape)}, got {tuple(others.shape)}")
    size = min(WINDOW, images.size(2), images.size(3))
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) ** 2) / (2 * SIGMA**2))
    window = torch.outer(line, line)[None, None].to(images.device) / line.sum() ** 2

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window)

    a, b = images.double(), others.double()
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return (luminance * structure).view(len(images), -1).mean(1)


def _decibels(squared_error: Tensor) -> Tensor:
    return -10 * squared_error.mean(-1).clamp(min=MIN_SQUARED_ERROR).log10()


def _metric(name: str, interval: Interval, unit: str, n: dict[str, int]) -> Metric:
    return Metric(name, interval.estimate, interval.low, interval.high, unit, n=n)
