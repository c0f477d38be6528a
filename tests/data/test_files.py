"""Data from files: images, arrays, text, recordings, Hugging Face datasets."""

from __future__ import annotations

import gzip
import struct
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data import DataConfig, Dataset, TensorItems, describe, load_data, read_images
from tests.data.test_bundled import check_contract, everything

RANDOM = np.random.RandomState(0)
GRAY = RANDOM.randint(0, 256, (12, 8, 8)).astype(np.uint8)
COLOR = RANDOM.randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)

NO_CAPTIONS = {"caption_vocabulary": "", "caption_length": 0, "caption_examples": ()}


def load(path: Path | str, kind: str = "images", **options: Any) -> Dataset:
    data = load_data(DataConfig(source=str(path), **options), kind)
    check_contract(data)
    return data


def all_images(data: Dataset) -> torch.Tensor:
    """Both parts (N, C, S, S), as bytes, in the order of the files where one knows which are held out."""
    return torch.cat([everything(part)["images"] for part in data.splits()]).mul(255).round().byte()


def save_images(folder: Path, images: Any, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:02}{suffix}")


CAPTIONS = ["a red dog", "a dög", "two cats, one dog"] * 4


@pytest.mark.parametrize("table", ["metadata.csv", "captions.tsv"])
def test_a_table_beside_images_has_their_captions(tmp_path: Path, table: str) -> None:
    save_images(tmp_path, GRAY)
    without = load(tmp_path)
    assert without.facts == NO_CAPTIONS | {"image_size": 8, "channels": 1, "levels": 256, "classes": 0}
    if table == "metadata.csv":
        (tmp_path / table).write_text("id,file_name\n1,00.png\n")
        assert load(tmp_path).fingerprint == without.fingerprint  # it tells something else
    mark = "," if table == "metadata.csv" else "\t"
    rows = [f"{i:02}.png{mark}{text if mark != ',' else chr(34) + text + chr(34)}" for i, text in enumerate(CAPTIONS)]
    (tmp_path / table).write_text("\n".join([f"file_name{mark}text", *rows[::-1]]), encoding="utf-8")
    data = load(tmp_path)
    assert data.fingerprint != without.fingerprint
    assert data.facts["caption_length"] == len(CAPTIONS[2])
    assert sorted(data.facts["caption_examples"]) == sorted(set(CAPTIONS))
    vocabulary = data.facts["caption_vocabulary"]
    assert vocabulary == "".join(sorted(set("".join(CAPTIONS))))
    for part in data.splits():
        batch = everything(part)
        for pixels, row in zip(batch["images"].mul(255).round().byte(), batch["caption"], strict=True):
            (number,) = (i for i, gray in enumerate(GRAY) if np.array_equal(gray, pixels[0].numpy()))
            assert "".join(vocabulary[i - 1] for i in row if i) == CAPTIONS[number]
    assert not describe(DataConfig(source=str(tmp_path))).warnings[1:]  # the table is not left out


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ("99.png\ta dog", "columns file_name and text, got 99.png, a dog"),
        ("00.png\ta dog\n01.png", "row 2: expected 2 columns, got 1"),
        ("file_name\ttext\n00.png", "row 2: expected 2 columns, got 1"),
        ("file_name\ttext\n77.png\ta", "row 2: expected an image in the folder, got 77.png, which does not exist"),
        ("file_name\ttext\n00.png\ta\n00.png\tb", "row 3: .*got 00.png, which an earlier row has"),
        ("file_name\ttext\n00.png\t ", "row 2: expected a caption of 00.png, got none"),
        ("file_name\ttext\n00.png\ta", "expected a caption of 01.png, got none"),
    ],
)
def test_a_mistake_in_a_table_of_captions_is_named(tmp_path: Path, rows: str, error: str) -> None:
    save_images(tmp_path, GRAY)
    (tmp_path / "captions.tsv").write_text(rows)
    with pytest.raises(ValueError, match=f"captions.tsv: .*{error}"):
        load(tmp_path)


def save_wav(path: Path, samples: Any, rate: int = 8000, width: int = 2, channels: int = 1) -> None:
    """samples: integers, interleaved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    offset = 128 if width == 1 else 0
    data = b"".join(int(s + offset).to_bytes(width, "little", signed=width > 1) for s in samples)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)


def save_idx(path: Path, array: Any, magic: int) -> None:
    data = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((20, 8, 8), (1, 8, 8)), ((20, 1, 8, 8), (1, 8, 8)), ((20, 8, 8, 3), (3, 8, 8)), ((20, 3, 8, 8), (3, 8, 8))],
)
def test_npz_layouts_become_channels_first(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    data = load(tmp_path / "a.npz")
    assert data.facts == NO_CAPTIONS | {"image_size": 8, "channels": expected[0], "levels": 256, "classes": 0}
    assert [len(part) for part in data.splits()] == [16, 4]
    assert all_images(data).sum().item() == images.sum()


@pytest.mark.parametrize("white", [1, 255])
def test_black_and_white_has_two_levels(tmp_path: Path, white: int) -> None:
    np.savez(tmp_path / "a.npz", pictures=(GRAY > 127).astype(np.uint8) * np.uint8(white))
    data = load(tmp_path / "a.npz", column="pictures")
    assert data.facts["levels"] == 2
    assert all_images(data).unique().tolist() == [0, 255]
    assert load(tmp_path / "a.npz", column="pictures", image_size=4).facts["levels"] == 256


def test_classes_of_one_image_leave_a_held_out_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GRAY[:10], labels=np.arange(10))
    assert [len(part) for part in load(tmp_path / "a.npz").splits()] == [8, 2]
    assert "classes with fewer than 5 items: 0, 1, 2" in str(describe(DataConfig(str(tmp_path / "a.npz"))))


def test_arrays_of_two_classes_are_two_domains(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], [20, 10])
    np.savez(tmp_path / "a.npz", images=np.repeat(labels.astype(np.uint8) * 2, 64).reshape(30, 8, 8), labels=labels)
    train, held = load(tmp_path / "a.npz", "domains").splits()
    assert (len(train), len(held)) == (16, 2)
    for part in map(everything, (train, held)):
        assert (part["a"] == 0).all()
        assert (part["b"] == 2 / 255).all()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_find_their_labels(tmp_path: Path, ending: str) -> None:
    labels = np.arange(12, dtype=np.uint8) % 3
    save_idx(tmp_path / f"train-images-idx3-ubyte{ending}", GRAY, 2051)
    assert load(tmp_path / f"train-images-idx3-ubyte{ending}").facts["classes"] == 0
    save_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels, 2049)
    data = load(tmp_path / f"train-images-idx3-ubyte{ending}")
    assert data.facts["classes"] == 3
    shown = {
        (image.sum().item(), label) for part in data.splits() for image, label in zip(*pixels_of(part), strict=True)
    }
    assert shown == {(int(image.sum()), label) for image, label in zip(GRAY, labels.tolist(), strict=True)}


def test_labels_of_idx_files_that_occur_are_the_classes(tmp_path: Path) -> None:
    def save(name: str, labels: list[int]) -> Path:
        save_idx(tmp_path / f"{name}-images-idx3-ubyte", GRAY, 2051)
        save_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.array(labels * 4, np.uint8), 2049)
        return tmp_path / f"{name}-images-idx3-ubyte"

    letters, some = save("letters-train", [1, 2, 4]), save("more", [4, 4, 1])
    data = load(tmp_path)
    assert (data.facts["classes"], data.classes) == (3, {"1": 4, "2": 4, "4": 4})
    held = load(letters, test_data=str(some)).held_out
    assert everything(held)["labels"].tolist() == [2, 2, 0] * 4
    with pytest.raises(ValueError, match=r"labels: expected those of the training images \(1, 4\), got 2"):
        load(some, test_data=str(letters))
    (tmp_path / "letters-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n4 68 100\n")
    data = load(tmp_path)
    assert data.classes == {"A": 4, "B": 4, "D": 4}
    assert not any("1 .txt" in warning for warning in data.warnings)
    np.savez(tmp_path / "a.npz", images=GRAY, labels=np.array([1, 2, 4] * 4))
    assert "classes without an item: 0, 3" in load(tmp_path / "a.npz").warnings


def pixels_of(part: Any) -> tuple[torch.Tensor, list[int]]:
    batch = everything(part)
    return batch["images"].mul(255).round().long(), batch["labels"].tolist()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("images", [GRAY, COLOR], ids=["gray", "color"])
def test_folders_of_images_are_read_as_they_are(tmp_path: Path, images: Any, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{i:02}{suffix}", **options)
    (tmp_path / ".hidden.png").write_text("no image")
    data = load(tmp_path)
    channels = 3 if images.ndim == 4 or suffix == ".webp" else 1  # WebP has no grayscale
    assert data.facts == NO_CAPTIONS | {"image_size": 8, "channels": channels, "levels": 256, "classes": 0}
    gray = np.broadcast_to(images.reshape(12, 8, 8, -1), (12, 8, 8, channels))
    assert sorted(all_images(data).sum((1, 2, 3)).tolist()) == sorted(gray.sum((1, 2, 3)).tolist())


def test_subfolders_are_classes_and_links_are_followed(tmp_path: Path) -> None:
    save_images(tmp_path / "all" / "white" / "deep", np.full((10, 8, 8), 254, np.uint8))
    save_images(tmp_path / "elsewhere", np.zeros((15, 8, 8), np.uint8))
    (tmp_path / "all" / "black").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "white" / "again").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "notes.md").write_text("mine")
    seen = describe(DataConfig(str(tmp_path / "all")))
    assert seen.classes == {"black": 15, "white": 10}
    assert seen.kinds == ("images", "domains")
    warnings = " ".join(seen.warnings)
    for part in ("25 items of one value", "23 items occur before; 5 held-out", "left out: 1 .md", "only 20 items"):
        assert part in warnings
    for part in map(everything, load(tmp_path / "all").splits()):
        assert torch.equal(part["labels"], (part["images"].amax((1, 2, 3)) > 0).long())


def test_pairs_belong_together_by_name(tmp_path: Path) -> None:
    save_images(tmp_path / "inputs", GRAY)
    save_images(tmp_path / "targets", np.stack([255 - GRAY] * 3, -1), ".bmp")
    data = load(tmp_path, "pairs")
    assert data.facts == {"image_size": 8, "input_channels": 1, "channels": 3, "levels": 256}
    for part in map(everything, data.splits()):
        assert torch.allclose(part["targets"], (1 - part["inputs"]).expand(-1, 3, -1, -1))
    (tmp_path / "targets" / "03.bmp").unlink()
    with pytest.raises(ValueError, match=r"expected an image 03 in targets. too, got none"):
        load(tmp_path, "pairs")
    for file in ("inputs/05.png", "inputs/06.png", "targets/07.bmp", "targets/09.bmp", "targets/10.bmp"):
        (tmp_path / file).unlink()
    with pytest.raises(
        ValueError, match=r"expected images 05, 06 in inputs. and images 03, 07, 09, \.\.\. \(4\) in targets. too"
    ):
        load(tmp_path, "pairs")


def test_one_color_image_makes_all_images_color(tmp_path: Path) -> None:
    save_images(tmp_path, GRAY)
    Image.fromarray(COLOR[0]).save(tmp_path / "color.png")
    both = all_images(load(tmp_path))
    assert both.shape == (13, 3, 8, 8)
    assert (both == both[:, :1]).flatten(1).all(1).sum() == 12


def _rgba(value: tuple[int, int, int, int]) -> Image.Image:
    return Image.new("RGBA", (8, 8), value)


MODES: dict[str, tuple[Callable[[], Image.Image], dict[str, Any], list[int]]] = {
    "transparent": (lambda: _rgba((255, 0, 0, 0)), {}, [255, 255, 255]),
    "half transparent": (lambda: _rgba((255, 0, 0, 128)), {}, [255, 127, 127]),
    "palette": (lambda: Image.new("RGB", (8, 8), (9, 90, 200)).quantize(4), {}, [9, 90, 200]),
    "gray palette": (lambda: Image.new("L", (8, 8), 77).convert("P"), {}, [77]),
    "transparent palette": (lambda: Image.new("RGB", (8, 8)).quantize(4), {"transparency": 0}, [255]),
    "16 bits": (lambda: Image.fromarray(np.full((8, 8), 300 * 256 // 2, np.uint16)), {}, [150]),
    "one bit": (lambda: Image.new("1", (8, 8), 1), {}, [255]),
    "gray and alpha": (lambda: Image.new("LA", (8, 8), (40, 255)), {}, [40]),
}


@pytest.mark.parametrize("case", MODES)
def test_every_image_mode_is_decoded_as_viewers_show_it(tmp_path: Path, case: str) -> None:
    make, options, expected = MODES[case]
    for i in range(10):
        make().save(tmp_path / f"{i}.png", **options)
    data = load(tmp_path)
    pixels = everything(data.splits()[0])["images"][0, :, 3, 3].mul(255).round()
    assert (pixels - torch.tensor(expected)).abs().max() <= 1
    assert len(pixels) == len(expected)


def test_images_are_rotated_upright_resized_and_cropped(tmp_path: Path) -> None:
    lying = np.zeros((16, 40, 3), np.uint8)
    lying[:, 20:] = 255  # the right half is white; turned by orientation 6 the lower half is
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(10):
        Image.fromarray(lying).save(tmp_path / f"{i}.jpg", exif=exif, quality=100)
    with pytest.raises(ValueError, match="expected square ones, got height 40 and width 16: --image-size resizes"):
        load(tmp_path)
    pixels = everything(load(tmp_path, image_size=8).splits()[0])["images"][0]
    assert pixels[:, :3].max() < 0.1
    assert pixels[:, 5:].min() > 0.9


def test_images_beyond_the_memory_limit_are_decoded_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(tmp_path / "a", COLOR)
    save_images(tmp_path / "b", COLOR[:, ::-1])
    eager = {kind: load(tmp_path, kind) for kind in ("images", "domains")}
    assert all(isinstance(part, TensorItems) for data in eager.values() for part in data.splits())
    monkeypatch.setattr("fastgen.data.images.MEMORY_LIMIT", 1000)
    for kind, data in eager.items():
        lazy = load(tmp_path, kind)
        assert lazy.fingerprint == data.fingerprint
        for part, same in zip(lazy.splits(), data.splits(), strict=True):
            assert part.lazy
            assert all(tensor.equal(everything(same)[name]) for name, tensor in everything(part).items())
    (tmp_path / "b" / "00.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"00.png: expected an image, got something else"):
        [everything(part) for part in lazy.splits()]


@pytest.mark.parametrize("limit", [2 << 30, 1000], ids=["in memory", "lazy"])
def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    save_images(tmp_path / "a", COLOR)
    save_images(tmp_path / "b", GRAY)
    monkeypatch.setattr("fastgen.data.images.MEMORY_LIMIT", limit)
    counts: Counter[Path] = Counter()
    read = Path.read_bytes

    def counting(path: Path) -> bytes:
        counts[path] += 1
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counting)
    splits = load_data(DataConfig(str(tmp_path)), "images").splits()
    assert len(counts) == 24
    assert set(counts.values()) == {1}
    both = torch.cat([everything(part)["images"] for part in splits])
    assert (both == both[:, :1]).flatten(1).all(1).sum() == 12
    assert set(counts.values()) == ({1} if limit > 1000 else {2})


def test_text_files_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffWäre\r\n".encode() + b"x" * 300)
    (tmp_path / "a.txt").write_text("€" * 100)
    data = load(tmp_path, "text")
    assert data.facts["vocabulary"] == "\nWerxä€"
    assert len(data.train) + len(data.held_out) == 100 + 1 + 5 + 300
    (tmp_path / "c.txt").write_text("short but sweet")
    with pytest.raises(
        ValueError, match="with 33 characters or more to train on and 33 or more held out, got 14 and 1"
    ):
        load(tmp_path / "c.txt", "text")


def test_lines_with_tabs_are_sequences_and_a_source_is_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("".join(f"{chr(97 + i % 13)}\t{i}\n" for i in range(26)))
    data = load(path, "sequences")
    assert (data.facts["source_length"], data.facts["target_length"]) == (3, 4)
    sources = [set(everything(part)["source"][:, 1].tolist()) for part in data.splits()]
    assert len(sources[0] | sources[1]) == 13
    assert not sources[0] & sources[1]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_recordings_of_every_width_are_averaged_over_channels(tmp_path: Path, width: int, channels: int) -> None:
    top = 2 ** (8 * width - 1)
    for i in range(10):
        save_wav(tmp_path / f"{i}.wav", ([-top, top // 2] if channels == 2 else [-top]) * 90, 100, width, channels)
    data = load(tmp_path, "audio", seconds=0.5)
    assert data.facts == {"sample_rate": 100, "length": 50, "classes": 0}
    expected = -0.25 if channels == 2 else -1
    for part in data.splits():
        assert (everything(part)["audio"] == expected).all()


def test_whole_recordings_are_held_out_where_there_are_enough(tmp_path: Path) -> None:
    for i in range(10):
        save_wav(tmp_path / "many" / f"{i}.wav", [i] * 350)
    save_wav(tmp_path / "one.wav", [i // 10 for i in range(215)])
    train, held = (everything(part)["audio"] for part in load(tmp_path / "many", "audio", seconds=100 / 8000).splits())
    assert (len(train), len(held)) == (24, 6)
    assert not set(train.unique().tolist()) & set(held.unique().tolist())
    train, held = (
        everything(part)["audio"] for part in load(tmp_path / "one.wav", "audio", seconds=10 / 8000).splits()
    )
    assert (train[:, 0] * 32768).tolist() == [*range(17)]
    assert (held[:, 0] * 32768).tolist() == [*range(17, 21)]


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")
    features = {
        "picture": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "words": datasets.Value("string"),
    }
    pictures = [Image.fromarray(pixels) for pixels in np.concatenate([GRAY, GRAY // 2])]
    rows = {
        "picture": pictures,
        "label": [i % 2 for i in range(24)],
        "words": [f"line {i}" for i in range(23)] + [None],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("place", ["folder", "folder of splits", "parquet", "hub"])
def test_hugging_face_datasets_serve_images_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    rows, source = hugging_face(), str(tmp_path / "set")
    import datasets

    if place == "folder":
        rows.save_to_disk(source)
    elif place == "folder of splits":
        datasets.DatasetDict({"train": rows, "other": rows.select([0])}).save_to_disk(source)
    elif place == "parquet":
        source += ".parquet"
        rows.to_parquet(source)
    else:
        source = "hf:someone/pets:small"
        monkeypatch.setattr(datasets, "load_dataset", lambda *names: {("someone/pets", "small"): {"all": rows}}[names])
    seen = describe(DataConfig(source))
    assert seen.kinds == ("images", "domains", "text")
    assert seen.classes == {"cat": 12, "dog": 12}
    assert all_images(load(source)).sum() == GRAY.sum() + (GRAY // 2).sum()
    assert load(source, image_size=4, column="picture").facts["image_size"] == 4
    text = load_data(DataConfig(source, column="words"), "text")
    assert len(text.train) + len(text.held_out) == len("\n".join(f"line {i}" for i in range(23)))
    with pytest.raises(ValueError, match="column: expected one of picture, label, words, got 'text'"):
        load(source, column="text")
    with pytest.raises(ValueError, match=r"expected data of kind images .*, got text"):
        load(source, column="words")


def test_a_text_column_beside_images_of_hugging_face_is_their_caption(tmp_path: Path) -> None:
    source = str(tmp_path / "set.parquet")
    hugging_face().rename_column("words", "text").to_parquet(source)
    data = load(source)
    vocabulary = data.facts["caption_vocabulary"]
    spelt = [
        "".join(vocabulary[i - 1] for i in row if i)
        for part in data.splits()
        for row in everything(part)["caption"].tolist()
    ]
    assert sorted(spelt) == sorted([f"line {i}" for i in range(23)] + [""])
    assert load(source, image_size=4).facts["caption_length"] == len("line 22")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*names: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"hf:someone/pets: expected a dataset of .* got: no network"):
        load("hf:someone/pets")


def test_images_to_encode_are_read_from_arrays_and_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GRAY)
    np.save(tmp_path / "b.npy", (GRAY > 127).astype(np.uint8))
    (tmp_path / "set").mkdir()
    save_idx(tmp_path / "set" / "train-images-idx3-ubyte", GRAY, 2051)
    save_images(tmp_path / "pictures", GRAY)
    expected = read_images(tmp_path / "pictures", 8, 3)
    for name in ("a.npz", "set", "set/train-images-idx3-ubyte"):
        assert torch.equal(read_images(tmp_path / name, 8, 3), expected), name
    assert read_images(tmp_path / "b.npy", 8, 1).unique().tolist() == [0, 255]
    assert read_images(tmp_path / "a.npz", 4, 1).shape == (12, 1, 4, 4)
    np.save(tmp_path / "c.npy", COLOR)
    with pytest.raises(ValueError, match="expected gray images, as those of the training, got images in color"):
        read_images(tmp_path / "c.npy", 8, 1)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt: expected images, got text"):
        read_images(tmp_path / "a.txt", 8, 1)
