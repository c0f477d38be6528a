"""The time of a run: its estimate, the share of evaluations and samples, the progress of an evaluation."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fastgen.cli import main
from fastgen.train import loop, progress
from fastgen.train.loop import Trainer

Main = Callable[..., int]
EVALUATE = ["--n", "40", "--importance", "2", "--resamples", "0"]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of held-out items of each evaluation."""
    found: list[int] = []
    evaluate = Trainer._evaluate

    def spy(self: Trainer, *rest: Any) -> None:
        found.append(len(self.held_out))
        evaluate(self, *rest)

    monkeypatch.setattr(Trainer, "_evaluate", spy)
    return found


def test_evaluations_take_five_percent_of_the_work_unless_their_interval_is_given(
    fit: Main, tmp_path: Path, evaluated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "many.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 17, (1000, 8, 8), dtype=np.uint8))
    data = ["--data", str(path), "--held-out", "2"]
    monkeypatch.setattr(loop, "LEAST_EVALUATED", 20)
    assert fit(*data, steps=24, name="few") == 0
    assert evaluated == [38] * 3  # 0.05 * 3 * 24 * 32 / 3, of 500
    del evaluated[:]
    assert fit(*data, steps=2, name="least") == 0
    assert evaluated == [20]
    del evaluated[:]
    assert fit(*data, "--evaluate-every", "12", steps=24, name="given") == 0
    assert evaluated == [500] * 2


def test_samples_that_take_long_are_left_out_but_for_the_last(
    fit: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(name: str, *options: str) -> list[str]:
        assert fit(*options, steps=30, name=name) == 0
        return sorted(file.stem for file in (tmp_path / name / "samples").iterdir())

    assert images("quick") == ["000010", "000020", "000030"]
    monkeypatch.setattr(loop, "QUICK", 0.0)
    monkeypatch.setattr(loop, "SHARE_OF_SAMPLES", 0.0)
    assert images("slow") == ["000010", "000030"]
    assert images("given", "--sample-every", "10") == ["000010", "000020", "000030"]


def test_a_run_of_images_keeps_some_of_its_training_images(fit: Main, tmp_path: Path) -> None:
    assert fit(steps=1) == 0
    (picture,) = (tmp_path / "run" / "real").iterdir()
    assert picture.name == "000000.png"
    before = picture.stat().st_mtime_ns
    assert fit("--resume", steps=2) == 0
    assert picture.stat().st_mtime_ns == before
    with Image.open(picture) as real, Image.open(tmp_path / "run" / "samples" / "000001.png") as samples:
        assert real.size == samples.size
    assert fit("--overwrite", model="cyclegan", steps=1) == 0  # its pictures have their inputs
    assert not (tmp_path / "run" / "real").exists()


def test_a_long_run_starts_with_an_estimate_that_changes_nothing(
    fit: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], same_tensors: Any
) -> None:
    assert fit(steps=6, name="short") == 0
    assert "about" not in capsys.readouterr().err
    monkeypatch.setattr(loop, "WORTH_AN_ESTIMATE", 0.0)
    assert fit(steps=6, name="long") == 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "about" in each]
    assert line.startswith("fastgen: about ")
    assert "3 steps of " in line
    assert "1 evaluations " in line
    assert "1 samples " in line
    assert same_tensors(tmp_path / "short", tmp_path / "long")


def test_the_time_left_counts_what_was_measured(
    fit: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations of 1000 s each: a line is printed before the evaluation of its step."""
    timed = Trainer._timed

    def slow(self: Trainer, part: str, work: Callable[[], Any]) -> float:
        timed(self, part, work)
        self.costs.seconds[part] = 1000.0 if part == "evaluate" else 0.0
        return 0.0

    monkeypatch.setattr(Trainer, "_timed", slow)
    assert fit("--evaluate-every", "10", steps=30) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    left = {int(line.split()[1].split("/")[0]): line for line in lines}
    assert "33 min 2" in left[20]
    assert "16 min 40 s left" in left[30]


def test_runs_of_the_same_data_share_a_feature_space(
    fit: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgen.train import evaluate

    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    calls = []

    def briefly(*args: Any, **options: Any) -> Any:
        calls.append(options["data"])
        return train(*args, **options, steps=3)

    train = evaluate.metrics.classifier_features
    monkeypatch.setattr(evaluate.metrics, "classifier_features", briefly)
    for name in ("first", "second"):
        assert fit(steps=2, name=name) == 0
    for name in ("first", "second", "second"):
        assert main(["evaluate", str(tmp_path / name), *EVALUATE]) == 0
    assert calls == ["digits.npz"]
    printed = capsys.readouterr()
    assert printed.err.count("fastgen: evaluate: training a classifier of digits.npz for the distances, once") == 1
    one, two = (load_file(tmp_path / name / "features.safetensors") for name in ("first", "second"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)

    damaged = tmp_path / "first" / "features.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "second" / "features.safetensors").unlink()
    assert main(["evaluate", str(tmp_path / "second"), *EVALUATE]) == 0  # another run's damaged file is passed over
    assert len(calls) == 2


def test_evaluate_names_the_feature_space_once(
    fit: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgen.train import evaluate

    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    briefly = functools.partial(evaluate.metrics.classifier_features, steps=3)
    monkeypatch.setattr(evaluate.metrics, "classifier_features", briefly)
    assert fit(steps=2) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), *EVALUATE]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]
    (space,) = {figure["space"] for figure in kept} - {""}
    assert [line for line in lines if space in line] == [f"in the feature space {space}:"]
    rest = lines[lines.index(f"in the feature space {space}:") + 1 : -1]
    below = [line for line in rest if line.startswith("  ")]
    assert rest[: len(below)] == below
    assert all(" in " not in line for line in below)
    assert len(below) == len([figure for figure in kept if figure["space"]])


def test_stages_print_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    stages = progress.Stages("evaluate")
    stages.begin("scores")
    for part in stages.over("samples", range(30), 30):
        now[0] = 0.7 * part
    assert capsys.readouterr().err == "fastgen: evaluate: samples, 16 of 30\n"  # after 10.5 s; the next after 20.5
    progress.Stages("evaluate", quiet=True).note("nothing")
    assert not capsys.readouterr().err
