"""Sets of generated images against held-out ones, in a feature space."""

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
    neighbourhoods,
    resampled_frechet,
    resampled_kernel,
)
from fastgen.metrics.features import FeatureSpace
from fastgen.metrics.figures import Figure, share


@dataclass(frozen=True)
class _Distance:
    name: str
    of_sets: Callable[[Tensor, Tensor], float]
    of_resampled: Callable[..., Tensor]
    needs_covariance: bool = False
    least: float = -math.inf


FRECHET = _Distance("Frechet distance", frechet_distance, resampled_frechet, needs_covariance=True, least=0.0)
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
) -> list[Figure]:
    """Frechet and kernel distance, precision, recall, density and coverage, each with a 95% interval.

    The intervals of the two distances are over other sets of the same sizes (``bootstrap_sets``). Those of precision
    and density are over other generated images, those of recall and coverage over other real ones, with the
    neighbourhoods of the other set as they are. None of them knows of other trainings of the model.

    Args:
        real: (N, C, S, S) in [0, 1], held out.
        generated: (M, C, S, S) in [0, 1].
        space: what the distances are measured in.
        training: (T, C, S, S), real images the model was trained on: adds their own Frechet distance from the held-out
            ones, as many of them as were generated if there are. A generator whose distance is near it can't be told
            from the data by this space.
        k: neighbours that make a neighbourhood.
        resamples: of the two distances; 0 leaves their intervals out. 200 take half a second for 64 features of 1,000
            images, and far too long for 2048 features.
        seed: of the resampling, and of the choice among the training images.

    Raises:
        ValueError: images of another shape, out of [0, 1], or too few: at least k + 1, and 10 to resample.
    """
    features, others = space(real), space(generated)
    n = {"generated": len(others), "held-out": len(features)}
    figures = [distance_figure(FRECHET, features, others, space, n, resamples, seed)]
    if training is not None:
        chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[: len(generated)]
        known = space(training[chosen.to(training.device)])
        floor_n = {"training": len(known), "held-out": len(features)}
        figures.append(distance_figure(FLOOR, features, known, space, floor_n, resamples, seed))
    figures.append(distance_figure(KERNEL, features, others, space, n, resamples, seed))
    found = neighbourhoods(features, others, k=k)
    spread = bootstrap_interval(found.spheres, seed=seed)
    density = Figure("density", spread.estimate, spread.low, spread.high, space=space.name, n=n, note=f"k = {k}")
    shares = [
        share(name, hits, space=space.name, n=n, note=f"k = {k}")
        for name, hits in (("precision", found.precise), ("recall", found.recalled), ("coverage", found.covered))
    ]
    return [*figures, *shares[:2], density, shares[2]]


def class_agreement(generated: Tensor, labels: Tensor, space: FeatureSpace) -> Figure:
    """The share of images (N, C, S, S) that the space's classifier takes for the class (N,) they were generated as."""
    if labels.shape != generated.shape[:1]:
        raise ValueError(f"labels: expected ({len(generated)},), one for each image, got {tuple(labels.shape)}")
    guesses = space.predict(generated)
    hits = (guesses == labels.to(guesses.device)).cpu()
    return share("class agreement", hits, space=space.name, n={"generated": len(generated)})


def distance_figure(
    distance: _Distance, real: Tensor, others: Tensor, space: FeatureSpace, n: dict[str, int], resamples: int, seed: int
) -> Figure:
    """One of the distances above between features (N, D) and (M, D); ``resamples`` 0: without its interval."""
    note = ""
    if distance.needs_covariance and min(n.values()) <= space.dims:
        note = f"far too high: a covariance of {space.dims} features needs more images"
    if not resamples:
        return Figure(distance.name, distance.of_sets(real, others), space=space.name, n=n, note=note)
    sizes = (len(real), len(others))
    found = bootstrap_sets(
        lambda *counts: distance.of_resampled(real, others, *counts), sizes, resamples=resamples, seed=seed
    )
    return Figure(
        distance.name, found.estimate, max(found.low, distance.least), found.high, space=space.name, n=n, note=note
    )
