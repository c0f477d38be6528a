"""Several processes train as one does: over gloo, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_resume import OFTEN

Main = Callable[..., int]
Words = Callable[..., list[str]]
Metrics = Callable[..., list[dict[str, Any]]]
SameTensors = Callable[[Path, Path], bool]
Together = Callable[..., list[int | None]]
ROOT = Path(__file__).resolve().parents[2]


def close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Whether two runs have the same figures, to the rounding of another order of sums."""
    return len(a) == len(b) > 0 and all(
        left["step"] == right["step"] and left["values"] == pytest.approx(right["values"], rel=1e-4, abs=1e-5)
        for left, right in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("model", "strategy"),
    [("conv-vae", "ddp"), ("dcgan", "ddp"), ("transformer-lm", "ddp"), ("transformer-lm", "fsdp")],
)
def test_two_processes_train_as_one_with_the_same_global_batch(
    fit: Main,
    words: Words,
    together: Together,
    tmp_path: Path,
    metrics: Metrics,
    model: str,
    strategy: str,
) -> None:
    """One process cuts its batch into two parts: batch norm and noise are of a part, whoever computes it."""
    options = [*OFTEN, "--evaluate-every", "4", "--device", "cpu"]
    assert fit(*options, "--accumulate", "2", model=model, name="one", steps=4) == 0
    codes = together(words(*options, "--strategy", strategy, model=model, name="two", steps=4))
    assert codes == [0, 0], (tmp_path / "output").read_text()
    assert close(metrics(tmp_path / "one"), metrics(tmp_path / "two"))
    if model != "dcgan":
        assert close(metrics(tmp_path / "one", "held-out"), metrics(tmp_path / "two", "held-out"))
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_resume_bit_for_bit(
    words: Words, together: Together, tmp_path: Path, same_tensors: SameTensors, strategy: str
) -> None:
    model = "transformer-lm" if strategy == "fsdp" else "dcgan"
    options = [*OFTEN, "--strategy", strategy, "--schedule", "constant", "--device", "cpu"]  # for any number of steps
    assert together(words(*options, model=model, name="straight", steps=4)) == [0, 0]
    assert together(words(*options, model=model, name="halves", steps=2)) == [0, 0]
    assert together(words("--resume", model=model, name="halves", steps=4)) == [0, 0]
    assert same_tensors(tmp_path / "straight", tmp_path / "halves")


def test_two_processes_share_a_store_of_items_without_mixing_them(
    words: Words, together: Together, tmp_path: Path
) -> None:
    """Their mean would be half-filled, with images that no process generated."""
    from fastgen.train.checkpoint import load_checkpoint

    assert together(words("--device", "cpu", "--model.history", "9", model="cyclegan", steps=3)) == [0, 0]
    _, tensors = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    for name in ("model/history_a", "model/history_b"):
        filled, images = tensors[f"{name}.filled"], tensors[f"{name}.images"]
        assert sorted(set(filled.tolist())) == [0.0, 1.0]
        assert images.flatten(1).any(1).tolist() == filled.bool().tolist()


def test_a_transformer_without_dropout_needs_no_parts(
    fit: Main, words: Words, together: Together, tmp_path: Path, metrics: Metrics
) -> None:
    """No noise, no batch norm: whole batches in one process give the same loss."""
    assert fit(*OFTEN, "--device", "cpu", model="transformer-lm", name="one", steps=4) == 0
    assert together(words(*OFTEN, "--device", "cpu", model="transformer-lm", name="two", steps=4)) == [0, 0]
    assert close(metrics(tmp_path / "one"), metrics(tmp_path / "two"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "33"], "batch_size: expected a multiple of processes x accumulate = 2 x 1, got 33"),
        (["--strategy", "fsdp"], "strategy: expected ddp for conv-vae, which has no Transformer blocks"),
    ],
    ids=["batch", "fsdp"],
)
def test_mistakes_end_all_processes(
    words: Words, together: Together, tmp_path: Path, options: list[str], message: str
) -> None:
    codes = together([*words("--device", "cpu"), *options])
    assert 2 in codes
    assert set(codes) <= {1, 2}  # one may find the other gone before it comes to the mistake
    assert message in (tmp_path / "output").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_them(words: Words, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "fastgen", *words("--device", "cpu", steps=2)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint ") == 1  # one process speaks
