"""Recordings of different sample rates are resampled; FLAC is read where soundfile is installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.data import DataConfig, describe
from fastgen.data.audio import read_sound, resample
from tests.data.test_bundled import everything
from tests.data.test_files import load, save_wav


def sine(frequency: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate), dtype=torch.float64) / rate).float()


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(8000, 16000), (44100, 16000), (16000, 44100), (48000, 8000), (7999, 8000)]
)
def test_resampling_keeps_tones_below_the_lower_nyquist_frequency(rate: int, new_rate: int) -> None:
    found = resample(0.5 * sine(440, rate), rate, new_rate)
    assert len(found) == new_rate
    inside = slice(new_rate // 10, -new_rate // 10)  # without the ends, where the filter has no signal on one side
    torch.testing.assert_close(found[inside], 0.5 * sine(440, new_rate)[inside], rtol=0, atol=1e-4)


def test_resampling_removes_tones_above_the_new_nyquist_frequency() -> None:
    found = resample(0.5 * sine(5500, 44100), 44100, 8000)  # it would become a tone of 2500 Hz
    assert found[800:-800].abs().max() < 1e-4


def test_what_overshoots_is_clamped() -> None:
    steps = torch.ones(8000)
    steps[1::100] = -1
    found = resample(steps, 8000, 12000)
    assert found.abs().max() == 1


@pytest.mark.parametrize("wanted", [0, 16000])
def test_recordings_of_other_rates_are_resampled_to_the_most_frequent_one(tmp_path: Path, wanted: int) -> None:
    for i in range(12):
        rate = 8000 if i % 3 else 22050
        save_wav(tmp_path / f"{i:02}.wav", (16000 * sine(300, rate)).int().tolist(), rate)
    data = load(tmp_path, "audio", seconds=0.5, sample_rate=wanted)
    rate = wanted or 8000
    assert data.facts == {"sample_rate": rate, "length": rate // 2, "classes": 0}
    assert len(data.train) + len(data.held_out) == 24
    crossings = ((everything(data.train)["audio"] > 0).int().diff(dim=1) != 0).sum(1)
    assert ((crossings - 300).abs() <= 2).all()  # two in each period of 300 Hz
    others = "4 of 22050" if not wanted else "8 of 8000, 4 of 22050"
    assert f"recordings resampled to {rate} samples a second: {others}" in data.warnings
    assert describe(DataConfig(str(tmp_path / "01.wav"), seconds=0.05)).facts["sample_rate"] == 8000


def test_flac_needs_soundfile_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastgen.data._optional as optional

    real = optional.importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "soundfile":
            raise ModuleNotFoundError("No module named 'soundfile'", name="soundfile")
        return real(name, *rest)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(
        ImportError, match=r"a\.flac: expected soundfile to be installed, got none: pip install 'fastgen\[audio\]'"
    ):
        load(tmp_path / "a.flac", "audio")


def test_flac_is_read_as_the_same_wav(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    wave = (20000 * sine(300, 8000)).short().numpy()
    stereo = np.stack([wave, -wave // 2], 1)
    soundfile.write(tmp_path / "a.flac", stereo, 8000)
    save_wav(tmp_path / "a.wav", stereo.reshape(-1).tolist(), channels=2)
    (one, rate), (other, _) = read_sound(tmp_path / "a.flac"), read_sound(tmp_path / "a.wav")
    assert rate == 8000
    assert torch.equal(one, other)
    (tmp_path / "b.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.flac: expected a FLAC file, got one that can't be decoded|with samples"):
        read_sound(tmp_path / "b.flac")


def save_classes(folder: Path, **recordings: int) -> None:
    """Recordings of 3 pieces of 10 samples, whose first sample is the class."""
    for i, (name, n) in enumerate(recordings.items(), start=1):
        for j in range(n):
            save_wav(folder / name / f"{j}.wav", [i] * 31)


PIECES = {"seconds": 10 / 8000}


def test_subfolders_of_recordings_are_classes_and_whole_recordings_of_each_are_held_out(tmp_path: Path) -> None:
    save_classes(tmp_path, flute=5, horn=10)
    data = load(tmp_path, "audio", **PIECES)
    assert (data.facts["classes"], data.classes) == (2, {"flute": 15, "horn": 30})
    train, held = (everything(part) for part in data.splits())
    for part in (train, held):
        assert torch.equal((part["audio"][:, 0] * 32768).long() - 1, part["labels"])
    assert held["labels"].bincount().tolist() == [3, 6]


def test_one_subfolder_of_recordings_is_no_class(tmp_path: Path) -> None:
    save_classes(tmp_path / "below", flute=10)
    data, plain = load(tmp_path / "below", "audio", **PIECES), load(tmp_path / "below/flute", "audio", **PIECES)
    assert (data.facts["classes"], data.classes) == (0, {})
    assert data.fingerprint == plain.fingerprint


def test_recordings_beside_classes_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    save_classes(tmp_path / "a", flute=5, horn=5)
    save_wav(tmp_path / "a" / "top.wav", [0] * 31)
    with pytest.raises(ValueError, match=r"expected recordings directly inside or in subfolders.*top.wav and flute/"):
        load(tmp_path / "a", "audio", **PIECES)
    save_classes(tmp_path / "b" / "train", flute=5, horn=5)
    save_classes(tmp_path / "b" / "test", reed=2)
    with pytest.raises(ValueError, match=r"expected classes of the training data \(flute, horn\), got reed"):
        load(tmp_path / "b", "audio", **PIECES)


def test_splits_of_recordings_have_the_classes_of_training(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", flute=5, horn=5)
    save_classes(tmp_path / "val", horn=2)
    save_classes(tmp_path / "else", horn=4)
    data = load(tmp_path / "train", "audio", test_data=str(tmp_path / "else"), **PIECES)
    assert everything(data.held_out)["labels"].tolist() == [1] * 12
    described = describe(DataConfig(str(tmp_path / "train"), test_data=str(tmp_path / "train"), **PIECES))
    assert "30 held-out ones are also trained on" in str(described)
    (tmp_path / "else").rename(tmp_path.parent / "moved")
    data = load(tmp_path, "audio", **PIECES)
    assert data.classes == {"flute": 15, "horn": 21}
    assert everything(data.held_out)["labels"].tolist() == [1] * 6


def test_broken_recordings_are_listed_at_once_or_left_out(tmp_path: Path) -> None:
    save_classes(tmp_path, flute=6, horn=6)
    (tmp_path / "flute" / "1.wav").write_bytes(b"")
    (tmp_path / "horn" / "2.wav").write_bytes(b"OggS")
    save_wav(tmp_path / "horn" / "3.wav", [0] * 100, rate=50)
    with pytest.raises(ValueError, match=r"got 3 of 12 files that can't be read: flute/1.wav \(an empty file") as error:
        load(tmp_path, "audio", **PIECES)
    assert "horn/3.wav (50)" in str(error.value)
    assert str(error.value).endswith("--skip-broken leaves them out")
    data = load(tmp_path, "audio", skip_broken=True, **PIECES)
    assert data.classes == {"flute": 15, "horn": 12}
    assert "3 files that can't be read were left out: flute/1.wav" in data.warnings[0]
    with pytest.raises(ValueError, match="got 2 files of which none"):
        (tmp_path / "test").mkdir()
        for name in ("1", "2"):
            (tmp_path / "test" / f"{name}.wav").write_bytes(b"")
        load(tmp_path / "test", "audio", skip_broken=True)


def test_a_sample_rate_that_recordings_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="sample_rate: expected 100 to 768000, or 0, got 3"):
        DataConfig("tones", sample_rate=3)
