"""The command line: options, images, exit codes and one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastgen.cli import EXTRAS, WAITING, main

Main = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]


def test_sample_writes_a_grid_that_its_seed_decides(fit: Main, tmp_path: Path) -> None:
    assert fit(steps=2) == 0
    images = {}
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(tmp_path / "run"), "--n", "12", "--out", str(out), "--seed", seed]) == 0
        images[name] = out.read_bytes()
    assert images["a"] == images["b"] != images["c"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (4 * 68 + 4, 3 * 68 + 4)  # cells of 8 pixels, enlarged 8 times, and gaps of 4
        assert len(np.unique(np.asarray(image))) > 10


def test_sample_prints_text_or_writes_it(fit: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(model="transformer-lm", steps=2) == 0
    capsys.readouterr()
    run, out = str(tmp_path / "run"), tmp_path / "a.txt"
    options = ["--n", "2", "--prompt", "12 times", "--length", "8"]
    assert main(["sample", run, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("12 times") >= 2
    assert main(["sample", run, *options, "--out", str(out)]) == 0
    assert out.read_text().count("12 times") >= 2
    assert main(["sample", run, "--prompt", "ö"]) == 2
    assert "'ö'" in capsys.readouterr().err
    assert main(["sample", run, "--help"]) == 0
    assert "--temperature" in capsys.readouterr().out


def test_a_model_of_pairs_or_domains_translates_held_out_items_or_given_images(
    fit: Main, tmp_path: Path, error_line: Callable[[], str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in (("b", (40, 50)), ("a", (33, 32))):
        Image.new("RGB", size, "teal").save(photos / f"{name}.png")
    for model, options in (("pix2pix", []), ("cyclegan", ["--direction", "b-to-a"])):
        assert fit(model=model, name=model, steps=1) == 0
        sheets = {}
        for given in (["--n", "3"], ["--n", "3", *options], ["--input", str(photos)], ["--input", f"{photos}/a.png"]):
            out = tmp_path / "out.png"
            assert main(["sample", str(tmp_path / model), *given, "--out", str(out)]) == 0
            with Image.open(out) as image:
                sheets[" ".join(given)] = (image.size, image.mode, out.read_bytes())
        cells = [(size[0] // 68, size[1] // 68) for size, _, _ in sheets.values()]
        assert cells == [(2, 2)] * (2 if options else 1) + [(2, 1), (1, 1)]
        assert {mode for _, mode, _ in sheets.values()} == {"RGB" if model == "pix2pix" else "L"}
        assert len({data for _, _, data in sheets.values()}) == len(sheets)
    (photos / "empty").mkdir()
    for path, message in (
        ("nowhere", "expected an image or a folder of images"),
        ("photos/empty", "expected images (.png"),
    ):
        assert main(["sample", str(tmp_path / "pix2pix"), "--input", str(tmp_path / path)]) == 1
        assert f"{path}: {message}" in error_line()
    assert main(["sample", str(tmp_path / "cyclegan"), "--direction", "up"]) == 2
    assert "direction" in error_line()


def test_a_file_can_set_options_but_not_where_to_write(
    fit: Main, tmp_path: Path, error_line: Callable[[], str]
) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("learning_rate: 0.001\nmodel:\n  latent_dim: 3\n")
    assert fit("--config", str(options), steps=1) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["learning_rate"] == 0.001
    assert settings["model"]["latent_dim"] == 3
    assert settings["model"]["width"] == 4
    for text in (f"out: {tmp_path / 'elsewhere'}\n", "overwrite: true\n"):
        options.write_text(text)
        assert main(["train", "conv-vae", "--config", str(options)]) == 2
        assert f"{text.partition(':')[0]}: expected on the command line" in error_line()
    assert not (tmp_path / "elsewhere").exists()


def test_models_and_data_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert all(name in capsys.readouterr().out for name in ["conv-vae"])
    assert main(["models", "dcgan"]) == 0
    described = capsys.readouterr().out
    for text in ("Radford, Metz and Chintala", "by default digits", "--model.latent-dim", "(default 64)", "DCGANConfig",
                 "least-squares", "fastgen train dcgan --data digits --out runs/dcgan", 
                 "--steps 3368", "images of 28x28: --steps 12000"):  # fmt: skip
        assert text in described
    assert "--model.image-size" not in described  # set by the data
    assert main(["data"]) == 0
    assert "digits" in capsys.readouterr().out
    out = tmp_path / "digits.png"
    assert main(["data", "digits", "--out", str(out)]) == 0
    assert "image_size: 8" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.size[0] > 100


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "expected a command, one of train, sample, evaluate, models, data, info, bench, got nothing"),
        (["paint"], 2, "invalid choice: 'paint'"),
        (["trian"], 2, "did you mean train?"),
        (["help"], 2, "did you mean --help?"),
        (["--versoin"], 2, "did you mean --version?"),
        (["train", "GAN"], 2, "got GAN; did you mean gan?"),
        (["models", "dcgn"], 2, "got dcgn; did you mean dcgan?"),
        (["bench", "--rounds", "-1"], 2, "rounds: expected a positive number"),
        (["data", "digits", "--out", "nowhere/a.png"], 2, "out: expected a path in a folder that exists"),
        (["data", "nowhere", "--out", "a.xyz"], 2, "out: expected a path that ends in .png, got a.xyz"),
        (["train"], 2, "train: expected a model, one of attention-gan, cdcgan, cgan,"),
        (["train", "pix3pix"], 2, "got pix3pix"),
        (["train", "conv-vae", "--epochs", "many"], 2, "epochs: Expected float. Got value: many"),
        (["train", "conv-vae", "--epochs", "0"], 2, "epochs: expected a positive number, got 0.0"),
        (["train", "conv-vae", "--learning-rate", "-1"], 2, "learning_rate: expected a positive number, got -1.0"),
        (["train", "conv-vae", "--model.width", "0"], 2, "model.width: expected a positive integer, got 0"),
        (["train", "conv-vae", "--model.likelihood", "bernoulli"], 2, "model.levels: expected 2 with likelihood"),
        (["train", "conv-vae", "--depth", "3"], 2, "--depth"),
        (["train", "conv-vae", "--device", "abacus"], 2, "device: expected one that this machine has, got 'abacus'"),
        (["train", "conv-vae", "--batch-size", "65", "--accumulate", "2"], 2, "batch_size: expected a multiple of"),
        (["train", "conv-vae", "--trackers", "slate"], 2, "trackers: expected"),
        (["train", "conv-vae", "--data", "prose"], 1, "prose: expected data of kind images"),
        (["train", "transformer-lm", "--data", "digits"], 1, "digits: expected data of kind text"),
        (["train", "dcgan", "--model.penalty", "r9"], 2, "model.penalty"),
        (["sample"], 2, "expected a run's folder first, got nothing"),
        (["sample", "nowhere"], 1, "nowhere/checkpoint.safetensors: expected a fastgen checkpoint"),
        (["evaluate"], 2, "required: run"),
        (["evaluate", "nowhere", "--n", "0"], 2, "n: expected a positive number, got 0"),
        (["evaluate", "nowhere"], 1, "nowhere/checkpoint.safetensors: expected a fastgen checkpoint"),
        (["data", "nowhere"], 1, "nowhere"),
        (["data", "digits", "--kind", "smells"], 2, "kind: expected one of images, pairs"),
        (["models", "now"], 2, "models: expected a model, one of attention-gan, cdcgan"),
        (["info", "now"], 2, "unrecognized arguments: now"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "0"], "n: expected a positive number of samples, got 0"),
        (["--seed", "-1"], "seed: expected an integer from 0 to 2^63 - 1, got -1"),
        (["--out", "nowhere/grid.png"], "out: expected a path in a folder that exists, got nowhere/grid.png"),
        (["--out", "grid.jpg"], "out: expected a path that ends in .png, got grid.jpg"),
        (["--device", "abacus"], "device: expected one that this machine has, got 'abacus'"),
        (["--label", "cat"], "conv-vae has the sampling options --temperature"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_in_sampling_are_named(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], options: list[str], message: str
) -> None:
    assert fit(steps=1) == 0
    assert main(["sample", str(tmp_path / "run"), *options]) == 2
    assert message in error_line()


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
        f"import sys; sys.modules.update(dict.fromkeys({[*EXTRAS]!r}))\n"
        "from fastgen.cli import main\n"
        "sys.exit(main(['--help']) + main(['--version']) + main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train MODEL" in done.stdout
    assert "fastgen 0." in done.stdout


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("sample", {}, "2000"),
        ("sample", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("sample", {"GOMP_SPINCOUNT": "1000"}, "1000"),
        ("info", {}, "None"),
    ],
)
def test_threads_of_training_commands_sleep_while_they_wait_unless_the_user_chose(
    command: str, given: dict[str, str], expected: str
) -> None:
    # The command itself, which imports torch, is left out.
    code = (
        "import os, sys, types; sys.argv = ['fastgen']\n"  # else torch is imported first
        "from fastgen.cli import main\n"
        f"command = sys.modules['fastgen.cli._{command}'] = types.ModuleType('command')\n"
        "command.run = lambda argv: print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))\n"
        f"main([{command!r}, '--help'])"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=inherited | given)
    assert done.stdout.split() == ["False", expected], done.stderr


def test_train_help_lists_the_options_of_loop_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "conv-vae", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--data", "--out", "--epochs", "--batch-size", "--learning-rate", "--seed", "--device",
                   "--resume", "--overwrite", "--config", "--model.latent-dim", "--model.likelihood"):  # fmt: skip
        assert option in text
    assert "--model.levels" not in text  # set by the data


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_part_of_a_run_s_folder_is_not_taken_for_the_run(
    tmp_path: Path, error_line: Callable[[], str], command: str
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    for part in ("model", "checkpoint.safetensors"):
        assert main([command, str(tmp_path / "run" / part)]) == 2
        assert f"expected a run's folder, got its {part}; the run is {tmp_path / 'run'}" in error_line()
