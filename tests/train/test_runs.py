"""A run from start to end: what it writes, what it does not overwrite, and its results."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastgen.cli import main
from fastgen.models import MODELS, Images
from fastgen.train.folder import RunFolder
from fastgen.train.trained import open_run, sample

Main = Callable[..., int]
Metrics = Callable[..., list[dict[str, Any]]]
SameTensors = Callable[[Path, Path], bool]
FILES = {"environment.json", "config.yaml", "metrics.jsonl", "checkpoint.safetensors", "curves.png", "report.html"}


@pytest.mark.parametrize(
    ("model", "steps", "score", "samples"),
    [
        ("conv-vae", 40, "loss", {"samples/000040.png", "real/000000.png", "reconstructions/000040.png"}),
        ("dcgan", 12, "discriminator/loss", {"samples/000012.png", "real/000000.png"}),
        ("transformer-lm", 40, "loss", {"samples/000040.txt"}),
    ],
)
def test_training_lowers_the_loss_and_fills_the_folder(
    pages: None,
    fit: Main,
    tmp_path: Path,
    metrics: Metrics,
    capsys: pytest.CaptureFixture[str],
    model: str,
    steps: int,
    score: str,
    samples: set[str],
) -> None:
    assert fit("--log-every", str(steps // 4), "--sample-every", str(steps), model=model, steps=steps) == 0
    folder = tmp_path / "run"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == FILES | samples | {"model/config.json", "model/model.safetensors", "model/README.md"}
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [steps // 4 * turn for turn in (1, 2, 3, 4)]
    assert rows[-1]["values"][score] < rows[0]["values"][score]
    assert all(row["items_per_second"] > 0 and row["seconds"] > 0 and row["skipped"] == 0 for row in rows)
    printed = capsys.readouterr()
    assert "step 10/40" in printed.err or steps != 40  # plain lines, as this is no terminal
    assert f"{model}: " in printed.out
    for row in metrics(folder, "held-out")[-1:]:
        assert f"held-out {next(iter(row['values']))}" in printed.out
    assert str(folder / "report.html") in printed.out
    card = (folder / "model" / "README.md").read_text()
    assert f"{steps} steps, with fastgen" in card
    assert f"fastgen train {model} --out {folder} --steps {steps}" in card
    assert all(f"| {name} |" in card for row in metrics(folder, "held-out")[-1:] for name in row["values"])


@pytest.mark.parametrize("model", ["conv-vae", "dcgan", "sagan", "transformer-lm", "vq-vae"])
def test_pretrained_weights_are_the_averaged_ones(fit: Main, tmp_path: Path, model: str) -> None:
    assert fit(model=model) == 0
    folder = tmp_path / "run"
    trained = open_run(RunFolder(folder))
    loaded = MODELS[model].from_pretrained(folder / "model")
    assert loaded.config == trained.model.config
    assert not loaded.training
    kept = trained.model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in loaded.state_dict().items())


def test_the_saved_config_reproduces_the_run(fit: Main, tmp_path: Path, same_tensors: SameTensors) -> None:
    assert fit("--learning-rate", "0.002", "--schedule", "linear", "--seed", "3") == 0
    config = tmp_path / "run" / "config.yaml"
    assert main(["train", "conv-vae", "--config", str(config), "--out", str(tmp_path / "again")]) == 0
    assert same_tensors(tmp_path / "run", tmp_path / "again")
    settings, again = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("run", "again"))
    assert settings == again
    assert (settings["learning_rate"], settings["model"]["width"]) == (0.002, 4)
    assert "image_size" not in settings["model"]  # the data decide


def test_another_seed_gives_other_weights_and_one_seed_the_same_samples(
    fit: Main, tmp_path: Path, same_tensors: SameTensors
) -> None:
    assert fit(name="a", steps=2) == fit("--seed", "1", name="c", steps=2) == 0
    assert not same_tensors(tmp_path / "a", tmp_path / "c")
    trained = open_run(RunFolder(tmp_path / "a"))
    first, again, other, more = (
        sample(trained, n, trained.model.sampling_class(), seed) for n, seed in ((3, 0), (3, 0), (3, 1), (300, 0))
    )
    assert isinstance(first, Images)
    assert isinstance(again, Images)
    assert isinstance(other, Images)
    assert isinstance(more, Images)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)
    assert len(more.pixels) == 300


@pytest.mark.parametrize(
    ("model", "options"),
    [("conv-vae", ()), ("dcgan", ()), ("transformer-lm", ()), ("image-transformer", ("--model.captions",))],
)
def test_evaluation_is_kept_with_its_feature_space(
    fit: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    options: tuple[str, ...],
) -> None:
    from fastgen.train import evaluate

    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    briefly = functools.partial(evaluate.metrics.classifier_features, steps=20)
    monkeypatch.setattr(evaluate.metrics, "classifier_features", briefly)
    assert fit(*options, model=model, steps=2) == 0
    capsys.readouterr()
    words = ["evaluate", str(tmp_path / "run"), "--n", "60", "--importance", "3", "--resamples", "0"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    found = {metric["name"]: metric for metric in kept["figures"]}
    assert kept["step"] == 2
    expected = {
        "conv-vae": {"ELBO", "importance-weighted bound", "bits per dimension", "Frechet distance", "recall"},
        "dcgan": {
            "Frechet distance",
            "kernel distance",
            "precision",
            "recall",
            "closer to training data than held-out images",
        },
        "transformer-lm": {"nats per token", "perplexity"},
        "image-transformer": {"negative log-likelihood", "class agreement", "caption agreement"},
    }
    assert expected[model] <= found.keys()
    for metric in found.values():
        assert metric["name"] in printed
        assert metric["space"] in printed
    if model == "conv-vae":
        assert found["importance-weighted bound"]["value"] > found["ELBO"]["value"]
    if model != "transformer-lm":
        assert "classifier" in found["recall"]["space"]
        features = (tmp_path / "run" / "features.safetensors").stat().st_mtime_ns
        assert main(words) == 0
        assert capsys.readouterr().out == printed  # the same again
        assert (tmp_path / "run" / "features.safetensors").stat().st_mtime_ns == features


@pytest.mark.parametrize(
    ("model", "data", "lacking"),
    [
        ("pix2pix", ["photos", "--items", "20"], "50 training images, to train their feature space on, got 16"),
        ("conv-vae", ["few.npz", "--held-out", "12"], "10 held-out images, with resamples 200, got 5"),
        ("dcgan", ["few.npz", "--held-out", "2"], "50 training images, to train their feature space on, got 30"),
    ],
)
def test_with_few_images_distances_are_left_out_with_the_reason(
    fit: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    data: list[str],
    lacking: str,
) -> None:
    monkeypatch.setattr("fastgen.train.evaluate.write_report", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    np.savez("few.npz", images=np.arange(60 * 64, dtype=np.uint8).reshape(60, 8, 8))
    assert fit("--data", *data, model=model, steps=1) == 0
    capsys.readouterr()
    done = main(["evaluate", str(tmp_path / "run"), "--importance", "0"])
    printed = capsys.readouterr()
    assert f"distances are left out: expected at least {lacking} (--features none leaves them out)" in printed.err
    if model == "dcgan":  # nothing else to measure
        assert done == 1
        assert f"dcgan is evaluated by distances alone: expected at least {lacking}" in printed.err
        return
    assert done == 0
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert kept["notes"] == [f"distances are left out: expected at least {lacking}"]
    found = {metric["name"] for metric in kept["figures"]}
    assert "structural similarity" in found if model == "pix2pix" else "ELBO" in found
    assert not any("distance" in name for name in found)


def test_classes_in_turn_keep_their_columns_where_samples_are_many(fit: Main, tmp_path: Path) -> None:
    assert fit(model="cvae", steps=1) == 0
    trained = open_run(RunFolder(tmp_path / "run"))
    samples = sample(trained, 300, trained.model.sampling_class(), 0)
    assert isinstance(samples, Images)
    assert samples.labels is not None
    assert samples.labels.tolist() == [number % 10 for number in range(300)]


def test_a_folder_that_holds_a_run_is_refused(fit: Main, tmp_path: Path, error_line: Callable[[], str]) -> None:
    assert fit() == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}
    assert fit(steps=2) == 1
    assert "holds a run already; --resume continues it, --overwrite replaces it" in error_line()
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}


def test_overwrite_replaces_the_run_and_nothing_else(fit: Main, tmp_path: Path, metrics: Metrics) -> None:
    assert fit("--log-every", "4") == 0
    mine = [tmp_path / "run" / "notes.txt", tmp_path / "run" / "samples" / "best.png"]
    for file in mine:
        file.write_text("mine")
    assert fit("--overwrite", "--log-every", "2", steps=2) == 0
    assert [file.read_text() for file in mine] == ["mine", "mine"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [2]
    assert {file.name for file in (tmp_path / "run" / "samples").iterdir()} == {"best.png", "000002.png"}


def test_files_of_another_program_are_never_replaced(fit: Main, tmp_path: Path, error_line: Callable[[], str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("theirs: 1")
    assert fit("--overwrite") == 1
    assert "config.yaml from another program" in error_line()
    assert (tmp_path / "run" / "config.yaml").read_text() == "theirs: 1"
    (tmp_path / "file").write_text("")
    assert fit(name="file") == 1
    assert "expected a folder for the run, got a file" in error_line()


def test_tensorboard_gets_every_value_once_in_a_resumed_run(fit: Main, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert fit("--trackers", "tensorboard", "--log-every", "2", "--checkpoint-every", "4", steps=6) == 0
    assert fit("--resume", "--trackers", "tensorboard", "--log-every", "2", steps=10) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "held-out/elbo"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10]


def test_half_precision_trains(fit: Main, tmp_path: Path, metrics: Metrics) -> None:
    assert fit("--precision", "bfloat16", "--log-every", "8", model="dcgan", steps=16) == 0
    rows = metrics(tmp_path / "run")
    assert all(torch.tensor(list(row["values"].values())).isfinite().all() for row in rows)


def test_compiled_networks_train_and_their_checkpoint_has_the_same_names(
    fit: Main, tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.train.checkpoint import load_checkpoint

    compile = torch.nn.Module.compile  # without code generation, which takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    torch._dynamo.reset()
    for model in ("conv-vae", "dcgan"):
        assert fit("--compile", "--log-every", "1", model=model, name=f"{model}-compiled", steps=2) == 0
        assert fit("--log-every", "1", model=model, name=model, steps=2) == 0
        names = [
            load_checkpoint(tmp_path / name / "checkpoint.safetensors")[1].keys()
            for name in (f"{model}-compiled", model)
        ]
        assert names[0] == names[1]
        for compiled, eager in zip(metrics(tmp_path / f"{model}-compiled"), metrics(tmp_path / model), strict=True):
            assert compiled["values"] == pytest.approx(eager["values"], rel=1e-2)
