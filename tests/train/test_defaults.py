"""Options that a run chooses: for the size of its data, from a preset; and the dry run that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastgen.cli import main
from fastgen.train.estimate import Costs
from fastgen.train.presets import GPU, PRESETS

NARROW = ["--model.width", "4", "--model.latent-dim", "8", "--batch-size", "4", "--threads", "1"]


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """40 images of 20x20, in a file."""
    path = tmp_path / "pictures.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8))
    return str(path)


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return found


def test_a_run_prints_and_stores_what_was_chosen_for_its_data(
    pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "dcgan", "--data", pictures, "--out", str(tmp_path / "run"), "--steps", "1", *NARROW]) == 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "chosen for" in each]
    assert line.startswith("fastgen: chosen for 32 items of 20x20x3: --average-decay 0.999 --model.generator-learning-")
    assert "--model.augment color,translation,cutout" in line
    assert "--steps" not in line  # given, as width and batch size
    assert "width" not in line
    kept = config(tmp_path / "run")
    assert (kept["steps"], kept["average_decay"], kept["model"]["width"]) == (1, 0.999, 4)
    assert kept["model"]["augment"] == "color,translation,cutout"
    assert main(["train", "dcgan", "--out", str(tmp_path / "run"), "--resume", "--steps", "2"]) == 0
    assert "chosen for" not in capsys.readouterr().err


def test_conv_vae_does_not_diverge_on_color_images_of_64_pixels(tmp_path: Path) -> None:
    """The learning rate of small images makes the KL infinite in the first steps."""
    path = tmp_path / "pictures.npz"
    random = np.random.default_rng(0)
    images = np.full((40, 64, 64, 3), 255, np.uint8)  # discs on white
    for image in images:
        x, y, radius = random.integers(16, 48, 3)
        rows, columns = np.mgrid[:64, :64]
        image[(rows - x) ** 2 + (columns - y) ** 2 < radius**2 / 4] = random.integers(0, 256, 3)
    np.savez(path, images=images)
    words = ["--steps", "12", "--log-every", "1", "--sample-every", "100", "--evaluate-every", "100"]
    assert main(["train", "conv-vae", "--data", str(path), "--out", str(tmp_path / "run"), *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kls = [line["values"]["kl"] for line in lines if line["part"] == "train"]
    assert len(kls) == 12
    assert all(kl is not None and kl < 1e5 for kl in kls)  # None: not finite


def test_small_images_keep_the_general_defaults_and_epochs_replace_steps(
    fit: Callable[..., int], tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "vae", "--data", str(digits), "--out", str(tmp_path / "run"), "--epochs", "0.5"]) == 0
    assert "chosen for" not in capsys.readouterr().err
    kept = config(tmp_path / "run")
    assert (kept["steps"], kept["epochs"]) == (0, 0.5)


def test_a_dry_run_writes_nothing_and_prints_a_file_of_options(
    pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.train import loop

    monkeypatch.setattr(loop, "REHEARSAL_SECONDS", 0.0)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "run"
    command = ["train", "dcgan", "--data", pictures, "--out", str(out), *NARROW]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert comments[0] == "# fastgen train dcgan"
    named = {line.split()[1] for line in comments}
    assert {"parameters", "data", "memory", "time", "chosen"} <= named
    assert "12,000 steps of " in printed
    assert "20 evaluations" in printed
    options = yaml.safe_load(printed)
    assert (options["steps"], options["model"]["width"]) == (12_000, 4)
    file = tmp_path / "options.yaml"
    file.write_text(printed)
    assert main(["train", "dcgan", "--config", str(file), "--steps", "1", "--out", str(out)]) == 0
    assert config(out) == options | {"steps": 1}


def test_presets_are_overridden_by_options_and_override_the_rest(
    pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "dcgan", "--data", pictures, "--preset", "cifar-10", "--steps", "1", *NARROW]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    kept = config(tmp_path / "run")
    assert (kept["flip"], kept["image_size"]) == (True, 32)
    assert main([*command, "--no-flip", "--image-size", "28", "--out", str(tmp_path / "other")]) == 0
    kept = config(tmp_path / "other")
    assert (kept["flip"], kept["image_size"]) == (False, 28)
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "preset: expected none with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dcgan", "--preset", "imagenet"], "preset: expected one of mnist, emoji-64, "),
        (
            ["transformer-lm", "--preset", "mnist"],
            "preset: expected none, as transformer-lm takes no images, got 'mnist'",
        ),
    ],
)
def test_a_preset_or_a_dry_run_that_does_not_fit_is_refused(
    options: list[str], message: str, error_line: Callable[[], str], tmp_path: Path
) -> None:
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 2
    assert message in error_line()


def test_every_preset_has_a_size_for_a_gpu_and_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert {name + GPU for name, preset in PRESETS.items() if not preset.gpu} == {n for n in PRESETS if PRESETS[n].gpu}
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in PRESETS)


def test_the_time_that_is_left_counts_evaluations_samples_and_checkpoints() -> None:
    costs = Costs(100, {"evaluate": 30, "sample": 50, "checkpoint": 200})
    assert [costs.due("evaluate", step) for step in (0, 30, 31, 90, 99, 100)] == [4, 4, 3, 2, 1, 1]
    assert [costs.due("checkpoint", step) for step in (0, 99, 100)] == [1, 1, 1]
    costs.seconds = {"step": 0.5, "evaluate": 3.0}
    assert costs.left(90) == {"step": 5.0, "evaluate": 6.0}
    costs.seconds["sample"] = 60.0
    assert costs.sentence(0) == "about 3 min 02 s: 100 steps of 500 ms, 4 evaluations 12 s, 2 samples 2 min 00 s"
