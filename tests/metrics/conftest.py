"""Digits and a feature space trained on them."""

from __future__ import annotations

import pytest
import torch

from fastgen import metrics
from tests.metrics.samples import seeded


@pytest.fixture(scope="session")
def digits():
    """Images (N, 1, 8, 8) and labels: the first 1400 to train on, the rest held out."""
    load = pytest.importorskip("sklearn.datasets").load_digits
    loaded = load()
    order = torch.randperm(1797, generator=seeded())
    return torch.from_numpy(loaded.images).float()[order, None] / 16, torch.from_numpy(loaded.target).long()[order]


@pytest.fixture(scope="session")
def space(digits):
    images, labels = digits
    held_out = images[1400:], labels[1400:]
    return metrics.classifier_features(images[:1400], labels[:1400], held_out=held_out, data="digits", steps=120)
