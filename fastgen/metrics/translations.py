"""Images made from other images, against those that they should be, or should be like.

Each figure stands beside that of the images as they were before: what doing nothing would have given.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.metrics.bootstrap import Interval, bootstrap_interval
from fastgen.metrics.features import FeatureSpace
from fastgen.metrics.figures import Figure
from fastgen.metrics.images import FLOOR, FRECHET, class_agreement, distance_figure

WINDOW, SIGMA = 11, 1.5  # pixels of the structural similarity's window, and of its Gaussian
STABLE = (0.01**2, 0.03**2)  # its constants, for pixels from 0 to 1
LEAST_ERROR = 1e-12  # of a peak signal-to-noise ratio: 120 dB


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
) -> list[Figure]:
    """Frechet distances from a domain's held-out images: of those translated into it, before and after, and the floor.

    Args:
        real: (N, C, S, S) in [0, 1], held-out images of the domain.
        translated: (M, C, S, S), of the other domain's held-out images ``before`` (M, C, S, S).
        name: of the direction, for the lines.
        training: (T, C, S, S) of the domain: M of them are compared, too.
        label: the domain's class, where the space is a classifier: adds the share that it takes for the domain's.
        resamples: of the intervals; 0 leaves them out.
    """
    features = space(real)
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[: len(translated)]
    sets = {
        f"{FRECHET.name}, {name}": (FRECHET, "translated", translated),
        f"{FRECHET.name}, {name}, not translated": (FRECHET, "images", before),
        f"{FLOOR.name}, {name}": (FLOOR, "training", training[chosen.to(training.device)]),
    }
    figures = []
    for title, (distance, what, images) in sets.items():
        n = {what: len(images), "held-out": len(features)}
        figure = distance_figure(distance, features, space(images), space, n, resamples, seed)
        figures.append(dataclasses.replace(figure, name=title))
    if label is not None and space.kind == "classifier":
        for what, images in (("", translated), (", not translated", before)):
            figure = class_agreement(images, torch.full((len(images),), label), space)
            figures.append(
                dataclasses.replace(figure, name=f"class agreement, {name}{what}", n={"images": len(images)})
            )
    return figures


def evaluate_pairs(
    outputs: Tensor,
    targets: Tensor,
    inputs: Tensor,
    space: FeatureSpace | None = None,
    *,
    training: Tensor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> list[Figure]:
    """Absolute error, peak signal-to-noise ratio and structural similarity of outputs, and of the inputs as they are.

    Inputs of another number of channels are made grey. With a ``space`` also Frechet distances, as in
    ``evaluate_domains``.

    Args:
        outputs, targets: (N, C, S, S) in [0, 1]. inputs: (N, Cin, S, S). training: (T, C, S, S), targets.

    Raises:
        ValueError: outputs and targets of different shapes, inputs of another number or size.
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs: expected the shape of targets {tuple(targets.shape)}, got {tuple(outputs.shape)}")
    if inputs.shape[:1] + inputs.shape[2:] != targets.shape[:1] + targets.shape[2:]:
        raise ValueError(
            f"inputs: expected as many images as targets, of their size, {tuple(targets.shape)} with any channels, got"
            f" {tuple(inputs.shape)}"
        )
    plain = inputs if inputs.size(1) == targets.size(1) else inputs.mean(1, keepdim=True).expand_as(targets)
    figures = []
    for images, what in ((outputs, ""), (plain, ", input as it is")):
        n = {"held-out items": len(images)}
        error = (images - targets).flatten(1).double()
        columns = {
            "absolute error": (bootstrap_interval(error.abs().mean(1), seed=seed), ""),
            "peak signal-to-noise ratio": (bootstrap_interval(error.square().mean(1), _decibels, seed=seed), "dB"),
            "structural similarity": (bootstrap_interval(structural_similarity(images, targets), seed=seed), ""),
        }
        figures += [_figure(name + what, found, unit, n) for name, (found, unit) in columns.items()]
    if space is not None and training is not None:
        figures += evaluate_domains(
            targets, outputs, plain, space, name="targets", training=training, resamples=resamples, seed=seed
        )
    return figures


def structural_similarity(images: Tensor, others: Tensor) -> Tensor:
    """(N,) of images (N, C, S, S) in [0, 1]: 1 for equal ones.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): means, variances and
    covariance under a Gaussian window of 11 pixels (of S, if that is less), each channel by itself.
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
    light = (2 * mean_a * mean_b + STABLE[0]) / (mean_a**2 + mean_b**2 + STABLE[0])
    structure = (2 * covariance + STABLE[1]) / (var_a + var_b + STABLE[1])
    return (light * structure).view(len(images), -1).mean(1)


def _decibels(squared_error: Tensor) -> Tensor:
    return -10 * squared_error.mean(-1).clamp(min=LEAST_ERROR).log10()


def _figure(name: str, found: Interval, unit: str, n: dict[str, int]) -> Figure:
    return Figure(name, found.estimate, found.low, found.high, unit, n=n)
