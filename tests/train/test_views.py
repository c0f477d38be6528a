"""``fastgen sample`` with --reconstruct, --encode, --interpolate, --nearest, --sweep, --show and
--history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.cli import main

Main = Callable[..., int]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def cells(path: Path) -> tuple[int, int]:
    """Columns and rows of a grid of 8x8 images, each enlarged 8 times, with gaps of 4."""
    width, height = size_of(path)
    return (width - 4) // 68, (height - 4) // 68


@pytest.fixture
def run(fit: Main, tmp_path: Path) -> Path:
    assert fit("--sample-every", "3", steps=8) == 0
    return tmp_path / "run"


def test_reconstructions_of_held_out_items_and_of_the_users_images(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["sample", str(run), "--reconstruct", "held-out", "--n", "16", "--out", str(out)]) == 0
    assert cells(out) == (16, 2)
    picture = tmp_path / "mine.png"
    Image.new("RGB", (20, 30), (255, 255, 255)).save(picture)
    assert main(["sample", str(run), "--reconstruct", str(picture), "--out", str(out)]) == 0
    assert cells(out) == (1, 2)
    with Image.open(out) as image:
        assert image.getpixel((10, 10)) in (255, (255, 255, 255))


def test_samples_above_their_nearest_training_images(
    run: Path, tmp_path: Path, fit: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    whole = tmp_path / "whole.png"
    assert main(["sample", str(run), "--nearest", "--n", "20", "--out", str(whole)]) == 0
    monkeypatch.setattr("fastgen.train.views.SEARCHED", 7)
    assert main(["sample", str(run), "--nearest", "--n", "20", "--out", str(out)]) == 0
    assert cells(out) == (16, 2)
    assert out.read_bytes() == whole.read_bytes()
    assert fit(model="transformer-lm", steps=1, name="lm") == 0
    assert main(["sample", str(tmp_path / "lm"), "--nearest"]) == 2


def test_latents_are_written_as_arrays(run: Path, tmp_path: Path, fit: Main) -> None:
    out = tmp_path / "z.npz"
    assert main(["sample", str(run), "--encode", "held-out", "--out", str(out)]) == 0
    arrays = np.load(out)
    assert set(arrays) == {"z"}
    assert arrays["z"].shape == (40, 4)
    assert arrays["z"].std() > 0
    assert fit(model="cvae", steps=1, name="cvae") == 0
    assert main(["sample", str(tmp_path / "cvae"), "--encode", "held-out", "--out", str(out)]) == 0
    arrays = np.load(out)
    assert (arrays["z"].shape, arrays["labels"].shape) == ((40, 8), (40,))
    assert len(set(arrays["labels"].tolist())) > 1
    assert fit(model="vq-vae", steps=1, name="vq") == 0
    assert main(["sample", str(tmp_path / "vq"), "--encode", "held-out", "--out", str(out)]) == 0
    assert np.load(out)["z"].shape == (40, 2, 2)


def pictures(folder: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * shade,) * 3).save(folder / name)
    return folder


def test_files_keep_their_names(run: Path, fit: Main, tmp_path: Path) -> None:
    given, out = pictures(tmp_path / "in", "b.png", "a.png", "a.bmp", "more/c.png"), tmp_path / "z.npz"
    assert main(["sample", str(run), "--encode", str(given), "--out", str(out)]) == 0
    assert np.load(out)["names"].tolist() == ["a.bmp", "a.png", "b.png", "more/c.png"]
    assert main(["sample", str(run), "--encode", str(given / "b.png"), "--out", str(out)]) == 0
    assert np.load(out)["names"].tolist() == ["b.png"]
    np.save(tmp_path / "several.npy", np.zeros((3, 8, 8), dtype=np.uint8))
    assert main(["sample", str(run), "--encode", str(tmp_path / "several.npy"), "--out", str(out)]) == 0
    assert {name: len(array) for name, array in np.load(out).items()} == {"z": 3}
    assert fit(model="pix2pix", name="pairs", steps=1) == 0
    for n, names in (("9", ["a.bmp.png", "a.png.png", "b.png", "more/c.png"]), ("2", ["a.bmp.png", "more/c.png"])):
        command = ["sample", str(tmp_path / "pairs"), "--input", str(given), "--n", n, "--out", f"{tmp_path / n}/"]
        assert main(command) == 0
        assert sorted(path.relative_to(tmp_path / n).as_posix() for path in (tmp_path / n).rglob("*.png")) == names


@pytest.mark.parametrize(
    "options",
    [
        ["--out", "a.flac"],
        ["--out", "a.jpg"],
        ["--out", "full/"],
        ["--out", "full/a/"],
        ["--interpolate", "--out", "a.wav"],
        ["--reconstruct", "held-out", "--out", "a.jpg"],
        ["--encode", "held-out", "--out", "a.npy"],
        ["--sweep", "temperature=1", "--out", "a/"],
        ["--nearest", "--out", "a.txt"],
        ["--show", "reconstructions", "--out", "a.jpg"],
        ["--history", "--out", "a.mp4"],
    ],
    ids=" ".join,
)
def test_where_to_write_is_checked_before_the_work(
    run: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "full").mkdir()
    (run.parent / "full" / "a").touch()
    monkeypatch.chdir(run.parent)
    for name in ("input_items", "sample", "_view"):
        monkeypatch.setattr(f"fastgen.cli._sample.{name}", lambda *given, **named: pytest.fail("has begun"))
    capsys.readouterr()
    assert main(["sample", str(run), *options]) in (1, 2)
    assert "expected a" in capsys.readouterr().err


def test_a_conditional_autoencoder_asks_for_the_class_of_the_users_images(
    fit: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "mine.png", tmp_path / "out.png"
    Image.new("L", (8, 8), 100).save(picture)
    assert fit(model="cvae", steps=1) == 0
    command = ["sample", str(tmp_path / "run"), "--reconstruct", str(picture), "--out", str(out)]
    capsys.readouterr()
    assert main(command) == 2
    assert "label: expected the class of the images, as cvae has classes, got none" in capsys.readouterr().err
    assert main([*command, "--label", "3"]) == 0
    assert cells(out) == (1, 2)


def test_interpolations_are_rows_of_eight(run: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    for out in (first, again):
        assert main(["sample", str(run), "--interpolate", "--n", "24", "--seed", "3", "--out", str(out)]) == 0
    assert cells(first) == (8, 3)
    assert first.read_bytes() == again.read_bytes()


def test_a_sweep_has_a_row_for_each_value(
    fit: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    assert fit(model="stylegan", steps=1) == 0
    out = tmp_path / "out.png"
    assert main(["sample", str(tmp_path / "run"), "--sweep", "truncation=0,0.5,1", "--n", "4", "--out", str(out)]) == 0
    assert cells(out) == (4, 3)
    assert fit(model="transformer-lm", steps=1, name="text") == 0
    out = tmp_path / "out.txt"
    command = ["sample", str(tmp_path / "text"), "--length", "5", "--n", "2", "--out", str(out)]
    assert main([*command, "--sweep", "temperature=0.5,2"]) == 0
    found = out.read_text()
    assert found.count("temperature 0.5\n") == found.count("temperature 2\n") == 2


def test_a_models_own_pictures_are_shown_by_name(fit: Main, tmp_path: Path) -> None:
    assert fit(model="sagan", steps=1) == 0
    out = tmp_path / "out.png"
    assert main(["sample", str(tmp_path / "run"), "--show", "attention", "--out", str(out)]) == 0
    assert cells(out) == (7, 16)
    assert main(["sample", str(tmp_path / "run"), "--show", "attention", "--n", "3", "--out", str(out)]) == 0
    assert cells(out) == (7, 6)


def test_the_history_is_an_animation_of_the_saved_samples(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gif"
    assert main(["sample", str(run), "--history", "--out", str(out)]) == 0
    with Image.open(out) as animation:
        assert animation.n_frames == len(list((run / "samples").iterdir())) == 3
        assert animation.size == size_of(run / "samples" / "000008.png")
        assert animation.info["loop"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interpolate", "--history"], "interpolate, history: expected one of them, got 2"),
        (["--reconstruct", "nowhere.png"], "nowhere.png: expected an image or a folder of images"),
        (["--encode", "held-out", "--out", "z.png"], "out: expected a path that ends in .npz, for latents, got z.png"),
        (["--history", "--out", "h.png"], "out: expected a path that ends in .gif, for a history, got h.png"),
        (["--show", "attention"], "show: expected one of reconstructions for conv-vae, got 'attention'"),
        (
            ["--sweep", "label=1"],
            "sweep: expected OPTION=VALUE,VALUE,... of a number that samples depend on (temperature), got 'label=1'",
        ),
        (["--interpolate", "--n", "0"], "n: expected a positive number of samples, got 0"),
    ],
)
def test_views_that_do_not_fit_are_refused(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["sample", str(run), *options]) in (1, 2)
    assert message in capsys.readouterr().err


def test_models_without_latents_are_refused(fit: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(model="image-transformer", steps=1) == 0
    run = str(tmp_path / "run")
    for option, message in (
        (["--interpolate"], "interpolate: image-transformer: expected a model with a continuous latent"),
        (["--reconstruct", "held-out"], "reconstruct, encode: expected an autoencoder, got image-transformer"),
        (["--sweep", "temperature=cold"], "sweep: expected numbers after temperature=, got 'cold'"),
        (["--sweep", "temperature=0.5,x"], "sweep: expected numbers after temperature=, got 'x'"),
        (["--sweep", "label=0"], "of a number that samples depend on (temperature), got 'label=0'"),
        (["--sweep", "temperature=-1"], "sweep: temperature: expected"),
    ):
        capsys.readouterr()
        assert main(["sample", run, *option]) == 2
        assert message in capsys.readouterr().err
