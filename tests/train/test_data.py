"""Data sets: layouts, the held-out part, and errors that name the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.data import load_images


def test_digits_are_split_per_class_and_always_the_same_way() -> None:
    data, again = load_images("digits"), load_images("digits")
    assert data.train.shape[1:] == data.test.shape[1:] == (1, 8, 8)
    assert len(data.train) + len(data.test) == 1797
    assert data.levels == 17
    assert torch.equal((data.train * 16).round() / 16, data.train)
    assert data.train_labels is not None
    assert data.test_labels is not None
    held, kept = data.test_labels.bincount(), data.train_labels.bincount()
    assert len(held) == 10
    assert ((held - (held + kept) / 5).abs() < 1).all()
    assert torch.equal(data.test, again.test)
    assert data.fingerprint() == again.fingerprint()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((20, 8, 8), (1, 8, 8)), ((20, 1, 8, 8), (1, 8, 8)), ((20, 8, 8, 3), (3, 8, 8)), ((20, 3, 8, 8), (3, 8, 8))],
)
def test_npz_layouts_become_channels_first(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    data = load_images(str(tmp_path / "a.npz"))
    assert data.train.shape == (16, *expected)
    assert data.test.shape == (4, *expected)
    assert data.levels == 256
    both = torch.cat([data.train, data.test]).mul(255).round()
    assert both.sum().item() == images.sum()


@pytest.mark.parametrize("white", [1, 255])
def test_npz_of_black_and_white_has_two_levels(tmp_path: Path, white: int) -> None:
    images = np.random.RandomState(0).randint(0, 2, (10, 8, 8)).astype(np.uint8) * white
    np.savez(tmp_path / "a.npz", images=images.astype(np.uint8))
    data = load_images(str(tmp_path / "a.npz"))
    assert data.levels == 2
    assert set(data.train.unique().tolist()) == {0.0, 1.0}


def test_classes_of_one_image_leave_a_held_out_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((10, 8, 8), np.uint8), labels=np.arange(10))
    data = load_images(str(tmp_path / "a.npz"))
    assert (len(data.train), len(data.test)) == (8, 2)


GOOD = np.zeros((10, 8, 8), np.uint8)
BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "array missing": ({"pictures": GOOD}, "expected an array named 'images', got pictures"),
    "floats": ({"images": GOOD + 0.5}, "images: expected uint8 pixels from 0 to 255, got float64"),
    "nan": ({"images": np.full((10, 8, 8), np.nan)}, "got float64, 640 of them NaN or infinite"),
    "objects": ({"images": np.array([{}] * 10)}, "expected an .npz file of plain arrays"),
    "dimensions": ({"images": GOOD[0]}, "images: expected shape (N, H, W), (N, C, H, W) or (N, H, W, C)"),
    "channels": ({"images": np.zeros((10, 2, 8, 8), np.uint8)}, "with C 1 or 3, got (10, 2, 8, 8)"),
    "empty": ({"images": GOOD[:0]}, "got (0, 8, 8)"),
    "too few": ({"images": GOOD[:3]}, "images: expected at least 10 of them, got 3"),
    "not square": ({"images": np.zeros((10, 8, 16), np.uint8)}, "expected square ones, got height 8 and width 16"),
    "labels": ({"images": GOOD, "labels": np.zeros(3, int)}, "labels: expected shape (10,), got (3,)"),
    "float labels": ({"images": GOOD, "labels": np.zeros(10)}, "labels: expected integers, got float64"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_arrays_are_refused_in_one_line_that_names_the_file(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str], case: str
) -> None:
    arrays, message = BAD_DATA[case]
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    assert fit(data=path) == 1
    line = error_line()
    assert str(path) in line
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["missing.npz", "folder.npz", "text.npz", "image.png"])
def test_what_is_no_npz_file_is_refused_by_name(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str], name: str
) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "image.png").write_text("hello")
    assert fit(data=tmp_path / name) == 1
    line = error_line()
    assert f"{tmp_path / name}: expected " in line
    assert "got" in line


def test_images_of_a_size_that_no_model_takes_are_refused(
    fit: Callable[..., int], tmp_path: Path, error_line: Callable[[], str]
) -> None:
    np.savez(tmp_path / "nine.npz", images=np.zeros((10, 9, 9), np.uint8))
    assert fit(data=tmp_path / "nine.npz") == 2
    assert "model.image_size: expected" in error_line()
