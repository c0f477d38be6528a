"""Evaluation of images, summaries of likelihoods, formatting of metrics, docstring examples."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from fastgen import metrics
from fastgen.metrics import bootstrap, distances, features, likelihood, sounds, summary, translations
from tests.metrics.samples import seeded

pytest.importorskip("scipy")


MODULES = [bootstrap, distances, features, likelihood, sounds, summary, translations]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


def test_evaluate_images_ranks_degraded_samples_and_reports_the_space(space, digits):
    images, labels = digits
    real, training = images[1400:], images[:1400]
    noisy = (training[:700] + 0.3 * torch.randn(700, 1, 8, 8, generator=seeded())).clamp(0, 1)
    half = training[labels[:1400] < 5]
    found = {
        name: {
            one.name: one for one in metrics.evaluate_images(real, generated, space, training=training, resamples=60)
        }
        for name, generated in (("real", training[:700]), ("noisy", noisy), ("half", half))
    }
    floor = found["noisy"]["Frechet distance, real against real"]
    assert floor.n == {"training": 700, "held-out": 397}
    assert floor.high < found["noisy"]["Frechet distance"].low
    assert found["real"]["Frechet distance"].high < found["noisy"]["Frechet distance"].low
    assert found["real"]["kernel distance"].high < found["noisy"]["kernel distance"].low
    assert found["noisy"]["precision"].high < found["real"]["precision"].low
    assert found["noisy"]["density"].high < found["real"]["density"].low
    for name in ("recall", "coverage"):
        assert found["half"][name].high < found["real"][name].low - 0.1
    assert found["half"]["precision"].value > found["real"]["precision"].value - 0.05
    for one in found["noisy"].values():
        assert one.low <= one.value <= one.high
        assert space.name in str(one)
        assert "against 397 held-out" in str(one)


def test_evaluate_images_is_reproducible_and_intervals_are_optional(space, digits):
    images = digits[0]
    first, again, other, bare = (
        metrics.evaluate_images(images[1500:], images[:200], space, training=images[200:1400], **options)
        for options in ({"resamples": 20}, {"resamples": 20}, {"resamples": 20, "seed": 1}, {"resamples": 0})
    )
    assert first == again
    assert first != other
    assert [one.value for one in bare] == pytest.approx([one.value for one in first])
    assert bare[0].low is None
    assert "[" not in str(bare[0])


def test_frechet_interval_is_nonnegative(space, digits):
    found = metrics.evaluate_images(digits[0][:100], digits[0][:100], space, resamples=20)[0]
    assert found.value == pytest.approx(0, abs=1e-9)
    assert found.low == 0


def test_too_few_images_for_the_covariance_are_noted(space, digits):
    images = digits[0]
    found = metrics.evaluate_images(images[:64], images[100:200], space, resamples=0)
    assert [bool("covariance of 64 features needs more images" in one.note) for one in found] == [True] + 5 * [False]


def test_class_agreement(space, digits):
    images, labels = digits
    wrong = labels[1400:].clone()
    wrong[:100] = (wrong[:100] + 1) % 10
    right = metrics.class_agreement(images[1400:], labels[1400:], space)
    assert right.value == pytest.approx(space.accuracy)
    assert metrics.class_agreement(images[1400:], wrong, space).value < right.value - 0.2
    assert space.name in str(right)


def test_summarize_reports_likelihood_units():
    nats = 64 * math.log(2) * torch.tensor([1.0, 2.0, 3.0])
    found = {one.name: one for one in metrics.summarize({"elbo": -nats, "nll": nats / 2, "error": nats}, dims=64)}
    assert found["ELBO"].value == pytest.approx(-128 * math.log(2))
    assert found["error"].unit == ""
    assert found["bits per dimension"].value == pytest.approx(2)  # of the bound, not of the reconstruction term
    assert "at most" in found["bits per dimension"].note

    lines = metrics.summarize({"nll": torch.tensor([10.0, 30.0]), "tokens": torch.tensor([10, 10])})
    assert [one.name for one in lines] == ["negative log-likelihood", "nats per token", "perplexity"]
    assert [one.value for one in lines[1:]] == pytest.approx([2, math.exp(2)])
    assert lines[2].high == pytest.approx(math.exp(lines[1].high))
    assert str(lines[1]).endswith("nats/token  20 tokens of 2 held-out items")
    values = {"nll": [10.0, 30.0], "tokens": [10, 10], "characters": [30, 50]}
    lines = metrics.summarize({name: torch.tensor(column) for name, column in values.items()})
    assert lines[3].value == pytest.approx(0.5)
    assert str(lines[3]).endswith("nats/character  80 characters of 20 tokens of 2 held-out items")
    weighted = metrics.summarize({"nll": torch.tensor([10.0, 30.0])}, tokens=torch.tensor([10, 90]))
    assert weighted[1].value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        (
            metrics.Metric("Frechet distance", 3.2149, 2.9, 3.6, space="pixels", n={"generated": 1000, "held-out": 9}),
            "Frechet distance  3.21 [2.90, 3.60]  in pixels, 1,000 generated against 9 held-out",
        ),
        (metrics.Metric("ELBO", -1234.5, -1240.0, -1229.0, unit="nats"), "ELBO  -1,234.5 [-1,240.0, -1,229.0] nats"),
        (metrics.Metric("x", 1.23456, note="by hand"), "x  1.235 (by hand)"),
        (metrics.Metric("x", 2.0, 2.0, 2.0), "x  2 [2, 2]"),
        (metrics.Metric("perplexity", math.inf, 3.0, math.inf), "perplexity  inf [3, inf]"),
    ],
    ids=["space", "large", "bare", "constant", "infinite"],
)
def test_metric_formatting_uses_significant_digits(metric, line):
    assert str(metric) == line
