"""Training from the weights of another run, and samples as single files, arrays, and of a class by its name."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen.cli import main
from fastgen.cli._sample import _numbered_label
from fastgen.data import DataConfig, load_data
from fastgen.train.checkpoint import load_checkpoint
from tests.train.conftest import TINY


def pets(folder: Path, size: int = 8, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    pixels = np.random.RandomState(0).randint(0, 256, (12, size, size)).astype(np.uint8)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def fit(folder: Path, data: Path | str, *options: str, model: str = "cgan") -> int:
    return main(["train", model, "--data", str(data), "--out", str(folder), "--steps", "2", *TINY[model], *options])


def test_a_run_starts_from_the_averaged_weights_and_options_of_another(
    tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pets(tmp_path / "pets")
    assert fit(tmp_path / "first", data, "--model.depth", "2", "--average-decay", "0.5") == 0
    begin = ["train", "cgan", "--data", str(data), "--steps", "1", "--learning-rate", "1e-30"]
    monkeypatch.chdir(tmp_path)
    assert main([*begin, "--out", "second", "--init-from", "first"]) == 0
    first, second = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("first", "second"))
    assert second[0].model_config == first[0].model_config
    assert second[0].train_config["init_from"] == str(tmp_path / "first")
    weights = [name for name in first[1] if name.startswith("average/") and name.endswith("weight")]
    assert weights
    for name in weights:
        torch.testing.assert_close(second[1][name], first[1][name])
        torch.testing.assert_close(second[1][name.replace("average/", "model/")], first[1][name])
    assert main([*begin, "--out", "second", "--resume", "--steps", "2", "--init-from", "first"]) == 0
    assert main([*begin, "--out", "second", "--resume", "--steps", "3", "--init-from", "second"]) == 2
    assert "init_from: expected '" in error_line()
    assert main(["train", "cgan", "--config", "second/config.yaml", "--out", "third"]) == 0
    for options, message in (
        (["--init-from", "nowhere"], "nowhere/checkpoint.safetensors: expected a fastgen checkpoint, got a path where"),
        (["--init-from", "first", "--image-size", "16"], "expected data with image_size 8, as in "),
        (
            ["--init-from", "first", "--model.latent-dim", "5", "--model.beta1", "0.1"],
            f"error: model.latent_dim: expected 8, as in {tmp_path / 'first'}, got 5",
        ),
    ):
        assert main([*begin, "--out", "other", *options]) in (1, 2)
        assert message in error_line()
    pets(tmp_path / "more", names=("cat", "dog", "owl"))
    assert main(["train", "cgan", "--data", "more", "--out", "other", "--init-from", "first"]) == 2
    assert "init_from: expected data with classes 2, as in " in error_line()
    assert main(["train", "gan", "--data", "more", "--out", "other", "--init-from", "first"]) == 2
    assert "init_from: expected a run of gan, got one of cgan in " in error_line()
    assert not (tmp_path / "other").exists()


def test_samples_are_written_as_single_files_or_arrays(tmp_path: Path, error_line: Callable[[], str]) -> None:
    assert fit(tmp_path / "run", pets(tmp_path / "pets")) == 0
    command = ["sample", str(tmp_path / "run"), "--n", "6"]
    for out in ("single/", "plain"):
        assert main([*command, "--out", f"{tmp_path}/{out}"]) == 0
    files = sorted((tmp_path / "single").iterdir())
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(6)]
    assert main([*command, "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 8, 8, 1)
        assert arrays["labels"].tolist() == [0, 1] * 3
        for file, pixels in zip(files, arrays["arr_0"], strict=True):
            with Image.open(file) as image:
                assert np.array_equal(np.asarray(image), pixels[:, :, 0])
        torch.manual_seed(0)
        drawn = fastgen.load(tmp_path / "run").sample(6, generator=torch.Generator().manual_seed(0))
        assert isinstance(drawn, torch.Tensor)
        assert np.array_equal(drawn.mul(255).round().byte().permute(0, 2, 3, 1).numpy(), arrays["arr_0"])
    assert main([*command, "--n", "12", "--out", str(tmp_path / "b.npz")]) == 0
    assert load_data(DataConfig(str(tmp_path / "b.npz")), "images").facts["classes"] == 2
    assert main([*command, "--out", str(tmp_path / "single")]) == 1
    assert "single: expected a new or an empty folder, got one with files" in error_line()


def test_texts_and_sounds_are_single_files_too(tmp_path: Path, error_line: Callable[[], str]) -> None:
    assert fit(tmp_path / "lm", "prose", model="transformer-lm") == 0
    assert main(["sample", str(tmp_path / "lm"), "--n", "2", "--length", "9", "--out", f"{tmp_path}/texts/"]) == 0
    assert [file.name for file in sorted((tmp_path / "texts").iterdir())] == ["000000.txt", "000001.txt"]
    assert main(["sample", str(tmp_path / "lm"), "--n", "2", "--length", "9", "--out", f"{tmp_path}/a.npz"]) == 2
    assert "out: expected a path that ends in .txt, got " in error_line()
    tones = ["--seconds", "0.05", "--items", "40"]
    assert fit(tmp_path / "sound", "tones", *tones, model="wavenet") == 0
    assert main(["sample", str(tmp_path / "sound"), "--n", "2", "--out", f"{tmp_path}/sounds/"]) == 0
    (one, _) = sorted((tmp_path / "sounds").iterdir())
    with wave.open(io.BytesIO(one.read_bytes())) as file:
        assert file.getframerate() == 8000


def test_what_was_left_out_of_the_data_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pets(tmp_path / "pets")
    (data / "cat" / "3.png").write_bytes(b"")
    assert fit(tmp_path / "run", data) == 1
    assert "3.png: expected an image, got an empty file: --skip-broken leaves it out" in capsys.readouterr().err
    assert fit(tmp_path / "run", data, "--skip-broken") == 0
    assert "1 files that can't be read were left out: cat/3.png (an empty file)" in capsys.readouterr().err


def test_a_label_is_a_number_or_the_name_of_a_class(tmp_path: Path, error_line: Callable[[], str]) -> None:
    assert fit(tmp_path / "run", pets(tmp_path / "pets")) == 0
    outs = {}
    for label in (["--label", "1"], ["--label", "dog"], ["--label=dog"], ["--label", "cat"], ["--label", "-1"]):
        out = tmp_path / "out.png"
        assert main(["sample", str(tmp_path / "run"), "--n", "4", *label, "--out", str(out)]) == 0
        outs[" ".join(label)] = out.read_bytes()
    assert outs["--label 1"] == outs["--label dog"] == outs["--label=dog"] != outs["--label cat"]
    assert main(["sample", str(tmp_path / "run"), "--label", "owl"]) == 2
    assert "label: expected a class, cat, dog, got owl" in error_line()


def test_the_name_of_a_class_precedes_its_number() -> None:
    classes = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ..., as folders are sorted
    assert _numbered_label(["--label", "10"], classes) == ["--label", "2"]
    assert _numbered_label(["--label=2"], classes) == ["--label=4"]
    assert _numbered_label(["--label", "-1"], classes) == ["--label", "-1"]
    assert _numbered_label(["--label", "2"], ["cat", "dog", "owl"]) == ["--label", "2"]


@pytest.mark.parametrize("model", ["vae", "dcgan"])
def test_a_dataset_with_a_test_split_and_random_pixels_trains_and_resumes_bit_for_bit(
    tmp_path: Path, model: str
) -> None:
    for split in ("train", "test"):
        pets(tmp_path / "pets" / split)
    data = str(tmp_path / "pets")
    options = ["--binarize", "dynamic"] if model == "vae" else ["--augment", "translation,color"]
    options += [] if model == "vae" else ["--model.augment", "cutout,color", "--model.augment-target", "0.6"]
    assert fit(tmp_path / "straight", data, *options, "--steps", "4", model=model) == 0
    assert fit(tmp_path / "halves", data, *options, "--steps", "2", model=model) == 0
    assert main(["train", model, "--out", str(tmp_path / "halves"), "--resume", "--steps", "4"]) == 0
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.safetensors")[1] for name in ("straight", "halves"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(["sample", str(tmp_path / "halves"), "--out", str(tmp_path / "a.png")]) == 0
