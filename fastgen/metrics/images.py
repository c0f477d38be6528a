"""Evaluation of generated images against held-out images in a feature space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.metrics.bootstrap import bootstrap_interval, bootstrap_sets
from fastgen.metrics.distances import (
    frechet_distance,
    kernel_distance,
    neighborhoods,
    resampled_frechet,
    resampled_kernel,
)
from fastgen.metrics.features import FeatureSpace
from fastgen.metrics.summary import Metric, proportion


@dataclass(frozen=True)
class _Distance:
    name: str
    function: Callable[[Tensor, Tensor], float]
    resampled: Callable[..., Tensor]
    needs_covariance: bool = False
    minimum: float = -math.inf


FRECHET = _Distance("Frechet distance", frechet_distance, resampled_frechet, needs_covariance=True, minimum=0.0)
FLOOR = dataclasses.replace(FRECHET, name="Frechet distance, real against real")
KERNEL = _Distance("kernel distance", kernel_distance, resampled_kernel)


def evaluate_images(
    real: Tensor,
    generated: Tensor,
    space: FeatureSpace,
    *,
    training: Tensor | None = None,
    k: int = 5,
    resamples: int = 200,
    seed: int = 0,
) -> list[Metric]:
    """Frechet and kernel distance, precision, recall, density and coverage, each with a 95% confidence interval.

    Intervals of the two distances are computed by ``bootstrap_sets``. Intervals of precision and density are over the
    generated images, intervals of recall and coverage over the real images, with fixed manifolds of the other set. They
    do not include the variance between training runs.

    Args:
        real: held-out images (N, C, S, S) in [0, 1].
        generated: generated images (M, C, S, S) in [0, 1].
        space: feature space.
        training: training images (T, C, S, S). Adds the Frechet distance between M of them and the held-out images, the
            value that a perfect generator would reach.
        k: number of nearest neighbors of precision, recall, density and coverage.
        resamples: number of bootstrap resamples of the two distances; 0 omits their intervals. 200 resamples take half
            a second for 1,000 images with 64 features, but are impractical for 2048 features.
        seed: random seed of the resampling and of the choice of training images.

    Returns:
        The metrics.

    Raises:
        ValueError: if images have different shapes, are not in [0, 1], or are too few: k + 1, or 10 with resampling.
    """
    features, others = space(real), space(generated)
    n = {"generated": len(others), "held-out": len(features)}
    metrics = [distance_metric(FRECHET, features, others, space, n, resamples, seed)]
    if training is not None:
        chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[: len(generated)]
        known = space(training[chosen.to(training.device)])
        floor_n = {"training": len(known), "held-out": len(features)}
        metrics.append(distance_metric(FLOOR, features, known, space, floor_n, resamples, seed))
    metrics.append(distance_metric(KERNEL, features, others, space, n, resamples, seed))
    manifolds = neighborhoods(features, others, k=k)
    interval = bootstrap_interval(manifolds.spheres, seed=seed)
    density = Metric("density", interval.estimate, interval.low, interval.high, space=space.name, n=n, note=f"k = {k}")
    members = {"precision": manifolds.precise, "recall": manifolds.recalled, "coverage": manifolds.covered}
    precision, recall, coverage = (
        proportion(name, hits, space=space.name, n=n, note=f"k = {k}") for name, hits in members.items()
    )
    return [*metrics, precision, recall, density, coverage]


def class_agreement(generated: Tensor, labels: Tensor, space: FeatureSpace) -> Metric:
    """Fraction of class-conditional samples that the classifier of the feature space assigns to their class.

    Args:
        generated: images (N, C, S, S) in [0, 1].
        labels: classes (N,) that the images were generated for.
        space: feature space trained on labels, see ``classifier_features``.

    Returns:
        The fraction with Wilson's interval.

    Raises:
        ValueError: if shapes do not match, or the space was not trained on labels.
    """
    if labels.shape != generated.shape[:1]:
        raise ValueError(f"labels: expected ({len(generated)},), one for each image, got {tuple(labels.shape)}")
    predictions = space.predict(generated)
    hits = (predictions == labels.to(predictions.device)).cpu()
    return proportion("class agreement", hits, space=space.name, n={"generated": len(generated)})


def distance_metric(
    distance: _Distance, real: Tensor, others: Tensor, space: FeatureSpace, n: dict[str, int], resamples: int, seed: int
) -> Metric:
    """Distance between features (N, D) and (M, D), without interval if ``resamples`` is 0."""
    note = ""
    if distance.needs_covariance and min(n.values()) <= space.dims:
        note = f"far too high: a covariance of {space.dims} features needs more images"
    if not resamples:
        return Metric(distance.name, distance.function(real, others), space=space.name, n=n, note=note)
    sizes = (len(real), len(others))
    interval = bootstrap_sets(
        lambda *counts: distance.resampled(real, others, *counts), sizes, resamples=resamples, seed=seed
    )
    low = max(interval.low, distance.minimum)
    return Metric(distance.name, interval.estimate, low, interval.high, space=space.name, n=n, note=note)
