"""Errors of metrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastgen import metrics

pytest.importorskip("scipy")


IMAGES, LABELS = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
PIXELS = metrics.FeatureSpace("pixels", 36, nn.Flatten())

ERRORS = {
    "dims": (lambda: metrics.bits_per_dim(1.0, 0), ValueError, "dims: expected a whole number of at least 1, got 0"),
    "bound's shape": (
        lambda: metrics.importance_weighted_bound(torch.zeros(3)),
        ValueError,
        r"log_weights: expected shape \(K, B\), got \(3,\)",
    ),
    "bound's rows": (
        lambda: metrics.importance_weighted_bound(iter([torch.zeros(3), torch.zeros(2)])),
        ValueError,
        r"log_weights: expected shape \(3,\) for each sample, got \(2,\)",
    ),
    "bound of NaN": (
        lambda: metrics.importance_weighted_bound(torch.tensor([[0.0, math.nan]])),
        ValueError,
        "got 1 of 2 NaN",
    ),
    "bound of nothing": (lambda: metrics.importance_weighted_bound([]), ValueError, "at least one sample, got none"),
    "bound of integers": (
        lambda: metrics.importance_weighted_bound(torch.zeros(2, 2, dtype=torch.int64)),
        TypeError,
        "floating point, got torch.int64",
    ),
    "one value": (lambda: metrics.bootstrap_interval(torch.zeros(1)), ValueError, r"at least 2, got \[1\]"),
    "values' shape": (lambda: metrics.bootstrap_interval(torch.zeros(2, 2)), ValueError, r"\(N,\), got \(2, 2\)"),
    "values of NaN": (
        lambda: metrics.summarize({"elbo": torch.tensor([0.0, math.inf])}),
        ValueError,
        "elbo: values: expected finite numbers, got 1 of 2",
    ),
    "confidence": (lambda: metrics.bootstrap_interval(torch.rand(9), confidence=95), ValueError, "confidence: .*95"),
    "resamples": (lambda: metrics.bootstrap_interval(torch.rand(9), resamples=0), ValueError, "resamples: .*got 0"),
    "small sets": (
        lambda: metrics.bootstrap_sets(lambda a, b: a.sum(1), (9, 20)),
        ValueError,
        r"sizes: expected at least 10 items in each set, got \(9, 20\)",
    ),
    "hits": (lambda: metrics.proportion_interval(torch.zeros(3)), ValueError, "hits: expected a bool tensor"),
    "features' shape": (
        lambda: metrics.frechet_distance(torch.zeros(3), torch.zeros(3, 2)),
        ValueError,
        r"real: expected features \(N, D\), got \(3,\)",
    ),
    "features' dims": (
        lambda: metrics.kernel_distance(torch.zeros(3, 2), torch.zeros(3, 4)),
        ValueError,
        "generated: expected 2 dims on cpu, as in real, got 4 dims on cpu",
    ),
    "features of NaN": (
        lambda: metrics.frechet_distance(torch.zeros(3, 2), torch.full((3, 2), math.nan)),
        ValueError,
        "generated: expected finite features, got 3 of 3 items",
    ),
    "one item": (
        lambda: metrics.frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2)),
        ValueError,
        "real: expected at least 2 items, got 1",
    ),
    "few neighbors": (
        lambda: metrics.neighborhoods(torch.zeros(9, 2), torch.zeros(5, 2)),
        ValueError,
        "generated: expected at least 6 items, got 5",
    ),
    "k": (lambda: metrics.neighborhoods(torch.zeros(9, 2), torch.zeros(9, 2), k=0), ValueError, "k: .*got 0"),
    "few images": (
        lambda: metrics.evaluate_images(IMAGES[:5], IMAGES, PIXELS),
        ValueError,
        r"expected at least 10 items in each set, got \(5, 50\)",
    ),
    "pixels": (lambda: PIXELS(IMAGES * 255), ValueError, r"images: expected pixels in \[0, 1\], got "),
    "integer pixels": (lambda: PIXELS((IMAGES * 255).byte()), TypeError, "floating point, got torch.uint8"),
    "images' shape": (lambda: PIXELS(IMAGES[..., :4]), ValueError, r"\(B, C, S, S\), got \(50, 1, 6, 4\)"),
    "no classes": (
        lambda: metrics.classifier_features(IMAGES, LABELS * 0),
        ValueError,
        "labels: expected from 2 classes .*got 1",
    ),
    "labels' type": (
        lambda: metrics.classifier_features(IMAGES, LABELS.float()),
        TypeError,
        "int64, got torch.float32",
    ),
    "labels' length": (
        lambda: metrics.classifier_features(IMAGES, LABELS[:40]),
        ValueError,
        r"labels: expected labels \(50,\) from 0, got \(40,\)",
    ),
    "held out": (
        lambda: metrics.rotation_features(IMAGES, held_out=IMAGES[..., :5, :5]),
        ValueError,
        r"held_out: expected images \(1, 6, 6\), got \(1, 5, 5\)",
    ),
    "images to train on": (
        lambda: metrics.rotation_features(IMAGES[:49]),
        ValueError,
        "images: expected at least 50 images, got 49",
    ),
    "state of others": (lambda: PIXELS.state(), ValueError, "state: expected a feature space made by fastgen.metrics"),
    "state of another": (
        lambda: metrics.FeatureSpace.from_state(
            {"mean": torch.zeros(2)},
            {
                "kind": "classifier",
                "config": {"channels": 1, "image_size": 8, "dims": 3, "classes": 2},
                "name": "",
                "accuracy": 1,
            },
        ),
        ValueError,
        "got one that fails to load: Error",
    ),
    "network": (
        lambda: metrics.FeatureSpace("pixels", 35, nn.Flatten())(IMAGES),
        ValueError,
        r"network: expected features \(B, 35\), got \(50, 36\)",
    ),
    "steps": (
        lambda: metrics.rotation_features(IMAGES, steps=0),
        ValueError,
        "expected at least 1 and 2, got 64 and 0",
    ),
    "state of nothing": (
        lambda: metrics.FeatureSpace.from_state({}, {"kind": "classifier"}),
        ValueError,
        "state: expected the state of a feature space",
    ),
    "agreement's labels": (
        lambda: metrics.class_agreement(IMAGES, LABELS[:3], PIXELS),
        ValueError,
        r"labels: expected \(50,\), one for each image, got \(3,\)",
    ),
    "tokens": (
        lambda: metrics.summarize({"nll": torch.rand(3)}, tokens=0),
        ValueError,
        "tokens: expected at least 1 in each item, got 0",
    ),
    "no likelihood": (
        lambda: metrics.summarize({"error": torch.rand(3)}, dims=4),
        ValueError,
        r"expected iwae, elbo or nll .*got \['error'\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_arguments_raise_single_line_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
