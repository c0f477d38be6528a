"""Every model of the zoo from the command line: training, bitwise resuming, evaluation, samples."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgen.cli import main
from fastgen.models import MODELS
from fastgen.train.curves import EXPLAINED, panels, read_rows
from fastgen.train.engine import Engine

Main = Callable[..., int]
SameTensors = Callable[[Path, Path], bool]
CLASSES = ("cgan", "cdcgan", "sagan", "cvae")
"""Models that sample a given class, with their defaults."""


@pytest.mark.parametrize("model", MODELS)
def test_a_model_trains_resumes_bitwise_evaluates_and_samples(
    fit: Main,
    tmp_path: Path,
    same_tensors: SameTensors,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
) -> None:
    from fastgen.train import evaluate

    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    for space in ("classifier_features", "rotation_features"):
        monkeypatch.setattr(evaluate.metrics, space, functools.partial(getattr(evaluate.metrics, space), steps=5))
    cadence = ["--log-every", "1", "--evaluate-every", "4", "--sample-every", "100", "--checkpoint-every", "2"]
    assert fit(*cadence, model=model, name="straight", steps=4) == 0
    with monkeypatch.context() as patch:
        advance = Engine.advance

        def stop(self: Engine, *rest: object) -> None:
            advance(self, *rest)  # type: ignore[arg-type]
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Engine, "advance", stop)
        assert fit(*cadence, model=model, name="halves", steps=4) == 130
    assert fit("--resume", model=model, name="halves", steps=4) == 0
    assert same_tensors(tmp_path / "straight", tmp_path / "halves")

    folder = str(tmp_path / "halves")
    assert main(["evaluate", folder, "--n", "40", "--importance", "2", "--resamples", "0"]) == 0
    names = {f["name"] for f in json.loads((tmp_path / "halves" / "evaluation.json").read_text())["figures"]}
    assert names
    if MODELS[model].kind == "images":
        assert {"Frechet distance", "recall"} <= names
    assert ("class agreement" in names) == (model in CLASSES)
    assert {panel.name for panel in panels(read_rows(tmp_path / "halves" / "metrics.jsonl"))} <= {*EXPLAINED}
    capsys.readouterr()
    first, again = (tmp_path / f"{name}{SUFFIX[MODELS[model].kind]}" for name in ("first", "again"))
    for out in (first, again):
        assert main(["sample", folder, "--n", "3", "--seed", "1", "--out", str(out), *SHORT.get(model, [])]) == 0
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("kind", ["text", "sequences"])
def test_a_model_of_several_kinds_of_data_has_the_kind_of_its_data(
    fit: Main, tmp_path: Path, text: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Training, resuming, evaluation and samples."""
    data = {"text": [str(text)], "sequences": ["sums", "--items", "80"]}[kind]
    assert fit("--data", *data, model="recurrent-gan", steps=2) == 0
    assert fit("--resume", model="recurrent-gan", steps=3) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    metric = {"text": "known triples", "sequences": "well formed"}[kind]
    assert metric in {f["name"] for f in json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]}
    out = tmp_path / "samples.txt"
    assert main(["sample", str(tmp_path / "run"), "--n", "2", "--out", str(out)]) == 0
    assert len(out.read_text()) > 10
    capsys.readouterr()
    assert fit("--data", "tones", "--items", "40", model="recurrent-gan", name="another", steps=1) == 1
    assert "tones: expected data of kind images (digits, " in error_line()


def test_evaluate_reports_the_harmonicity_of_sounds(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgen.train import evaluate

    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    assert fit("--data", "tones", "--items", "20", "--seconds", "0.25", model="wavenet", steps=1) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--n", "2", "--resamples", "0"]) == 0
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]
    found = {metric["name"]: metric for metric in kept}
    assert found["energy at harmonics"]["n"] == {"generated": 2}
    assert found["energy at harmonics, held-out sounds"]["value"] > 0.99
    assert "energy at harmonics" in capsys.readouterr().out


SUFFIX = {"text": ".txt", "sequences": ".txt", "audio": ".wav"} | dict.fromkeys(("images", "domains", "pairs"), ".png")
SHORT = {"transformer-lm": ["--length", "5"], "wavenet": ["--seconds", "0.01"]}
