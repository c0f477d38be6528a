"""What a layout of files means: links, folders named like splits, and tables whose cells are no captions."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data import read_images
from fastgen.data.hub import _by_split
from fastgen.data.images import decode, header
from tests.data.test_bundled import everything
from tests.data.test_files import GRAY, load, save_images, save_wav

TURNED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Links and archives


def test_two_links_to_one_folder_are_two_folders(tmp_path: Path) -> None:
    save_images(tmp_path / "images", GRAY)
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        os.symlink(tmp_path / "images", tmp_path / "set" / name)
    assert load(tmp_path / "set").classes == {"a": 12, "b": 12}
    os.symlink(tmp_path / "set", tmp_path / "images" / "above")  # a loop
    assert load(tmp_path / "set").classes == {"a": 12, "b": 12}


@pytest.mark.parametrize("form", [".tar", ".tar.gz"])
@pytest.mark.parametrize("link", ["hard", "symbolic", "folder"])
def test_links_in_an_archive_are_the_files_that_they_lead_to(tmp_path: Path, form: str, link: str) -> None:
    save_images(tmp_path / "set" / "a", GRAY)
    if link == "folder":
        os.symlink("a", tmp_path / "set" / "b")
    else:
        (tmp_path / "set" / "b").mkdir()
        for i in range(12):
            name = f"{i:02}.png"
            make = os.link if link == "hard" else os.symlink
            make(tmp_path / "set" / "a" / name if link == "hard" else f"../a/{name}", tmp_path / "set" / "b" / name)
    os.symlink("..", tmp_path / "set" / "a" / "above")
    archive = tmp_path / f"set{form}"
    with tarfile.open(archive, "w" if form == ".tar" else "w:gz") as file:
        file.add(tmp_path / "set", "top")
    found = load(archive)
    assert found.classes == {"a": 12, "b": 12}
    assert found.fingerprint == load(tmp_path / "set").fingerprint


@pytest.mark.parametrize("form", [".tar", ".tar.gz"])
def test_a_link_to_a_file_beside_the_archive_is_named(tmp_path: Path, form: str) -> None:
    save_images(tmp_path / "set", GRAY)
    os.symlink(tmp_path / "elsewhere.png", tmp_path / "set" / "99.png")
    archive = tmp_path / f"set{form}"
    with tarfile.open(archive, "w" if form == ".tar" else "w:gz") as file:
        file.add(tmp_path / "set", "top")
    with pytest.raises(ValueError, match=r"99\.png: expected a file, got a link to .*, which is not in the archive"):
        load(archive)


def test_backslashes_in_a_zip_separate_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for name in "ab":
            for i, gray in enumerate(GRAY):
                file.writestr(zipfile.ZipInfo(f"{name}\\{i:02}.png"), encode(Image.fromarray(gray), "PNG"))
    assert load(tmp_path / "set.zip").classes == {"a": 12, "b": 12}


# --------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("name", ["dev", "eval"])
def test_folders_of_development_data_are_held_out(tmp_path: Path, name: str) -> None:
    save_images(tmp_path / "train", GRAY)
    save_images(tmp_path / name, GRAY[:3])
    data = load(tmp_path)
    assert (len(data.train), len(data.held_out), data.facts["classes"]) == (12, 3, 0)


@pytest.mark.parametrize(
    ("folders", "error"),
    [
        (("train", "Train", "test"), "expected one folder of the split train, got Train/00.png and train/00.png"),
        (("train", "val", "valid"), "expected one folder of the split val, got val/00.png and valid/00.png"),
        (("train", "test", "extra"), "expected subfolders that are classes, or train/ and test/ or val/, got extra"),
        (("trainA", "trainB", "testA", "more"), "expected subfolders that are classes, or train/ and test/"),
        (("a/train", "a/test", "b/train", "b/test"), "expected train/ and test/ or val/ above the classes, got test"),
    ],
)
def test_folders_that_would_mix_splits_are_refused(tmp_path: Path, folders: tuple[str, ...], error: str) -> None:
    if (tmp_path / "x").mkdir() or not (tmp_path / "X").exists():  # not on a file system that ignores case
        for folder in folders:
            save_images(tmp_path / "set" / folder, GRAY)
        with pytest.raises(ValueError, match=error):
            load(tmp_path / "set")


def test_recordings_below_test_are_held_out(tmp_path: Path) -> None:
    for split, n in (("train", 10), ("test", 3)):
        for i in range(n):
            save_wav(tmp_path / split / f"{i}.wav", [1000 * (1 + (split == "test"))] * 8000)
    data = load(tmp_path, "audio")
    assert (len(data.train), len(data.held_out), data.warnings) == (10, 3, ())
    assert everything(data.held_out)["audio"].min() > everything(data.train)["audio"].max()
    with pytest.raises(ValueError, match="held_out: expected 0, as the data have a held-out split of their own, got 5"):
        load(tmp_path, "audio", held_out=5)


def test_a_split_that_test_data_names_is_not_said_to_be_left_out(tmp_path: Path) -> None:
    for split in ("train", "test", "valid"):
        save_images(tmp_path / split, GRAY)
    data = load(tmp_path, test_data=str(tmp_path / "valid"))
    assert data.warnings == ("12 images of the test split were left out: --test-data is held out",)


def test_texts_below_test_are_held_out(tmp_path: Path) -> None:
    for split, letter in (("train", "a"), ("val", "b"), ("test", "c")):
        for i in range(2):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / f"{i}.txt").write_text(letter * 50)
    data = load(tmp_path, "text")
    assert data.facts["vocabulary"] == "\nac"
    assert (len(data.train), len(data.held_out)) == (101, 101)
    assert data.warnings == ("files of other types were left out: 2 .txt",)
    with pytest.raises(ValueError, match="held_out: expected 0, as the data have a held-out split of their own, got 5"):
        load(tmp_path, "text", held_out=5)


def test_windows_of_text_count_from_the_end_as_other_items_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 60)
    windows = load(tmp_path / "a.txt", "text").splits(16)[0]
    last = windows.batch(torch.tensor([len(windows) - 1, len(windows) - 3]))["tokens"]
    assert torch.equal(windows.batch(torch.tensor([-1, -3]))["tokens"], last)


@pytest.mark.parametrize("argument", [{"image_size": 0}, {"channels": 2}])
def test_a_size_or_depth_that_images_cannot_have_is_named(tmp_path: Path, argument: dict[str, int]) -> None:
    save_images(tmp_path, GRAY)
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}$"):
        read_images(tmp_path, **{"image_size": 8, "channels": 1, **argument})


def test_parquet_files_of_validation_data_are_not_trained_on() -> None:
    names = ["train-0", "test-0", "val-0", "valid_0", "validation-0", "dev", "value", "device", "a/val/0", "a/b/0"]
    splits = _by_split([Path(f"{name}.parquet") for name in names])
    found = {split: [str(file.with_suffix("")) for file in files] for split, files in splits.items()}
    assert found == {
        "train": ["train-0", "value", "device", "a/b/0"],
        "test": ["test-0"],
        "validation": ["val-0", "valid_0", "validation-0", "dev", "a/val/0"],
    }


def test_two_images_of_one_name_are_no_pair(tmp_path: Path) -> None:
    for side in ("maps", "photos"):
        save_images(tmp_path / side, GRAY)
    Image.fromarray(GRAY[0]).save(tmp_path / "maps" / "03.jpg")
    assert load(tmp_path, "domains").classes == {"maps": 13, "photos": 12}
    with pytest.raises(ValueError, match=r"expected one image maps/03, got maps/03\.jpg, maps/03\.png"):
        load(tmp_path, "pairs")


# --------------------------------------------------------------------------------------------------
# Tables and arrays


@pytest.mark.parametrize("value", [None, 3, ["a"], True])
@pytest.mark.parametrize("field", ["text", "file_name"])
def test_captions_that_are_no_strings_are_refused(tmp_path: Path, field: str, value: object) -> None:
    save_images(tmp_path, GRAY)
    rows: list[dict[str, object]] = [{"file_name": f"{i:02}.png", "text": "a"} for i in range(12)]
    rows[3][field] = value
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    got = json.dumps(value).replace("[", r"\[")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl: line 4: expected a string as {field}, got {got}"):
        load(tmp_path)


def test_a_first_object_without_caption_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path, GRAY)
    rows: list[dict[str, object]] = [{"file_name": f"{i:02}.png", "text": "a"} for i in range(12)]
    del rows[0]["text"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"expected a caption of 00\.png, got none"):
        load(tmp_path)


def test_two_columns_of_captions_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, GRAY)
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n" + "\n".join(f"{i:02}.png,a,b" for i in range(12)))
    with pytest.raises(ValueError, match=r"metadata\.csv: expected one column text, got 2"):
        load(tmp_path)


def test_arrays_that_are_not_read_are_named(tmp_path: Path) -> None:
    labels = np.arange(12) % 3
    np.savez(tmp_path / "a.npz", images=GRAY, label=labels)
    assert load(tmp_path / "a.npz").warnings == ("arrays that are not read: label",)
    np.savez(tmp_path / "a.npz", images=GRAY, labels=labels)
    assert load(tmp_path / "a.npz").warnings == ()
    np.savez(tmp_path / "a.npz", GRAY, labels)
    assert load(tmp_path / "a.npz").warnings == ("arrays that are not read: arr_1",)


@pytest.mark.parametrize("largest", [2**63, 2**64 - 1])
def test_labels_beyond_signed_integers_are_refused(tmp_path: Path, largest: int) -> None:
    labels = np.zeros(12, np.uint64)
    labels[3] = largest
    np.savez(tmp_path / "a.npz", images=GRAY, labels=labels)
    with pytest.raises(ValueError, match=f"labels: expected numbers from 0 to classes - 1, .* got 0 to {largest}"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("line", "reason"),
    [(r'{"text": "\ud83d x"}', "surrogates not allowed"), ('{"text": "a", "text": "b"}', "text occurs twice")],
)
def test_json_lines_without_one_meaning_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "\\ud83d\\ude00 is whole"}', line]))
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2: expected a JSON object, got one that fails: .*{reason}"):
        load(tmp_path / "a.jsonl", "text")


@pytest.mark.parametrize("held", ["validation", "valid", "dev"])
def test_columns_and_splits_of_hugging_face_that_are_not_read_are_named(tmp_path: Path, held: str) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encode(Image.fromarray(gray), "PNG"), "path": None} for gray in GRAY]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": cells, "label": ["a"] * 12}, features=features)
    parts = {"train": rows, held: rows.select(range(3)), "extra": rows}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    data = load(tmp_path / "set")
    assert (len(data.train), len(data.held_out)) == (12, 3)
    assert data.warnings == ("columns that are not read: label", "splits that are not read: extra")


# --------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_a_header_has_the_size_of_the_upright_image(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.new("RGB", (8, 4)), form, exif=exif)
    found = header(data, "a")
    assert (found.width, found.height) == ((4, 8) if orientation in TURNED else (8, 4))
    assert decode(data, "a", 3, 0).shape == (3, found.height, found.width)


def test_gray_images_of_16_bits_are_decoded_as_those_of_8_bits() -> None:
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    white_is_zero = {262: 0}
    for image in (Image.fromarray(gray), Image.fromarray(gray.astype(np.uint16) << 8)):
        plain = decode(encode(image, "TIFF"), "a", 1, 0)[0]
        assert np.array_equal(plain, gray)
        wide = image.mode != "L"  # Pillow inverts 8 bits when it writes them, too
        inverted = decode(encode(image, "TIFF", tiffinfo=white_is_zero), "a", 1, 0)[0]
        assert np.array_equal(inverted, 255 - gray if wide else gray)
    clear = int(gray[1, 2])
    for image, value in ((Image.fromarray(gray), clear), (Image.fromarray(gray.astype(np.uint16) << 8), clear << 8)):
        found = decode(encode(image, "PNG", transparency=value), "a", 1, 0)[0]
        assert found[1, 2] == 255
        assert np.delete(found.flatten(), 10).tolist() == np.delete(gray.flatten(), 10).tolist()
