"""Runs that stop and go on: the same bits as if they had never stopped, and nothing lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.cli import main
from fastgen.train import loop
from fastgen.train.checkpoint import load_checkpoint

Metrics = Callable[[Path], list[dict[str, Any]]]
SameTensors = Callable[[Path, Path], bool]
ROOT = Path(__file__).resolve().parents[2]


def interrupt_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Ctrl-C when the training of ``epoch`` begins."""
    train_epoch = loop._train_epoch

    def hook(state: Any, images: Any, config: Any, current: int, progress: Any) -> float:
        if current == epoch:
            raise KeyboardInterrupt
        return train_epoch(state, images, config, current, progress)

    monkeypatch.setattr(loop, "_train_epoch", hook)


def test_resuming_gives_the_same_bits_as_never_stopping(
    fit: Callable[..., int], tmp_path: Path, same_tensors: SameTensors, metrics: Metrics
) -> None:
    assert fit(name="straight", epochs=4) == 0
    assert fit(name="halves", epochs=2) == 0
    assert not same_tensors(tmp_path / "straight", tmp_path / "halves")
    assert fit("--resume", name="halves", epochs=4) == 0
    assert same_tensors(tmp_path / "straight", tmp_path / "halves")
    straight, halves = metrics(tmp_path / "straight"), metrics(tmp_path / "halves")
    assert [row["held_out_elbo"] for row in straight] == [row["held_out_elbo"] for row in halves]


def test_the_order_of_the_images_depends_on_seed_and_epoch_alone() -> None:
    orders = [torch.randperm(50, generator=loop._seeded(*pair)) for pair in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])


def test_ctrl_c_keeps_the_last_finished_epoch(
    fit: Callable[..., int],
    tmp_path: Path,
    same_tensors: SameTensors,
    metrics: Metrics,
    error_line: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 3)
        assert fit(epochs=4) == 130
    line = error_line()
    assert "epoch 2 is kept" in line
    assert f"--out {tmp_path / 'run'} --resume" in line
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert main(["train", "conv-vae", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert fit(name="straight", epochs=4) == 0
    assert same_tensors(tmp_path / "run", tmp_path / "straight")


def test_ctrl_c_before_the_first_epoch_ends_can_be_resumed(
    fit: Callable[..., int], tmp_path: Path, same_tensors: SameTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 1)
        assert fit() == 130
    assert fit("--resume") == 0
    assert fit(name="straight") == 0
    assert same_tensors(tmp_path / "run", tmp_path / "straight")


def test_a_real_sigint_ends_the_process_with_130(digits: Path, tmp_path: Path) -> None:
    options = ["--data", str(digits), "--out", str(tmp_path / "run"), "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgen", "train", "conv-vae", *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & would have it ignored
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in rest
    kept = int(rest.split("; epoch ")[1].split()[0])
    assert kept >= 2
    _, tensors = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert int(tensors["epoch"]) == kept


def test_a_loss_that_is_no_longer_finite_stops_and_keeps_the_last_good_checkpoint(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(epochs=1) == 0
    _, good = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")

    def poisoned(state: Any, *rest: Any) -> float:
        next(state.model.parameters()).data.fill_(float("nan"))
        return float("nan")

    monkeypatch.setattr(loop, "_train_epoch", poisoned)
    assert fit("--resume", epochs=3) == 1
    line = error_line()
    assert "epoch 2: the training loss is nan" in line
    assert "epoch 1 is kept" in line
    _, kept = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert all(torch.equal(good[name], kept[name]) for name in good)


def test_a_learning_rate_far_too_large_is_reported(fit: Callable[..., int], error_line: Callable[[], str]) -> None:
    assert fit("--learning-rate", "1e9") == 1
    assert "epoch 1: the training loss is" in error_line()


def test_resume_without_a_run_is_refused(fit: Callable[..., int], error_line: Callable[[], str]) -> None:
    assert fit("--resume") == 1
    assert "expected a run to resume" in error_line()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.width", "8"], "model.width: expected 4, as when the run in"),
        (["--learning-rate", "0.1"], "learning_rate: expected 0.004, as when the run in"),
        (["--data", "digits"], "data: expected the images with which the run in"),
        (["--epochs", "1"], "epochs: expected at least 2, which are trained, got 1"),
        (["--epochs", "0"], "epochs: expected a positive integer, got 0"),
        (["--overwrite"], "resume, overwrite: expected at most one of them, got both"),
    ],
)
def test_options_that_do_not_fit_the_run_are_refused_by_name(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str], options: list[str], message: str
) -> None:
    assert fit() == 0
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    assert main(["train", "conv-vae", "--out", str(tmp_path / "run"), "--resume", *options]) == 2
    assert message in error_line()
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_resume_drops_metrics_that_its_checkpoint_does_not_know(
    fit: Callable[..., int], tmp_path: Path, metrics: Metrics
) -> None:
    assert fit() == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train_loss": 0}\n{"epoch": 4, "tr')
    assert fit("--resume", epochs=3) == 0
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["train_loss"] > 0
