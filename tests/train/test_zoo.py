"""Every model of the zoo from the command line: it trains, stops, goes on with the same bits, is judged, and draws."""

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
from fastgen.train.engine import Engine

Main = Callable[..., int]
SameTensors = Callable[[Path, Path], bool]
CLASSES = ("cgan", "cdcgan", "sagan", "cvae")
"""Models that draw the class they are asked for, with their defaults."""


@pytest.mark.parametrize("model", MODELS)
def test_a_model_trains_stops_goes_on_with_the_same_bits_is_judged_and_draws(
    fit: Main,
    tmp_path: Path,
    same_tensors: SameTensors,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
) -> None:
    from fastgen.train import judge

    monkeypatch.setattr(judge, "write_report", lambda folder: None)
    for space in ("classifier_features", "rotation_features"):
        monkeypatch.setattr(judge.metrics, space, functools.partial(getattr(judge.metrics, space), steps=5))
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
    figures = {f["name"] for f in json.loads((tmp_path / "halves" / "evaluation.json").read_text())["figures"]}
    assert figures
    if MODELS[model].kind == "images":
        assert {"Frechet distance", "recall"} <= figures
    assert ("class agreement" in figures) == (model in CLASSES)
    capsys.readouterr()
    first, again = (tmp_path / f"{name}{SUFFIX[MODELS[model].kind]}" for name in ("first", "again"))
    for out in (first, again):
        assert main(["sample", folder, "--n", "3", "--seed", "1", "--out", str(out), *SHORT.get(model, [])]) == 0
    assert first.read_bytes() == again.read_bytes()


SUFFIX = {"text": ".txt", "sequences": ".txt", "audio": ".wav"} | dict.fromkeys(("images", "domains", "pairs"), ".png")
SHORT = {"transformer-lm": ["--length", "5"], "wavenet": ["--seconds", "0.01"]}
