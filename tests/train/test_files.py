"""Files appear whole or not at all, and what is no checkpoint is refused."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastgen.cli import main
from fastgen.models import ConvVAE
from fastgen.train import files
from fastgen.train.checkpoint import load_checkpoint, save_checkpoint
from fastgen.train.folder import RunFolder
from fastgen.train.trained import open_run

Main = Callable[..., int]
Metrics = Callable[..., list[dict[str, Any]]]
SameTensors = Callable[[Path, Path], bool]
TINY = {"conv-vae": ["--model.width", "4", "--model.hidden-dim", "16", "--batch-size", "32"]}


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


def test_a_link_planted_for_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("theirs")
    files.temporary_name(tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    files.write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "elsewhere").read_text() == "theirs"


def test_an_interrupted_checkpoint_leaves_the_previous_one(
    fit: Main, tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == "checkpoint.safetensors" and len(metrics(target.parent)) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    options = ["--log-every", "2", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert fit(*options, steps=6) == 130
    assert int(load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"]) == 2
    assert fit("--resume", steps=6) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [2, 4, 6]


def test_a_full_disk_gives_one_line_and_keeps_the_previous_checkpoint(
    fit: Main, words: Callable[..., list[str]], start: Callable[..., Any], tmp_path: Path, same_tensors: SameTensors
) -> None:
    """A limit on the size of files stands for the disk: a write beyond it fails just so, in the middle."""
    assert fit("--checkpoint-every", "4", steps=4) == 0
    kept = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    process = start(words("--resume", steps=8), limit=str(len(kept) - 1))
    process.join(timeout=120)
    assert process.exitcode == 1
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert f"{checkpoint}: expected to write it, got: File too large; what was there is kept; step 4 is saved" in output
    assert "--resume" in output
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == kept
    assert fit("--resume", steps=8) == 0
    assert fit(name="straight", steps=8) == 0
    assert same_tensors(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_disk_that_is_really_full(fit: Main, tmp_path: Path, error_line: Callable[[], str]) -> None:
    """On a file system of its own, which takes a privileged user."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        assert fit("--out", str(disk / "run"), steps=4) == 0
        kept = (disk / "run" / "checkpoint.safetensors").read_bytes()
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert fit("--resume", "--out", str(disk / "run"), steps=8) == 1
        assert "No space left on device" in error_line()
        assert (disk / "run" / "checkpoint.safetensors").read_bytes() == kept
        (disk / "filler").unlink()
        assert fit("--resume", "--out", str(disk / "run"), steps=8) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a checkpoint was run",))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


SPOILED: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "a changed bit": flip_a_bit,
    "another header": lambda path: path.write_bytes(path.read_bytes().replace(b"conv-vae", b"conv-vax")),
    "another program's": lambda path: save_file({"a": torch.zeros(2)}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Trap())),
    "text": lambda path: path.write_text("not a checkpoint"),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    from fastgen.train.loop import Trainer

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "write_pages", lambda self: None)
        assert main(["train", "conv-vae", "--steps", "2", "--out", str(folder), *TINY["conv-vae"]]) == 0
    return folder


@pytest.mark.parametrize("kind", SPOILED)
def test_other_files_are_rejected_as_checkpoints_and_never_run(
    finished: Path, tmp_path: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "checkpoint.safetensors"
    SPOILED[kind](path)
    capsys.readouterr()
    commands = [["sample", str(folder)], ["evaluate", str(folder)]]
    if kind != "missing":
        commands.append(["train", "conv-vae", "--out", str(folder), "--resume"])
    for words in commands:
        assert main(words) == 1
        line = error_line()
        assert f"{path}: expected a fastgen checkpoint, got " in line
        assert "was run" not in line


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    header, tensors = load_checkpoint(finished / "checkpoint.safetensors")
    tensors["average/add_details.bias"] = torch.zeros(3)
    save_checkpoint(folder.checkpoint, header, tensors)
    with pytest.raises(ValueError, match=r"average/add_details\.bias: expected a tensor of shape \(8,\), got \(3,\)"):
        open_run(folder)


def test_pretrained_weights_are_never_read_from_a_pickle(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: expected the weights of a ConvVAE"):
        ConvVAE.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="expected the weights of a ConvVAE, got"):
        ConvVAE.from_pretrained(folder)
    (folder / "config.json").write_text('{"width": 4, "depth": 3}')
    with pytest.raises(ValueError, match=r"config.json: expected options of ConvVAE, got \['depth'\]"):
        ConvVAE.from_pretrained(folder)


def test_no_load_path_can_read_a_pickle() -> None:
    """Whoever adds one has to change this test."""
    package = Path(files.__file__).parents[1]
    calls = {"load": ("torch", "pickle", "joblib", "dill"), "loads": ("pickle", "marshal", "dill")}
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in calls.get(node.attr, ()):
                    found.append(f"{path.name}: {node.value.id}.{node.attr}")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False
    assert found == []


@pytest.mark.parametrize("name", ["samples", "model", "tensorboard", "metrics.jsonl"])
def test_a_run_never_writes_through_a_link_that_leads_out_of_its_folder(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options = ["--trackers", "tensorboard"] if name == "tensorboard" else []
    assert fit(*options, steps=2) == 0
    inside, outside = tmp_path / "run" / name, tmp_path / "outside"
    if inside.is_dir():
        shutil.rmtree(inside)
        outside.mkdir()
    else:
        inside.unlink()
        outside.write_text("")
    inside.symlink_to(outside)
    capsys.readouterr()
    assert fit("--resume", *options, steps=4) == (0 if name == "metrics.jsonl" else 1)
    if name == "metrics.jsonl":
        assert outside.read_text() == ""  # the link was replaced by a file
        assert not inside.is_symlink()
    else:
        assert f"{inside}: expected a folder of its own, got a link to another place" in error_line()
        assert not list(outside.iterdir())


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", "", "C:x"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected a plain name for a file inside, got"):
        files.inside(tmp_path, name)
