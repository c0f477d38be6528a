"""Files appear whole or not at all, and what is no checkpoint is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastgen.cli import main
from fastgen.train import files, run
from fastgen.train.checkpoint import load_checkpoint, save_checkpoint
from fastgen.train.pictures import write_pairs

Metrics = Callable[[Path], list[dict[str, Any]]]


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint.safetensors"
    target.write_bytes(b"old")
    code = (
        "import os, runpy, pathlib\n"
        f"write_whole = runpy.run_path({str(files.__file__)!r})['write_whole']\n"
        "os.fsync = lambda descriptor: os._exit(9)\n"
        f"write_whole(pathlib.Path({str(target)!r}), b'new' * 100000)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_exception_while_writing_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    files.write_whole(tmp_path / "a", b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "a", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_an_interrupted_checkpoint_leaves_the_one_before(
    fit: Callable[..., int], tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == "checkpoint.safetensors" and len(metrics(target.parent)) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert fit(epochs=3) == 130
    assert int(load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["epoch"]) == 1
    assert fit("--resume", epochs=3) == 0
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a checkpoint was run",))


@pytest.mark.parametrize("kind", ["cut short", "another program's", "pickle", "text", "missing"])
def test_what_is_no_checkpoint_is_refused_by_name(
    fit: Callable[..., int],
    tmp_path: Path,
    error_line: Callable[[], str],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    assert fit(epochs=1) == 0
    path = tmp_path / "run" / "checkpoint.safetensors"
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "another program's":
        save_file({"a": torch.zeros(2)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif kind == "text":
        path.write_text("not a checkpoint")
    else:
        path.unlink()
    capsys.readouterr()
    for words in (["sample", str(tmp_path / "run")], ["train", "conv-vae", "--out", str(tmp_path / "run"), "--resume"]):
        assert main(words) == 1
        assert f"{path}: expected a fastgen checkpoint, got " in error_line()


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(fit: Callable[..., int], tmp_path: Path) -> None:
    assert fit(epochs=1) == 0
    header, tensors = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    tensors["average/add_details.bias"] = torch.zeros(3)
    save_checkpoint(tmp_path / "run" / "checkpoint.safetensors", header, tensors)
    with pytest.raises(ValueError, match=r"average/add_details\.bias: expected a tensor of shape \(8,\), got \(3,\)"):
        run.sample(run.RunFolder(tmp_path / "run"), 1, tmp_path / "a.png")


def test_reconstructions_stand_below_their_originals(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.png", torch.ones(5, 3, 32, 32), torch.zeros(5, 3, 32, 32), columns=4)
    with Image.open(tmp_path / "pairs.png") as image:
        column = np.asarray(image)[20::68, 20, 0]  # the middle of each row's first cell
    assert column.tolist() == [255, 0, 255, 0]
