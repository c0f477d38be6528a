"""The command line: options, pictures, exit codes and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.cli import EXTRAS, main

ROOT = Path(__file__).resolve().parents[2]


def test_sample_writes_a_grid_that_its_seed_decides(fit: Callable[..., int], tmp_path: Path) -> None:
    assert fit() == 0
    pictures = {}
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(tmp_path / "run"), "--n", "12", "--out", str(out), "--seed", seed]) == 0
        pictures[name] = out.read_bytes()
    assert pictures["a"] == pictures["b"] != pictures["c"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (4 * 68 + 4, 3 * 68 + 4)  # cells of 8 pixels, enlarged 8 times, and gaps of 4
        assert len(np.unique(np.asarray(image))) > 10


def test_options_can_come_from_a_file(fit: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("learning_rate: 0.001\nmodel:\n  latent_dim: 3\n")
    assert fit("--config", str(tmp_path / "options.yaml")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train_config"]["learning_rate"] == 0.001
    assert config["model_config"]["latent_dim"] == 3
    assert config["model_config"]["width"] == 4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "expected a command, one of train, sample, info"),
        (["paint"], 2, "invalid choice: 'paint'"),
        (["train"], 2, "train: expected a model, one of conv-vae, got nothing"),
        (["train", "gan"], 2, "train: expected a model, one of conv-vae, got gan"),
        (["train", "conv-vae", "--epochs", "many"], 2, "epochs: Expected int. Got value: many"),
        (["train", "conv-vae", "--epochs", "0"], 2, "epochs: expected a positive integer, got 0"),
        (["train", "conv-vae", "--learning-rate", "-1"], 2, "learning_rate: expected a positive number, got -1.0"),
        (["train", "conv-vae", "--model.width", "0"], 2, "model.width: expected a positive integer, got 0"),
        (["train", "conv-vae", "--model.likelihood", "bernoulli"], 2, "model.levels: expected 2 with likelihood"),
        (["train", "conv-vae", "--depth", "3"], 2, "--depth"),
        (["train", "conv-vae", "--device", "abacus"], 2, "device: expected one that this machine has, got 'abacus'"),
        (["sample"], 2, "required: run"),
        (["sample", "nowhere"], 1, "nowhere/checkpoint.safetensors: expected a fastgen checkpoint"),
        (["sample", "nowhere", "--n", "0"], 2, "n: expected a positive number of samples, got 0"),
        (["sample", "nowhere", "--seed", "-1"], 2, "seed: expected an integer from 0 to 2^63 - 1, got -1"),
        (["sample", "nowhere", "--out", "grid.jpg"], 2, "out: expected a path that ends in .png, got grid.jpg"),
        (["info", "now"], 2, "unrecognized arguments: now"),
    ],
)
def test_mistakes_end_in_one_line_and_the_right_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_line: Callable[[], str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    line = error_line()
    assert line.startswith("fastgen: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_tracebacks_come_only_with_debug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["sample", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "conv-vae"], ["sample", "runs/a"]])
def test_a_missing_extra_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str], command: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(command) == 1
    assert f"{command[0]} needs scikit-learn, tqdm: pip install 'fastgen[train]'" in error_line()


def test_help_version_and_info_need_no_extras() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[*EXTRAS, 'yaml']!r}))\n"
        "from fastgen.cli import main\n"
        "sys.exit(main(['--help']) + main(['--version']) + main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train MODEL" in done.stdout
    assert "fastgen 0." in done.stdout


def test_train_help_lists_the_options_of_loop_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "conv-vae", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--data", "--out", "--epochs", "--batch-size", "--learning-rate", "--seed", "--device",
                   "--resume", "--overwrite", "--config", "--model.latent-dim", "--model.likelihood"):  # fmt: skip
        assert option in text
    assert "--model.levels" not in text  # the data decide
