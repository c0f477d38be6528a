"""Frechet distances in the course of training."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgen import metrics

Main = Callable[..., int]
OFTEN = ("--evaluate-every", "2", "--sample-every", "100", "--log-every", "1")


def distances(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["values"]["Frechet distance"] for row in rows if "Frechet distance" in row["values"]}


def test_distances_are_measured_at_each_evaluation_and_change_nothing_else(
    fit: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_tensors: Callable[[Path, Path], bool]
) -> None:
    space = functools.partial(metrics.classifier_features, steps=5)
    monkeypatch.setattr("fastgen.train.feature_space.metrics.classifier_features", space)
    assert fit(*OFTEN, model="dcgan", name="plain", steps=5) == 0
    assert fit(*OFTEN, "--distance-samples", "40", model="dcgan", name="measured", steps=5) == 0
    assert distances(tmp_path / "plain") == {}
    assert list(distances(tmp_path / "measured")) == [2, 4, 5]
    assert all(value > 0 for value in distances(tmp_path / "measured").values())
    assert same_tensors(tmp_path / "plain", tmp_path / "measured")
    assert (tmp_path / "measured" / "features.safetensors").is_file()

    monkeypatch.setattr("fastgen.train.feature_space.metrics.classifier_features", None)  # the run beside has the space
    assert fit(*OFTEN, "--distance-samples", "40", model="gan", name="other", steps=2) == 0
    assert list(distances(tmp_path / "other")) == [2]


def test_distances_of_what_is_no_image_or_too_few_are_refused(fit: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--distance-samples", "9", "--data", "tones", "--items", "20", model="wavenet", steps=1) != 0
    assert "distance_samples: expected 0, as wavenet makes no images, got 9" in capsys.readouterr().err
    assert fit("--distance-samples", "1", model="dcgan", steps=1) != 0
    expected = "distance_samples: expected 2 or more, with at least 50 training and 2 held-out images, got 1"
    assert expected in capsys.readouterr().err
