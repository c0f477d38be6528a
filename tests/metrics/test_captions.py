"""Agreement of samples from captions with the held-out images of these captions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgen import metrics
from tests.metrics.samples import seeded


class Pixels:
    """A feature space of pixels."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def agreement(real: Tensor, generated: Tensor, captions: Tensor, resamples: int = 200) -> metrics.Metric:
    return metrics.caption_agreement(real, generated, captions, Pixels(), resamples=resamples)  # type: ignore[arg-type]


def images(n: int, seed: int) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=seeded(seed))


def test_the_images_themselves_agree_and_images_of_other_captions_do_not():
    real, captions = images(300, 0), torch.arange(300).unsqueeze(1)
    assert agreement(real, real, captions).value == 1
    by_chance = agreement(real, images(300, 1), captions)
    assert by_chance.low < 0.5 < by_chance.high
    assert by_chance.high - by_chance.low < 0.1
    assert agreement(real, torch.zeros_like(real), captions, 0).value == pytest.approx(0.5, abs=0.01)


def test_images_with_the_same_caption_are_not_compared():
    # Two captions. The sample of image 0 is nearer to image 1, which has its caption, and to image 2, which has not.
    real = torch.tensor([0.0, 0.5, 0.6, 1.0]).view(4, 1, 1, 1)
    generated = torch.tensor([0.55, 0.5, 0.6, 1.0]).view(4, 1, 1, 1)
    captions = torch.tensor([[1, 2], [1, 2], [1, 3], [1, 3]])
    # Of image 0: image 2 is nearer, 3 is nearer than 0, too (0.45 against 0.55): 0 of 2. The others: 2 of 2.
    assert agreement(real, generated, captions, 0).value == pytest.approx(3 / 4)


def test_bad_arguments_are_named():
    real = images(3, 0)
    with pytest.raises(ValueError, match=r"^generated: expected \(3, 1, 4, 4\) as real, got \(2, 1, 4, 4\)"):
        agreement(real, real[:2], torch.arange(3).unsqueeze(1))
    with pytest.raises(ValueError, match=r"^captions: expected \(3, T\), one for each image, got \(3,\)"):
        agreement(real, real, torch.arange(3))
    with pytest.raises(ValueError, match=r"^captions: expected at least two different ones"):
        agreement(real, real, torch.ones(3, 2, dtype=torch.int64))
