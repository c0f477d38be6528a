"""A run from start to end: what it writes, what it refuses to touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Metrics = Callable[[Path], list[dict[str, Any]]]
SameTensors = Callable[[Path, Path], bool]


def test_training_improves_the_held_out_elbo_and_fills_the_folder(
    fit: Callable[..., int], tmp_path: Path, metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(epochs=4) == 0
    folder = tmp_path / "run"
    names = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "samples.png", "reconstructions.png"}
    assert {file.name for file in folder.iterdir()} == names
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["held_out_elbo"] > rows[0]["held_out_elbo"] + 5
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 5
    assert all(row["images_per_second"] > 0 and row["seconds"] > 0 for row in rows)
    assert rows[0]["held_out_elbo"] == pytest.approx(-rows[0]["held_out_nll"] - rows[0]["held_out_kl"])
    printed = capsys.readouterr()
    assert printed.err.count("epoch ") == 4  # plain lines, as this is no terminal
    assert f"held-out ELBO    {rows[-1]['held_out_elbo']:.2f} nats per image (40 images)" in printed.out
    assert str(folder / "samples.png") in printed.out


def test_another_seed_gives_other_weights(fit: Callable[..., int], tmp_path: Path, same_tensors: SameTensors) -> None:
    assert fit(name="a", epochs=1) == fit(name="b", epochs=1) == fit("--seed", "1", name="c", epochs=1) == 0
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert not same_tensors(tmp_path / "a", tmp_path / "c")


def test_a_folder_that_holds_a_run_is_refused(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str]
) -> None:
    assert fit(epochs=1) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert fit(epochs=2) == 1
    assert "holds a run already; --resume goes on with it, --overwrite replaces it" in error_line()
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_overwrite_replaces_the_run_and_nothing_else(fit: Callable[..., int], tmp_path: Path, metrics: Metrics) -> None:
    assert fit(epochs=2) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert fit("--overwrite", epochs=1) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1]


def test_files_of_another_program_are_never_replaced(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"theirs": 1}')
    assert fit("--overwrite") == 1
    assert "config.json from another program" in error_line()
    assert (tmp_path / "run" / "config.json").read_text() == '{"theirs": 1}'
    (tmp_path / "file").write_text("")
    assert fit(name="file") == 1
    assert "expected a folder for the run, got a file" in error_line()
