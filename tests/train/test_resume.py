"""Runs that are stopped and resumed: bitwise equal to uninterrupted ones, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from fastgen.cli import main
from fastgen.models import MODELS
from fastgen.train.checkpoint import load_checkpoint
from fastgen.train.engine import Engine
from fastgen.train.loop import Trainer
from tests.data.test_files import COLOR, save_images

Main = Callable[..., int]
Metrics = Callable[..., list[dict[str, Any]]]
SameTensors = Callable[[Path, Path], bool]
Words = Callable[..., list[str]]
Start = Callable[..., ForkServerProcess]
OFTEN = ["--log-every", "1", "--evaluate-every", "3", "--sample-every", "4", "--checkpoint-every", "2"]


def kept_step(folder: Path) -> int:
    return int(load_checkpoint(folder / "checkpoint.safetensors")[1]["step"])


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Engine], None]) -> None:
    """Have something happen when a step is done."""
    advance = Engine.advance

    def hook(self: Engine, *rest: Any) -> None:
        advance(self, *rest)
        if self.step == step:
            act(self)

    monkeypatch.setattr(Engine, "advance", hook)


@pytest.mark.parametrize("model", ["conv-vae", "dcgan", "transformer-lm"])
def test_resuming_gives_the_same_bits_as_never_stopping(
    fit: Main,
    tmp_path: Path,
    same_tensors: SameTensors,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    options = ["--accumulate", "2", "--flip", "--schedule", "cosine", "--warmup", "3"]
    assert fit(*OFTEN, *options, model=model, name="straight", steps=6) == 0
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda engine: os.kill(os.getpid(), signal.SIGINT))
        assert fit(*OFTEN, *options, model=model, name="halves", steps=6) == 130
    assert kept_step(tmp_path / "halves") == 3
    torch.manual_seed(99)  # what happened to the global generators meanwhile does not matter
    assert fit("--resume", model=model, name="halves", steps=6) == 0
    assert same_tensors(tmp_path / "straight", tmp_path / "halves")
    straight, halves = metrics(tmp_path / "straight"), metrics(tmp_path / "halves")
    assert [(row["step"], row["values"]) for row in straight] == [(row["step"], row["values"]) for row in halves]
    began, resumed = (json.loads((tmp_path / name / "environment.json").read_text()) for name in ("straight", "halves"))
    assert "resumed" not in began
    assert len(resumed["resumed"]) == 1
    for image in (tmp_path / "straight").glob("*/*.*"):
        if image.parent.name != "model":
            assert image.read_bytes() == (tmp_path / "halves" / image.parent.name / image.name).read_bytes()


def killed_and_resumed(words: Words, start: Start, folder: Path, kills: int, steps: int, longest: float) -> list[int]:
    """Kill a run at random moments, at most ``longest`` seconds after its start, until ``kills`` of them hit it alive,
    then let it end; steps that were kept."""
    moments = random.Random(0)
    kept = []
    resuming: list[str] = []
    while len(kept) < kills:
        process = start(words(*OFTEN, *resuming, name=folder.name, steps=steps))
        while not (folder / "environment.json").exists() and process.is_alive():
            time.sleep(0.01)
        process.join(timeout=moments.uniform(0.0, longest))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break  # done before the kill came
        assert process.exitcode == -signal.SIGKILL
        written = (folder / "checkpoint.safetensors").exists()
        kept.append(kept_step(folder) if written else 0)
        resuming = ["--resume"] if written else ["--overwrite"]
    process = start(words(*OFTEN, *(resuming or ["--overwrite"]), name=folder.name, steps=steps))
    process.join(timeout=300)
    assert process.exitcode == 0
    return kept


@pytest.mark.parametrize(
    ("kills", "steps", "longest"),
    [
        pytest.param(3, 80, 0.8, id="short"),
        pytest.param(10, 1200, 2.0, id="long", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    fit: Main,
    words: Words,
    start: Start,
    tmp_path: Path,
    same_tensors: SameTensors,
    kills: int,
    steps: int,
    longest: float,
) -> None:
    assert fit(*OFTEN, name="straight", steps=steps) == 0
    kept = killed_and_resumed(words, start, tmp_path / "killed", kills, steps, longest)
    print("steps that were kept:", kept)
    assert len(kept) == kills
    assert kept == sorted(kept)
    assert kept[-1] > 0
    assert same_tensors(tmp_path / "straight", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_130_and_keeps_the_step(
    words: Words, start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start(words("--checkpoint-every", "1000000", "--evaluate-every", "1000000", "--sample-every", "1000000",
                          "--log-every", "1", steps=1000000))  # fmt: skip
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").stat().st_size < 1000:
        assert process.is_alive(), (tmp_path / "output").read_text()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == 130
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    kept = int(output.split("interrupted; step ")[1].split()[0])
    assert kept == kept_step(folder) > 0
    assert f"--out {folder} --resume" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_keeps_the_step_although_workers_get_it_too(
    words: Words, start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    folder, never = tmp_path / "run", "1000000"
    save_images(tmp_path / "images", COLOR)
    options = ["--data", str(tmp_path / "images"), "--workers", "2", "--checkpoint-every", never, "--evaluate-every"]
    options += [never, "--sample-every", never, "--log-every", "1"]
    process = start(words(*options, steps=1000000), lazy="yes")
    try:
        while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").stat().st_size < 1000:
            assert process.is_alive(), (tmp_path / "output").read_text()
            time.sleep(0.02)
        assert process.pid is not None
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        os.killpg(process.pid, number)
        process.join(timeout=60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 130, (tmp_path / "output").read_text()
    kept = int((tmp_path / "output").read_text().split("interrupted; step ")[1].split()[0])
    assert kept == kept_step(folder) > 0
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_checkpoint(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(engine: Engine) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after_step(patch, 5, twice)
        assert fit(*OFTEN) == 130
    assert "interrupted; step 4 is saved" in error_line()
    assert kept_step(tmp_path / "run") == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_ended_before_its_first_checkpoint_is_named(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(self: Trainer, *rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", at_once)
        assert fit() == 130
    assert "no step is saved" in error_line()
    assert fit("--resume") == 1
    assert "--overwrite starts over" in error_line()
    assert fit("--overwrite") == 0


def poison(engine: Engine) -> None:
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("model", ["conv-vae", "dcgan"])
def test_a_step_whose_gradient_is_nan_changes_nothing_and_is_counted(
    fit: Main, tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    loss = MODELS[model].loss

    def sometimes(self: Any, phase: str, batch: Any, context: Any) -> Any:
        if context.step in (3, 4):  # in the images, so that it affects batch norm, too
            batch = batch | {"images": batch["images"] * float("nan")}
        return loss(self, phase, batch, context)

    monkeypatch.setattr(MODELS[model], "loss", sometimes)
    assert fit("--log-every", "1", "--nan-limit", "3", model=model, steps=6) == 0
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0, 0, 1, 2, 2, 2]
    _, tensors = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    steps = {name.split("/")[1]: int(tensor) for name, tensor in tensors.items() if name.endswith("/step")}
    expected = {"conv-vae": {"model": 4}, "dcgan": {"discriminator": 4, "generator": 6}}  # who saw them skips two
    assert steps == expected[model]


def test_gradients_that_stay_nan_stop_the_run_and_keep_the_last_good_checkpoint(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(*OFTEN, steps=4) == 0
    _, good = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    after_step(monkeypatch, 5, poison)
    assert fit("--resume", "--nan-limit", "2", "--checkpoint-every", "1000", steps=20) == 1
    line = error_line()
    assert "step 7: the gradient was NaN or infinite in the last 2 steps" in line
    assert "step 4 is saved" in line
    _, kept = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert all(torch.equal(good[name], kept[name]) for name in good)


def test_resume_without_a_run_is_refused(fit: Main, error_line: Callable[[], str]) -> None:
    assert fit("--resume") == 1
    assert "expected a run to resume" in error_line()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.width", "8"], "model.width: expected 4, as in the run in"),
        (["--clip", "3"], "got 3.0; with --resume only epochs, steps, learning_rate, threads"),
        (["--batch-size", "64"], "batch_size: expected 32, as in the run in"),
        (["--model.beta", "2"], "model.beta: expected 1.0, as in the run in"),
        (["--data", "digits"], "data: expected the data that the run in"),
        (["--held-out", "7"], "held_out: expected 0, as in the run in"),
        (["--steps", "1"], "steps: expected at least the 8 steps that are trained, got 1"),
        (["--steps", "-1"], "steps: expected a number >= 0, got -1"),
        (["--overwrite"], "resume, overwrite: expected at most one of them, got both"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_the_run_are_refused_by_name(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], options: list[str], message: str
) -> None:
    assert fit() == 0
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    assert fit("--resume", *options) == 2
    assert message in error_line()
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_resume_drops_metrics_after_its_checkpoint(fit: Main, tmp_path: Path, metrics: Metrics) -> None:
    assert fit("--log-every", "4") == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "part": "train", "values": {"loss": 0}}\n{"step": 16, "tr')
    assert fit("--resume", steps=12) == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[-1]["values"]["loss"] > 0


def test_a_learning_rate_that_changes_is_taken_and_recorded(pages: None, fit: Main, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert fit("--learning-rate", "0.01", steps=3) == 0
    assert fit("--resume", "--learning-rate", "1e-9", steps=4) == 0
    assert fit("--resume", steps=5) == 0
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["learning_rate"], settings["steps"]) == (1e-9, 5)
    assert fit("--learning-rate", "0.01", name="short", steps=3) == 0
    short, longer = (load_checkpoint(tmp_path / name / "checkpoint.safetensors")[1] for name in ("short", "run"))
    for name, weight in short.items():
        if name.startswith("model/") and weight.is_floating_point() and "running" not in name:
            torch.testing.assert_close(longer[name], weight, rtol=0, atol=1e-7)  # two steps of about 1e-9 each
    turns = json.loads((folder / "environment.json").read_text())["resumed"]
    assert [turn["step"] for turn in turns] == [3, 4]
    assert turns[0]["changed"] == {"steps": [3, 4], "learning_rate": [0.01, 1e-9]}
    assert turns[1]["changed"] == {"steps": [4, 5]}
    assert "--learning-rate 1e-9" in turns[0]["command"]
    assert "# step 3: learning_rate changed from 0.01 to 1e-09" in (folder / "config.yaml").read_text()
    page = (folder / "report.html").read_text().split("Reproduce")[1].split("</pre>")[0]
    assert "--learning-rate 0.01" in page
    assert "# resumed at step 3\n# step 3: steps changed" in page
    assert f"--out {folder} --steps 4 --resume --learning-rate 1e-9" in page
    assert f"--out {folder} --steps 5 --resume" in page
    assert main(["train", "conv-vae", "--config", str(folder / "config.yaml"), "--out", str(tmp_path / "again")]) == 0


def test_a_resumed_training_without_a_checkpoint_is_not_recorded(
    fit: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(self: Trainer, *rest: Any) -> None:
        raise KeyboardInterrupt

    assert fit(steps=3) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", at_once)
        assert fit("--resume", "--learning-rate", "0.5", steps=4) == 130
    assert fit("--resume", steps=4) == 0
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text)["learning_rate"] is None
    assert "learning_rate changed" not in text
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["resumed"]) == 1
