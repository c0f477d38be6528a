"""Nearest training images, and the share of samples that are closer to the training data than held-out images."""

from __future__ import annotations

import pytest
import torch

from fastgen import metrics
from tests.metrics.samples import seeded


def images(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 2, 5, 4, generator=seeded(seed))


def test_the_nearest_training_image_is_that_of_all_pairs():
    made, training = images(30, 0), images(300, 1)
    indices, found = metrics.nearest_training(made, training)
    pairs = (made[:, None] - training).double().square().flatten(2).mean(2).sqrt()
    assert torch.equal(indices, pairs.argmin(1))
    torch.testing.assert_close(found, pairs.min(1).values)


def test_copies_are_closer_than_held_out_images_and_images_of_the_same_distribution_are_not():
    held_out, training = images(200, 2), images(400, 3)
    share = metrics.closer_than_held_out(held_out, images(200, 4), training)
    assert share.low < 0.5 < share.high
    assert 0.4 < share.value < 0.6
    copied = (training[:200] + 0.01 * images(200, 5)).clamp(0, 1)
    assert metrics.closer_than_held_out(held_out, copied, training).value == 1
    assert metrics.closer_than_held_out(held_out, held_out, training, resamples=0).value == 0.5
    assert metrics.closer_than_held_out(held_out, images(50, 6) * 0 + 4, training).value == 0


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"images: expected \(2, 5, 4\) as training, got \(2, 5, 3\)"):
        metrics.nearest_training(images(2, 0)[..., :3], images(3, 1))
    with pytest.raises(ValueError, match=r"training: expected images \(N, C, H, W\), got \(0, 2, 5, 4\)"):
        metrics.nearest_training(images(2, 0), images(3, 1)[:0])
