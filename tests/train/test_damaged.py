"""Files of a run that were damaged, or can't be read: refused in one line that names them, never taken as they are."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from fastgen.cli import main
from fastgen.models import ConvVAE
from fastgen.models.digest import UNSEALED, is_whole, seal
from fastgen.train import evaluate
from fastgen.train.checkpoint import Header, load_checkpoint, save_checkpoint
from fastgen.train.files import temporary_name
from fastgen.train.lock import NAME
from tests.train.conftest import TINY

Main = Callable[..., int]
Metrics = Callable[..., list[dict[str, Any]]]
DEAD_PID = 2**22 + 1  # above the largest number of a process
EVALUATE = ["--n", "20", "--importance", "0", "--resamples", "0"]


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    briefly = functools.partial(evaluate.metrics.classifier_features, steps=2)
    monkeypatch.setattr(evaluate.metrics, "classifier_features", briefly)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of a run of two steps that was evaluated."""
    from fastgen.train.loop import Trainer

    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["train", "conv-vae", "--steps", "2", "--data", str(digits), "--out", str(folder), *TINY["conv-vae"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "write_pages", lambda self: None)
        patch.setattr(evaluate, "write_report", lambda folder: None)
        briefly = functools.partial(evaluate.metrics.classifier_features, steps=2)
        patch.setattr(evaluate.metrics, "classifier_features", briefly)
        assert main(words) == 0
        assert main(["evaluate", str(folder), *EVALUATE]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def without_digest(path: Path, **changed: torch.Tensor) -> None:
    """As an earlier version wrote the file."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name not in ("digest", "config")}
    save_file({**load_file(path), **changed}, path, metadata)


def flip(path: Path, at: int = -50) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_digest_covers_every_byte_of_a_file() -> None:
    data = seal(safetensors.torch.save({"a": torch.arange(5.0)}, {"more": "text", **UNSEALED}))
    assert is_whole(data)
    length = int.from_bytes(data[:8], "little")
    key = data.index(b'"digest"')
    for at in range(8, len(data)):
        changed = bytearray(data)
        changed[at] ^= 4
        try:
            safetensors.torch.load(bytes(changed))
        except safetensors.SafetensorError:
            continue
        unsealed = at < 8 + length and key <= at < key + len('"digest"')  # then it counts as one of an earlier version
        assert is_whole(bytes(changed)) == unsealed
    with pytest.raises(ValueError, match="expected a safetensors file with 'digest' in its metadata, got none"):
        seal(b"")


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (flip, "got a damaged file (its digest differs); remove it"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "got a damaged file ("),
    "text": (lambda path: path.write_text("no features"), "got a damaged file ("),
    "old, zeros": (
        lambda path: without_digest(path, **{name: 0 * of for name, of in load_file(path).items() if "body" in name}),
        "expected features of mean 0 and deviation 1, got others: damaged? remove it",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_damaged_feature_space_is_rejected(
    run: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, message = SPOILED[case]
    before = (run / "evaluation.json").read_bytes()
    spoil(run / "features.safetensors")
    capsys.readouterr()
    assert main(["evaluate", str(run), *EVALUATE]) == 1
    line = error_line()
    assert f"{run / 'features.safetensors'}: expected " in line
    assert message in line
    assert (run / "evaluation.json").read_bytes() == before


def test_a_feature_space_of_an_earlier_version_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        capsys.readouterr()
        assert main(["evaluate", str(run), *EVALUATE]) == 0
        printed.append(capsys.readouterr().out)
        without_digest(run / "features.safetensors")
        before = (run / "features.safetensors").read_bytes()
    assert printed[0] == printed[1]
    assert (run / "features.safetensors").read_bytes() == before


def test_damaged_pretrained_weights_are_rejected_and_old_ones_without_a_digest_load(run: Path) -> None:
    model, weights = run / "model", run / "model" / "model.safetensors"
    expected = ConvVAE.from_pretrained(model).state_dict()
    data = weights.read_bytes()
    flip(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights of a ConvVAE, got a damaged file"):
        ConvVAE.from_pretrained(model)
    weights.write_bytes(data)
    without_digest(weights)
    found = ConvVAE.from_pretrained(model).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list(model.glob(".*"))


def test_options_of_a_saved_model_have_to_be_those_of_its_weights(run: Path) -> None:
    model, file = run / "model", run / "model" / "config.json"
    text, config = file.read_text(), json.loads(file.read_text())
    less = {name: value for name, value in config.items() if name != "likelihood"}
    cases = {
        "{}": r"expected the options that were saved with the weights, got a file without .*width",
        json.dumps(less): "got a file without likelihood; config=... replaces them",
        json.dumps({**config, "latent_dim": 3}): "got other ones",
        text[:40]: "expected JSON, got a file that is cut short or damaged",
        "[]": "expected options of a model, got list",
    }
    for content, message in cases.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json: .*({message})"):
            ConvVAE.from_pretrained(model)
    file.write_text(json.dumps(less))
    options = {name: value for name, value in config.items() if name not in ("model_type", "class_names")}
    given = ConvVAE.from_pretrained(model, config=ConvVAE.config_class(**options))
    assert given.config.likelihood == config["likelihood"]
    without_digest(model / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: expected all options of the model, got none for likelihood"):
        ConvVAE.from_pretrained(model)
    file.write_text(text)
    assert ConvVAE.from_pretrained(model).config.width == 4


def test_a_checkpoint_without_options_of_its_model_is_refused(run: Path, error_line: Callable[[], str]) -> None:
    path = run / "checkpoint.safetensors"
    header, tensors = load_checkpoint(path)
    fields = dict(vars(header))
    for change, message in (
        ({"model_config": {}}, "got no options of the model"),
        ({"data_config": {}}, "got no source of the data"),
        ({"data_config": {"source": "digits", "size": 3}}, "got DataConfig.__init__"),
        ({"model_config": [3]}, "got "),
    ):
        save_checkpoint(path, Header(**(fields | change)), tensors)
        for words in (["sample", str(run)], ["train", "conv-vae", "--out", str(run), "--resume"]):
            assert main(words) == 1
            line = error_line()
            assert f"{path}: expected a checkpoint of this version of fastgen, " in line
            assert message in line


def test_damaged_lines_of_metrics_are_dropped_with_a_warning(run: Path, fit: Main, metrics: Metrics) -> None:
    (run / "metrics.jsonl").write_bytes(
        b'{"step": 1, "part": "train", "values": {"loss": 1, "\\u2028": 2}, "seconds": "long"}\n'
        b'{"step": 1, "par\xfft\n\0\0\0\n[1]\n'
        b'{"step": 2, "part": "held-out", "values": {"nll": "x"}}\n{"step": 2, "pa'
    )
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 2 damaged lines were left out"):
        assert fit("--resume", "--log-every", "1", steps=3) == 0
    assert [row["step"] for row in metrics(run)] == [1, 3]


def test_temporary_files_of_dead_processes_are_removed_and_nothing_else(run: Path, fit: Main) -> None:
    def temporary(path: Path, pid: int) -> Path:
        return path.with_name(temporary_name(path).name.replace(str(os.getpid()), str(pid)))

    checkpoint, image = run / "checkpoint.safetensors", run / "samples" / "000002.png"
    image.parent.mkdir(exist_ok=True)
    dead = [temporary(checkpoint, DEAD_PID), temporary(image, DEAD_PID), run / ".metrics.jsonl.tmp"]
    kept = [temporary(checkpoint, os.getppid()), run / ".notes.1.tmp"]
    for file in dead + kept:
        file.write_text("half")
    saving = temporary(run / "model" / "saving", DEAD_PID)
    saving.mkdir()
    (saving / "config.json").write_text("half")
    dead.append(saving)
    assert fit("--resume", steps=3) == 0
    assert [file.exists() for file in dead + kept] == [False] * len(dead) + [True] * len(kept)


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "damaged environment": (
        lambda run: (run / "environment.json").write_bytes(b'{"format": "fast\xff'),
        "environment.json: expected the environment of a fastgen run, got a damaged file: ",
    ),
    "no environment": (
        lambda run: (run / "environment.json").unlink(),
        "got a folder with checkpoint.safetensors from",
    ),
    "folder as checkpoint": (
        lambda run: folder_in_place(run / "checkpoint.safetensors"),
        "checkpoint.safetensors: expected a fastgen checkpoint, got a folder",
    ),
    "link as checkpoint": (
        lambda run: [(run / "checkpoint.safetensors").unlink(), (run / "checkpoint.safetensors").symlink_to("gone")],
        "checkpoint.safetensors: expected a fastgen checkpoint, got a link to gone, where there is nothing",
    ),
    "folder as metrics": (
        lambda run: folder_in_place(run / "metrics.jsonl"),
        "metrics.jsonl: expected a file that can be read, got a folder",
    ),
    "folder as lock": (lambda run: (run / NAME).mkdir(), f"{NAME}: expected to write it, got: Is a directory"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_of_a_run_that_cannot_be_read_are_named(
    run: Path, fit: Main, error_line: Callable[[], str], case: str
) -> None:
    spoil, message = UNREADABLE[case]
    spoil(run)
    assert fit("--resume", steps=3) == 1
    line = error_line()
    assert message in line
    assert "Errno" not in line


def test_paths_that_can_hold_no_run_are_refused(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").write_text("")
    for name, code, message in (
        ("link", 1, "link: expected a folder for the run, got a link to gone, where there is nothing"),
        ("file/run", 1, "file/run: expected to make the folder, got: Not a directory"),
        ("two\nlines", 2, "out: expected a path without line ends and other control characters, got '"),
        ("two\u2028lines", 2, "out: expected a path without line ends and other control characters, got '"),
    ):
        assert fit(name=name) == code
        line = error_line()
        assert message in line
        assert "Errno" not in line
    assert main(["sample", str(tmp_path / "link")]) == 1
    assert "link/checkpoint.safetensors: expected a fastgen checkpoint, got a path where there is" in error_line()

    def refuse(*args: Any, **options: Any) -> None:  # as root no folder is out of reach
        raise PermissionError(13, "Permission denied", str(args[0]))

    monkeypatch.setattr(os, "open", refuse)
    assert fit() == 1
    assert f"{NAME}: expected to write it, got: Permission denied" in error_line()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_run_on_a_bundled_dataset_resumes_beside_a_folder_of_that_name(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit("--data", "digits", steps=1) == 0
    (tmp_path / "digits").mkdir()
    assert fit("--resume", steps=2) == 0
    assert main(["train", "conv-vae", "--out", "default", "--steps", "1", *TINY["conv-vae"]]) == 0
    assert fit("--data", "bundled:digits", name="named", steps=1) == 0
    assert fit("--data", "digits", name="other", steps=1) == 1
    assert "digits: expected bundled:digits (the bundled dataset) or ./digits (the path)" in error_line()
    assert fit("--resume", "--data", "bundled:digits", steps=3) == 0
