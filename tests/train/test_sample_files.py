"""Samples are written as image, text and audio files, for any values, and only inside the folder."""

from __future__ import annotations

import errno
import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.models import Images, Samples, Sounds, Texts
from fastgen.train.curves import read_rows, write_curves
from fastgen.train.errors import UsageError
from fastgen.train.files import inside
from fastgen.train.sample_files import GAP, NOT_FINITE, SILENCE, TEXT_SEPARATOR, save_samples
from fastgen.train.trained import write_arrays, write_single_samples

RATE = 800
NAN, INF = float("nan"), float("inf")


def test_pixels_are_clamped_and_those_that_are_not_finite_have_a_color(tmp_path: Path) -> None:
    pixels = torch.tensor([[-1.0, 0.5, 2.0, NAN], [INF, -INF, 0.0, 1.0]]).view(2, 1, 1, 4)
    path = save_samples(tmp_path / "samples", "000100", Images(pixels, columns=1))
    assert path == tmp_path / "samples" / "000100.png"
    image = np.asarray(Image.open(path).convert("RGB"))
    scale = (image.shape[1] - 2 * GAP) // 4
    row, next_row = image[GAP, GAP + scale // 2 :: scale][:4], image[GAP + scale + GAP, GAP + scale // 2 :: scale][:4]
    alarm = [round(255 * part) for part in NOT_FINITE]
    assert row.tolist() == [[0] * 3, [128] * 3, [255] * 3, alarm]
    assert next_row.tolist() == [alarm, alarm, [0] * 3, [255] * 3]


def test_texts_are_separated_and_any_characters_can_be_written(tmp_path: Path) -> None:
    path = save_samples(tmp_path, "000100", Texts(["one\nline", "zwölf ☃", "half \ud800"]))
    assert path.read_text(encoding="utf-8").split(f"\n{TEXT_SEPARATOR}\n") == ["one\nline", "zwölf ☃", "half ?\n"]


def test_sounds_follow_one_another_clamped_and_silent_where_they_are_not_finite(tmp_path: Path) -> None:
    waves = torch.stack([torch.full((100,), 2.0), torch.full((100,), -0.5), torch.full((100,), NAN)])
    path = save_samples(tmp_path, "000100", Sounds(waves, RATE))
    with wave.open(io.BytesIO(path.read_bytes())) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    gap = [0] * int(SILENCE * RATE)
    assert heard.tolist() == [32767] * 100 + gap + [round(-0.5 * 32767)] * 100 + gap + [0] * 100
    plot = np.asarray(Image.open(tmp_path / "000100.png")) < 100
    heights = np.nonzero(plot[:, 500])[0]
    assert len(heights) == 3  # a line for each wave: at the top, below the middle, in the middle
    assert heights[0] == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Images(torch.zeros(2, 2, 4, 4)), r"pixels: expected \(N, C, H, W\) .* got \(2, 2, 4, 4\)"),
        (Images(torch.zeros(0, 1, 4, 4)), r"pixels: .* got \(0, 1, 4, 4\)"),
        (Images(torch.zeros(1, 1, 4, 4), columns=0), "columns: expected a positive number, got 0"),
        (Texts([]), "texts: expected at least one, got none"),
        (Sounds(torch.zeros(3), RATE), r"waves: expected \(N, samples\).* got \(3,\)"),
        (Sounds(torch.zeros(1, 3), 0), "sample_rate: expected a positive integer, got 0"),
    ],
    ids=["channels", "no-images", "columns", "no-texts", "one-wave", "rate"],
)
def test_samples_of_another_shape_are_rejected_and_nothing_written(
    tmp_path: Path, samples: Samples, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_samples(tmp_path / "samples", "000100", samples)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("stem", ["", ".", "..", "a/b", "../a", "a\\b", "c:a", "a\0b"])
def test_a_stem_that_is_no_plain_name_is_refused(tmp_path: Path, stem: str) -> None:
    with pytest.raises(ValueError, match="expected a plain name"):
        save_samples(tmp_path / "samples", stem, Texts(["a"]))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (run / "samples").symlink_to(elsewhere)
    for names in (("samples",), ("samples", "000100.png")):
        with pytest.raises(FileExistsError, match="samples: expected a folder of its own, got a link"):
            inside(run, *names)
    (run / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes: expected a folder, got a file"):
        inside(run, "notes", "000100.png")


def test_a_file_that_is_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "000100.txt").symlink_to(tmp_path / "precious")
    path = save_samples(tmp_path, "000100", Texts(["a"]))
    assert (tmp_path / "precious").read_text() == "mine"
    assert not path.is_symlink()
    assert path.read_text(encoding="utf-8") == "a\n"


@pytest.mark.parametrize("steps", [0, 1, 3, 5000])
def test_curves_are_plotted_for_any_number_of_rows_with_gaps_and_odd_names(tmp_path: Path, steps: int) -> None:
    rows = [
        {
            "step": step,
            "part": ("train", "held-out")[step % 5 == 0],
            "values": {"d/loss": NAN if step % 7 == 0 else 1e3 / step, "$x_{\\foo$": INF, "_kl": 10**400, "word": "x"},
        }
        for step in range(1, steps + 1)
    ]
    write_curves(tmp_path / "curves.png", rows)
    with Image.open(tmp_path / "curves.png") as image:
        assert len(image.convert("L").getcolors() or []) > 4  # more than an empty page


def test_lines_that_hold_no_row_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "part": "train", "values": {"loss": NaN}}'
    path.write_text(f'{good}\n[1]\n{{"step": "x", "values": {{}}}}\n{{"step": 2}}\n{"[" * 100000}\n{{"step": 3, "val')
    assert [row["step"] for row in read_rows(path)] == [1]
    assert read_rows(tmp_path / "nothing") == []


@pytest.mark.parametrize("kind", ["images", "sounds"])
def test_values_that_are_not_finite_are_no_arrays_or_single_files(tmp_path: Path, kind: str) -> None:
    values = torch.zeros(3, 16)
    values[1, 2] = NAN
    samples: Samples = Sounds(values, RATE) if kind == "sounds" else Images(values.view(3, 1, 4, 4))
    for write, out in ((write_arrays, tmp_path / "a.npz"), (write_single_samples, tmp_path / "a")):
        with pytest.raises(UsageError, match=r"expected finite .*, got 1 of 3"):
            write(samples, out)
    assert not list(tmp_path.iterdir())


def test_a_single_file_is_written_whole_or_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name != "000001.txt":
            return write(path, data)
        write(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"000001\.txt: expected to write it, got: No space left on device"):
        write_single_samples(Texts(["one", "two", "three"]), tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["000000.txt"]
