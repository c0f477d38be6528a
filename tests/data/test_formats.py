"""Formats that people bring: MNIST's and CIFAR's files, Keras' arrays, archives, splits, pairs, broken images."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data import DataConfig, describe
from fastgen.data.image_sets import LazyItems
from fastgen.data.images import LazyImages
from fastgen.data.trees import _opened_zip
from tests.data.test_bundled import everything
from tests.data.test_files import COLOR, GRAY, load, save_idx, save_images

LABELS = np.arange(12, dtype=np.uint8) % 3


def pixels(items: Any) -> torch.Tensor:
    return everything(items)["images"].mul(255).round().byte()


def save_mnist(folder: Path, ending: str = "", test: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", slice(12)), ("t10k", slice(4))) if test else (("train", slice(12)),):
        save_idx(folder / f"{split}-images-idx3-ubyte{ending}", GRAY[chosen] // (1 + (split == "t10k")), 2051)
        save_idx(folder / f"{split}-labels-idx1-ubyte{ending}", LABELS[chosen], 2049)


@pytest.mark.parametrize("layout", ["plain", "gzip", "both", "torchvision", "zip"])
def test_the_folder_of_mnists_files_is_read_with_t10k_held_out(tmp_path: Path, layout: str) -> None:
    inside = {"torchvision": "MNIST/raw", "zip": "packed"}.get(layout, "")
    if layout != "gzip":
        save_mnist(tmp_path / "set" / inside)
    if layout in ("gzip", "both", "torchvision"):
        save_mnist(tmp_path / "set" / inside, ".gz")
    source = tmp_path / "set"
    if layout == "zip":
        source = tmp_path / "set.zip"
        pack(source, tmp_path / "set")
    data = load(source)
    assert (len(data.train), len(data.held_out)) == (12, 4)
    assert np.array_equal(pixels(data.train)[:, 0], GRAY)
    assert np.array_equal(pixels(data.held_out)[:, 0], GRAY[:4] // 2)
    assert everything(data.train)["labels"].tolist() == LABELS.tolist()
    assert everything(data.held_out)["labels"].tolist() == LABELS[:4].tolist()
    assert not data.warnings
    with pytest.raises(ValueError, match="held_out: expected 0, as the data have a held-out split of their own, got 3"):
        load(source, held_out=3)


def test_mnists_train_files_alone_are_split_and_test_data_is_held_out(tmp_path: Path) -> None:
    save_mnist(tmp_path / "train", test=False)
    save_mnist(tmp_path / "both")
    data = load(tmp_path / "train")
    assert len(data.train) + len(data.held_out) == 12
    assert data.facts["classes"] == 3
    for test in (tmp_path / "both" / "t10k-images-idx3-ubyte",):
        held = load(tmp_path / "train", test_data=str(test))
        assert (len(held.train), len(held.held_out)) == (12, 4)
        assert held.fingerprint == load(tmp_path / "both").fingerprint
    with pytest.raises(ValueError, match="test_data: expected one split, got data that have two"):
        load(tmp_path / "train", test_data=str(tmp_path / "both"))
    with pytest.raises(ValueError, match="held_out: expected 0, as test_data is held out, got 4"):
        load(tmp_path / "train", test_data=str(tmp_path / "train"), held_out=4)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt: test_data: expected images, got text"):
        load(tmp_path / "train", test_data=str(tmp_path / "a.txt"))


def test_several_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    save_mnist(tmp_path / "mnist")
    save_mnist(tmp_path / "fashion")
    with pytest.raises(ValueError, match="expected one IDX file of train images, got fashion/train-images"):
        load(tmp_path)


def save_cifar(folder: Path, hundred: bool = False) -> None:
    folder.mkdir()
    planes = np.random.RandomState(0).randint(0, 256, (20, 3072)).astype(np.uint8)
    labels = np.arange(20, dtype=np.uint8)[:, None] % 4
    head = np.concatenate([labels // 2, labels], 1) if hundred else labels
    records = np.concatenate([head, planes], 1)
    train = (
        {"train.bin": records[:16]} if hundred else {"data_batch_1.bin": records[:8], "data_batch_2.bin": records[8:16]}
    )
    for name, part in {**train, "test.bin" if hundred else "test_batch.bin": records[16:]}.items():
        (folder / name).write_bytes(part.tobytes())
    (folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("cat\ndog\nowl\nelk\n\n")


@pytest.mark.parametrize("hundred", [False, True])
def test_cifars_binary_version_is_read_with_its_test_batch_held_out(tmp_path: Path, hundred: bool) -> None:
    save_cifar(tmp_path / "set", hundred)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "set", "cifar-batches-bin")
    for source in (tmp_path / "set", tmp_path / "cifar.tar.gz"):
        data = load(source)
        assert (len(data.train), len(data.held_out)) == (16, 4)
        assert data.classes == {"cat": 5, "dog": 5, "owl": 5, "elk": 5}
        planes = np.random.RandomState(0).randint(0, 256, (20, 3, 32, 32)).astype(np.uint8)
        assert np.array_equal(pixels(data.train), planes[:16])
    with pytest.raises(ValueError, match=r"expected CIFAR records of 307[34] bytes, got a file of 5 bytes"):
        (tmp_path / "set" / ("test.bin" if hundred else "test_batch.bin")).write_bytes(bytes(5))
        load(tmp_path / "set")


@pytest.mark.parametrize(
    "names", [("data_batch_1", "data_batch_2", "test_batch", "batches.meta"), ("train", "test", "meta")]
)
def test_cifars_pickles_are_refused_with_the_name_of_the_binary_version(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps({"data": 1}))
    version = "100" if "meta" in names else "10"
    with pytest.raises(ValueError, match=rf"in its binary version \(cifar-{version}-binary.tar.gz\), got its Python"):
        load(tmp_path)
    if version == "10":
        with pytest.raises(ValueError, match=r"data_batch_1: expected data that can be read without running code"):
            load(tmp_path / "data_batch_1")


def test_keras_arrays_have_labels_and_a_test_split(tmp_path: Path) -> None:
    arrays = {"x_train": GRAY, "y_train": LABELS, "x_test": GRAY[:3], "y_test": LABELS[:3]}
    np.savez(tmp_path / "mnist.npz", **arrays)
    data = load(tmp_path / "mnist.npz")
    assert (len(data.train), len(data.held_out)) == (12, 3)
    assert everything(data.train)["labels"].tolist() == LABELS.tolist()
    np.savez(tmp_path / "cifar.npz", **{**arrays, "y_train": LABELS[:, None], "y_test": LABELS[:3, None]})
    assert load(tmp_path / "cifar.npz").fingerprint == data.fingerprint
    np.savez(tmp_path / "new.npz", **{**arrays, "y_test": LABELS[:3] + 1})
    with pytest.raises(ValueError, match=r"labels: expected 0 to 2, as for training, got 3"):
        load(tmp_path / "new.npz")


def test_npy_files_and_unnamed_arrays_are_images(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", COLOR)
    assert load(tmp_path / "images.npy").facts["classes"] == 0
    np.save(tmp_path / "labels.npy", LABELS)
    data = load(tmp_path / "images.npy")
    assert (data.facts["channels"], data.facts["classes"]) == (3, 3)
    np.savez(tmp_path / "others.npz", images=COLOR, labels=LABELS, notes=np.array([{}]))
    assert load(tmp_path / "others.npz").fingerprint == data.fingerprint  # other arrays are not read
    np.savez(tmp_path / "a.npz", COLOR)
    assert load(tmp_path / "a.npz").facts["classes"] == 0
    np.save(tmp_path / "objects.npy", np.array([{}] * 10))
    for name in ("objects.npy", "missing.npy"):
        (tmp_path / "missing.npy").write_bytes(b"hello")
        with pytest.raises(ValueError, match=rf"{name}: expected an .npy file of plain arrays, got one that fails"):
            load(tmp_path / name)


def pack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, Path("top") / path.relative_to(folder))
        file.writestr("__MACOSX/top/._a.png", b"no image")


@pytest.mark.parametrize("form", [".zip", ".tar", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("lazy", [False, True])
def test_an_archive_of_images_is_read_as_its_folder(
    tmp_path: Path, form: str, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, images in (("cat", GRAY), ("dog", 255 - GRAY)):
        save_images(tmp_path / "set" / name, images)
    rows = [f"{name}/{i:02}.png\ta {name}" for name in ("cat", "dog") for i in range(12)]
    (tmp_path / "set" / "captions.tsv").write_text("\n".join(rows))
    archive = tmp_path / f"set{form}"
    if form == ".zip":
        pack(archive, tmp_path / "set")
    else:
        with tarfile.open(archive, "w" if form == ".tar" else "w:gz") as file:
            file.add(tmp_path / "set", "top")
    expected = load(tmp_path / "set")
    if lazy:
        monkeypatch.setattr("fastgen.data.images.MEMORY_LIMIT", 100)
    data = load(archive)
    assert isinstance(data.train, LazyItems) == lazy
    assert data.fingerprint == expected.fingerprint
    assert data.facts == expected.facts
    for one, other in zip(data.splits(), expected.splits(), strict=True):
        for name, tensor in everything(one).items():
            assert torch.equal(tensor, everything(other)[name]), name


def test_damaged_archives_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "set", GRAY)
    pack(tmp_path / "good.zip", tmp_path / "set")
    data = (tmp_path / "good.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "a.tar").write_bytes(b"hello" * 300)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"hello" * 300)[:-20])
    for name in ("a.zip", "a.tar", "a.tar.gz"):
        with pytest.raises(
            ValueError, match=rf"{name}: expected a zip or tar archive, got one that fails: .+"
        ) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    with tarfile.open(tmp_path / "large.tgz", "w:gz") as file:
        file.add(tmp_path / "set")
    monkeypatch.setattr("fastgen.data.trees.MEMORY_LIMIT", 100)
    with pytest.raises(ValueError, match=r"large\.tgz: expected at most 0 MiB in a compressed tar"):
        load(tmp_path / "large.tgz")


@pytest.mark.parametrize("held", ["test", "val", "validation"])
def test_folders_named_like_splits_are_splits(tmp_path: Path, held: str) -> None:
    for split, images in (("train", GRAY), (held, 255 - GRAY[:4])):
        for label in (0, 1):
            save_images(tmp_path / split / "ab"[label], images[label::2])
    data = load(tmp_path)
    assert (len(data.train), len(data.held_out)) == (12, 4)
    assert data.classes == {"a": 8, "b": 8}
    assert everything(data.held_out)["labels"].tolist() == [0, 0, 1, 1]
    assert np.array_equal(pixels(data.held_out)[:, 0], 255 - GRAY[[0, 2, 1, 3]])
    if held == "val":
        save_images(tmp_path / "test" / "b", GRAY[:1])
        both = load(tmp_path)
        assert len(both.held_out) == 1
        assert both.warnings[0].startswith("4 images of the validation split were left out: the test split is held out")
        (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
        with pytest.raises(ValueError, match=r"test: expected classes of the training images \(a, b\), got c"):
            load(tmp_path)


def test_captions_of_splits_are_beside_them_or_above(tmp_path: Path) -> None:
    for split, images in (("train", GRAY), ("test", GRAY[:3])):
        save_images(tmp_path / split, images)
        rows = [json.dumps({"file_name": f"{i:02}.png", "text": f"{split} {i}"}) for i in range(len(images))]
        (tmp_path / split / "metadata.jsonl").write_text("\r\n".join(rows))
    inside = load(tmp_path)
    assert inside.facts["caption_length"] == len("train 11")
    assert not inside.warnings
    for split in ("train", "test"):
        (tmp_path / split / "metadata.jsonl").unlink()
    rows = [f"{split}/{i:02}.png\t{split} {i}" for split, n in (("train", 12), ("test", 3)) for i in range(n)]
    (tmp_path / "captions.tsv").write_text("file_name\ttext\n" + "\n".join(rows))
    assert load(tmp_path).fingerprint == inside.fingerprint


def test_held_out_images_have_the_channels_and_size_of_training(tmp_path: Path) -> None:
    save_images(tmp_path / "a" / "train", COLOR)
    save_images(tmp_path / "a" / "test", GRAY[:3])
    held = load(tmp_path / "a").held_out
    assert np.array_equal(pixels(held), np.repeat(GRAY[:3, None], 3, 1))
    save_images(tmp_path / "b" / "train", GRAY)
    save_images(tmp_path / "b" / "test", COLOR[:3])
    with pytest.raises(
        ValueError, match=r"00\.png: expected a gray image, as the training images are, got one in color"
    ):
        load(tmp_path / "b")
    save_images(tmp_path / "c" / "train", GRAY)
    save_images(tmp_path / "c" / "test", GRAY[:3, :4, :4])
    with pytest.raises(ValueError, match="expected images of 8x8, as for training, got 4x4: --image-size"):
        load(tmp_path / "c")
    assert load(tmp_path / "c", image_size=4).facts["image_size"] == 4


@pytest.mark.parametrize("layout", ["folders", "cyclegan"])
def test_domains_of_splits(tmp_path: Path, layout: str) -> None:
    for split, n in (("train", 12), ("test", 4)):
        for domain in "AB":
            folder = f"{split}{domain}" if layout == "cyclegan" else f"{split}/{domain}"
            save_images(tmp_path / folder, GRAY[: n - (domain == "B")] // (1 + (domain == "B")))
    data = load(tmp_path, "domains")
    assert (len(data.train), len(data.held_out)) == (12, 3)
    batch = everything(data.held_out)
    assert np.array_equal(batch["a"].mul(255).round().byte()[:, 0], GRAY[:3])
    assert np.array_equal(batch["b"].mul(255).round().byte()[:, 0], GRAY[:3] // 2)


@pytest.mark.parametrize("lazy", [False, True])
def test_pairs_are_folders_with_the_same_names_or_images_side_by_side(
    tmp_path: Path, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lazy:
        monkeypatch.setattr("fastgen.data.images.MEMORY_LIMIT", 100)
    for split, n in (("train", 12), ("test", 4)):
        save_images(tmp_path / "beside" / split, np.concatenate([COLOR[:n], 255 - COLOR[:n]], 2))
        for name, images in (("google", COLOR[:n]), ("twitter", 255 - COLOR[:n])):
            save_images(tmp_path / "folders" / split / name / "faces", images)
    for layout in ("beside", "folders"):
        data = load(tmp_path / layout, "pairs")
        assert (len(data.train), len(data.held_out)) == (12, 4)
        batch = everything(data.train)
        assert np.array_equal(batch["inputs"].mul(255).round().byte().permute(0, 2, 3, 1), COLOR)
        assert np.array_equal(batch["targets"].mul(255).round().byte().permute(0, 2, 3, 1), 255 - COLOR)
        exchanged = everything(load(tmp_path / layout, "pairs", direction="BtoA").train)
        assert torch.equal(exchanged["inputs"], batch["targets"])
        assert load(tmp_path / layout, "pairs", image_size=4).facts["image_size"] == 4
    assert describe(DataConfig(str(tmp_path / "beside"))).kinds == ("pairs", "images")
    assert len(load(tmp_path / "folders" / "train", "pairs").held_out) == 3
    Image.fromarray(COLOR[0]).save(tmp_path / "beside" / "train" / "99.png")
    with pytest.raises(
        ValueError, match=r"99\.png: expected two square images side by side, .* got 8x8: --skip-broken"
    ):
        load(tmp_path / "beside", "pairs")
    assert len(load(tmp_path / "beside", "pairs", skip_broken=True).train) == 12
    (tmp_path / "folders" / "train" / "twitter" / "faces" / "03.png").write_bytes(b"")
    assert len(load(tmp_path / "folders", "pairs", skip_broken=True).train) == 11
    (tmp_path / "folders" / "train" / "twitter" / "faces" / "03.png").unlink()
    with pytest.raises(ValueError, match=r"train: expected an image faces.03 in twitter. too, got none: --skip-broken"):
        load(tmp_path / "folders", "pairs", direction="BtoA")
    data = load(tmp_path / "folders", "pairs", skip_broken=True)
    assert len(data.train) == 11
    assert "1 images without a counterpart were left out: google/faces/03.png" in data.warnings
    for i in range(12):
        file = tmp_path / "folders" / "train" / "twitter" / "faces" / f"{i:02}.png"
        if i != 3:
            file.rename(file.with_name(f"other{i}.png"))
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"expected data of kind pairs .*side by side.*, got images or domains"):
            load(tmp_path / "folders", "pairs", skip_broken=skip)


@pytest.mark.parametrize("lazy", [False, True])
def test_broken_images_are_listed_at_once_or_left_out(
    tmp_path: Path, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lazy:
        monkeypatch.setattr("fastgen.data.images.MEMORY_LIMIT", 100)
    for name in ("cat", "dog"):
        save_images(tmp_path / name, GRAY)
    whole = (tmp_path / "cat" / "00.png").read_bytes()
    for name, data in {"cat/03.png": b"", "cat/08.png": b"hello", "dog/11.png": whole[:-30]}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=r"got 3 of 24 files that can't be read: cat/03.png \(an empty file\), "
    ) as error:
        load(tmp_path)
    text = str(error.value)
    assert "cat/08.png (something else), dog/11.png (" in text
    assert text.endswith("--skip-broken leaves them out")
    assert "\n" not in text
    data = load(tmp_path, skip_broken=True)
    assert data.classes == {"cat": 10, "dog": 11}
    assert "3 files that can't be read were left out: cat/03.png" in data.warnings[0]
    shown = {tuple(image.flatten().tolist()) for items in data.splits() for image in pixels(items)}
    assert shown == {tuple(image.flatten().tolist()) for image in GRAY}


def test_images_with_several_frames_are_counted(tmp_path: Path) -> None:
    save_images(tmp_path, GRAY)
    for i in range(2):
        frames = [Image.fromarray(GRAY[0]), Image.fromarray(GRAY[1])]
        frames[0].save(tmp_path / f"a{i}.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(GRAY[0]).save(tmp_path / "still.gif")
    assert load(tmp_path).warnings == ("of 2 images with several frames the first one is read",)


def test_enlarged_images_are_warned_of(tmp_path: Path) -> None:
    save_images(tmp_path, GRAY)
    Image.fromarray(np.tile(GRAY[0], (4, 4))).save(tmp_path / "99.png")
    assert (
        "12 of 13 images are smaller than 16 and were enlarged"
        in describe(DataConfig(str(tmp_path), image_size=16)).warnings
    )
    assert not [each for each in describe(DataConfig(str(tmp_path), image_size=8)).warnings if "enlarged" in each]


def test_captions_are_described_only_where_there_are_some(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / name, GRAY)
    assert "caption_" not in str(describe(DataConfig(str(tmp_path))))
    (tmp_path / "captions.tsv").write_text(
        "\n".join(f"{n}/{i:02}.png\tpet {i}" for n in ("cat", "dog") for i in range(12))
    )
    assert "caption_examples: " in str(describe(DataConfig(str(tmp_path))))


def test_binarized_images_are_drawn_with_their_values_as_probabilities(tmp_path: Path) -> None:
    images = np.full((200, 8, 8), 64, np.uint8)
    images[:, 0] = 255
    images[:, 1] = 0
    np.savez(tmp_path / "a.npz", images=images)
    static, dynamic = (load(tmp_path / "a.npz", binarize=each) for each in ("static", "dynamic"))
    for data in (static, dynamic):
        assert data.facts["levels"] == 2
        for items in data.splits():
            batch = everything(items)["images"]
            assert set(batch.unique().tolist()) == {0.0, 1.0}
            assert batch[:, :, 0].eq(1).all()
            assert batch[:, :, 1].eq(0).all()
            assert abs(batch[:, :, 2:].mean() - 64 / 255) < 0.02
    assert torch.equal(everything(static.train)["images"], everything(dynamic.train)["images"])
    assert len({static.fingerprint, dynamic.fingerprint, load(tmp_path / "a.npz").fingerprint}) == 3
    indices = torch.arange(50)
    one, again, other = (dynamic.train.training_batch(indices, seed)["images"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert abs(torch.stack([one, other])[:, :, :, 2:].mean() - 64 / 255) < 0.02
    assert torch.equal(*(static.train.training_batch(indices, seed)["images"] for seed in (1, 2)))
    moved = dynamic.train.to("cpu")
    assert torch.equal(moved.training_batch(indices, 1)["images"], one)
    with pytest.raises(ValueError, match="binarize: expected one of none, static, dynamic, got 'on'"):
        DataConfig("digits", binarize="on")
    with pytest.raises(ValueError, match="prose: binarize: expected 'none', as this source does not use it"):
        load("prose", "text", binarize="static")


def test_lazy_images_are_decoded_by_forked_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open archive's position is shared with a forked process, which therefore opens its own."""
    from torch.utils.data import DataLoader

    save_images(tmp_path / "set", GRAY)
    pack(tmp_path / "set.zip", tmp_path / "set")
    monkeypatch.setattr("fastgen.data.images.MEMORY_LIMIT", 100)
    data = load(tmp_path / "set.zip")
    assert isinstance(data.train.stacks["images"], LazyImages)  # type: ignore[attr-defined]
    expected = pixels(data.train)
    loader: Callable[..., Any] = DataLoader
    keys = [torch.arange(3 * i, 3 * i + 3) for i in range(3)]

    class Parts(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
            return data.train.batch(indices)["images"]

    opened = _opened_zip(tmp_path / "set.zip")

    class Same(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __getitem__(self, index: int) -> bool:
            return _opened_zip(tmp_path / "set.zip") is opened

    assert Same()[0]
    assert list(loader(Same(), None, sampler=[0, 1], num_workers=2, multiprocessing_context="fork")) == [False, False]
    for _ in range(3):
        found = torch.cat(list(loader(Parts(), None, sampler=keys, num_workers=2)))
        assert torch.equal(found.mul(255).round().byte(), expected[:9])
