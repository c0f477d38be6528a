"""Folders as they are on disk: line ends, stray files, broken links, ambiguous names."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen.data import DataConfig, describe
from fastgen.data.captions import read_captions
from fastgen.data.trees import folder_tree
from tests.data.test_files import GRAY, load, save_idx, save_images, save_wav

UNICODE_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What ``str.splitlines`` takes for line ends, and files do not."""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_the_line_ends_of_files_end_lines(tmp_path: Path, end: str) -> None:
    odd = UNICODE_LINE_ENDS

    def write(name: str, *lines: str) -> Path:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + end.join([*lines, ""]).encode())
        return tmp_path / name

    save_images(tmp_path / "images", GRAY)
    names = [Path(f"{i:02}.png") for i in range(12)]
    for table, mark in (("captions.tsv", "\t"), ("metadata.csv", ",")):
        write(f"images/{table}", f"file_name{mark}text", *(f"{name}{mark}{name}{odd}x" for name in names))
        found = read_captions(folder_tree(tmp_path / "images"))
        assert found is not None
        assert found.captions(names) == {name: f"{name}{odd}x" for name in names}
        (tmp_path / "images" / table).unlink()
    data = load(write("pairs.tsv", *(f"{i}{odd}s\t{i}{odd}t" for i in range(10, 20))), "sequences")
    assert (data.facts["source_length"], data.facts["target_length"]) == (13, 13)  # with start and end
    text = load(write("text.txt", *(f"a{odd}b" for _ in range(40))), "text")
    assert text.facts["vocabulary"] == "".join(sorted({*odd, *"ab\n"}))
    assert len(text.train) + len(text.held_out) == 40 * (3 + len(odd))


def test_rows_of_a_table_are_counted_as_a_spreadsheet_counts_them(tmp_path: Path) -> None:
    save_images(tmp_path, GRAY)
    (tmp_path / "metadata.csv").write_text('file_name,text\n\n00.png,"one\ntwo"\n\n77.png,a\n')
    with pytest.raises(ValueError, match=r"metadata\.csv: row 5: .*got 77\.png"):
        load(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\n00.png,one\n01.png,"two" more\n')
    with pytest.raises(ValueError, match=r"metadata\.csv: line 3: expected a table of columns, got one that fails"):
        load(tmp_path)


def test_a_bundled_name_that_is_also_a_path_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "digits", GRAY)
    bundled = load("digits").fingerprint
    monkeypatch.chdir(tmp_path)
    mine = load(tmp_path / "digits").fingerprint
    assert mine == load("./digits").fingerprint == load("digits/").fingerprint
    assert bundled == load("bundled:digits").fingerprint
    assert load("bundled:digits").name == "digits"
    message = (
        "^digits: expected bundled:digits .the bundled dataset. or ./digits .the path., got a name that both have$"
    )
    with pytest.raises(ValueError, match=message):
        load("digits")
    with pytest.raises(ValueError, match=r"^bundled:cats: expected one of digits, .* after bundled:, got 'cats'$"):
        load("bundled:cats")


def test_stray_files_beside_the_data_change_nothing(tmp_path: Path) -> None:
    save_images(tmp_path / "images", GRAY)
    for i in range(12):
        save_wav(tmp_path / "sounds" / f"{i}.wav", [0] * 8000)
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("a text of some length, " * 20)
    kinds = {"images": "images", "sounds": "audio", "texts": "text"}
    before = {place: load(tmp_path / place, kind).fingerprint for place, kind in kinds.items()}
    for place, kind in kinds.items():
        for name in ("README.md", "LICENSE", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.txt", "notes.pdf"):
            (tmp_path / place / name).write_bytes(b"\xff")
        if kind != "text":
            (tmp_path / place / "README.txt").write_bytes(b"\xff")
            for i in range(12):  # a caption for each picture, say
                (tmp_path / place / f"{i:02}.txt").write_bytes(b"\xff")
        seen = describe(DataConfig(str(tmp_path / place)))
        assert (seen.kinds, seen.fingerprint) == ((kind,), before[place])
        left = "1 .md, 1 .pdf, 13 .txt, 1 without a suffix" if kind != "text" else "1 .md, 1 .pdf, 1 without a suffix"
        assert f"files of other types were left out: {left}" in seen.warnings


@pytest.mark.parametrize(
    ("files", "kind", "error"),
    [
        (
            ["batches.meta.txt", *(f"part_{i}.bin" for i in range(6)), "readme.html"],
            "text",
            ".wav or .flac files, or one file, got 1 text files beside 6 .bin",
        ),
        ([*(f"{i}.heic" for i in range(20)), "a.jpg"], "images", "got 1 image files beside 20 .heic"),
        ([*(f"{i}.mp3" for i in range(20)), "a.wav"], "audio", "got 1 audio files beside 20 .mp3"),
        ([*(f"{i}.png" for i in range(10)), "README.txt"], "text", "expected data of kind text (prose, a .txt file, "),
        ([f"{i}.{suffix}" for i in range(10) for suffix in ("png", "txt")], "text", "expected data of kind text"),
    ],
    ids=["binary", "heic", "mp3", "README", "captions"],
)
def test_a_folder_of_no_known_kind_is_rejected_with_its_contents(
    tmp_path: Path, files: list[str], kind: str, error: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("airplane\nautomobile\nbird\n")
    with pytest.raises(ValueError, match=re.escape(error)):
        load(tmp_path, kind)


def test_unreadable_files_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link.txt").symlink_to("gone.txt")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, error in (
        ("gone", "got a path where there is nothing"),
        ("link.txt", "got a link to gone.txt, where there is nothing"),
        ("loop", "got a link to loop, where there is nothing"),
        ("a.txt/b", "got a path where there is nothing"),
        ("pipe.txt", "got something that is neither a file nor a folder"),
    ):
        with pytest.raises(OSError, match="^" + re.escape(f"{tmp_path / name}: expected digits, ")) as caught:
            load(tmp_path / name, "text")
        assert error in str(caught.value)
    save_images(tmp_path / "images", GRAY)
    (tmp_path / "images" / "link.png").symlink_to("../gone.png")
    with pytest.raises(
        FileNotFoundError, match=r"link\.png: expected a file that can be read, got a link to \.\./gone\.png"
    ):
        load(tmp_path / "images")
    (tmp_path / "images" / "link.png").unlink()
    save_wav(tmp_path / "a.wav", [0] * 800)
    np.savez(tmp_path / "a.npz", images=GRAY)
    save_idx(tmp_path / "images-idx3-ubyte", GRAY, 2051)

    def refuse(*args: Any, **options: Any) -> None:  # as root no file is out of reach
        raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="images: expected to read it, got: Permission denied"):
        load(tmp_path / "images")
    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, refuse)
    for name, kind in (("a.txt", "text"), ("a.wav", "audio"), ("a.npz", "images"), ("images-idx3-ubyte", "images")):
        with pytest.raises(PermissionError, match=f"{name}: expected to read it, got: Permission denied"):
            load(tmp_path / name, kind)
